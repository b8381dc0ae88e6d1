"""Factors of value functions stay definite against rounding, and a step on numbers that overflow changes nothing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import compile_optimizer, kernels


@pytest.mark.parametrize("noise", [1e-7, 3e-5])
def test_rounding_does_not_make_it_indefinite(noise: float) -> None:
    """A rank-one Gram matrix in float32, and one with more noise than rounding of one sum explains."""
    torch.manual_seed(0)
    gamma = torch.randn(64, 1)
    error = torch.randn(64, 64) * noise
    block = 1e6 * (gamma @ gamma.T + error + error.T)
    with pytest.raises(RuntimeError):
        torch.linalg.cholesky(block)
    (found,), _ = kernels.factor((block,))
    torch.testing.assert_close(found.T @ found, block, rtol=1e-2, atol=1e-2 * float(block.abs().max()))


def test_a_step_whose_gram_matrices_overflow_is_skipped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4) * 1e15, torch.randint(3, (6,))
    with torch.no_grad():
        model[1].weight.mul_(1e8)
    before = copy.deepcopy(model.state_dict())
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1)
    loss = opt.step(x, y)
    assert torch.isfinite(loss) and opt.diagnostics["skipped"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("rollout", "factored"), [("linear", 1), ("nonlinear", 2)])
@pytest.mark.parametrize(("coupling", "blocks"), [("full", 1), (3, 2)])
def test_larger_lifts_are_counted(
    coupling: int | str, blocks: int, rollout: Any, factored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Gram matrices, one a group of samples, are said to be indefinite beyond rounding: those of the last
    stage of two, or the only ones.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    options = {"curvature": "sgd", "coupling": coupling, "lr": 0.1, "rollout": rollout}
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options)
    opt.step(x, y)
    assert opt.diagnostics["lifted_grams"] == 0
    true_cholesky, calls = torch.linalg.cholesky_ex, []

    def fails_first(block: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(block)
        found, failed = true_cholesky(block, **options)
        return found, failed + (len(calls) <= blocks)

    monkeypatch.setattr("torch.linalg.cholesky_ex", fails_first)
    with pytest.warns(RuntimeWarning, match="not definite to rounding"):
        opt.step(x, y)
    assert len(calls) == factored * blocks
    assert opt.diagnostics["lifted_grams"] == blocks
