"""Richer terminal Hessians: the generated program equals the derivation executed with explicit ``H_i``, to 1e-9."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
from networks import Case
from torch import nn

from gtddp_compile import MonteCarlo, compile_optimizer

CASES = {
    "residual": networks.residual,
    "projection": networks.projection,
    "gated": networks.gated,
    "conv": lambda: networks.conv_residual(training=False),
}
CURVATURES: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.5, "weight_decay": 0.05},
    "rmsprop": {"curvature": "rmsprop", "lr": 5e-3, "momentum": 0.5},
    "adam": {"curvature": "adam", "lr": 1e-2},
}
FORMS: dict[str, dict[str, Any]] = {
    "full": {"coupling": "full"},
    "groups": {"coupling": 3},
    "block": {"coupling": "block"},
    "substituted": {"coupling": "block", "recursion": "substituted"},
    "printed": {"coupling": "block", "recursion": "printed"},
}
TERMINALS: dict[str, Any] = {"ggn": "ggn", "mc": MonteCarlo(2)}


def trained(
    case: Case, loss: nn.Module, steps: int = 3, size: int = 4, **options: Any
) -> tuple[torch.Tensor, list[int]]:
    """All parameters after training, and how many radicands were clipped."""
    model = copy.deepcopy(case.model)
    torch.manual_seed(5)
    opt = compile_optimizer(model, case.batch(0, size)[0], loss=loss, **options)
    clipped = []
    for step in range(steps):
        x, y = case.batch(step, size)
        opt.step(x, y if isinstance(loss, nn.CrossEntropyLoss) else nn.functional.one_hot(y, 3).double())
        clipped.append(opt.diagnostics["clipped_radicands"])
    return torch.cat([p.detach().flatten() for p in model.parameters()]), clipped


def assert_equal(case: Case, loss: nn.Module | None = None, **options: Any) -> list[int]:
    loss = loss or nn.CrossEntropyLoss()
    (fast, clipped), (dense, counted) = (trained(case, loss, backend=b, **options) for b in ("fast", "dense"))
    start = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    assert (fast - start).abs().max() > 1e-4
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)
    assert clipped == counted
    return clipped


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", CASES)
def test_fast_equals_dense(network: str, curvature: str, terminal: str, form: str) -> None:
    assert_equal(CASES[network](), terminal=TERMINALS[terminal], **CURVATURES[curvature], **FORMS[form])
