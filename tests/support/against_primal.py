"""Steps of the joint rollout against `support.primal`'s, of classifications and of regressions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompiledOptimizer, Geometric
from support import networks
from support.compared import SUM, flat, optimizer
from support.networks import Case
from support.primal import Primal

SIZE = 5


def classified(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def method(options: dict[str, Any]) -> dict[str, Any]:
    """The base method's own options."""
    return {key: value for key, value in options.items() if key in ("lr", "weight_decay", "damping", "betas", "alpha")}


def oracle(model: nn.Module, loss: Any = classified, *, total: bool = False, **options: Any) -> Primal:
    terminal, reach, early = options.get("terminal", "geometric"), 0.0, 0.0
    if terminal == "geometric":
        terminal = Geometric()
    if isinstance(terminal, Geometric):
        reach, early = 0.0 if options.get("weight_decay") else terminal.reach, terminal.early
        terminal = (terminal.aim, terminal.own, terminal.half)
    coupling = options.get("coupling", "full")
    return Primal(
        model, loss, options["curvature"], method(options), terminal,
        None if coupling == "full" else coupling, options.get("inertia", 0.0), options.get("max_step"), total, reach,
        options.get("lookahead", 0.0), early,
    )  # fmt: skip


def regression(name: str) -> Case:
    """A network's classification as a regression of several numbers a sample."""
    case = getattr(networks, name)()

    def draw(step: int, size: int) -> tuple[Any, Tensor]:
        x, y = case.batch(step, size)
        return x, F.one_hot(y, 3).double()

    return Case(case.model, loss=nn.MSELoss(), draw=draw)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def assert_primal(
    case: Case, loss: Any, steps: int, backend: Any, per_sample: Any = classified, said: Any = None, **options: Any
) -> CompiledOptimizer:
    """``said``: what the compiler is told in place of all options."""
    expected = oracle(case.model, per_sample, total=loss is SUM, **options)
    model, opt = optimizer(case, SIZE, loss=loss, backend=backend, **(options if said is None else said))
    for step in range(steps):
        x, y = case.batch(step, SIZE)
        before = expected.u
        opt.step(x, y), expected.step((x,), y)
        assert (expected.u - before).abs().max() > 1e-3
        torch.testing.assert_close(flat(model), expected.u, rtol=0, atol=1e-9)
    return opt
