"""Steps of the joint rollout against `support.primal`'s, of classifications and of regressions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import Geometric, compile_optimizer
from support.compared import SUM, flat
from support.networks import Case
from support.primal import Primal

SIZE = 5


def classified(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def method(options: dict[str, Any]) -> dict[str, Any]:
    """The base method's own options."""
    return {key: value for key, value in options.items() if key in ("lr", "weight_decay", "damping", "betas", "alpha")}


def oracle(model: nn.Module, loss: Any = classified, *, total: bool = False, **options: Any) -> Primal:
    terminal, reach = options.get("terminal", "geometric"), 0.0
    if terminal == "geometric":
        terminal = Geometric()
    if isinstance(terminal, Geometric):
        terminal, reach = (terminal.aim, terminal.own, terminal.half), terminal.reach
    coupling = options.get("coupling", "full")
    return Primal(
        model, loss, options["curvature"], method(options), terminal,
        None if coupling == "full" else coupling, options.get("inertia", 0.0), options.get("max_step"), total, reach,
        options.get("lookahead", 0.0),
    )  # fmt: skip


class Regressed:
    """A classification's data as a regression's of several numbers a sample."""

    def __init__(self, case: Case) -> None:
        self.model, self.loss, self._case = case.model, nn.MSELoss(), case

    def batch(self, step: int, size: int) -> tuple[Any, Tensor]:
        x, y = self._case.batch(step, size)
        return x, F.one_hot(y, self.model(x).shape[1]).double()


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def assert_primal(
    case: Case | Regressed, loss: Any, steps: int, backend: Any, per_sample: Any = classified, **options: Any
) -> None:
    model = copy.deepcopy(case.model)
    expected = oracle(case.model, per_sample, total=loss is SUM, **options)
    opt = compile_optimizer(model, case.batch(0, SIZE)[0], loss=loss, backend=backend, **options)
    for step in range(steps):
        x, y = case.batch(step, SIZE)
        before = expected.u
        opt.step(x, y), expected.step((x,), y)
        assert (expected.u - before).abs().max() > 1e-3
        torch.testing.assert_close(flat(model), expected.u, rtol=0, atol=1e-9)
