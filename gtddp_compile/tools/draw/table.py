"""A control graph as plain text: the same characters on every terminal, fit for comparison in tests."""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import networkx as nx
from rich.box import SIMPLE_HEAD
from rich.table import Table

from gtddp_compile.tools.draw.repeats import Run, runs
from gtddp_compile.tools.draw.style import shape_text, summary
from gtddp_compile.wording import rendered

WIDTH = 110
WHOLE, MOST_ROWS, MOST_NAMES = 60, 200, 4
"""More rows than ``WHOLE`` are folded where they repeat; more than ``MOST_ROWS`` even so are counted.

So are more names in a cell than ``MOST_NAMES``, in such a table."""
Row = tuple[str, str, str, str]


def table(graph: nx.MultiDiGraph[str]) -> str:
    """Stages with their players, cuts and merges, then the shortcuts, then one line of totals.

    Of a deep network, stages and shortcuts that repeat the ones before are said in one line. At most 110 columns wide
    (unless a single word is wider), without colour codes or trailing blanks.
    """
    data = graph.graph
    tables = [_stages(graph), *([_shortcuts(graph)] if data["shortcuts"] else [])]
    texts = ["\n".join(filter(None, rendered(found, WIDTH).splitlines())) + "\n" for found in tables]
    head = f"Control graph of {data['name']} (schedule {data['schedule']})"
    return "\n".join((head, *texts, summary(graph)))


def packed(names: Sequence[str], width: int, few: bool) -> str:
    """Names with commas between them, filled into lines; where there are not ``few`` rows, as many as can be read."""
    if not few and len(names) > MOST_NAMES + 1:
        names = [*names[:MOST_NAMES], f"+{len(names) - MOST_NAMES} more"]
    lines = [""]
    for name in names:
        joined = f"{lines[-1]}, {name}" if lines[-1] else name
        if lines[-1] and len(joined) > width - 1:
            lines[-1] += ","
            lines.append(name)
        else:
            lines[-1] = joined
    return "\n".join(lines)


def _stages(graph: nx.MultiDiGraph[str]) -> Table:
    data = graph.graph
    players = {player["name"]: player for player in data["players"]}
    shapes = {value["name"]: value["shape"] for value in data["values"]}
    rows: list[Row] = []
    alike: list[Hashable] = []
    few = len(data["stages"]) <= WHOLE
    for stage in data["stages"]:
        deciding = [players.get(name, {"name": name}) for name in stage["players"]]
        live = [f"{name} {shape_text(shapes[name])}" if name in shapes else name for name in stage["live"]]
        cells = ("\n".join(map(_player_line, deciding)), packed(live, 40, few), packed(stage["merges"], 24, few))
        rows.append((str(stage["index"]), *cells))
        kinds = tuple((player.get("kind"), player.get("size")) for player in deciding)
        waiting = tuple(tuple(shapes[name]) if name in shapes else name for name in stage["live"])
        alike.append((kinds, waiting, len(stage["merges"])))

    def say(run: Run) -> Row:
        first, last = run.start + run.period, run.stop - 1
        pattern = f"stage {run.start}" if run.period == 1 else f"stages {run.start}–{first - 1}"
        names = [data["stages"][at]["players"] for at in (first, last)]
        ends = f": {names[0][0]} – {names[1][-1]}" if all(names) else ""
        return f"{first}–{last}", f"as {pattern}, {run.count - 1} times{ends}", "", ""

    columns = ("stage", "players: kind, parameters", "live values (the cut before it)", "merges")
    return _table(columns, _folded(rows, alike, say))


def _player_line(player: dict[str, Any]) -> str:
    if "kind" not in player:
        return str(player["name"])
    tied = f" ×{len(player['uses'])}" if len(player["uses"]) > 1 else ""
    return f"{player['name']}: {player['kind']}{tied}, {player['size']:,}"


def _shortcuts(graph: nx.MultiDiGraph[str]) -> Table:
    shortcuts = graph.graph["shortcuts"]
    few = len(shortcuts) <= WHOLE
    rows: list[Row] = [
        (f"{one['fork']} → {one['merge']}", one["kind"].replace("_", " "), packed(one["players"], 36, few),
         "regular" if one["regular"] else "irregular")
        for one in shortcuts
    ]  # fmt: skip
    alike = [
        (re.sub(r"\d+", "#", f"{one['fork']} {one['merge']}"), one["kind"], len(one["players"]), one["regular"])
        for one in shortcuts
    ]

    def say(run: Run) -> Row:
        return f"and {run.period * (run.count - 1)} more alike, the last {rows[run.stop - 1][0]}", "", "", ""

    return _table(("shortcut", "kind", "players", "region"), _folded(rows, alike, say))


def _table(columns: Iterable[str], rows: Iterable[Row]) -> Table:
    found = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in columns:
        found.add_column(column, overflow="fold", justify="right" if column == "stage" else "left")
    for row in rows:
        found.add_row(*row)
    return found


def _folded(rows: Sequence[Row], alike: Sequence[Hashable], say: Callable[[Run], Row]) -> Iterator[Row]:
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
