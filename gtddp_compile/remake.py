"""Values and gradients that follow elementwise from others that are kept are made again in the forward sweep.

A layer is updated from what it read and from the gradient of its output. Between two layers there often lies nothing
but a normalisation and an activation; of what went into those and the gradient of what came out, which ``c`` needs
anyhow, they make both again, at a price that no layer's product would notice. So of a convolution, its batch-norm and
their activation two values are kept and not three: no more than backpropagation itself has to keep.

A part of a stage can be made again if it ends the stage and autograd keeps what goes into it anyhow. Which parts are
follows from the shapes: none, where a step holds little more than backpropagation does without them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import networkx as nx

from gtddp_compile.adjoints import written_out
from gtddp_compile.builder import Builder
from gtddp_compile.forget import compares, read_by
from gtddp_compile.graph import ControlGraph, Op
from gtddp_compile.instructions import Function, Instruction, StageFunction, Var
from gtddp_compile.recompute import Sweeps, rename

HOLDING = frozenset(
    {"batch_norm", "layer_norm", "group_norm", "rms_norm", "gelu", "silu", "mish", "elu", "leaky_relu", "softplus"}
)
"""Kinds whose backward pass keeps what they read until then."""

CHEAP = HOLDING | {"relu", "add"}
"""Kinds that may be made again: what they cost is of the order of reading and writing their values."""

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
    """Every part of the network that can be made again; ``b.held`` learns which players' outputs they begin with."""
    usable = b.plan.segments is None and not b.factored and b.plan.form.name in ("information", "block")
    parts = tuple(part for stage in b.plan.stages for part in _ends(b, stage.index)) if usable else ()
    inputs = ((name, part.function.stage) for part in parts for name in part.function.inputs)
    b.held = frozenset(name for name, stage in inputs if b.graph.stage_of.get(name, -1) == stage)
    return parts


def _ends(b: Builder, t: int) -> Iterator[Part]:
    """What ends a stage that torch differentiates, values that have nothing to do with each other apart."""
    graph = b.graph
    if written_out(b, t):
        return
    inside = {name for name in graph.stages[t].ops if graph.op(name).kind != "guard"}
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
    return Part(function, gradients, pulled, sum(_bytes(graph.op(name)) for name in ops))


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


def _bytes(op: Op) -> int:
    return math.prod(op.shape) * op.dtype.itemsize if op.shape is not None and op.dtype is not None else 0


# --- what to make again -----------------------------------------------------------------------------------------------


def make_again(b: Builder, sweeps: Sweeps, parts: tuple[Part, ...]) -> tuple[Sweeps, tuple[StageFunction, ...]]:
    """The sweeps with the parts made again that are worth it, and those parts' functions."""
    if not parts:
        return sweeps, ()
    kept = _Kept(b, sweeps)
    _, made = kept.needed(kept.choose(parts))
    written = _Written(b, made)
    forward = {t: tuple(written.stage(part)) for t, part in sweeps.forward.items()}
    return replace(sweeps, forward=forward), tuple(written.functions.values())


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
                yield self._b.name(op.name), _bytes(op)
                yield self._b.g_output(op.name), _bytes(op)
            if op.name in graph.value:
                yield from ((self._b.g(op.name, t), _bytes(op)) for t in graph.segments(op.name))
        for player in graph.players:
            if self._b.keeps(player.name):
                (use,) = self._b.uses(player.name)
                size = sum(_parameter_bytes(graph, name) for name in use.names)
                yield f"rows_{self._b.name(use.key)}", size * (graph.ops.batch or 1)

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
    kept = sum(_bytes(op) for op in graph.ops.ops if _keeps(graph, op))
    most = kept
    for stage in reversed(graph.stages):
        kept += sum(
            _parameter_bytes(graph, name) for player in stage.players for name in graph.player[player].parameters
        )
        most = max(most, kept)
        kept -= sum(_bytes(graph.op(name)) for name in stage.ops if _keeps(graph, graph.op(name)))
    return _all_parameters(graph) + most


def _keeps(graph: ControlGraph, op: Op) -> bool:
    """Whether autograd keeps the operation's value."""
    read = any(graph.op(user).kind not in PASSING for user in graph.ops.users[op.name])
    return op.kind != "input" and (read or op.kind in KEEPING)


def _all_parameters(graph: ControlGraph) -> int:
    return sum(_parameter_bytes(graph, name) for name in graph.ops.parameter_info)


def _parameter_bytes(graph: ControlGraph, name: str) -> int:
    info = graph.ops.parameter_info[name]
    return math.prod(info.shape) * info.dtype.itemsize


def _needed(instruction: Instruction) -> set[str]:
    """What an instruction reads; of an old value that is only compared with its new one, ``⟨g, x⟩`` is kept."""
    found = read_by(instruction)
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


class _Written:
    """The forward sweep, each part before the first instruction that reads anything of it.

    ``made``: which part makes which variable.
    """

    def __init__(self, b: Builder, made: dict[str, Part]) -> None:
        self._b, self._made, self._same = b, made, same_gradients(b)
        self._names: dict[str, str] = {}
        self.functions: dict[str, StageFunction] = {}

    def stage(self, instructions: tuple[Instruction, ...]) -> Iterator[Instruction]:
        """The instructions of one stage."""
        for one in instructions:
            for name in sorted(read_by(one) & self._made.keys()):
                yield from self._part(self._made[name], one.stage)
            yield rename(one, self._names)

    def _part(self, part: Part, stage: int) -> Iterator[Instruction]:
        function, b = part.function, self._b
        if function.name in self.functions:
            return
        self.functions[function.name] = function
        for name in takes(b, part):
            if name in self._made:
                yield from self._part(self._made[name], stage)
        writes = makes(b, part)
        wanted = {self._same.get(name, name) for name, maker in self._made.items() if maker is part}
        found = Instruction(
            "forward", stage, tuple(f"{name}_again" if name in wanted else "_" for name in writes), "make_again",
            (Function(function.name), Var("p"), Var("b_again"), tuple(Var(b.name(name)) for name in function.inputs),
             tuple(name and Var(name) for name in part.gradients), tuple(name is not None for name in part.pulled)),
            note=f"x and g of stage {function.stage} as they were",
        )  # fmt: skip
        yield rename(found, self._names)
        same = {name: name for name in writes} | {own: cut for own, cut in self._same.items() if cut in writes}
        self._names.update({name: f"{made}_again" for name, made in same.items() if name in self._made})
