"""Compiling takes work in proportion to the graph: counted in calls, not in seconds."""

import sys
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtddp_compile
from gtddp_compile import compile_optimizer
from support.networks import make

OURS = gtddp_compile.__path__[0]
SHALLOW = 4


def residual(net: nn.Module, x: Tensor) -> Tensor:
    """Blocks of one hidden layer around an identity shortcut."""
    for a, b in batched(net.children(), 2):
        x = x + b(torch.tanh(a(x)))
    return x


def branches(net: nn.Module, x: Tensor) -> Tensor:
    """Two branches and a gate a block, concatenated and mapped back."""
    for a, b, gate, back in batched(net.children(), 4):
        x = torch.tanh(back(torch.cat([a(x) * torch.sigmoid(gate(x)), b(x)], 1)))
    return x


LAYERS: dict[Any, list[tuple[int, int]]] = {residual: [(3, 3)] * 2, branches: [(3, 3)] * 3 + [(6, 3)]}


def batched(layers: Iterable[nn.Module], size: int) -> Iterable[tuple[nn.Module, ...]]:
    return zip(*[iter(layers)] * size, strict=True)


def compiled(forward: Any, depth: int) -> tuple[Any, Counter[str]]:
    """The optimizer, and how often each function of the package was called to make it."""
    model = make(forward, **{f"l{k}": sizes for k, sizes in enumerate(LAYERS[forward] * depth)})
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith((OURS, OURS.rpartition("/")[0] + "/passes")):
            calls[f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_qualname}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        opt = compile_optimizer(model, torch.randn(3, 3).double(), loss=nn.MSELoss(), curvature="sgd", lr=0.1)
    finally:
        sys.setprofile(before)
    return opt, calls


@pytest.mark.parametrize("forward", LAYERS)
def test_work_doubles_with_depth(forward: Any) -> None:
    compiled(forward, 1)  # caches of torch, sympy and ours
    found = [compiled(forward, SHALLOW * factor) for factor in (1, 2, 4)]
    ops = [len(opt.graph.ops.ops) for opt, _ in found]
    assert ops[2] - ops[1] == 2 * (ops[1] - ops[0])
    patterns = [len(opt.program.derived.patterns) for opt, _ in found]
    assert patterns[1] == patterns[2] < 12, "a pattern is derived once, however often it occurs"
    first, second, third = (calls for _, calls in found)
    assert first.total() > 1000
    growing = {
        name: (first[name], second[name], third[name])
        for name in third
        if third[name] - second[name] > 2 * (second[name] - first[name])
    }
    assert not growing, f"calls grow faster than the graph: {growing}"
