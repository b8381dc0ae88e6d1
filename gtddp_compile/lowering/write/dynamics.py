"""The dynamics of every stage as a function: what it reads, runs and returns."""

from __future__ import annotations

from gtddp_compile.graph import GUARD, ControlGraph, Ref
from gtddp_compile.kernels import batch_norm
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import StageFunction
from gtddp_compile.lowering.write.adjoints import read_back, written_out


def stage_functions(b: Builder) -> tuple[StageFunction, ...]:
    """Every stage's, after that of what comes before the first player."""
    graph = b.graph
    # Sizes of parameter expressions are read before the stage at which those are decided on.
    inner = tuple(n for n in graph.with_expressions(graph.prologue) if graph.op(n).kind not in ("input", GUARD))
    named: list[tuple[str, int, tuple[str, ...], tuple[str, ...]]] = [("prologue", -1, inner, ())] if inner else []
    for stage in graph.stages:
        ordered = graph.with_expressions(stage.ops)
        named.append((f"stage_{stage.index}", stage.index, ordered, graph.uses_in(stage.ops)))
    # Parameter expressions are evaluated in every function that reads them, and so read there what they read.
    read = frozenset(name for _, _, ops, _ in named for name in _read_outside(graph, ops))
    return tuple(_function(b, *which, read) for which in named)


def _read_outside(graph: ControlGraph, ops: tuple[str, ...]) -> tuple[str, ...]:
    inside = set(ops)
    return tuple(
        dict.fromkeys(o for op in ops if graph.op(op).kind != GUARD for o in graph.op(op).operands if o not in inside)
    )


def _function(
    b: Builder, name: str, stage: int, ops: tuple[str, ...], taps: tuple[str, ...], read: frozenset[str]
) -> StageFunction:
    """Inputs are what the operations read from outside, returns what anybody outside reads: guards are outside.

    ``read``: what any function reads from outside.
    """
    graph = b.graph
    inputs = _read_outside(graph, ops)
    ops = tuple(op for op in ops if graph.op(op).kind != GUARD)
    inside = set(ops)
    outputs = b.outputs
    returns = [
        op
        for op in ops
        if (op in outputs and graph.stage_of[op] == stage)
        or (op not in graph.expressions and (op in read or any(user not in inside for user in graph.ops.users[op])))
        or op in b.orders
    ]
    operands = [
        ref.name
        for tap in taps
        for _, use in b.uses_at(tap)
        for ref in (*use.operands, *(Ref(extra) for extra in use.extras))
        if isinstance(ref, Ref) and ref.name in inside
    ]
    players = ", ".join(graph.stages[stage].players) if stage >= 0 else "before the first player"
    if chain := written_out(b, stage):  # nothing is asked of torch
        returns, taps = [*returns, *read_back(chain)], ()
    edges = tuple(tap for tap in taps if tap not in {*returns, *operands})
    written = tuple(dict.fromkeys([*returns, *taps, *operands]))
    return StageFunction(name, stage, inputs, ops, taps, written, doc=players, edges=edges, moments=_moments(b, ops))


def _moments(b: Builder, ops: tuple[str, ...]) -> dict[str, str]:
    """Batch-norms whose moments the function finds itself: where there is feedback.

    Without it they are torch's own: such a step is the base method's to the last bit, however rounding grows.
    """
    norms = [op for op in map(b.graph.op, ops) if op.target is batch_norm and op.kwargs.get("training")]
    return {op.name: "" for op in norms if b.plan.form.name != "base" or b.synchronised(op.name)}
