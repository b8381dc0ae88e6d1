"""Make again: values and gradients that follow elementwise from others that are kept.

Takes the sweeps; guarantees the same steps with less held between them. A layer is updated from what it read and from
the gradient of its output. Between two layers there often lies nothing but a normalisation and an activation; of what
went into those and the gradient of what came out, which ``c`` needs anyhow, they make both again in the forward sweep,
at a price that no layer's product would notice. So of a convolution, its batch-norm and their activation two values are
kept and not three: no more than backpropagation itself has to keep.

Which parts (``lowering/write/ends.py``) are made again follows from the shapes: none, where a step holds little more
than backpropagation does without them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

from gtddp_compile.graph import ControlGraph, Op
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import Function, Instruction, Phase, StageFunction, Var
from gtddp_compile.lowering.lowered import Sweeps, Written, compares
from gtddp_compile.lowering.write.calls import kept_rows, moments
from gtddp_compile.lowering.write.ends import Part

PASSING = frozenset(
    {"add", "cat", "flatten", "unflatten", "reshape", "view", "transpose", "permute", "chunk", "getitem", "relu"}
    | {"avg_pool2d", "adaptive_avg_pool2d", "mean", "sum"}
)
"""Kinds whose backward pass keeps nothing of what they read."""

KEEPING = frozenset({"relu", "softmax", "sigmoid", "tanh"})
"""Kinds whose backward pass keeps what they return."""

AIM = 1.4
"""What a step holds between its sweeps, against what backpropagation holds at most, both with the parameters and
estimated from the shapes: parts are made again while it is more."""

MOVING = 4
"""Values of the largest size that are there for a moment: of a layer what it reads, returns, and torch's own copies."""

WORTH = 0.25
"""Least part of a part's own values that less is kept by making it again."""

LEAST = 2**20
"""Bytes below which it is not worth a call."""


def remake(written: Written) -> Written:
    """The program with the parts made again that are worth it."""
    if not written.parts:
        return written
    b, sweeps = Builder.like(written.plan, written.names, written.uses), written.sweeps
    kept = _Kept(b, sweeps)
    _, made = kept.needed(kept.choose(written.parts))
    again = _Again(b, made, {name for part in sweeps.gains.values() for one in part for name in one.written})
    forward = {t: tuple(again.stage(part)) for t, part in sweeps.forward.items()}
    return replace(
        written, sweeps=replace(sweeps, forward=forward), dynamics=(*written.dynamics, *again.functions.values())
    )


class _Kept:
    """What the forward sweep needs of the sweeps before it."""

    def __init__(self, b: Builder, sweeps: Sweeps) -> None:
        self._b, self._same, self._sum = b, same_gradients(b), _added(b)
        self._size = dict(self._sizes())
        self._needed = {name for part in sweeps.forward.values() for one in part for name in _needed(one)}

    def _sizes(self) -> Iterator[tuple[str, int]]:
        graph = self._b.graph
        for op in graph.ops.ops:
            if op.kind != "input":
                yield self._b.name(op.name), op.nbytes
                yield self._b.g_output(op.name), op.nbytes
            if op.name in graph.value:
                yield from ((self._b.g(op.name, t), op.nbytes) for t in graph.segments(op.name))
        for player in graph.players:
            if self._b.keeps(player.name):
                (use,) = self._b.uses(player.name)
                size = sum(graph.ops.parameter_info[name].nbytes for name in use.names)
                yield kept_rows(self._b, use), size * (graph.ops.batch or 1)

    def needed(self, parts: Iterable[Part]) -> tuple[set[str], dict[str, Part]]:
        """Variables that are read in the forward sweep if these parts are made again, and which part makes which."""
        made = self._made(parts)
        pending, found = list(self._needed), set()
        while pending:
            name = pending.pop()
            if name in found:
                continue
            found.add(name)
            part = made.get(self._same.get(name, name))
            if part is not None:
                pending += takes(self._b, part)
        return found, {name: made[cut] for name in found if (cut := self._same.get(name, name)) in made}

    def _made(self, parts: Iterable[Part]) -> dict[str, Part]:
        """Which part makes which variable: a value not if another makes its gradient, for which it needs the value."""
        pulled = {name: part for part in parts for name in part.pulled if name is not None}
        found = {self._same.get(name, name): part for name, part in pulled.items()}
        for part in parts:
            pairs = zip(part.function.returns, part.gradients, strict=True)
            found.update({self._b.name(name): part for name, gradient in pairs if gradient not in pulled})
        return found

    def bytes(self, parts: Iterable[Part]) -> int:
        """What is kept for it."""
        found, made = self.needed(parts)
        kept = {self._same.get(name, name) for name in found - made.keys()}
        return sum(self._size.get(name, 0) for name in {self._sum.get(name, name) for name in kept})

    def choose(self, parts: tuple[Part, ...]) -> tuple[Part, ...]:
        """Leave out, one after the other, what does not pay; then, while the aim is kept, what pays least."""
        chosen = self._leave_out(parts, parts, lambda part, more: more < max(LEAST, WORTH * part.size))
        aim = AIM * held_by_backpropagation(self._b.graph)
        beside = _all_parameters(self._b.graph) + MOVING * max(self._size.values(), default=0)
        least = self.bytes(chosen)
        gain = {part.function.name: self.bytes(p for p in chosen if p is not part) - least for part in chosen}
        order = sorted(chosen, key=lambda part: gain[part.function.name] / part.size)
        return self._leave_out(chosen, order, lambda part, more: self._held + more + beside <= aim)

    def _leave_out(
        self, parts: Iterable[Part], order: Iterable[Part], enough: Callable[[Part, int], bool]
    ) -> tuple[Part, ...]:
        chosen = tuple(parts)
        self._held = self.bytes(chosen)
        for part in order:
            without = tuple(other for other in chosen if other is not part)
            kept = self.bytes(without)
            if enough(part, kept - self._held):
                chosen, self._held = without, kept
        return chosen


def held_by_backpropagation(graph: ControlGraph) -> int:
    """Bytes of parameters, and at most of what autograd keeps and of gradients of parameters, in turns; estimated."""
    kept = sum(op.nbytes for op in graph.ops.ops if _keeps(graph, op))
    most = kept
    for stage in reversed(graph.stages):
        kept += sum(
            graph.ops.parameter_info[name].nbytes
            for player in stage.players
            for name in graph.player[player].parameters
        )
        most = max(most, kept)
        kept -= sum(graph.op(name).nbytes for name in stage.ops if _keeps(graph, graph.op(name)))
    return _all_parameters(graph) + most


def _keeps(graph: ControlGraph, op: Op) -> bool:
    """Whether autograd keeps the operation's value."""
    read = any(graph.op(user).kind not in PASSING for user in graph.ops.users[op.name])
    return op.kind != "input" and (read or op.kind in KEEPING)


def _all_parameters(graph: ControlGraph) -> int:
    return sum(info.nbytes for info in graph.ops.parameter_info.values())


def _needed(instruction: Instruction) -> set[str]:
    """What an instruction reads; of an old value that is only compared with its new one, ``⟨g, x⟩`` is kept."""
    found = set(instruction.reads)
    return found - {instruction.args[2].name} if compares(instruction) else found


def _added(b: Builder) -> dict[str, str]:
    """Of players' outputs that are added to something, the gradient: that of the sum."""
    graph, found = b.graph, {}
    for stage in b.plan.stages:
        for name in stage.opened:
            for operand in graph.op(name).operands if graph.op(name).kind == "add" else ():
                alone = graph.ops.users[operand] == (name,) and graph.op(operand).shape == graph.op(name).shape
                if alone and b.uses_at(operand):
                    found[b.g_output(operand)] = b.g(name, graph.segments(name)[0])
    return found


def same_gradients(b: Builder) -> dict[str, str]:
    """Of players' outputs that their stage only hands on, the gradient in the stage: that at the cut after it."""
    found = {}
    for stage in b.plan.stages:
        inside = set(b.graph.stages[stage.index].ops)
        for name in stage.opened:
            uses = b.uses_at(name)
            if uses and not any(use.layouts for _, use in uses) and inside.isdisjoint(b.graph.ops.users[name]):
                found[b.g_output(name)] = b.g(name, b.graph.segments(name)[0])
    return found


def makes(b: Builder, part: Part) -> tuple[str, ...]:
    """Variables that a part makes again: its values, then the gradients of what it takes."""
    values = (b.name(name) for name in part.function.returns)
    return (*values, *(name for name in part.pulled if name is not None))


def takes(b: Builder, part: Part) -> tuple[str, ...]:
    """Variables that are kept for it."""
    values = (b.name(name) for name in part.function.inputs)
    return (*values, *(name for name in part.gradients if name is not None))


# --- writing it down --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Known:
    """What is known of the batch where a batch-norm is made again.

    Attributes:
        name: the variable.
        sums: what the variable is made of in the forward sweep; nothing where it is that of the moments alone.
    """

    name: str
    sums: tuple[str, ...] = ()


class _Again:
    """The forward sweep, each part before the first instruction that reads anything of it.

    ``made``: which part makes which variable. ``written``: variables of the backward sweep, moments among them.
    """

    def __init__(self, b: Builder, made: dict[str, Part], written: set[str]) -> None:
        self._b, self._made, self._same, self._written = b, made, same_gradients(b), written
        self._names: dict[str, str] = {}
        self.functions: dict[str, StageFunction] = {}

    def stage(self, instructions: tuple[Instruction, ...]) -> Iterator[Instruction]:
        """The instructions of one stage."""
        for one in instructions:
            for name in sorted(set(one.reads) & self._made.keys()):
                yield from self._part(self._made[name], one.phase, one.stage)
            yield one.renamed(self._names)

    def _part(self, part: Part, phase: Phase, stage: int) -> Iterator[Instruction]:
        b, known = self._b, self._known(part)
        function = replace(part.function, moments={op: one.name for op, one in known.items()})
        if function.name in self.functions:
            return
        self.functions[function.name] = function
        for name in takes(b, part):
            if name in self._made:
                yield from self._part(self._made[name], phase, stage)
        for one in known.values():
            if one.sums:
                yield Instruction(phase, stage, (f"*{one.name}",), "batch_known", tuple(map(Var, one.sums)),
                                  note="means of g too")  # fmt: skip
        writes, bound = makes(b, part), ", ".join((function.name, *function.moments.values()))
        wanted = {self._same.get(name, name) for name, maker in self._made.items() if maker is part}
        found = Instruction(
            phase, stage, tuple(f"{name}_again" if name in wanted else "_" for name in writes), "remake",
            (Function(f"bind({bound})" if known else function.name), Var("p"), Var("b_again"),
             tuple(Var(b.name(name)) for name in function.inputs), tuple(name and Var(name) for name in part.gradients),
             tuple(name is not None for name in part.pulled), tuple(name in wanted for name in writes)),
            {"by_entry": True} if self._by_entry(part, known) else None,
            note=f"x and g of stage {function.stage} as they were",
        )  # fmt: skip
        yield found.renamed(self._names)
        same = {name: name for name in writes} | {own: cut for own, cut in self._same.items() if cut in writes}
        self._names.update({name: f"{made}_again" for name, made in same.items() if name in self._made})

    def _known(self, part: Part) -> dict[str, _Known]:
        """What is known of the batch, by the part's batch-norms."""
        found = {}
        for op in part.function.ops:
            name = moments(self._b, op)
            if name in self._written:
                ((_, use),) = self._b.uses_at(op)
                sums = (name, kept_rows(self._b, use)) if use.wants == (True, True) else ()
                found[op] = _Known(f"known_{self._b.name(op)}" if sums else name, sums)
        return found

    def _by_entry(self, part: Part, known: Mapping[str, _Known]) -> bool:
        """Whether its values are all of one shape, samples first, and no sample's entries depend on another's."""
        inputs, ops = (tuple(map(self._b.graph.op, names)) for names in (part.function.inputs, part.function.ops))
        alike = len({op.shape for op in (*inputs, *ops)}) == 1 and not any(op.layout for op in (*inputs, *ops))
        met = [op.name for op in ops if op.kind == "batch_norm" and (op.kwargs.get("training") or op.args[1] is None)]
        return alike and all(name in known and known[name].sums for name in met)
