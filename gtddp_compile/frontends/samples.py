"""Where the samples of every value lie, found by trial: change one sample of the inputs and see which elements change.

Most models keep samples along the leading axis throughout, and where shapes say so nothing is tried. Otherwise the
recording is run three times side by side, without gradients: on the example inputs, and with their first and their last
sample changed. A layout holds for a value if nothing outside its sample changed. Operations that mix samples
(batch-norm in training mode) are passed over: their value has the layout of what they normalise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.frontends.reference import SEED, evaluate, leaves
from gtddp_compile.frontends.traced import Untraceable
from gtddp_compile.graph import Op, OpGraph, Ref
from gtddp_compile.graph.layouts import LEADING, Layout, candidates

REORDERING = frozenset(
    {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT", "einsum", "rearrange"}
)
"""Kinds that may bring another axis of the batch's size to the front."""


@dataclass(frozen=True)
class Trial:
    """The example inputs, and variants of them in which one sample each is another."""

    batch: int
    inputs: tuple[Any, ...]
    variants: tuple[tuple[Any, ...], ...]
    changed: tuple[int, ...]


def find_layouts(graph: OpGraph, model: nn.Module, inputs: tuple[Any, ...]) -> OpGraph:
    """The graph with the layout of every value whose samples do not lie along the leading axis.

    Values of which no layout holds keep none: a later pass refuses them if they matter.

    Args:
        graph: with shapes for ``inputs``.
        model: for its parameters and buffers, which are left as they are.
        inputs: the example inputs.
    """
    batch = graph.batch
    moving = _reached(graph)
    if not batch or not any(_is_doubtful(op, batch) for op in graph.ops if op.name in moving):
        return graph
    for trial in _trials(graph, inputs, batch):
        try:
            return _with_layouts(graph, _found(graph, model, trial, moving))
        except Untraceable:  # a changed input is none that the model takes, or the recording holds for one size alone
            continue
    return _with_layouts(graph, {op.name: _of_one(op) for op in graph.ops if op.name in moving})


def _reached(graph: OpGraph) -> frozenset[str]:
    """Operations that an input's tensor reaches."""
    found = set(graph.inputs)
    for op in graph.ops:
        if not op.is_size and any(name in found for name in op.operands):
            found.add(op.name)
    return frozenset(found)


def _is_doubtful(op: Op, batch: int) -> bool:
    """Whether the samples of a value may lie elsewhere than along its leading axis."""
    if not op.shape or not op.is_differentiable:
        return False
    if op.shape[0] != batch:
        return True
    return op.kind in REORDERING and any(size % batch == 0 for size in op.shape[1:])


def _with_layouts(graph: OpGraph, found: dict[str, Layout | None]) -> OpGraph:
    layouts = {name: layout for name, layout in found.items() if layout not in (None, LEADING)}
    return replace(graph, ops=tuple(replace(op, layout=layouts.get(op.name)) for op in graph.ops))


def _of_one(op: Op) -> Layout | None:
    """All there is belongs to the only sample."""
    return Layout(0, "inner") if op.shape and op.shape[0] != 1 else None


# --- trials -----------------------------------------------------------------------------------------------------------


def _trials(graph: OpGraph, inputs: tuple[Any, ...], batch: int) -> Iterator[Trial]:
    """What to try, in order: whole numbers are changed boldly first, then only to what other samples have."""
    if batch == 1:
        if graph.frontend != "fx":
            return
        inputs = tuple(_twice(value) for value in inputs)
    count = max(batch, 2)
    for bold in (True, False):
        yield Trial(
            count,
            inputs,
            tuple(
                tuple(_other(value, sample, count - 1 - sample, count, bold=bold) for value in inputs)
                for sample in (0, count - 1)
            ),
            (0, count - 1),
        )


def _twice(value: Any) -> Any:
    return torch.cat([value, value]) if isinstance(value, Tensor) and value.dim() and len(value) == 1 else value


def _other(value: Any, sample: int, donor: int, batch: int, *, bold: bool) -> Any:
    """The input with one sample replaced by another of the batch, or by one that looks like them."""
    if not isinstance(value, Tensor) or not value.dim() or len(value) != batch or not value.numel():
        return value
    changed, own = value.detach().clone(), value.detach()[sample]
    changed[sample] = value.detach()[donor]
    if not torch.equal(changed[sample], own):
        return changed
    if own.is_floating_point() or own.is_complex():
        noise = torch.rand(own.shape, generator=torch.Generator().manual_seed(SEED), dtype=torch.float64)
        changed[sample] = own + (0.5 + noise).to(own.device, own.dtype)
    elif own.dtype == torch.bool:
        changed[sample] = ~own
    else:
        low, high = int(value.min()), int(value.max())
        changed[sample] = low + high - own if low < high else own + (1 if low == 0 else -1) * int(bold)
    return changed


# --- evaluation -------------------------------------------------------------------------------------------------------


def _found(graph: OpGraph, model: nn.Module, trial: Trial, moving: frozenset[str]) -> dict[str, Layout | None]:
    found: dict[str, Layout | None] = {name: LEADING for name in graph.inputs}
    for op, value, others in _side_by_side(graph, model, trial):
        if op.name in moving and isinstance(value, Tensor):
            masks = [_differs(value, other) for other in others]
            implied = [found[name] for name in op.operands if found.get(name) is not None]
            found[op.name] = _decide(tuple(value.shape), masks, trial, implied)
    return found


def _side_by_side(graph: OpGraph, model: nn.Module, trial: Trial) -> Iterator[tuple[Op, Any, list[Any]]]:
    """Every operation with its value for the inputs and for each variant; values are let go after their last reader."""
    last = {name: op.name for op in graph.ops for name in op.operands}
    runs = []
    for inputs in (trial.inputs, *trial.variants):
        runs.append((dict(zip(graph.inputs, inputs, strict=True)), *leaves(model)))
    with torch.random.fork_rng(), torch.no_grad():
        for op in graph.ops:
            for values, params, buffers in runs:
                if op.target is not None:
                    values[op.name] = _evaluate(op, values, params, buffers)
            first, *rest = (values[op.name] for values, _, _ in runs)
            yield op, first, rest
            for name in {*op.operands, op.name}:
                if last.get(name, name) == op.name:
                    for values, _, _ in runs:
                        del values[name]


def _evaluate(op: Op, values: dict[str, Any], params: dict[str, Tensor], buffers: dict[str, Tensor]) -> Any:
    if op.mixes_samples and op.args and isinstance(op.args[0], Ref):
        return values[op.args[0].name]
    if op.random:
        torch.manual_seed(SEED)
    return evaluate(op, values, params, buffers)


def _differs(value: Tensor, other: Any) -> Tensor | None:
    """Where two values differ; ``None`` if they cannot be compared."""
    if not isinstance(other, Tensor) or other.shape != value.shape:
        return None
    same = value == other
    if value.is_floating_point() or value.is_complex():
        same |= value.isnan() & other.isnan()
    return ~same


# --- decision ---------------------------------------------------------------------------------------------------------


def _decide(
    shape: tuple[int, ...], masks: Sequence[Tensor | None], trial: Trial, implied: Sequence[Layout | None]
) -> Layout | None:
    """The layout that the trial allows; where it allows several, what the operands have, then the plain one."""
    seen = [(mask, s) for mask, s in zip(masks, trial.changed, strict=True) if mask is not None and bool(mask.any())]
    options = candidates(shape, trial.batch)
    allowed = [o for o in options if all(_within(mask, o, s, trial.batch) for mask, s in seen)]
    likely = [o for o in allowed if o in implied]
    return next(iter(likely or [o for o in allowed if seen or o == LEADING]), None)


def _within(mask: Tensor, layout: Layout, sample: int, batch: int) -> bool:
    """Whether nothing outside the sample changed."""
    rows = mask.movedim(layout.axis, 0)
    if layout.fold == "":
        own = rows[sample]
    elif layout.fold == "inner":
        own = rows.unflatten(0, (batch, -1))[sample]
    else:
        own = rows[sample::batch]
    return int(own.sum()) == int(mask.sum())
