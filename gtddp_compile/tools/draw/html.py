"""A control graph as one self-contained page: blocks that open, pan and zoom, hover texts, derivations, the table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources

import networkx as nx

from gtddp_compile.tools.draw.pagedata import page_data
from gtddp_compile.tools.draw.style import FAMILIES, SHORTCUT_COLOURS, SHORTCUT_WORDS, escape, summary
from gtddp_compile.tools.draw.table import table

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
HINT = (
    "Click a block to open it, its heading to close it. Drag or scroll to move, Ctrl and scroll to zoom. Hover for "
    "shapes, stage, live values and derivation; click an operation or a stage to keep its text here."
)


def html(graph: nx.MultiDiGraph[str], notes: Mapping[int, str] | None = None) -> str:
    """The page; it loads nothing from the network, and forbids itself to.

    Args:
        graph: as made by ``ControlGraph.to_networkx``.
        notes: text for a stage by its index, for instance its derivation, shown with the stage.

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
<style>{_part("page.css")}</style>
</head>
<body>
<main>
<header><h1>Control graph of {name}</h1>
<p>{escape(summary(graph))}; schedule {escape(data["schedule"])}.</p></header>
<div class="view">
<div class="pane"><svg role="img" aria-label="Control graph of {name}: {escape(summary(graph))}"><g></g></svg>
<div class="tools"><input id="find" type="search" placeholder="find an operation" aria-label="find an operation">
<button id="open" title="open one level more">open</button><button id="close" title="close all blocks">close</button>
<button id="in" title="zoom in">+</button><button id="out" title="zoom out">−</button>
<button id="all" title="fit the whole graph">fit</button></div>
</div>
<aside><p class="hint">{HINT}</p>{_legend()}<div id="said"></div></aside>
</div>
<div class="tip"><pre></pre></div>
<details><summary>Stages and shortcuts as a table</summary><pre class="wide">{escape(table(graph))}</pre></details>
</main>
<script type="application/json" id="data">{_json(page_data(graph, notes or {}))}</script>
<script>{_part("page.js")}</script>
</body>
</html>
"""


def _part(name: str) -> str:
    return resources.files("gtddp_compile.tools.draw").joinpath(name).read_text(encoding="utf-8")


def _json(data: object) -> str:
    """JSON inside a script element: no ``<`` can end the element early."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _legend() -> str:
    boxes = [(found.fill, found.line, found.name) for found in FAMILIES]
    entries = [
        f'<span><i style="background:{fill};border-color:{line}"></i>{escape(name)}</span>'
        for fill, line, name in boxes
    ]
    entries += [
        f'<span><i class="line" style="background:{colour}"></i>{escape(SHORTCUT_WORDS[kind])}</span>'
        for kind, colour in SHORTCUT_COLOURS.items()
    ]
    return f'<p class="legend">{"".join(entries)}</p>'
