"""A control graph as plain data in a ``networkx.MultiDiGraph``: what ``gtddp_compile.draw`` reads.

Everything in it is a string, number, boolean, ``None``, list or dictionary, so ``networkx.node_link_data`` of it is
JSON. It is a fresh copy: changing it changes nothing else.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import networkx as nx

if TYPE_CHECKING:
    from gtddp_compile.graph.control import ControlGraph, Player, Shortcut, Stage, Value


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
        stages=[_stage(stage) for stage in graph.stages],
        shortcuts=[_shortcut(shortcut) for shortcut in graph.shortcuts],
        values=[_value(value) for value in graph.values],
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
            live=None if value is None else {k: v for k, v in _value(value).items() if k in _LIVE},
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


def _stage(stage: Stage) -> dict[str, Any]:
    return {
        "index": stage.index,
        "players": list(stage.players),
        "live": list(stage.live),
        "consumed": list(stage.consumed),
        "carried": list(stage.carried),
        "produced": list(stage.produced),
        "ops": list(stage.ops),
        "merges": list(stage.merges),
    }


def _shortcut(shortcut: Shortcut) -> dict[str, Any]:
    return {
        "fork": shortcut.fork,
        "merge": shortcut.merge,
        "kind": shortcut.kind,
        "players": list(shortcut.players),
        "ops": list(shortcut.ops),
        "regular": shortcut.regular,
    }


def _value(value: Value) -> dict[str, Any]:
    return {
        "name": value.name,
        "shape": [int(size) for size in value.shape],
        "born": value.born,
        "dies": value.dies,
        "readers": list(value.readers),
        "fixed": value.fixed,
        "control": value.control,
    }
