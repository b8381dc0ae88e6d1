"""Where a loss that is not finite comes from: asked when a step has been given up, at the cost of one more pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gtddp_compile.errors import NonFiniteError
from gtddp_compile.frontends.attributes import untouched
from gtddp_compile.frontends.canonical import base_name
from gtddp_compile.frontends.keywords import positional
from gtddp_compile.frontends.reference import leaves
from gtddp_compile.frontends.traced import argument_names, module_paths, users_line
from gtddp_compile.methods.losses import Loss
from gtddp_compile.runtime.method import GivenUp
from gtddp_compile.terms import Terms

SHOWN = 5
SKIP = "or leave such batches out by on_nonfinite='skip'"


def error_of(
    stop: GivenUp, model: nn.Module, loss: Loss, sets: Any, inputs: tuple[Any, ...], targets: Any, *, alone: bool
) -> NonFiniteError:
    """What to say of a step that was given up; ``alone``: no other process has to take part in the pass."""
    if isinstance(model, Terms) and isinstance(sets, Mapping):
        model.refuse_points(sets)
    asked = alone and inputs and not stop.loss.isfinite()
    return (_origin(str(stop), model, loss, inputs, targets) if asked else None) or stop.error()


def _origin(said: str, model: nn.Module, loss: Loss, inputs: tuple[Any, ...], targets: Any) -> NonFiniteError | None:
    """``said``, and where it begins: in the batch, in what the model holds, in an operation, or in the loss.

    ``None``: one more pass finds nothing (under look-ahead the step's was at another place).
    """
    names = (f"the input {name!r}" for name in argument_names(model, len(inputs)))
    for name, given in (*zip(names, inputs, strict=True), ("the target", targets)):
        for value in _floating(given):
            if value.isnan().any():
                return NonFiniteError(f"{said}: {name} holds NaN{_rows(value.isnan())}",
                                      f"Mend or drop such samples, {SKIP}")  # fmt: skip
    held = [("parameter", *each) for each in model.named_parameters()]
    for kind, name, value in (*held, *(("buffer", *each) for each in model.named_buffers())):
        if value.isnan().any():
            return NonFiniteError(f"{said}: the {kind} {name!r} holds NaN", "Load values that are numbers",
                                  module=name.rpartition(".")[0])  # fmt: skip
    try:
        return _computed(said, model, loss, inputs, targets)
    except Exception as error:  # the user's own code, which made a loss before
        return NonFiniteError(f"{said}; where it begins was not found, one more pass ended with {error!r}"[:500],
                              f"Look for NaN in the batch, lower lr, {SKIP}")  # fmt: skip


def _computed(said: str, model: nn.Module, loss: Loss, inputs: tuple[Any, ...], targets: Any) -> NonFiniteError | None:
    forward, after = _Watch(), _Watch()
    params, buffers = leaves(model)
    wrapped, inputs = positional(model, inputs)
    with untouched(model), torch.random.fork_rng(), torch.enable_grad():
        with module_paths(wrapped) as forward.stack, forward:
            outputs = torch.func.functional_call(wrapped, {**params, **buffers}, inputs)
        with after:
            loss.per_sample(outputs, targets)
    where = forward.first or forward.below
    if where is not None and not all(bool(value.isfinite().all()) for value in _floating(outputs)):
        what, place = where
        return NonFiniteError(f"{said}: {what} comes first from here", f"Bound what goes in, lower lr, {SKIP}", **place)
    where = after.first or after.below
    if where is None:
        return None
    what, place = where
    place = {"operation": loss.name} if loss.module is not None else {**place, "module": None}
    return NonFiniteError(f"{said}: the outputs are finite, and {what} comes first from the loss",
                          f"Look at the targets and at what the loss divides by, {SKIP}", **place)  # fmt: skip


class _Watch(TorchFunctionMode):
    """Looks for the first operation that gives NaN or infinity, and apart for ``-inf``, which masks hold."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [""]
        self.first: tuple[str, dict[str, Any]] | None = None
        self.below: tuple[str, dict[str, Any]] | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do it, and look at what came out."""
        result = func(*args, **(kwargs or {}))
        for value in _floating(result) if self.first is None else ():
            bad = ~value.isfinite()
            if bad.any():
                what = "NaN" if value.isnan().any() else "infinity"
                place = {"module": self.stack[-1], "operation": base_name(func), "source": users_line() or None}
                self.below = self.below or (f"{what}{_rows(bad)}", place)
                if what == "NaN" or (value == torch.inf).any():
                    self.first = (f"{what}{_rows(bad)}", place)
        return result


def _floating(values: Any) -> Iterator[Tensor]:
    found = (value for value in pytree.tree_leaves(values) if isinstance(value, Tensor))
    return (value.detach() for value in found if value.is_floating_point())


def _rows(bad: Tensor) -> str:
    """Where along the leading axis, at first."""
    if not bad.dim():
        return ""
    rows = bad.flatten(1).any(1) if bad.dim() > 1 else bad
    return f" (first in rows {rows.nonzero().flatten()[:SHOWN].tolist()})"
