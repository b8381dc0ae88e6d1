"""What the structural passes build on the normal form: players, shortcuts, stages, cuts.

``OpGraph`` → ``PlayerGraph`` → ``ShortcutGraph`` → ``Schedule`` → ``ControlGraph``, each immutable, each made by one
pass from the one before. Theory: a *player* is an operation that owns parameters (its control), a *stage* is one player
or a coalition of them deciding at the same time, the *cut* before a stage is the set of values already computed and
still needed: the augmented state of the paper's Eq. 8, 13 and 26 for any acyclic network.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import networkx as nx

from gtddp_compile import draw
from gtddp_compile.graph import views
from gtddp_compile.graph.ops import Op, OpGraph

ShortcutKind = Literal["identity", "parametric", "parameter_free"]
UNSCHEDULED = -1
PROLOGUE = -1
"""Stage of what runs before the first player: constant through the step."""


@dataclass(frozen=True)
class Player:
    """An operation that owns parameters: it decides on a control.

    Attributes:
        name: qualified module name (``"layer1.0.conv1"``), or the parameter's name where a bare parameter is used.
        kind: the deciding operation's kind (``"linear"``, ``"conv"``, ``"batch_norm"``, …).
        parameters: canonical names of the trainable parameters it owns, in the order of use.
        op: name of the operation at which it decides: its first use.
        uses: names of all operations that read its parameters (``op`` first); more than one if weights are tied.
        expressions: operations computed from parameters alone on the way into ``uses`` (``weight * scale``), in order.
        stage: index of its stage; ``UNSCHEDULED`` before the schedule pass.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    op: str
    uses: tuple[str, ...]
    expressions: tuple[str, ...] = ()
    stage: int = UNSCHEDULED


@dataclass(frozen=True)
class Shortcut:
    """A path from a fork to a merge beside the main path.

    Attributes:
        fork: name of the value at which the paths part.
        merge: name of the operation at which they meet.
        kind: ``"identity"`` (the forked value itself arrives), ``"parametric"`` (players on the way: a shortcut mapping
            with controls of its own), ``"parameter_free"`` (operations without parameters on the way).
        players: names of the players on the shortcut path.
        ops: names of the operations on the shortcut path, fork and merge excluded.
        regular: whether the region is single-entry, single-exit: the fork dominates the merge and the merge
            post-dominates the fork.
    """

    fork: str
    merge: str
    kind: ShortcutKind
    players: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    regular: bool = True


@dataclass(frozen=True)
class Value:
    """A differentiable value that is live across at least one cut (or is the network's output).

    Attributes:
        name: the operation that computes it; ``"params:NAME"`` for a tied player's control waiting for a later use.
        shape: per-sample shape, batch axis dropped.
        born: stage that computes it; -1 for inputs and what is computed from them before any player.
        dies: last stage that reads it; the number of stages for an output.
        readers: stages that read it, in order.
        fixed: no player has acted on it, so its change δ is zero always.
        control: name of the tied player whose control it is, else ``None``.
    """

    name: str
    shape: tuple[int, ...]
    born: int
    dies: int
    readers: tuple[int, ...] = ()
    fixed: bool = False
    control: str | None = None


@dataclass(frozen=True)
class Stage:
    """One time step of the control problem.

    Attributes:
        index: t.
        players: names of the players deciding at t (a coalition if more than one).
        live: names of the values in the cut before t: the augmented state.
        consumed: those of ``live`` that operations of this stage read.
        carried: those of ``live`` still needed after it (a value can be both).
        produced: names of the values computed here that are in the cut after it.
        ops: names of the operations run here, in order.
        merges: names of the merges run here.
    """

    index: int
    players: tuple[str, ...]
    live: tuple[str, ...]
    consumed: tuple[str, ...]
    carried: tuple[str, ...]
    produced: tuple[str, ...]
    ops: tuple[str, ...]
    merges: tuple[str, ...] = ()


def _players_by(pairs: Iterable[tuple[Player, tuple[str, ...]]]) -> dict[str, tuple[Player, ...]]:
    """Players by each of the operations that are named beside them."""
    found: dict[str, tuple[Player, ...]] = {}
    for player, names in pairs:
        found.update((name, (*found.get(name, ()), player)) for name in names)
    return found


@dataclass(frozen=True)
class PlayerGraph:
    """The normal form with its players found; ``unused`` names trainable parameters without a path to the output."""

    ops: OpGraph
    players: tuple[Player, ...]
    unused: tuple[str, ...] = ()

    @cached_property
    def player_using(self) -> dict[str, tuple[Player, ...]]:
        """Players whose parameters an operation reads (first or later use), by the operation's name."""
        return _players_by((player, player.uses) for player in self.players)


@dataclass(frozen=True)
class ShortcutGraph:
    """Players and the shortcuts between them."""

    base: PlayerGraph
    shortcuts: tuple[Shortcut, ...]


@dataclass(frozen=True)
class Schedule:
    """A stage for every player and every operation (-1: before the first player, constant through the step)."""

    base: ShortcutGraph
    players: tuple[Player, ...]
    stage_of: Mapping[str, int]
    stages: int
    name: str = "asap"


@dataclass(frozen=True)
class ControlGraph:
    """The state-augmented control graph of a network (immutable; docs/theory.md#state; Eq. 8, 13, 26 of the paper).

    ``str()`` is a table, ``to_networkx``/``to_dot``/``to_mermaid``/``to_svg``/``to_html`` and ``save`` draw it.

    Attributes:
        notes: text for a stage by its index, shown by the page: its derivation, once there is one.
    """

    ops: OpGraph
    players: tuple[Player, ...]
    stages: tuple[Stage, ...]
    shortcuts: tuple[Shortcut, ...]
    values: tuple[Value, ...]
    prologue: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    schedule: str = "asap"
    name: str = "model"
    notes: Mapping[int, str] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def player(self) -> dict[str, Player]:
        """Players by name."""
        return {player.name: player for player in self.players}

    @cached_property
    def player_using(self) -> dict[str, tuple[Player, ...]]:
        """Players whose parameters an operation reads, at first or again, by the operation's name."""
        return _players_by((player, player.uses) for player in self.players)

    @cached_property
    def expressions(self) -> dict[str, tuple[Player, ...]]:
        """Operations computed from parameters alone, with the players whose parameters they read."""
        return _players_by((player, player.expressions) for player in self.players)

    def uses_in(self, ops: Iterable[str]) -> tuple[str, ...]:
        """Those of the operations that read trained parameters, in order."""
        return tuple(name for name in ops if name in self.player_using)

    def with_expressions(self, ops: Iterable[str]) -> tuple[str, ...]:
        """The operations with every parameter expression they read: recomputed where used, never a state."""
        kept = [name for name in ops if name not in self.expressions or name in self.player_using]
        needed, pending = set(kept), kept
        while pending:
            for name in self.op(pending.pop()).operands:
                if name in self.expressions and name not in needed:
                    needed.add(name)
                    pending.append(name)
        return tuple(sorted(needed, key=self.ops.position.__getitem__))

    @cached_property
    def value(self) -> dict[str, Value]:
        """Values by name."""
        return {value.name: value for value in self.values}

    def segments(self, name: str) -> tuple[int, ...]:
        """The stages at which a value's gradient at the cut changes: each later reader, and the loss.

        A tied control's uses do not accumulate along the cut: each later use is a contraction of its own.
        """
        value, total = self.value[name], len(self.stages)
        readers = tuple(reader for reader in value.readers if reader > value.born)
        return (*readers, total) if value.dies == total and not value.control else readers

    @cached_property
    def guards(self) -> tuple[Op, ...]:
        """Decisions on values, as :attr:`OpGraph.guards`."""
        return self.ops.guards

    @cached_property
    def stage_of(self) -> dict[str, int]:
        """Stage of every operation; -1 for the prologue."""
        found = dict.fromkeys(self.prologue, -1)
        found.update((name, stage.index) for stage in self.stages for name in stage.ops)
        return found

    def op(self, name: str) -> Op:
        """The operation called ``name``."""
        return self.ops.by_name[name]

    def to_networkx(self) -> nx.MultiDiGraph[str]:
        """Operations, operands, stages, cuts and shortcuts as plain data: :func:`.views.to_networkx` lists it."""
        return views.to_networkx(self)

    def to_dot(self) -> str:
        """Graphviz source, one cluster a stage."""
        return draw.dot(self.to_networkx())

    def to_mermaid(self) -> str:
        """A Mermaid flowchart, one subgraph a stage; folded into blocks where it would exceed Mermaid's limits."""
        return draw.mermaid(self.to_networkx())

    def to_svg(self, boxes: int = 150) -> str:
        """A standalone drawing: one band a stage, waiting values as coloured curves.

        Args:
            boxes: a network of more operations is folded into its blocks, so many boxes at most.
        """
        return draw.svg(self.to_networkx(), boxes)

    def to_html(self, notes: Mapping[int, str] | None = None) -> str:
        """One self-contained page: the drawing with pan, zoom and hover texts, and the tables.

        Args:
            notes: text shown for a stage, by its index, instead of the graph's own :attr:`notes`.
        """
        return draw.html(self.to_networkx(), self.notes if notes is None else notes)

    def save(self, path: str | Path) -> None:
        """Write the graph as ``.svg``, ``.html``, ``.dot``, ``.mmd``, ``.md``, ``.txt`` or ``.json``, by suffix."""
        draw.save(self.to_networkx(), path, self.notes)

    def __str__(self) -> str:
        return draw.table(self.to_networkx())

    def __repr__(self) -> str:
        return f"<ControlGraph of {self.name}: {len(self.players)} players, {len(self.stages)} stages>"

    def _repr_html_(self) -> str:
        return f'<div style="overflow:auto;max-height:720px">{draw.svg(self.to_networkx(), 60)}</div>'
