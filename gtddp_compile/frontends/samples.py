"""Where the samples of every value lie, found by trial: change one sample of the inputs and see which elements change.

Most models keep samples along the leading axis throughout, and where shapes say so nothing is tried. Otherwise the
recording is run five times side by side, without gradients: on the example inputs, and with their first or last sample
changed, twice each. A layout holds for a value if nothing outside its sample changed. Of a value that mixes
samples (batch-norm in training mode) each sample's own part is kept and the rest put back, so that it lies as what it
was made of. Rows that are taken by an index which depends on the data (tokens sorted by expert) are put back in order
first, by an operation added for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.frontends.changes import Change, changes, decide, keep_own, lies_as
from gtddp_compile.frontends.orders import Orders, is_sound, operations, order_after
from gtddp_compile.frontends.reference import SEED, descending, evaluate, leaves, only_moves, seed_all
from gtddp_compile.frontends.traced import Untraceable
from gtddp_compile.frontends.trials import FAILED, Trial, is_stopped, like, nudged, trials
from gtddp_compile.graph import GUARD, Op, OpGraph, ParamRef
from gtddp_compile.graph.layouts import LEADING, LISTED, UNKNOWN, Layout, candidates

REORDERING = frozenset(
    {"transpose", "permute", "movedim", "moveaxis", "swapaxes", "swapdims", "t", "T", "mT", "einsum", "rearrange"}
)
"""Kinds that may bring another axis of the batch's size to the front."""

DROPPING = frozenset({"mul", "div", "truediv", "where", "masked_fill"})
"""Kinds by which a mask that was drawn drops entries."""

EMPTY = ("new_", "empty")
"""How kinds begin that take nothing but sizes from a value."""

SPREADING = frozenset({"expand", "expand_as", "repeat", "tile", "broadcast_to"})
"""Kinds that give every sample a copy."""

PLAIN = (LEADING, LISTED)
"""Layouts of samples one after the other, which are told quickly."""


def find_layouts(graph: OpGraph, model: nn.Module, inputs: tuple[Any, ...]) -> OpGraph:
    """The graph, with shapes, with the layout of every value whose samples do not lie along the leading axis.

    Values of which no layout holds are ``UNKNOWN``: a later pass refuses them if they matter.
    """
    batch = graph.batch
    moving = graph.reached
    if not batch or not any(_is_doubtful(op, batch) for op in graph.ops if op.name in moving):
        return graph
    known: dict[str, Layout | None] = {}
    for trial in trials(graph, inputs, batch):
        try:
            found, failed = _found(graph, model, trial, moving)
        except Untraceable:  # the recording holds for one size alone
            continue
        if failed and batch == 1:
            continue
        known = {name: layout if known.get(name) is None else known[name] for name, layout in found.items()}
        if not failed:  # else a changed input is none that the model takes
            return _with_layouts(graph, known)
    known = known or {op.name: _of_one(op) for op in graph.ops if op.name in moving}
    return _with_layouts(graph, known)


def _is_doubtful(op: Op, batch: int) -> bool:
    """Whether the samples of a value may lie elsewhere than along its leading axis."""
    if not op.shape or not op.is_differentiable:
        return False
    if op.shape[0] != batch:
        return True
    return op.kind in REORDERING and any(size % batch == 0 for size in op.shape[1:])


def _with_layouts(graph: OpGraph, found: dict[str, Layout | None]) -> OpGraph:
    """The graph with layouts, and with an operation for every order that one of them names."""
    layouts = {name: layout or UNKNOWN for name, layout in found.items() if layout != LEADING}
    orders = {layout.order for layout in layouts.values() if layout.order is not None}
    ops: list[Op] = []
    for op in graph.ops:
        ops.append(replace(op, layout=layouts.get(op.name) if op.is_tensor else None))
        if order_after(op) in orders:
            ops += operations(op, graph)
    return replace(graph, ops=tuple(ops))


def _of_one(op: Op) -> Layout:
    """All there is belongs to the only sample; its rows are compared as they lie, whatever order a router brings."""
    return LISTED if op.shape and op.shape[0] != 1 else LEADING


# --- evaluation -------------------------------------------------------------------------------------------------------


def _found(
    graph: OpGraph, model: nn.Module, trial: Trial, moving: frozenset[str]
) -> tuple[dict[str, Layout | None], bool]:
    """The layout of every value, and whether a changed input was let through by all operations."""
    failed = False
    found: dict[str, Layout | None] = {name: LEADING for name in graph.inputs}
    orders = Orders(graph)
    still: set[str] = set()
    spread = frozenset(op.name for op in graph.ops if op.name not in moving and _is_spread(op, graph))
    for op, values, given in _side_by_side(graph, model, trial):
        if op.name in spread:
            _change(values, trial)
        implied = [found[name] for name in op.operands if found.get(name) is not None]
        if op.name not in moving or not isinstance(values[0], Tensor):
            found[op.name] = implied[0] if implied and not op.is_size else None  # parts of a tuple lie as a rule as it
            continue
        if trial.inside and op.kind == "embedding" and set(implied) == {LEADING}:
            found[op.name] = LEADING
            for run, sample in enumerate(trial.changed, 1):
                values[run] = nudged(values[run], sample, trial.batch, run)
            continue
        plain = implied[0] if implied and implied[0] in PLAIN and len(set(implied)) == 1 else None
        if plain is not None and lies_as(plain, values, trial.changed, trial.batch):
            found[op.name] = plain
            orders.note(op, values)
            continue
        failed |= is_stopped(values)
        seen = changes(values, trial.changed)
        layout = decide(candidates(tuple(values[0].shape), trial.batch), seen, trial.batch, implied)
        if op.name in graph.smooth and _is_dead(op, seen) and layout in PLAIN and layout in implied:
            _change(values, trial)
        if layout is None:
            layout = next((o for o in orders.likely(op, implied) if orders.holds(o, values, trial)), None)
        if layout is None and op.name in graph.smooth and not only_moves(values[0], given):
            read = [name for name in op.operands if name in moving and not graph.by_name[name].is_size]
            if graph.smooth.issuperset(read):  # what takes rows by whole numbers, or counts them, may undo it later
                layout = keep_own(values, trial.changed, trial.batch, [found.get(name) for name in read])
        found[op.name] = layout if _is_shown(values, seen, trial) else None
        orders.note(op, values)
        if layout is None and all(change is not None and not change.count for change in seen):
            still.add(op.name)
    told = {name: found[name] if is_sound(found[name], graph, found) else None for name in moving}
    if not failed or trial.inside:  # positions, a mask of sizes: nobody's, and the same for everybody
        told.update(dict.fromkeys(still, LEADING))
    return told, failed


def _is_shown(values: Sequence[Any], seen: Sequence[Change | None], trial: Trial) -> bool:
    """Where a changed input was not let through, the others must have shown where every changed sample lies."""
    known = {change.sample for change in seen if change is not None and change.count}
    return known == set(trial.changed) or not is_stopped(values)


def _is_spread(op: Op, graph: OpGraph) -> bool:
    """Whether a value is one that every sample gets a copy of (a class token): no input changes it."""
    if op.kind not in SPREADING or not op.is_differentiable or not op.shape or op.shape[0] != graph.batch:
        return False
    before = op.leaves[0] if op.leaves else None
    known = graph.parameter_info if isinstance(before, ParamRef) else graph.by_name
    shape = getattr(known.get(before.name), "shape", None) if before is not None else None
    return shape is not None and (len(shape) < len(op.shape) or shape[0] == 1)


def _is_dead(op: Op, seen: Sequence[Change | None]) -> bool:
    """Whether no input changes a value (``x - x``), so that nothing would tell where it goes from here.

    Only of values that derivatives lead to: another of a router's numbers would name another expert.
    """
    return all(change is not None and not change.count for change in seen) and op.kind not in REORDERING


def _change(values: list[Any], trial: Trial) -> None:
    """Change the changed sample's part of a value, so that its way can be followed."""
    for run, sample in enumerate(trial.changed, 1):
        if isinstance(values[run], Tensor) and values[run].dim() and len(values[run]) % trial.batch == 0:
            changed = values[run].detach().clone()
            own = changed.unflatten(0, (trial.batch, -1))[sample]
            own.copy_(like(own, changed, run, bold=True))
            values[run] = changed


def _side_by_side(graph: OpGraph, model: nn.Module, trial: Trial) -> Iterator[tuple[Op, list[Any], list[Any]]]:
    """Every operation with its values, for the inputs and each variant, and with what it reads for the inputs.

    Values are let go after their last reader. Their list may be changed; later operations see what it holds then.
    Random numbers are the same in all runs, and what a mask of them drops is put back: luck decides nothing.
    """
    drawn: set[str] = set()
    runs = []
    for inputs in (trial.inputs, *trial.variants):
        runs.append((dict(zip(graph.inputs, inputs, strict=True)), *leaves(model)))
    with torch.random.fork_rng(), torch.no_grad():
        for op in graph.ops:
            for run, (values, params, buffers) in enumerate(runs):
                if op.target is not None:
                    values[op.name] = _evaluate(op, values, params, buffers, example=run == 0)
            source = _dropped(op, graph, drawn)
            if source:
                for values, _, _ in runs:
                    values[op.name] = _put_back(values[op.name], values[source])
            found = [values[op.name] for values, _, _ in runs]
            yield op, found, [runs[0][0][name] for name in op.operands]
            for (values, _, _), value in zip(runs, found, strict=True):
                values[op.name] = value
            for name in graph.finished[op.name]:
                for values, _, _ in runs:
                    del values[name]


def _dropped(op: Op, graph: OpGraph, drawn: set[str]) -> str | None:
    """The value of which an operation drops entries at random; what is drawn otherwise is noted."""
    if not op.random and not drawn.intersection(op.operands):
        return None
    for name in op.operands if op.random or op.kind in DROPPING else ():
        source = graph.by_name[name]
        if name not in drawn and source.shape == op.shape and not source.kind.startswith(EMPTY):
            return name
    drawn.add(op.name)
    return None


def _put_back(value: Any, source: Any) -> Any:
    alike = isinstance(value, Tensor) and isinstance(source, Tensor) and value.shape == source.shape
    return torch.where(value == 0, source.to(value.dtype), value) if alike else value


def _evaluate(
    op: Op, values: dict[str, Any], params: dict[str, Tensor], buffers: dict[str, Tensor], *, example: bool
) -> Any:
    """``example``: the inputs are the example inputs, which every operation lets through."""
    if is_stopped(values[name] for name in op.operands):
        return FAILED
    if op.kind == GUARD:  # the operations that were recorded are asked, not whether a step would take them
        return None
    if op.random:
        seed_all(SEED)
    try:
        return descending(op, evaluate(op, values, params, buffers))
    except Untraceable:
        if example:
            raise
        return FAILED
