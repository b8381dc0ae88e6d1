"""A step is a transaction: a fault at any line of the generated program leaves everything as it was, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer
from support.faults import Fault, fault_at
from support.networks import make


class Normed(nn.Module):
    """Statistics that advance, masks that are drawn, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.dropout(torch.relu(self.norm(self.a(x))), 0.4, self.training)
        found: Tensor = self.c(h + torch.tanh(self.b(h)))
        return found


class Convolved(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.out(torch.relu(self.norm(self.conv(x.view(-1, 1, 4, 4)))).mean((2, 3)))
        return found


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "chain": (lambda: make(lambda net, x: net.b(torch.tanh(net.a(x))), a=(4, 5), b=(5, 3)), 4),
    "norm, mask, shortcut": (Normed, 4),
    "convolution": (Convolved, 16),
}


def everything(opt: CompiledOptimizer, net: nn.Module) -> Any:
    """Parameters, buffers, state and random state."""
    return copy.deepcopy((net.state_dict(), opt.state_dict()["state"], torch.get_rng_state()))


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("curvature", ["adam", "kfac"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fault_at_any_line_changes_nothing(name: str, curvature: str, rollout: Any) -> None:
    torch.manual_seed(0)
    kind, width = NETWORKS[name]
    net = kind().double()
    x, y = torch.randn(6, width).double(), torch.arange(6) % 3
    opt = compile_optimizer(net, x, loss=nn.CrossEntropyLoss(), curvature=curvature, rollout=rollout, lr=0.1)
    opt.step(x, y)  # there are states and memory of a step before
    before, (twin, own) = everything(opt, net), copy.deepcopy((net, opt))
    own.step(x, y)
    expected = everything(own, twin)
    torch.set_rng_state(before[2])
    for line in range(1, 1000):
        try:
            with fault_at(line):
                opt.step(x, y)
        except Fault:
            torch.testing.assert_close(everything(opt, net), before, rtol=0, atol=0)
        else:
            break
    assert 5 < line < 999
    torch.testing.assert_close(everything(opt, net), expected, rtol=0, atol=0)  # nothing is left of the faults
