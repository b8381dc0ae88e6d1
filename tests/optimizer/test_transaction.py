"""A step is a transaction: a fault at any line of the generated program, and numbers that are not finite, leave
everything as it was, bit for bit."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, CompileError, NonFiniteError, compile_optimizer
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


@pytest.mark.parametrize(("name", "curvature", "rollout"), [
    ("chain", "adam", "linear"), ("chain", "kfac", "nonlinear"), ("norm, mask, shortcut", "kfac", "linear"),
    ("norm, mask, shortcut", "adam", "nonlinear"), ("convolution", "kfac", "linear"),
    ("convolution", "adam", "nonlinear"),
])  # fmt: skip
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


class Rooted(Normed):
    """Finite where its derivative is not: the root of a zero."""

    def forward(self, x: Tensor) -> Tensor:
        rooted: Tensor = (self.a(x) * x[:, :1]).square().sum(1, True).sqrt()
        return super().forward(x) * (1 + rooted)


METHODS: list[dict[str, Any]] = [
    {"curvature": "sgd", "momentum": 0.9}, {"curvature": "adam", "rollout": "nonlinear"}, {},
    {"curvature": "kfac", "rollout": "nonlinear"}, {"curvature": "adam", "feedback": False}, {"line_search": (1.0,)},
    {"curvature": "ekfac", "terminal": "ggn"}, {"curvature": "sgd", "backend": "dense"}, {"memory": "recompute"},
    {"curvature": "sgd", "coupling": "block", "recursion": "substituted"},
]  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), 0.0], ids=["loss", "derivative"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_numbers_that_are_not_finite_change_nothing(method: dict[str, Any], bad: float) -> None:
    torch.manual_seed(0)
    net = Rooted().double()
    x, y = torch.rand(6, 4).double() + 0.1, torch.arange(6) % 3
    wrong = x.index_fill(1, torch.tensor(0), bad)
    given: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "lr": 0.01, **method}
    opt, strict = (compile_optimizer(net, x, on_nonfinite=what, **given) for what in ("skip", "raise"))
    opt.step(x, y)
    before = everything(opt, net)
    with pytest.warns(UserWarning, match="is not finite, and nothing was changed"):
        assert bool(opt.step(wrong, y).isfinite()) == (bad == 0)
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error", UserWarning)
        opt.step(wrong, y)
    assert opt.diagnostics["skipped"] and opt.diagnostics["skipped_steps"] == 2
    with pytest.raises(NonFiniteError, match="on_nonfinite='skip'"):
        strict.step(wrong, y)
    torch.testing.assert_close(everything(opt, net), before, rtol=0, atol=0)
    assert strict.state_dict()["state"] == {} and issubclass(NonFiniteError, CompileError)
    opt.step(x, y)
    assert not opt.diagnostics["skipped"] and opt.diagnostics["skipped_steps"] == 2
