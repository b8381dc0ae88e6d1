"""Two computations of the same training, compared; options and losses that many tests share."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer
from support.networks import Case

FORMS = {
    "full": {"coupling": "full"},
    "groups": {"coupling": 3},
    "nonlinear": {"coupling": "full", "rollout": "nonlinear"},
    "block": {"coupling": "block"},
    "substituted": {"coupling": "block", "recursion": "substituted"},
    "printed": {"coupling": "block", "recursion": "printed"},
}


def trained(case: Case, steps: int = 5, size: int = 5, **options: Any) -> torch.Tensor:
    """All parameters after training."""
    model = copy.deepcopy(case.model)
    x, _ = case.batch(0, size)
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options)
    for step in range(steps):
        opt.step(*case.batch(step, size))
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def assert_equal(case: Case, **options: Any) -> None:
    fast, dense = trained(case, **options), trained(case, backend="dense", **options)
    start = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    assert (fast - start).abs().max() > 1e-4
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)


LOSS, SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def optimizer(case: Case, **options: Any) -> tuple[nn.Module, CompiledOptimizer]:
    model = copy.deepcopy(case.model)
    return model, compile_optimizer(model, case.batch(0, 6)[0], **{"loss": LOSS, **options})


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


KRONECKER: dict[str, dict[str, Any]] = {
    "kfac": {"curvature": "kfac", "lr": 0.1, "damping": 1e-2, "refresh": 2, "momentum": 0.5, "weight_decay": 0.05},
    "ekfac": {"curvature": "ekfac", "lr": 0.05, "damping": 5e-2, "refresh": 1},
}
