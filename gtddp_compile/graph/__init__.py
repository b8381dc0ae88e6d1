"""Immutable data structures: the normal form and the control graph. They know no passes."""

from gtddp_compile.graph.control import ControlGraph, to_networkx, tool
from gtddp_compile.graph.layouts import LEADING, UNKNOWN, Layout
from gtddp_compile.graph.ops import (
    DETACHED,
    GUARD,
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
from gtddp_compile.graph.structure import (
    PROLOGUE,
    Player,
    PlayerGraph,
    Schedule,
    Shortcut,
    ShortcutGraph,
    ShortcutKind,
    Stage,
    Value,
    grouped,
)

__all__ = [
    "DETACHED", "GUARD", "LEADING", "PROLOGUE", "UNKNOWN", "BufferRef", "ControlGraph", "Layout", "Leaf", "Method",
    "Op", "OpGraph", "ParamRef", "ParameterInfo", "Player", "PlayerGraph", "Ref", "Schedule", "Shortcut",
    "ShortcutGraph", "ShortcutKind", "Stage", "Value", "grouped", "iter_leaves", "map_leaves", "to_networkx", "tool",
]  # fmt: skip
