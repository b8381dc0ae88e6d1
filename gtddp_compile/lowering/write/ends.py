"""The ends of stages that can be made again from values that are kept anyhow.

A part of a stage can be made again if it ends the stage and autograd keeps what goes into it anyhow. Which of them are
made again is decided when the whole program is written down (``passes/p10_remake.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import networkx as nx

from gtddp_compile.algebra.collapsed import LEVENBERG
from gtddp_compile.graph import GUARD, Op
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import StageFunction
from gtddp_compile.lowering.write.adjoints import written_out

HOLDING = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "rms_norm", "gelu", "silu", "mish", "elu", "leaky_relu", "softplus"}
)
"""Kinds whose backward pass keeps what they read until then."""

CHEAP = HOLDING | {"relu", "add"}
"""Kinds that may be made again: what they cost is of the order of reading and writing their values."""


@dataclass(frozen=True)
class Part:
    """The end of a stage that can be made again.

    Attributes:
        function: its dynamics, from values that are kept to those that the stage returns.
        gradients: of each value it returns, the variable of its gradient; ``None`` where none enters.
        pulled: of each value it takes, the variable of its gradient if that is made again, else ``None``.
        size: bytes of all values in it.
    """

    function: StageFunction
    gradients: tuple[str | None, ...]
    pulled: tuple[str | None, ...]
    size: int


def ends(b: Builder) -> tuple[Part, ...]:
    """Every part of the network that can be made again."""
    usable = b.plan.segments is None and not b.factored and b.plan.form.name in LEVENBERG
    return tuple(part for stage in b.plan.stages for part in _ends(b, stage.index)) if usable else ()


def begun_with(b: Builder, parts: Iterable[Part]) -> frozenset[str]:
    """Players' outputs that the parts begin with, in the parts' own stages."""
    inputs = ((name, part.function.stage) for part in parts for name in part.function.inputs)
    return frozenset(name for name, stage in inputs if b.graph.stage_of.get(name, -1) == stage)


def _ends(b: Builder, t: int) -> Iterator[Part]:
    """What ends a stage that torch differentiates, values that have nothing to do with each other apart."""
    graph = b.graph
    if written_out(b, t):
        return
    inside = {name for name in graph.stages[t].ops if graph.op(name).kind != GUARD}
    ops: list[str] = []
    for name in reversed([name for name in graph.stages[t].ops if name in inside]):
        if _cheap(b, graph.op(name)) and all(user in ops for user in graph.ops.users[name] if user in inside):
            ops.insert(0, name)
    joined = nx.Graph((name, user) for name in ops for user in graph.ops.users[name] if user in ops)
    joined.add_nodes_from(ops)
    for index, together in enumerate(nx.connected_components(joined)):
        part = _end(b, t, inside, tuple(name for name in ops if name in together), f"{index + 1}" if index else "")
        if part is not None:
            yield part


def _end(b: Builder, t: int, inside: set[str], ops: tuple[str, ...], number: str) -> Part | None:
    graph, stage = b.graph, b.plan.stages[t]
    inputs = tuple(dict.fromkeys(o for name in ops for o in graph.op(name).operands if o not in ops))
    returns = tuple(name for name in ops if name in b.outputs or set(graph.ops.users[name]) - inside)
    readers = {o: [user for user in graph.ops.users[o] if user in inside] for o in inputs}
    own = [o for o in inputs if o in inside]
    if not all(_held(b, t, o) and all(graph.op(user).kind in HOLDING for user in readers[o]) for o in own):
        return None
    opened = [name for name in returns if name in stage.opened]
    if not opened or all(graph.op(user).kind not in HOLDING for users in readers.values() for user in users):
        return None
    pulled = tuple(
        b.g_output(o) if o in own else b.g(o, t) if _whole(b, t, o) and set(readers[o]) <= set(ops) else None
        for o in inputs
    )
    gradients = tuple(b.g(name, b.graph.segments(name)[0]) if name in stage.opened else None for name in returns)
    doc = f"the end of stage {t}, made again"
    function = StageFunction(f"stage_{t}_end{number}", t, inputs, ops, (), returns, doc=doc)
    return Part(function, gradients, pulled, sum(graph.op(name).nbytes for name in ops))


def _cheap(b: Builder, op: Op) -> bool:
    tensors = op.is_tensor and all(b.graph.op(name).is_tensor for name in op.operands)
    return tensors and op.kind in CHEAP and not op.random and op.name not in b.graph.expressions


def _held(b: Builder, t: int, op: str) -> bool:
    """Whether a stage's own value is a player's output whose gradient is one variable, read by nothing but the part."""
    uses = b.uses_at(op)
    return len(uses) == 1 and not uses[0][1].layouts and op not in b.plan.stages[t].opened and op not in b.outputs


def _whole(b: Builder, t: int, value: str) -> bool:
    """Whether a value's gradient at the cut before stage ``t`` is what that stage alone pulls back."""
    return value in b.plan.stages[t].pulled and b.graph.segments(value)[-1] == t
