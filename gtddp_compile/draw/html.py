"""Not yet."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx


def html(graph: nx.MultiDiGraph, notes: Mapping[int, str] | None = None) -> str:
    """Not yet."""
    raise NotImplementedError
