"""Not yet."""

from __future__ import annotations

from collections.abc import Mapping

import networkx as nx


def svg(graph: nx.MultiDiGraph) -> str:
    """Not yet."""
    raise NotImplementedError
