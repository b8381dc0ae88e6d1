"""Schedule: a stage for every player and every operation.

Takes players and shortcuts; guarantees a :class:`Schedule` in which

* a player decides after every player on which its input depends (by any path of operations, and through tied
  weights: a later use depends on the player's first one, at which it decides);
* stages are numbered from 0 without gaps, each with one player or several that decide together (a coalition);
* random numbers are drawn in the order in which the model draws them: an operation that draws (dropout) runs no
  earlier than those before it, and players that read it decide after the players on which those depend;
* an operation without parameters runs as early as its inputs allow: in the stage of the last player that it
  depends on, or in the prologue (-1) before the first one. So does a later use of tied weights; parameter
  expressions (``weight * scale``) run in their player's stage.

The schedule is not unique and changes the update (paper, end of Sec. 3.2). A player's depth is the longest
path over players to it: "asap" places it there, "alap" as late as its readers allow without more stages,
"sequential" gives every player a stage of its own, in trace order; a mapping gives the stages by hand.
Players that decide at one operation (one weight tied elsewhere, the other not) always share a stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import PROLOGUE, Player, PlayerGraph, Schedule, ShortcutGraph
from gtddp_compile.graph.structure import players_by

Stages = dict[str, int]
"""Stage by player name."""


# --- predicates -----------------------------------------------------------------------------------


def deciding(graph: PlayerGraph) -> dict[str, tuple[Player, ...]]:
    """Players by the operation at which they decide."""
    return players_by((player, (player.op,)) for player in graph.players)


def predecessors(graph: PlayerGraph) -> dict[str, tuple[str, ...]]:
    """What must run before each operation: its operands, the first uses of weights it uses again, the draw before it.

    The last is an order only, no value passes: the same seed must give the masks that the model itself would draw.
    """
    drawing = [op.name for op in graph.ops.ops if op.random]
    draw_before = {later: (earlier,) for earlier, later in pairwise(drawing)}
    return {
        op.name: (
            *op.operands,
            *(p.op for p in graph.player_using.get(op.name, ()) if p.op != op.name),
            *draw_before.get(op.name, ()),
        )
        for op in graph.ops.ops
    }


def in_trace_order(graph: PlayerGraph) -> list[Player]:
    """Players by the position of the operation at which they decide."""
    return sorted(graph.players, key=lambda player: graph.ops.position[player.op])


# --- the schedules --------------------------------------------------------------------------------


def asap(graph: PlayerGraph) -> Stages:
    """A player's stage is its depth: the most players on a path before it."""
    before, players = predecessors(graph), deciding(graph)
    depth: dict[str, int] = {}
    for op in graph.ops.ops:
        deepest = max((depth[name] for name in before[op.name]), default=PROLOGUE)
        depth[op.name] = deepest + (op.name in players)
    return {player.name: depth[player.op] for player in graph.players}


def alap(graph: PlayerGraph) -> Stages:
    """A player's stage is its latest depth: as many stages before the end as players on a path after it."""
    before, players = predecessors(graph), deciding(graph)
    after = dict.fromkeys(before, 0)
    for op in reversed(graph.ops.ops):
        longest = after[op.name] + (op.name in players)
        for name in before[op.name]:
            after[name] = max(after[name], longest)
    last = max(asap(graph).values(), default=PROLOGUE)
    return {player.name: last - after[player.op] for player in graph.players}


def sequential(graph: PlayerGraph) -> Stages:
    """One player a stage, in trace order."""
    order = {op: stage for stage, op in enumerate(dict.fromkeys(player.op for player in in_trace_order(graph)))}
    return {player.name: order[player.op] for player in graph.players}


def by_hand(graph: PlayerGraph, given: Mapping[str, int]) -> Stages:
    """The stages of a mapping, renumbered without gaps."""
    names = [player.name for player in graph.players]
    known = set(names)
    missing, unknown = [n for n in names if n not in given], [repr(n) for n in given if n not in known]
    if unknown:
        raise CompileError(
            f"the schedule names {_some(unknown)}, but the model has no such player",
            f"The players are {_some([repr(n) for n in names], 40)}",
        )
    if missing:
        raise CompileError(
            f"the schedule gives no stage to {_some([repr(n) for n in missing])}",
            "Name every player: start from {p.name: p.stage for p in opt.graph.players} of 'asap'",
        )
    for name, stage in given.items():
        if isinstance(stage, bool) or not isinstance(stage, int):
            raise CompileError(f"the schedule gives player {name!r} the stage {stage!r}", "Give stages as integers")
    number = {stage: index for index, stage in enumerate(sorted(set(given.values())))}
    return {name: number[given[name]] for name in names}


SCHEDULES: Mapping[str, Callable[[PlayerGraph], Stages]] = {"asap": asap, "alap": alap, "sequential": sequential}


def _some(names: list[str], most: int = 8) -> str:
    """A list of names, cut where it is too long to read."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- the rewrite ----------------------------------------------------------------------------------


def schedule(graph: ShortcutGraph, how: str | Mapping[str, int] = "asap") -> Schedule:
    """Place every player and every operation.

    Args:
        graph: players and shortcuts.
        how: ``"asap"``, ``"alap"``, ``"sequential"``, or a stage for every player by name.

    Returns:
        The schedule; its players carry their stage and come in stage order, then trace order.

    Raises:
        CompileError: for an unknown name, or a mapping that leaves out a player, names one that is not there,
            or lets one decide no later than another that it depends on.
    """
    if isinstance(how, Mapping):
        name, stages = "mapping", by_hand(graph.base, how)
    elif isinstance(how, str) and how in SCHEDULES:
        name, stages = how, SCHEDULES[how](graph.base)
    else:
        choices = ", ".join(map(repr, SCHEDULES))
        raise CompileError(
            f"option schedule={how!r} is not known", f"Choose {choices}, or a mapping from player to stage"
        )
    stage_of = place(graph.base, stages, how if isinstance(how, Mapping) else stages)
    players = sorted(in_trace_order(graph.base), key=lambda player: stages[player.name])
    placed = tuple(replace(player, stage=stages[player.name]) for player in players)
    return Schedule(graph, placed, stage_of, len(set(stages.values())), name)


def place(graph: PlayerGraph, stages: Stages, given: Mapping[str, int]) -> dict[str, int]:
    """Stage of every operation, that of the last player it depends on; checks that players are in order.

    ``given`` are the stages as the user numbered them, for the message.
    """
    before, players = predecessors(graph), deciding(graph)
    latest: dict[str, Player | None] = {}
    found: dict[str, int] = {}

    def stage(player: Player | None) -> int:
        return PROLOGUE if player is None else stages[player.name]

    for op in graph.ops.ops:
        last = max((latest[name] for name in before[op.name]), key=stage, default=None)
        here = players.get(op.name, ())
        for player in here:
            if last is not None and stage(player) <= stage(last):
                raise _too_early(graph, player, last, given)
            if stage(player) != stage(here[0]):
                raise _apart(graph, here[0], player)
        latest[op.name] = here[0] if here else last
        found[op.name] = stage(latest[op.name])
    for player in sorted(graph.players, key=stage, reverse=True):
        alone = [name for name in player.expressions if name not in graph.player_using]  # not what is returned itself
        found.update(dict.fromkeys(alone, stages[player.name]))
    return found


def _too_early(graph: PlayerGraph, player: Player, needed: Player, given: Mapping[str, int]) -> CompileError:
    op = graph.ops.by_name[player.op]
    return op.refusal(
        f"player {player.name!r} at stage {given[player.name]} depends on player {needed.name!r} at stage "
        f"{given[needed.name]} (by its input, tied weights or the order of random draws)",
        f"Give {player.name!r} a later stage than {needed.name!r}, or use schedule='asap'",
    )


def _apart(graph: PlayerGraph, one: Player, other: Player) -> CompileError:
    op = graph.ops.by_name[one.op]
    return op.refusal(
        f"players {one.name!r} and {other.name!r} decide at the same operation but at different stages",
        "Give both the same stage",
    )
