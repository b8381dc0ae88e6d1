"""A program trained, and compared: with the dense derivation, its base method, the module that it is exported to."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer
from support import published
from support.exported import largest, load_module, named, state_by_name
from support.kronecker_reference import Reference
from support.networks import Case

STEPS, SIZE = 2, 5
LOSS, SUM = nn.CrossEntropyLoss(), nn.CrossEntropyLoss(reduction="sum")
TORCH = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW,
         "adagrad": torch.optim.Adagrad}  # fmt: skip
WRITTEN = {"shampoo": published.Shampoo, "soap": published.SOAP, "muon": published.Muon}


@dataclass
class Run:
    """What training left behind."""

    optimizer: CompiledOptimizer
    model: nn.Module
    losses: list[float]
    random: Tensor

    @property
    def parameters(self) -> Tensor:
        return flat(self.model)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def batches(case: Case, steps: int, size: int) -> Iterator[tuple[Any, Tensor]]:
    """The same random numbers before the same step, whoever makes it."""
    for step in range(steps):
        batch = case.batch(step, size)
        torch.manual_seed(step)
        yield batch


def optimizer(case: Case, size: int = 6, **options: Any) -> tuple[nn.Module, CompiledOptimizer]:
    """A copy of the case's model and its optimizer."""
    model = copy.deepcopy(case.model)
    return model, compile_optimizer(model, case.batch(0, size)[0], **{"loss": case.loss, **options})


def train(case: Case, steps: int = STEPS, size: int = SIZE, **options: Any) -> Run:
    model, opt = optimizer(case, size, **options)
    return followed(case, model, opt, steps, size)


def followed(case: Case, model: nn.Module, opt: CompiledOptimizer, steps: int, size: int) -> Run:
    """What an optimizer makes of the case's batches."""
    losses = [float(opt.step(x, y)) for x, y in batches(case, steps, size)]
    return Run(opt, model, losses, torch.get_rng_state())


def trained(case: Case, steps: int = STEPS, size: int = SIZE, **options: Any) -> Tensor:
    """All parameters after training."""
    return train(case, steps, size, **options).parameters


def torch_step(optimizer: torch.optim.Optimizer, value: Tensor) -> None:
    """One step of torch.optim's own."""
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def assert_equal(case: Case, run: Run | None = None, steps: int = STEPS, size: int = SIZE, **options: Any) -> Run:
    """The generated program is the derivation executed with explicit matrices, and does something."""
    run = run or train(case, steps, size, **options)
    dense = train(case, steps, size, backend="dense", **options)
    assert (run.parameters - flat(case.model)).abs().max() > 1e-4
    torch.testing.assert_close(run.parameters, dense.parameters, rtol=0, atol=1e-9)
    torch.testing.assert_close(run.losses, dense.losses, rtol=1e-9, atol=1e-9)
    clipped = "clipped_radicands"
    assert run.optimizer.diagnostics.get(clipped) == dense.optimizer.diagnostics.get(clipped)
    return run


def assert_union(case: Case, part: int, **options: Any) -> None:
    """One update from two micro-batches is that of the whole in groups of their size; losses and figures too."""
    (whole, at_once), (parts, by_parts) = (optimizer(case, 2 * part, coupling=c, **options) for c in (part, "full"))
    for x, y in batches(case, 3, 2 * part):
        expected = at_once.step(x, y)
        by_parts.accumulate(x[:part], y[:part])
        torch.testing.assert_close(by_parts.step(x[part:], y[part:]), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(flat(parts), flat(whole), rtol=0, atol=1e-9)
    figures = (opt.diagnostics["predicted_decrease"] for opt in (at_once, by_parts))
    torch.testing.assert_close(*figures, rtol=1e-6, atol=1e-12)


def assert_base(case: Case, steps: int = STEPS, size: int = SIZE, tolerance: float = 1e-12, **options: Any) -> Run:
    """Proposition 4: with feedback off it is the base method itself, losses, buffers, states and random numbers too."""
    run = train(case, steps, size, feedback=False, **options)
    own = {key: value for key, value in options.items() if key not in ("curvature", "loss", "schedule", "pi_off")}
    theirs, curvature, loss = copy.deepcopy(case.model), options["curvature"], options.get("loss", case.loss)
    optimizers: dict[str, Any] = TORCH | WRITTEN
    if curvature in optimizers:
        reference: Any = optimizers[curvature]([p for p in theirs.parameters() if p.requires_grad], **own)
    else:
        reference = Reference(theirs, curvature, **own)
    for (x, y), found in zip(batches(case, steps, size), run.losses, strict=True):
        if curvature not in optimizers:
            reference.step(x, y)
            continue
        torch_step(reference, value := loss(theirs(*x) if isinstance(x, tuple) else theirs(x), y).mean())
        torch.testing.assert_close(found, float(value.detach()), rtol=10 * tolerance, atol=10 * tolerance)
    assert (flat(theirs) - flat(case.model)).abs().max() > 1e-4
    torch.testing.assert_close(run.model.state_dict(), theirs.state_dict(), rtol=0, atol=tolerance)
    if curvature in TORCH:
        ours, states = run.optimizer.state, reference.state
        for mine, other in zip(run.model.parameters(), theirs.parameters(), strict=True):
            assert set(ours[mine]) == {key for key, value in states[other].items() if value is not None}
    return run


def assert_exported(case: Case, run: Run, folder: Path) -> None:
    """The exported module takes the optimizer's steps: losses, parameters, buffers, states and random numbers."""
    run.optimizer.program.export(folder / "step.py")
    module, (params, buffers) = load_module(folder / "step.py"), named(case.model)
    state = module.init_state(params)
    for (x, y), found in zip(batches(case, len(run.losses), SIZE), run.losses, strict=True):
        params, buffers, state, loss = module.step(params, buffers, state, x, y)
        assert abs(float(loss) - found) <= 1e-12
    assert torch.equal(torch.get_rng_state(), run.random)
    assert largest(params, named(run.model)[0]) <= 1e-12
    assert largest(buffers, named(run.model)[1]) <= 1e-12
    kept = {name: own for name, own in state.items() if own}  # an unused parameter has none either way
    ours = {name: own for name, own in state_by_name(run.optimizer, run.model).items() if own}
    assert largest(kept, ours) <= 1e-12
