"""Compiling takes work in proportion to the graph: counted in calls, not in seconds."""

import sys
from collections import Counter
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gtddp_compile
from gtddp_compile import compile_optimizer

OURS = gtddp_compile.__path__[0]
SHALLOW = 4


class Residual(nn.Module):
    """Blocks of one hidden layer around an identity shortcut."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Branches(nn.Module):
    """Two branches and a gate a block, concatenated and mapped back."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(3, 3) for _ in range(3)]) for _ in range(depth))
        self.maps = nn.ModuleList(nn.Linear(6, 3) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for (a, b, gate), back in zip(self.blocks, self.maps, strict=True):
            x = torch.tanh(back(torch.cat([a(x) * torch.sigmoid(gate(x)), b(x)], 1)))
        return x


def compiled(build: Callable[[int], nn.Module], depth: int) -> tuple[Any, Counter[str]]:
    """The optimizer, and how often each function of the package was called to make it."""
    torch.manual_seed(0)
    model = build(depth)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith((OURS, OURS.rpartition("/")[0] + "/passes")):
            calls[f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_code.co_qualname}"] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        opt = compile_optimizer(model, torch.randn(3, 3), loss=nn.MSELoss(), curvature="sgd", lr=0.1)
    finally:
        sys.setprofile(before)
    return opt, calls


@pytest.mark.parametrize("build", [Residual, Branches])
def test_work_doubles_with_depth(build: Callable[[int], nn.Module]) -> None:
    compiled(build, 1)  # caches of torch, sympy and ours
    found = [compiled(build, SHALLOW * factor) for factor in (1, 2, 4)]
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
