"""A control graph as plain text: the same characters on every terminal, fit for comparison in tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from io import StringIO
from typing import Any

import networkx as nx
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from gtddp_compile.tools.draw.repeats import Run, runs
from gtddp_compile.tools.draw.style import shape_text, summary

WIDTH = 110
WHOLE, MOST_ROWS, MOST_NAMES = 60, 200, 4
"""More rows than ``WHOLE`` are folded where they repeat; more than ``MOST_ROWS`` even so are counted.

So are more names in a cell than ``MOST_NAMES``, in such a table."""
Row = tuple[str, str, str, str]
Fold = Callable[[Run], Row]


def table(graph: nx.MultiDiGraph[str]) -> str:
    """Stages with their players, cuts and merges, then the shortcuts, then one line of totals.

    Of a deep network, stages and shortcuts that repeat the ones before are said in one line.

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
    rows, alike = [], []
    few = len(data["stages"]) <= WHOLE
    for stage in data["stages"]:
        deciding = [players.get(name, {"name": name}) for name in stage["players"]]
        live = [f"{name} {shape_text(values[name]['shape'])}" if name in values else name for name in stage["live"]]
        lines = [_player_line(player) if "kind" in player else player["name"] for player in deciding]
        rows.append(
            (
                str(stage["index"]),
                "\n".join(lines),
                packed(_most(live, few), 40),
                packed(_most(stage["merges"], few), 24),
            )
        )
        shapes = tuple(tuple(values[name]["shape"]) if name in values else name for name in stage["live"])
        kinds = tuple((player.get("kind"), player.get("size")) for player in deciding)
        alike.append((kinds, shapes, len(stage["merges"])))
    for row in _folded(rows, alike, _more_stages(data["stages"])):
        found.add_row(*row)
    return found


def _more_stages(stages: Sequence[dict[str, Any]]) -> Fold:
    def say(run: Run) -> Row:
        first, last = run.start + run.period, run.stop - 1
        pattern = f"stage {run.start}" if run.period == 1 else f"stages {run.start}–{first - 1}"
        names = [stages[at]["players"] for at in (first, last)]
        ends = f": {names[0][0]} – {names[1][-1]}" if all(names) else ""
        return f"{first}–{last}", f"as {pattern}, {run.count - 1} times{ends}", "", ""

    return say


def _player_line(player: dict[str, Any]) -> str:
    tied = f" ×{len(player['uses'])}" if len(player["uses"]) > 1 else ""
    return f"{player['name']}: {player['kind']}{tied}, {player['size']:,}"


def _shortcuts(graph: nx.MultiDiGraph[str]) -> Table:
    found = _table("shortcut", "kind", "players", "region")
    rows, alike = [], []
    few = len(graph.graph["shortcuts"]) <= WHOLE
    for shortcut in graph.graph["shortcuts"]:
        rows.append(
            (
                f"{shortcut['fork']} → {shortcut['merge']}",
                shortcut["kind"].replace("_", " "),
                packed(_most(shortcut["players"], few), 36),
                "regular" if shortcut["regular"] else "irregular",
            )
        )
        ends = re.sub(r"\d+", "#", f"{shortcut['fork']} {shortcut['merge']}")
        alike.append((ends, shortcut["kind"], len(shortcut["players"]), shortcut["regular"]))

    def say(run: Run) -> Row:
        return f"and {run.period * (run.count - 1)} more alike, the last {rows[run.stop - 1][0]}", "", "", ""

    for row in _folded(rows, alike, say):
        found.add_row(*row)
    return found


def _folded(rows: Sequence[Row], alike: Sequence[Hashable], say: Fold) -> Iterator[Row]:
    """The rows; of many, those that repeat the ones before are said in one row, and there is an end."""
    if len(rows) <= WHOLE:
        yield from rows
        return
    at = shown = 0
    starts = {run.start: run for run in runs(alike)}
    while at < len(rows) and shown < MOST_ROWS:
        run = starts.get(at)
        yield from rows[at : at + run.period] if run else rows[at : at + 1]
        if run:
            yield say(run)
        shown += run.period + 1 if run else 1
        at = run.stop if run else at + 1
    if at < len(rows):
        yield f"and {len(rows) - at} more", "", "", ""


def _most(names: Sequence[str], few: bool) -> list[str]:
    """The names, all of them where there are ``few`` rows, else as many as can be read and the rest counted."""
    whole = few or len(names) <= MOST_NAMES + 1
    return list(names) if whole else [*names[:MOST_NAMES], f"+{len(names) - MOST_NAMES} more"]
