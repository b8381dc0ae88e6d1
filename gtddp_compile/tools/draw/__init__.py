"""Drawing and inspection: text, DOT, Mermaid, SVG and HTML from one ``networkx.MultiDiGraph``.

Nothing here knows the compiler's classes: every function takes the graph that ``ControlGraph.to_networkx`` returns,
whose attributes :func:`gtddp_compile.graph.to_networkx` documents, and returns text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import networkx as nx

from gtddp_compile.errors import CompileError
from gtddp_compile.tools.draw.dot import dot
from gtddp_compile.tools.draw.html import html
from gtddp_compile.tools.draw.mermaid import mermaid
from gtddp_compile.tools.draw.svg import svg
from gtddp_compile.tools.draw.table import table

__all__ = ["SUFFIXES", "dot", "html", "mermaid", "save", "svg", "table"]

SUFFIXES: Mapping[str, Callable[[nx.MultiDiGraph[str]], str]] = {
    ".svg": svg,
    ".html": html,
    ".dot": dot,
    ".mmd": mermaid,
    ".txt": lambda graph: table(graph) + "\n",
    ".json": lambda graph: json.dumps(nx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False) + "\n",
}


def save(graph: nx.MultiDiGraph[str], path: str | Path, notes: Mapping[int, str] | None = None) -> None:
    """Write a control graph in the form that the path's suffix names (``.json``: networkx's node-link form).

    Args:
        graph: as made by ``ControlGraph.to_networkx``.
        path: ends in one of :data:`SUFFIXES`.
        notes: text for a stage by its index, shown by the page.

    Raises:
        CompileError: the suffix is none of these; nothing is written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise CompileError(
            f"no drawing is known by the suffix {suffix!r} of {str(path)!r}", f"Use one of {', '.join(SUFFIXES)}"
        )
    text = html(graph, notes) if suffix == ".html" else SUFFIXES[suffix](graph)
    Path(path).write_text(text, encoding="utf-8")
