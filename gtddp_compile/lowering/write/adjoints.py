"""Stages whose vector-Jacobian product is written out: chains of operations with a known derivative.

``Q_x = f_xᵀ V_x`` of a linear layer is one product, of an activation one pass over its output. Where a stage is a chain
of such operations, nothing of it is recorded for automatic differentiation, which takes longer than small networks'
arithmetic; every other stage is differentiated by torch.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gtddp_compile.graph import Op, ParamRef, Ref
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import Apply, Var
from gtddp_compile.lowering.layers.binding import bind
from gtddp_compile.lowering.plan import StagePlan
from gtddp_compile.lowering.write.columns import vectorises

Adjoint = tuple[str, tuple[Ref | ParamRef, ...]]
"""A kernel that takes ``g`` of an operation's value to ``g`` of its operand, and what it takes besides ``g``."""


def _linear(op: Op) -> Adjoint | None:
    """``g W``."""
    bound = bind(op)
    if bound is None or not isinstance(bound["input"], Ref) or not isinstance(bound["weight"], ParamRef):
        return None
    return "linear_pulled", (bound["weight"], bound["input"])


def _of_output(kernel: str) -> Callable[[Op], Adjoint | None]:
    def adjoint(op: Op) -> Adjoint | None:
        plain = len(op.args) == 1 and isinstance(op.args[0], Ref) and not any(op.kwargs.values())
        return (kernel, (Ref(op.name),)) if plain else None

    return adjoint


ADJOINTS: dict[str, Callable[[Op], Adjoint | None]] = {
    "linear": _linear,
    "relu": _of_output("relu_pulled"),
    "tanh": _of_output("tanh_pulled"),
    "sigmoid": _of_output("sigmoid_pulled"),
}
"""By kind of operation; ``None``: not as it is called here."""


def _adjoint(op: Op) -> Adjoint | None:
    known = ADJOINTS.get(op.kind)
    return None if known is None or not op.is_differentiable else known(op)


def written_out(b: Builder, t: int) -> tuple[Op, ...]:
    """The stage's operations in order, if they are a chain of known derivatives; otherwise none."""
    if t < 0 or b.factored or b.plan.segments is not None:
        return ()
    graph, stage = b.graph, b.plan.stages[t]
    names = graph.stages[t].ops
    ops = tuple(graph.op(name) for name in names)
    if not ops or graph.with_expressions(names) != names or stage.opened != names[-1:]:
        return ()
    follow = all(op.operands == (before,) for before, op in zip(names, ops[1:], strict=False))
    alone = all(graph.ops.users[name] == (after,) for name, after in itertools.pairwise(names))
    inner = b.outputs.isdisjoint(names[:-1]) and stage.pulled in ((), ops[0].operands)
    return ops if follow and alone and inner and all(_adjoint(op) is not None for op in ops) else ()


HELD = 2**22
"""Elements of players' gradients that one reverse pass may leave, for the batch that was compiled for: past that memory
counts, and how many passes there are does not."""


def recorded_runs(b: Builder) -> dict[int, range]:
    """Stages in a row that torch differentiates, by each of them: as one where nobody reads ``g`` at the cuts between.

    That is the joint step, its trajectory kept. A reverse pass gives the gradients of all its players at once: of large
    values it has few.
    """
    count, plan = len(b.plan.stages), b.plan
    cut = plan.form.name != "joint" or b.factored or plan.segments is not None
    first, held, found = 0, 0, {}
    for t in range(count):
        own = sum(math.prod(b.graph.op(tap).shape or ()) for tap in b.graph.uses_in(b.graph.stages[t].ops))
        alone = cut or not t or written_out(b, t) or written_out(b, t - 1) or held + own > HELD
        first, held = (t, own) if alone else (first, held + own)
        found.update(dict.fromkeys(range(first, t + 1), range(first, t + 1)))
    return found


def entries(b: Builder, run: range) -> dict[str, int]:
    """Values from before a run that its stages pull gradients to, and the first stage that reads each."""
    born = b.graph.value
    return {
        name: t for t in reversed(run) for name in b.plan.stages[t].pulled if born[name].born < run.start
    }  # fmt: skip


def read_back(ops: Sequence[Op]) -> tuple[str, ...]:
    """Values of the stage itself that its vector-Jacobian product reads."""
    inside = {op.name for op in ops}
    found = (_adjoint(op) for op in ops)
    refs = (ref.name for adjoint in found if adjoint is not None for ref in adjoint[1] if isinstance(ref, Ref))
    return tuple(dict.fromkeys(name for name in refs if name in inside))


def as_read(b: Builder, value: str) -> Apply | Var:
    """A value as a stage that is written out reads it: without what torch has recorded of it."""
    t = b.graph.stage_of.get(value, -1)
    recorded = t >= 0 and not written_out(b, t)
    return Apply(".detach()", (Var(b.name(value)),)) if recorded else Var(b.name(value))


def pull(b: Builder, stage: StagePlan, ops: Sequence[Op], g: str) -> None:
    """``g`` of the stage's players' outputs and of what it reads, from that of its value."""
    t, taps = stage.index, b.graph.uses_in(b.graph.stages[stage.index].ops)
    targets = [b.g_as_it_lies(op.name) if op.name in taps else f"{b.g_as_it_lies(op.name)}_inner" for op in ops]
    if ops[-1].name in taps:
        b.emit("backward", t, f"{targets[-1]}", "=", Var(g), note="g of the player")
    first = 0 if stage.pulled else 1 + min(index for index, op in enumerate(ops) if op.name in taps)
    for index in range(len(ops) - 1, first - 1, -1):
        found = _adjoint(ops[index])
        assert found is not None  # written_out() has seen it
        kernel, rest = found[0], [b.operand(ref) for ref in found[1]]
        after = targets[index - 1] if index else b.g(stage.pulled[0], t)
        b.emit("backward", t, after, kernel, Var(g), *rest, note="Q_x = f_x^T V_x; g of the players")
        g = after


def pull_run(b: Builder, run: range, entered: Mapping[str, int]) -> None:
    """One vector-Jacobian product of stages in a row; what passes between them is let go of."""
    graph, t = b.graph, run[-1]
    opened = [name for index in run for name in b.plan.stages[index].opened]
    left = {name: min((r for r in graph.segments(name) if r > t), default=0) for name in opened}
    outputs = [Var(b.name(name)) for name, reader in left.items() if reader]
    gradients = [Var(b.g(name, reader)) for name, reader in left.items() if reader]
    taps = [tap for index in run for tap in graph.uses_in(graph.stages[index].ops)]
    inputs = [Var(b.leaf(*one)) for one in entered.items()] + [Var(b.name(tap)) for tap in taps]
    writes = (*(b.g(*one) for one in entered.items()), *map(b.g_as_it_lies, taps))
    options: dict[str, Any] = {"vectorised": vectorises(graph, t)} if b.factored else {}
    if between := tuple(Var(b.name(name)) for name, reader in left.items() if not reader):
        options["between"] = between
    b.emit("backward", t, writes, "pull_back", outputs, inputs, gradients,
           note="Q_x = f_x^T V_x; g of the players", **options)  # fmt: skip
