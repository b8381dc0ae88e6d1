"""A control graph as one self-contained page: blocks that open, pan and zoom, hover texts, derivations, the table."""

from __future__ import annotations

import json
from collections.abc import Mapping

import networkx as nx

from gtddp_compile.tools.draw import style
from gtddp_compile.tools.draw.pagedata import page_data
from gtddp_compile.tools.draw.table import table
from gtddp_compile.tools.page import page


def html(graph: nx.MultiDiGraph[str], notes: Mapping[int, str] | None = None) -> str:
    """The page; it loads nothing from the network, and forbids itself to. ``notes``: text for a stage by its index."""
    data = json.dumps(page_data(graph, notes or {}), ensure_ascii=False, separators=(",", ":"))
    return page(
        "draw/page.html.j2",
        title=f"Control graph of {graph.graph['name']}",
        css="draw/page.css",
        summary=style.summary(graph),
        schedule=graph.graph["schedule"],
        families=style.FAMILIES,
        shortcuts=style.SHORTCUT_COLOURS,
        words=style.SHORTCUT_WORDS,
        coalition=(style.COALITION_COLOUR, style.COALITION_WORDS),
        table=table(graph),
        data=data.replace("<", "\\u003c"),  # no "<" can end the element early
    )
