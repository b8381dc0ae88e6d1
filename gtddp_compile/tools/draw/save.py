"""Write a drawing to a file, the form chosen by the file's suffix."""

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


def _json(graph: nx.MultiDiGraph[str]) -> str:
    """Node-link form, as ``networkx.node_link_graph(data, edges="edges")`` reads it."""
    data = {
        "directed": True,
        "multigraph": True,
        "graph": graph.graph,
        "nodes": [{"id": name, **found} for name, found in graph.nodes(data=True)],
        "edges": [
            {"source": a, "target": b, "key": key, **found} for a, b, key, found in graph.edges(keys=True, data=True)
        ],
    }
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def _markdown(graph: nx.MultiDiGraph[str]) -> str:
    return f"```mermaid\n{mermaid(graph)}```\n"


def _text(graph: nx.MultiDiGraph[str]) -> str:
    return table(graph) + "\n"


SUFFIXES: dict[str, Callable[[nx.MultiDiGraph[str]], str]] = {
    ".svg": svg,
    ".html": html,
    ".dot": dot,
    ".gv": dot,
    ".mmd": mermaid,
    ".md": _markdown,
    ".txt": _text,
    ".json": _json,
}


def save(graph: nx.MultiDiGraph[str], path: str | Path, notes: Mapping[int, str] | None = None) -> None:
    """Write a control graph in the form that the path's suffix names.

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
            f"no drawing is known by the suffix {suffix!r} of {str(path)!r}",
            f"Use one of {', '.join(SUFFIXES)}",
        )
    text = html(graph, notes) if suffix == ".html" else SUFFIXES[suffix](graph)
    Path(path).write_text(text, encoding="utf-8")
