"""Which blocks of a stage's augmented Jacobians are zero or identity by construction: read off the operations.

A block is followed along every path from a value of the cut (or a player's control) to a value of the next cut:
additions of equal shapes add, reshapes pass (a value is a flat vector in the state), anything else is dense. A tuple of
tensors carries what any of its parts carries.
"""

from __future__ import annotations

from dataclasses import dataclass

from gtddp_compile.algebra.pattern import DENSE, IDENTITY, Entry
from gtddp_compile.graph import ControlGraph, Op, Ref, Stage

ALIASES = frozenset(
    {"identity", "flatten", "reshape", "view", "unsqueeze", "squeeze", "contiguous", "clone"} | {"time_first"}
)
CONTROL = "player:"

Sources = dict[str, Entry]


@dataclass(frozen=True)
class StageEntries:
    """Nonzero blocks of ``f̂_x`` (``state[output][input]``) and ``f̂_u`` (``control[output][player]``) of one stage."""

    state: dict[str, Sources]
    control: dict[str, Sources]
    read_by_players: frozenset[str]


def stage_entries(graph: ControlGraph, stage: Stage, live_after: tuple[str, ...]) -> StageEntries:
    """Follow every path through the stage (linear in its operations times the values they mix)."""
    deciding = {graph.player[name].op for name in stage.players}
    found: dict[str, Sources] = {name: {name: IDENTITY} for name in stage.live}
    read: set[str] = set()
    for name in stage.ops:
        op = graph.op(name)
        if op.carries_gradient:
            found[name] = _through(graph, op, found)
            for player in (*graph.player_using.get(name, ()), *graph.expressions.get(name, ())):
                here = player.name in stage.players
                found[name][f"{CONTROL}{player.name}" if here else f"params:{player.name}"] = DENSE
            if name in deciding:
                read.update(source for source in found[name] if not source.startswith(CONTROL))
    for name in stage.players:
        # Every sample carries a copy of a tied control: the block is a stack of identities, no square one.
        found[f"params:{name}"] = {f"{CONTROL}{name}": DENSE}
    state, control = {}, {}
    for output in live_after:
        sources = found.get(output, {})
        state[output] = {s: entry for s, entry in sources.items() if not s.startswith(CONTROL)}
        control[output] = {s[len(CONTROL) :]: e for s, e in sources.items() if s.startswith(CONTROL)}
    return StageEntries(state, control, frozenset(read))


def _through(graph: ControlGraph, op: Op, found: dict[str, Sources]) -> Sources:
    """Entries of an operation's value from those of its operands."""
    plain = plain_scales(graph, op)
    result: Sources = {}
    for name in op.operands:
        for source, entry in found.get(name, {}).items():
            scale = plain.get(name)
            moved = DENSE if scale is None else Entry(scale * entry.identity, entry.dense)
            old = result.get(source, Entry())
            result[source] = Entry(old.identity + moved.identity, old.dense or moved.dense)
    return {source: entry for source, entry in result.items() if not entry.is_zero}


def plain_scales(graph: ControlGraph, op: Op) -> dict[str, int]:
    """Operands by which the derivative is a multiple of the identity, and of which: sums, differences, reshapes.

    What a sum spreads over more elements is none of them: that block is no square one.
    """
    if op.parameters:
        return {}
    if op.kind in ALIASES:
        return {name: 1 for name in op.operands if graph.op(name).is_tensor}
    found: dict[str, int] = {}
    for arg, scale in zip(op.args, _scales(op), strict=False):
        if isinstance(arg, Ref) and graph.op(arg.name).shape == op.shape:
            found[arg.name] = found.get(arg.name, 0) + scale
    return found


def _scales(op: Op) -> tuple[int, ...]:
    """Of each argument of a sum, a difference or a negation; of no other operation."""
    if op.kind == "neg":
        return (-1,)
    times = op.kwargs.get("alpha", 1)
    if len(op.args) != 2 or op.kwargs.keys() - {"alpha"} or not isinstance(times, int):
        return ()
    return {"add": (1, times), "sub": (1, -times), "rsub": (-times, 1)}.get(op.kind, ())
