"""What a step holds: old values are let go of as soon as a number a sample can stand for them."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gtddp_compile import compile_optimizer
from gtddp_compile.lowering.instructions import render_instruction


class Held(TorchDispatchMode):
    """Bytes of the storages that operations inside have made and that are still there, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and (storage := value.untyped_storage())._cdata not in self._known:
                self._known[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata)
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def network(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(16 if index else 3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def test_what_a_normalisation_takes_in_is_not_held() -> None:
    options = {"curvature": "sgd", "lr": 0.1, "gram": "coarse", "rollout": "nonlinear"}
    optimizer = compile_optimizer(network(3), torch.randn(4, 3, 8, 8), loss=nn.CrossEntropyLoss(), **options)
    program = optimizer.program
    text = [render_instruction(i) for i in program.lowered.instructions if i.phase == "forward"]
    assert any("contract_value(g_v3_at3, v3_new) - before_d_v3_at3" in line for line in text)  # the second layer's
    assert not any(re.search(r"\b(v3|v2)\b(?!')", line) for line in text), "its input's per-sample gradients are kept"
    assert any("contract(g_v10_at6, v10_new, v10)" in line for line in text), "the last layer reads its input itself"
    assert "return (v5, edge(v4))" in program.code


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_peak_of_a_step(rollout: Any) -> None:
    """Values and gradients of both cuts of a layer would be twice what plain training holds, outputs thrice."""
    torch.manual_seed(0)
    model, x, y = network(8), torch.randn(8, 3, 16, 16), torch.randint(4, (8,))
    with Held() as plain:
        F.cross_entropy(model(x), y).backward()
    options = {"curvature": "sgd", "lr": 0.1, "gram": "coarse", "rollout": rollout}
    optimizer = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options)
    optimizer.step(x, y)
    with Held() as ours:
        optimizer.step(x, y)
    assert ours.peak < 1.6 * plain.peak
