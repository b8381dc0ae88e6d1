"""Player graphs built by hand, operation by operation, and what the structural passes make of them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from gtddp_compile.graph import ControlGraph, Op, OpGraph, ParamRef, Player, PlayerGraph, Ref
from gtddp_compile.passes.p03_find_shortcuts import find_shortcuts
from gtddp_compile.passes.p04_schedule import schedule
from gtddp_compile.passes.p05_augment import augment

SCHEDULES = ("asap", "alap", "sequential")


def op(
    name: str, kind: str, reads: str = "", params: tuple[str, ...] = (), shape: tuple[int, ...] | None = (2, 3),
    dtype: torch.dtype | None = torch.float32,
) -> Op:  # fmt: skip
    """One operation that reads the values named in ``reads``."""
    args = (*map(Ref, reads.split()), *map(ParamRef, params))
    return Op(name, kind, None, args, module=name, source="net.py:7", shape=shape, dtype=dtype if shape else None)


def layer(name: str, reads: str, kind: str = "linear", weight: str = "") -> Op:
    """An operation with a weight of its own, or another's."""
    return op(name, kind, reads, (weight or f"{name}.weight",))


def build(*ops: Op, output: Any = None) -> PlayerGraph:
    """The player graph: a parameter's first reader decides on it. The last operation is the output."""
    inputs = tuple(o.name for o in ops if o.kind == "input")
    players: dict[str, Player] = {}
    owner: dict[str, str] = {}
    for o in ops:
        own = tuple(p for p in o.parameters if p not in owner)
        if own:
            players[o.name] = Player(o.name, o.kind, own, o.name, (o.name,))
            owner.update(dict.fromkeys(own, o.name))
        for first in dict.fromkeys(owner[p] for p in o.parameters if p not in own):
            players[first] = replace(players[first], uses=(*players[first].uses, o.name))
    return PlayerGraph(OpGraph(ops, inputs, Ref(ops[-1].name) if output is None else output), tuple(players.values()))


X = op("x", "input")


def shortcuts(graph: PlayerGraph) -> list[tuple[str, str, str, tuple[str, ...], bool]]:
    """Fork, merge, kind, players and regularity of each."""
    return [(s.fork, s.merge, s.kind, s.players, s.regular) for s in find_shortcuts(graph).shortcuts]


def control(graph: PlayerGraph, how: str | Mapping[str, int] = "asap") -> ControlGraph:
    return augment(schedule(find_shortcuts(graph), how))


def cuts(graph: ControlGraph) -> list[tuple[str, ...]]:
    return [stage.live for stage in graph.stages]
