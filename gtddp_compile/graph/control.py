"""The control graph: operations, players, stages, cuts and shortcuts of one network, and the same as plain data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import networkx as nx

from gtddp_compile.graph.ops import Op, OpGraph
from gtddp_compile.graph.structure import Player, Shortcut, Stage, Value, players_by

NORMALISATIONS = frozenset({"batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm"})


def tool(name: str) -> Any:
    """A module of ``gtddp_compile.tools``, found when a structure is asked for it: no structure imports a tool."""
    return import_module(f"gtddp_compile.tools.{name}")


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
        return players_by((player, player.uses) for player in self.players)

    @cached_property
    def expressions(self) -> dict[str, tuple[Player, ...]]:
        """Operations computed from parameters alone, with the players whose parameters they read."""
        return players_by((player, player.expressions) for player in self.players)

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
    def unbroken(self) -> int:
        """Most players in a row with neither a normalisation nor a merge of values between them."""
        row: dict[str, int] = {}
        for op in self.ops.ops:
            before = [row[name] for name in op.operands if row.get(name)]
            broken = len(before) > 1 or op.kind in NORMALISATIONS
            row[op.name] = 0 if broken else sum(before) + (op.name in self.player_using)
        return max(row.values(), default=0)

    @cached_property
    def depth(self) -> int:
        """Most players on a way without a normalisation, over merges too; each at its first use alone."""
        first, deepest = {player.op for player in self.players}, dict[str, int]()
        for op in self.ops.ops:
            before = max((deepest.get(name, 0) for name in op.operands), default=0)
            deepest[op.name] = 0 if op.kind in NORMALISATIONS else before + (op.name in first)
        return max(deepest.values(), default=0)

    @cached_property
    def tried(self) -> dict[str, Mapping[str, Any]]:
        """What trials of operations have found, by use: several passes ask, one trial is enough."""
        return {}

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
        """Operations, operands, stages, cuts and shortcuts as plain data: :func:`to_networkx` lists it."""
        return to_networkx(self)

    def to_dot(self) -> str:
        """Graphviz source, one cluster a stage."""
        return str(tool("draw").dot(self.to_networkx()))

    def to_mermaid(self) -> str:
        """A Mermaid flowchart, one subgraph a stage; folded into blocks where it would exceed Mermaid's limits."""
        return str(tool("draw").mermaid(self.to_networkx()))

    def to_svg(self, boxes: int = 150) -> str:
        """A standalone drawing: one band a stage, waiting values as coloured curves.

        Args:
            boxes: a network of more operations is folded into its blocks, so many boxes at most.
        """
        return str(tool("draw").svg(self.to_networkx(), boxes))

    def to_html(self, notes: Mapping[int, str] | None = None) -> str:
        """One self-contained page: the drawing with pan, zoom and hover texts, and the tables.

        Args:
            notes: text shown for a stage, by its index, instead of the graph's own :attr:`notes`.
        """
        return str(tool("draw").html(self.to_networkx(), self.notes if notes is None else notes))

    def save(self, path: str | Path) -> None:
        """Write the graph as ``.svg``, ``.html``, ``.dot``, ``.mmd``, ``.txt`` or ``.json``, by suffix."""
        tool("draw").save(self.to_networkx(), path, self.notes)

    def __str__(self) -> str:
        return str(tool("draw").table(self.to_networkx()))

    def __repr__(self) -> str:
        return f"<ControlGraph of {self.name}: {len(self.players)} players, {len(self.stages)} stages>"

    def _repr_html_(self) -> str:
        return f'<div style="overflow:auto;max-height:720px">{tool("draw").svg(self.to_networkx(), 60)}</div>'


def to_networkx(graph: ControlGraph) -> nx.MultiDiGraph[str]:
    """The operations of a control graph, with stages, cuts, players and shortcuts as attributes.

    Args:
        graph: the control graph.

    Returns:
        A graph with one node an operation (its name) and one edge an operand, from the operation that computes a value
        to the one that reads it; tied weights add an edge from the player's first use to each later one.

        Node attributes: ``kind``, ``module``, ``source``, ``shape`` (batch axis included, or ``None``), ``stage`` (-1:
        before any player), ``player`` (the player that decides there, or ``None``), ``coalition`` (players that decide
        together there, or none), ``parameters`` (names of all that it reads), ``merge`` (whether it is the merge of a
        shortcut), ``input``, ``output`` and ``live`` (``None``, or ``born``, ``dies``, ``readers``, ``fixed`` of the
        value that it computes).

        Edge attributes: ``crosses`` (stages before which the value waits in the cut on its way along this edge),
        ``shortcut`` (kind of the shortcut it is on, or ``None``) and ``control`` (name of the tied player whose control
        it is, or ``None``).

        Graph attributes: ``name``, ``schedule``, ``players``, ``stages``, ``shortcuts``, ``values``, ``unused``,
        ``mixing`` (operations that mix samples), ``prologue``, ``inputs``, ``outputs``: lists of names, or of
        dictionaries with the fields of ``gtddp_compile.graph``'s classes of those names; a player's ``parameters`` are
        pairs of name and shape.
    """
    shapes = {info.name: list(info.shape) for info in graph.ops.parameters}
    outputs = graph.ops.output_names
    found: nx.MultiDiGraph[str] = nx.MultiDiGraph(
        name=graph.name,
        schedule=graph.schedule,
        players=[_player(player, shapes) for player in graph.players],
        stages=[_plain(stage) for stage in graph.stages],
        shortcuts=[_plain(shortcut) for shortcut in graph.shortcuts],
        values=[_plain(value) for value in graph.values],
        unused=list(graph.unused),
        mixing=list(graph.ops.mixing),
        prologue=list(graph.prologue),
        inputs=list(graph.ops.inputs),
        outputs=list(outputs),
    )
    deciding = {player.op: player.name for player in graph.players}
    together = {player.op: list(graph.stages[player.stage].players) for player in graph.players}
    merges = {name for stage in graph.stages for name in stage.merges}
    merges.update(shortcut.merge for shortcut in graph.shortcuts)
    for op in graph.ops.ops:
        value = graph.value.get(op.name)
        found.add_node(
            op.name,
            kind=op.kind,
            module=op.module,
            source=op.source,
            shape=None if op.shape is None else [int(size) for size in op.shape],
            stage=graph.stage_of.get(op.name, -1),
            player=deciding.get(op.name),
            coalition=together[op.name] if len(together.get(op.name, ())) > 1 else [],
            parameters=list(op.parameters),
            merge=op.name in merges,
            input=op.name in graph.ops.inputs,
            output=op.name in outputs,
            live=None if value is None else {k: v for k, v in _plain(value).items() if k in _LIVE},
        )
    _add_edges(found, graph)
    return found


_LIVE = ("born", "dies", "readers", "fixed")


def _add_edges(found: nx.MultiDiGraph[str], graph: ControlGraph) -> None:
    on_shortcut: dict[tuple[str, str], str] = {}
    for shortcut in graph.shortcuts:
        path = {shortcut.fork, shortcut.merge, *shortcut.ops}
        for name in (*shortcut.ops, shortcut.merge):
            op = graph.ops.by_name.get(name)
            sources = [source for source in (op.operands if op else ()) if source in path]
            if name == shortcut.merge and shortcut.ops:  # the main path may also end in an edge from the fork
                sources = [source for source in sources if source != shortcut.fork]
            for source in sources:
                on_shortcut.setdefault((source, name), shortcut.kind)
    for op in graph.ops.ops:
        for source in op.operands:
            crosses = _crossed(graph, source, source, op.name)
            kind = on_shortcut.get((source, op.name))
            found.add_edge(source, op.name, crosses=crosses, shortcut=kind, control=None)
    for player in graph.players:
        for use in player.uses[1:]:
            crosses = _crossed(graph, f"params:{player.name}", player.op, use)
            found.add_edge(player.op, use, crosses=crosses, shortcut=None, control=player.name)


def _crossed(graph: ControlGraph, value: str, source: str, reader: str) -> list[int]:
    """Stages after the source's and up to the reader's whose cut holds the value."""
    first, last = graph.stage_of.get(source, -1), graph.stage_of.get(reader, -1)
    return [stage.index for stage in graph.stages[first + 1 : last + 1] if value in stage.live]


def _player(player: Player, shapes: dict[str, list[int]]) -> dict[str, Any]:
    parameters = [[name, shapes.get(name, [])] for name in player.parameters]
    return {
        "name": player.name,
        "kind": player.kind,
        "parameters": parameters,
        "size": sum(prod(shapes[name]) for name in player.parameters if name in shapes),
        "op": player.op,
        "uses": list(player.uses),
        "stage": player.stage,
    }


def _plain(record: Stage | Shortcut | Value) -> dict[str, Any]:
    """Its fields, tuples as lists."""
    return {name: list(held) if isinstance(held, tuple) else held for name, held in vars(record).items()}
