"""A control graph as one self-contained page: the drawing with pan, zoom and hover texts, and the tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

from gtddp_compile.draw.page import SCRIPT, STYLE
from gtddp_compile.draw.style import escape, shape_text, summary
from gtddp_compile.draw.svg import svg

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HINT = (
    "Drag or scroll to move, Ctrl and scroll to zoom, hover for shapes, click on a stage or an operation to keep its "
    "text here."
)


def html(graph: nx.MultiDiGraph[str], notes: Mapping[int, str] | None = None) -> str:
    """The page; it loads nothing from the network, and forbids itself to.

    Args:
        graph: as made by ``ControlGraph.to_networkx``.
        notes: text for a stage by its index, for instance its derivation, shown when the stage is clicked and in the
            table.

    Raises:
        CompileError: the layout engine is not installed, or it failed.
    """
    data = graph.graph
    name = escape(data["name"])
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Control graph of {name}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<div class="view">
<div class="pane">
{svg(graph)}<div class="tools"><button id="in" title="zoom in">+</button><button id="out" title="zoom out">−</button>
<button id="width" title="fit the width">width</button><button id="all" title="fit the whole graph">all</button></div>
</div>
<aside><h2>Control graph of {name}</h2><p>{escape(summary(graph))}; schedule {escape(data["schedule"])}.</p>
<p>{HINT}</p></aside>
</div>
<div class="tip"><pre></pre></div>
<h2>Stages</h2>
{_stages(graph, notes or {})}
{_shortcuts(data["shortcuts"])}
</main>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    body = "\n".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def _stages(graph: nx.MultiDiGraph[str], notes: Mapping[int, str]) -> str:
    players = {player["name"]: player for player in graph.graph["players"]}
    values = {value["name"]: value for value in graph.graph["values"]}
    heads = ["stage", "players", "live values (the cut before it)", "merges", *(["notes"] if notes else [])]
    rows = []
    for stage in graph.graph["stages"]:
        row = [
            str(stage["index"]),
            "<br>".join(_player(players.get(name, {"name": name})) for name in stage["players"]),
            ", ".join(_value(values.get(name, {"name": name})) for name in stage["live"]),
            ", ".join(map(escape, stage["merges"])),
        ]
        if notes:
            note = notes.get(stage["index"])
            block = f'<pre id="note-{stage["index"]}">{escape(note)}</pre>' if note else ""
            row.append(f"<details><summary>show</summary>{block}</details>" if note else "")
        rows.append(row)
    return _table(heads, rows)


def _player(player: dict[str, Any]) -> str:
    if "kind" not in player:
        return escape(player["name"])
    shapes = ", ".join(f"{name.rsplit('.', 1)[-1]} {shape_text(shape)}" for name, shape in player["parameters"])
    return f"{escape(player['name'])} <span>{escape(player['kind'])} · {escape(shapes)} · {player['size']:,}</span>"


def _value(value: dict[str, Any]) -> str:
    shape = f" <span>{escape(shape_text(value['shape']))}</span>" if "shape" in value else ""
    return escape(value["name"]) + shape


def _shortcuts(shortcuts: Sequence[dict[str, Any]]) -> str:
    if not shortcuts:
        return ""
    rows = [
        (
            escape(f"{shortcut['fork']} → {shortcut['merge']}"),
            escape(shortcut["kind"].replace("_", " ")),
            ", ".join(map(escape, shortcut["players"])),
            "regular" if shortcut["regular"] else "irregular",
        )
        for shortcut in shortcuts
    ]
    return "<h2>Shortcuts</h2>\n" + _table(["from fork to merge", "kind", "players", "region"], rows)
