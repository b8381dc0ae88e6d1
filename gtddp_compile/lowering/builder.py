"""Names and bookkeeping while a plan is written down as instructions."""

from __future__ import annotations

import builtins
import itertools
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from sympy import MatrixExpr

from gtddp_compile import kernels
from gtddp_compile.graph import BufferRef, ControlGraph, ParamRef, Player, Ref, map_leaves
from gtddp_compile.lowering.instructions import (
    SAMPLES,
    Apply,
    Buffer,
    Function,
    Instruction,
    Param,
    Phase,
    Var,
    identifier,
)
from gtddp_compile.lowering.plan import LayerPlan, MetricBlock, Plan
from gtddp_compile.lowering.uses import Use, use_key

RESERVED = frozenset(
    {"torch", "F", "operator", "m", "p", "b", "q", "b_again", "inputs", "targets", "outputs", "math", "rows"}
    | {"ones", "aim", "rank", "rows_all", "tau", "start", "phi", "loss", "step", "random_state"}
    # local names and functions of an exported module (gtddp_compile.tools.export.python)
    | {"params", "buffers", "state", "options", "advancing", "drawn", "first", "after", "losses", "ParameterUpdates"}
    | {"factors", "refuse_negative", "BlockUpdates", "LOSS", "RANK"}
    | {"ranks", "samples", "information_own", "y_all", "w_all", "w_capped_all", "lambda_all"}
    | {"lambda_reached", "information_reached", "early", "pace", "full_aim", "above", "excess", "information"}
    | {"products", "w_capped"}
    | {f"{name}_alike" for name in ("lambda", "y", "s", "gamma", "factor", "lifted")}
)
PREFIXES = ("stage_", "player_", "prologue", "layer_")
"""Of the program's own functions and layers."""
NUMBERED = re.compile(
    r"(alpha|c|clipped|columns|cross|diagonal|factor|fall|gamma|lambda|lifted|moved|own|rho|root|s|system|w|y)_\d+"
    r"|(\w+_)?alike_\d+|lambda|w"
)
"""The program's own variables of a stage, or of a group of layers that are computed together."""


@dataclass
class Builder:
    """Collects instructions; knows every variable's name."""

    plan: Plan
    instructions: list[Instruction] = field(default_factory=list)
    formulas: dict[MatrixExpr, Any] = field(default_factory=dict)
    """Every derived formula so far, with placeholders for the stage."""
    gradients: dict[str, str] = field(default_factory=dict)
    """Variables of players' weighted gradients, where all are made before the first is used."""
    _names: dict[str, str] = field(default_factory=dict)
    _taken: set[str] = field(default_factory=set)
    _written: set[str] = field(default_factory=set)

    @property
    def names(self) -> dict[str, str]:
        """Identifiers of the qualified names that have been asked for."""
        return dict(self._names)

    @cached_property
    def outputs(self) -> frozenset[str]:
        """Operations whose values the model returns."""
        return frozenset(self.graph.ops.output_names)

    @property
    def graph(self) -> ControlGraph:
        """The control graph."""
        return self.plan.graph

    @property
    def factored(self) -> bool:
        """Whether every sample has columns of its own beside the gradient (docs/theory.md#columns)."""
        return self.plan.form.factored

    @property
    def drifts(self) -> bool:
        """Whether ``s`` is there: weight decay, inertia, or an ordinary gradient that is kept apart."""
        return self.plan.linear or self.factored

    def alpha(self, t: int) -> str:
        """What statistics at stage ``t`` are taken from: ``α`` after it, in the linear rollout ``α_T``."""
        return f"alpha_{len(self.plan.stages) if self.plan.form.name == 'joint' else t + 1}"

    @cached_property
    def counting(self) -> tuple[int | str, ...]:
        """Where the recursion goes on, as its variables are numbered: at the end, at the stages with blocks that are
        computed there, from the last to the first, and after them for layers that are computed together.
        """
        stages = [s.index for s in reversed(self.plan.stages) if self.plan.alone(s) or not s.blocks]
        return (len(self.plan.stages), *stages, *(("alike",) if self.plan.alike else ()))

    def after(self, place: int | str) -> int | str:
        """Where the recursion was before it came to a place."""
        return self.counting[self.counting.index(place) - 1]

    @property
    def rows(self) -> str:
        """Variable of the rows of every group in a Gram matrix."""
        return "rows_all" if self.factored else "rows"

    def emit(
        self, phase: Phase, stage: int, writes: str | tuple[str, ...], function: str, /, *args: Any, note: str = "",
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """Append one instruction; ``kwargs`` may have any names, ``function`` among them."""
        self.instructions.append(Instruction(phase, stage, writes, function, args, kwargs, note))

    def written(self, write: Callable[[], None]) -> tuple[Instruction, ...]:
        """The instructions that a call appends."""
        before = len(self.instructions)
        write()
        return tuple(self.instructions[before:])

    def name(self, qualified: str) -> str:
        """The identifier of a qualified name, the same every time."""
        if qualified not in self._names:
            plain = qualified.replace(".", "_")
            ours = plain.startswith(PREFIXES) or NUMBERED.fullmatch(plain)
            found = identifier(f"v_{qualified}" if ours else qualified, self._is_taken)
            self._taken.add(found)
            self._names[qualified] = found
        return self._names[qualified]

    def _is_taken(self, candidate: str) -> bool:
        return (
            candidate in self._taken
            or candidate in RESERVED
            or keyword.iskeyword(candidate)
            or hasattr(builtins, candidate)
            or hasattr(kernels, candidate)
        )

    def new(self, value: str) -> str:
        """A value in the forward sweep; what no player moves is what it was."""
        return f"{self.name(value)}_new" if self.graph.stage_of.get(value, -1) >= 0 else self.name(value)

    def leaf(self, value: str, stage: int) -> str:
        """A value cut from the graph before it, as a stage reads it."""
        return f"{self.name(value)}_at{stage}"

    def g(self, value: str, reader: int) -> str:
        """``g`` of a value at the cuts before ``reader``."""
        return f"g_{self.name(value)}_at{reader}"

    def g_output(self, op: str) -> str:
        """``g`` of a player's output."""
        return f"gh_{self.name(op)}"

    def g_as_it_lies(self, op: str) -> str:
        """``g`` of a player's output as it is pulled back, before samples are brought to the leading axis."""
        arranged = any(use.layouts for _, use in self.uses_at(op))
        return f"{self.g_output(op)}_lying" if arranged else self.g_output(op)

    def contraction(self, value: str, reader: int) -> str:
        """``⟨g_v, δv⟩``."""
        return f"d_{self.name(value)}_at{reader}"

    def uses(self, player: str) -> tuple[Use, ...]:
        """How every use of a player's parameters is differentiated."""
        return self.plan.layers[player].uses

    def layer(self, player: Player) -> LayerPlan:
        """How a player's layer is computed."""
        return self.plan.layers[player.name]

    def uses_at(self, op: str) -> tuple[tuple[Player, Use], ...]:
        """Players that use an operation, each with how."""
        players = self.graph.player_using.get(op, ())
        return tuple((player, use) for player in players for use in self.uses(player.name) if use.op == op)

    def identity(self, player: Player) -> str:
        """The identifier of a player: its operation's, unless several players decide there."""
        return self.name(use_key(self.graph, player, player.op))

    def name_of(self, block: MetricBlock) -> str:
        """The identifier of a block: its players'."""
        return "_and_".join(self.identity(player) for player in block.players)

    def first(self, block: MetricBlock) -> LayerPlan:
        """How the first of a block's layers is computed: those of a coalition keep nothing."""
        return self.layer(block.players[0])

    def first_time(self, variable: str) -> bool:
        """Whether this is the first time that somebody asks for the variable."""
        new = variable not in self._written
        self._written.add(variable)
        return new

    def synchronised(self, op: str) -> bool:
        """Whether an operation is a batch-norm under the moments of all ranks."""
        found = self.graph.op(op).kwargs
        return self.plan.ranks > 1 and bool(found.get("sync") and found.get("training"))

    def operand(self, ref: Ref | BufferRef | ParamRef | None) -> Any:
        """A kernel's operand or parameter, as a variable of the first sweep."""
        if ref is None:
            return None
        if isinstance(ref, BufferRef):
            return Buffer(ref.name)
        return Param(ref.name) if isinstance(ref, ParamRef) else Var(self.name(ref.name))

    def tree(self, structure: Any, rename: Mapping[str, str] | None = None) -> Any:
        """A nested structure of references as variables."""
        return map_leaves(
            structure,
            lambda leaf: Var((rename or {}).get(leaf.name, self.name(leaf.name))) if isinstance(leaf, Ref) else leaf,
        )

    def kernel(self, use: Use, suffix: str) -> str:
        """Name of a kernel of the use's rule."""
        return f"{use.rule.prefix}_{suffix}"

    def arrangement(self, use: Use) -> tuple[tuple[Any, ...] | None, ...]:
        """Where samples lie in a use's value and operands, as kernels take it, orders as variables."""
        return tuple(
            found and (*found, *((Var(self.name(layout.order)),) if layout and layout.order else ()))
            for found, layout in zip(use.arrangement, use.layouts, strict=True)
        )

    @cached_property
    def orders(self) -> frozenset[str]:
        """Operations that say in which order samples lie."""
        return frozenset(op.layout.order for op in self.graph.ops.ops if op.layout and op.layout.order)

    def how(self, use: Use) -> Any:
        """How the use's operation computes, as kernels take it; what is as usual is left out."""
        if not use.rule.how:
            return None
        given = dict(use.options)
        if use.function is not None:
            given["function"] = Function(f"player_{self.name(use.key)}")
            if use.extras:
                extras = (Var(self.name(extra)) for extra in use.extras)
                given["function"] = Apply("bind", (given["function"], *extras))
            if use.layouts:
                output, *rest = self.arrangement(use)
                given["function"] = Apply("arranged", (given["function"], SAMPLES, output, tuple(rest)))
        kind = kernels.KERNELS[use.rule.how]
        usual = kind._field_defaults  # type: ignore[attr-defined]
        told = {name: value for name, value in given.items() if name not in usual or usual[name] != value}
        first = tuple(told.pop(name) for name in itertools.takewhile(told.__contains__, kind._fields))  # type: ignore[attr-defined]
        return Apply(use.rule.how, first, tuple(told.items()))
