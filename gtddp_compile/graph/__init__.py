"""Immutable data structures: the normal form and the control graph. They know no passes."""

from gtddp_compile.graph.control import (
    ControlGraph,
    Player,
    PlayerGraph,
    Schedule,
    Shortcut,
    ShortcutGraph,
    ShortcutKind,
    Stage,
    Value,
)
from gtddp_compile.graph.layouts import LEADING, Layout
from gtddp_compile.graph.ops import (
    BufferRef,
    Leaf,
    Method,
    Op,
    OpGraph,
    ParameterInfo,
    ParamRef,
    Ref,
    iter_leaves,
    map_leaves,
)

__all__ = [
    "LEADING",
    "BufferRef",
    "ControlGraph",
    "Layout",
    "Leaf",
    "Method",
    "Op",
    "OpGraph",
    "ParamRef",
    "ParameterInfo",
    "Player",
    "PlayerGraph",
    "Ref",
    "Schedule",
    "Shortcut",
    "ShortcutGraph",
    "ShortcutKind",
    "Stage",
    "Value",
    "iter_leaves",
    "map_leaves",
]
