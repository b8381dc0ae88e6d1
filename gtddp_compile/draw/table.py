"""A control graph as plain text: the same characters on every terminal, fit for comparison in tests."""

from __future__ import annotations

from collections.abc import Iterable
from io import StringIO

import networkx as nx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gtddp_compile.draw.style import shape_text, summary

WIDTH = 110


def table(graph: nx.MultiDiGraph[str]) -> str:
    """Stages with their players, cuts and merges, then the shortcuts, then one line of totals.

    Args:
        graph: as made by ``ControlGraph.to_networkx``.

    Returns:
        Text at most 110 columns wide (unless a single word is wider), without colour codes or trailing blanks.
    """
    data = graph.graph
    tables = [_stages(graph)]
    if data["shortcuts"]:
        tables.append(_shortcuts(graph))
    head = f"Control graph of {data['name']} (schedule {data['schedule']})"
    return "\n".join((head, *map(_rendered, tables), summary(graph)))


def packed(items: Iterable[str], width: int) -> str:
    """Items with commas between them, filled into lines, an item broken only if it is wider than a line."""
    lines = [""]
    for item in items:
        joined = f"{lines[-1]}, {item}" if lines[-1] else item
        if lines[-1] and len(joined) > width - 1:
            lines[-1] += ","
            lines.append(item)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _rendered(found: Table) -> str:
    console = Console(
        file=StringIO(),
        width=WIDTH,
        color_system=None,
        force_terminal=False,
        legacy_windows=False,
        emoji=False,
        markup=False,
        highlight=False,
        _environ={},
    )
    console.print(found)
    assert isinstance(console.file, StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().splitlines()]
    return "\n".join(line for line in lines if line) + "\n"


def _table(*columns: str) -> Table:
    found = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        found.add_column(column, overflow="fold", justify="right" if column == "stage" else "left")
    return found


def _stages(graph: nx.MultiDiGraph[str]) -> Table:
    data = graph.graph
    players = {player["name"]: player for player in data["players"]}
    values = {value["name"]: value for value in data["values"]}
    found = _table("stage", "players: kind, parameters", "live values (the cut before it)", "merges")
    for stage in data["stages"]:
        lines = [_player_line(players[name]) if name in players else name for name in stage["players"]]
        live = [f"{name} {shape_text(values[name]['shape'])}" if name in values else name for name in stage["live"]]
        found.add_row(str(stage["index"]), "\n".join(lines), packed(live, 40), packed(stage["merges"], 24))
    return found


def _player_line(player: dict[str, object]) -> str:
    tied = f" ×{len(player['uses'])}" if len(player["uses"]) > 1 else ""  # type: ignore[arg-type]
    return f"{player['name']}: {player['kind']}{tied}, {player['size']:,}"


def _shortcuts(graph: nx.MultiDiGraph[str]) -> Table:
    found = _table("shortcut", "kind", "players", "region")
    for shortcut in graph.graph["shortcuts"]:
        found.add_row(
            f"{shortcut['fork']} → {shortcut['merge']}",
            shortcut["kind"].replace("_", " "),
            packed(shortcut["players"], 36),
            "regular" if shortcut["regular"] else "irregular",
        )
    return found
