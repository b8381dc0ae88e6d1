"""Augment: the state of every stage, by liveness.

Takes a schedule; guarantees a :class:`ControlGraph` in which the cut before stage t holds exactly the values
that are computed before t and still needed at or after it: the augmented state of Eq. 8 and 26 (one shortcut:
the pair ``(x_t, x_r)``), Eq. 13 (``x_r'`` instead of ``x_r`` once the shortcut mapping has decided), and of
any other acyclic network (as many values as are live).

* Values are differentiable tensors, inputs included. An input is born at -1, as is whatever is computed
  before the first player; what the network returns dies after the last stage.
* Values that no player has acted on are *fixed*: their change is zero always.
* Tensors of integers, masks and sizes are no state: no gain can act on them. They are read across stages
  freely.
* The control of a player with tied weights is a value from its decision to the last later stage that uses it
  again. Parameter expressions are computed where they are used, so they are none.

The work is proportional to the graph and to the sum of all cuts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import (
    DETACHED,
    PROLOGUE,
    ControlGraph,
    Op,
    OpGraph,
    Player,
    PlayerGraph,
    Schedule,
    Stage,
    Value,
    grouped,
)
from gtddp_compile.passes.p03_find_shortcuts import carriers


@dataclass(frozen=True)
class Lives:
    """Stages that read each operation's value, in order, and the operations whose values are returned."""

    readers: Mapping[str, tuple[int, ...]]
    returned: frozenset[str]
    end: int


# --- predicates -----------------------------------------------------------------------------------


def moved_by_players(graph: PlayerGraph) -> frozenset[str]:
    """Operations whose values can change in a step: a player acts on them, not through sizes alone.

    What is kept for its random numbers or its buffers and does not lead to the output is none: nothing of it counts.
    Nor is what is made of parameters alone and detached: it is read as a constant.
    """
    own = (name for player in graph.players for name in (*player.uses, *player.expressions))

    def passes(op: Op) -> bool:
        return not op.reads_sizes and (op.kind != DETACHED or op.name in graph.ops.reached)

    return graph.ops.downstream(own, passes) & graph.ops.returned


def find_lives(schedule: Schedule) -> Lives:
    """Readers and returned values."""
    ops, stage_of = schedule.base.base.ops, schedule.stage_of
    readers = {name: tuple(sorted({stage_of[user] for user in users})) for name, users in ops.users.items()}
    return Lives(readers, frozenset(ops.output_names), schedule.stages)


def is_live_after(name: str, born: int, lives: Lives) -> bool:
    """Whether a value crosses a cut: some later stage reads it, or the network returns it."""
    return name in lives.returned or max(lives.readers[name], default=born) > born


def later_uses(player: Player, stage_of: Mapping[str, int]) -> tuple[int, ...]:
    """Stages after the player's own that use its parameters again."""
    return tuple(sorted({stage_of[use] for use in player.uses} - {player.stage}))


def check_tuples(ops: OpGraph, stage_of: Mapping[str, int], lives: Lives, moved: frozenset[str]) -> None:
    """A tuple of moving tensors is no value of the state: the stage that computes it must unpack it."""
    for name in sorted(carriers(ops) & moved, key=ops.position.__getitem__):
        op = ops.by_name[name]
        if not op.is_tensor and is_live_after(name, stage_of[name], lives):
            raise _packed(op, returned=name in lives.returned)


def _packed(op: Op, *, returned: bool) -> CompileError:
    return op.refusal(
        f"it gives several tensors at once, which are {'returned' if returned else 'read by a later stage'}",
        "Unpack them where they are computed (a, b = ...) and use the parts",
    )


POOLING = frozenset(
    {"index_add", "index_reduce", "index_put", "scatter_add", "scatter_reduce", "scatter", "segment_reduce"}
)
"""Kinds that bring rows together by an index."""


def check_batch_axes(players: PlayerGraph, values: tuple[Value, ...]) -> None:
    """The state is one a sample: whose the entries of what players decide on, and of what moves, are is known."""
    ops = players.ops
    moving = [value.name for value in values if not value.fixed and value.control is None]
    for name in sorted({*players.player_using, *moving}, key=ops.position.__getitem__):
        op = ops.by_name[name]
        if op.shape == () and ops.batch:
            raise op.refusal(
                f"it makes a single number of the {ops.batch} samples, a loss inside the model perhaps",
                "Let the model return what the loss is computed from, and give the loss to compile_optimizer",
            )
        if not _has_samples(op, ops):
            raise _without_samples(op, ops)


def _has_samples(op: Op, ops: OpGraph) -> bool:
    return op.shape is None or not ops.batch or op.samples.fits(op.shape, ops.batch)


def _without_samples(op: Op, ops: OpGraph) -> CompileError:
    """The refusal of a value, or of the pooling that led to it."""
    rows = f"an entry along the leading axis of {', '.join(ops.inputs)}"
    why = (f"its value has shape {op.shape}, and which of its elements belong to which of the {ops.batch} samples is "
           f"no matter of axes (a sample is {rows})")  # fmt: skip
    remedy = ("Keep samples along an axis of their own, (B, T, n), or in order along one with others, (B T, n); "
              "compute what is of the whole batch where it is read, between the same two layers")  # fmt: skip
    if op.random and not ops.reached.intersection(op.operands):
        why = f"it draws numbers of shape {op.shape} for a parameter, which all samples would share"
        remedy = "Draw what multiplies or adds to values instead, once a sample, (B, ...); or draw into a buffer before"
        pending = []
    else:
        pending = [op]
    while pending:
        before = pending.pop()
        if before.kind in POOLING:
            why = (f"it brings rows together by an index, as nodes to graphs, in a value of shape {before.shape}; what "
                   f"was looked for is the part of each of the {ops.batch} samples (a sample is {rows})")  # fmt: skip
            remedy = ("Wrap the network, GraphBatches(net), which takes graphs as they are, or give a padded batch of "
                      "nodes, (B, N, n), with a mask")  # fmt: skip
            op = before
            break
        pending += [ops.by_name[name] for name in before.operands if not _has_samples(ops.by_name[name], ops)]
    return op.refusal(why, remedy)


# --- the rewrite ----------------------------------------------------------------------------------


def augment(schedule: Schedule, name: str = "model") -> ControlGraph:
    """Find the augmented state of every stage.

    Args:
        schedule: a stage for every player and operation.
        name: what to call the network.

    Returns:
        The control graph.

    Raises:
        CompileError: if a tuple of tensors would have to wait between two stages, or samples cannot be told
            apart.
    """
    players = schedule.base.base
    ops = players.ops
    lives = find_lives(schedule)
    moved = moved_by_players(players)
    check_tuples(ops, schedule.stage_of, lives, moved)
    values = find_values(schedule, lives, moved)
    check_batch_axes(players, values)
    ops_at: dict[int, list[str]] = {t: [] for t in range(PROLOGUE, schedule.stages)}
    for op in ops.ops:
        ops_at[schedule.stage_of[op.name]].append(op.name)
    return ControlGraph(
        ops=ops,
        players=schedule.players,
        stages=make_stages(schedule, values, ops_at),
        shortcuts=schedule.base.shortcuts,
        values=values,
        prologue=tuple(ops_at[PROLOGUE]),
        unused=players.unused,
        schedule=schedule.name,
        name=name,
    )


def find_values(schedule: Schedule, lives: Lives, moved: frozenset[str]) -> tuple[Value, ...]:
    """Values that cross a cut, in trace order; a tied player's control follows the value it computes."""
    players, ops = schedule.base.base, schedule.base.base.ops
    expressions = {name for player in players.players for name in player.expressions}
    tied: dict[str, list[Value]] = {}
    for player in schedule.players:
        later = later_uses(player, schedule.stage_of)
        if later:
            control = Value(f"params:{player.name}", (), player.stage, later[-1], later, control=player.name)
            tied.setdefault(player.op, []).append(control)
    found = []
    for op in ops.ops:
        born = schedule.stage_of[op.name]
        waits = op.name not in expressions or op.name in lives.returned
        if op.is_tensor and op.is_differentiable and waits and is_live_after(op.name, born, lives):
            readers = lives.readers[op.name]
            dies = lives.end if op.name in lives.returned else readers[-1]
            shape = op.samples.sample_shape(op.shape, ops.batch or 1) if op.shape else ()
            found.append(Value(op.name, shape, born, dies, readers, fixed=op.name not in moved))
        found += tied.get(op.name, ())
    return tuple(found)


def make_stages(schedule: Schedule, values: tuple[Value, ...], ops_at: Mapping[int, list[str]]) -> tuple[Stage, ...]:
    """The stages with the values that wait before, enter, pass and leave each."""
    merges = {shortcut.merge for shortcut in schedule.base.shortcuts}
    players_at = grouped(schedule.players, lambda player: player.stage)
    born_at = grouped(range(len(values)), lambda index: values[index].born)
    reads = [frozenset(value.readers) for value in values]
    live = born_at.get(PROLOGUE, [])
    stages = []
    for t in range(schedule.stages):
        carried = [i for i in live if values[i].dies > t]
        produced = born_at.get(t, [])
        stages.append(
            Stage(
                index=t,
                players=tuple(player.name for player in players_at[t]),
                live=tuple(values[i].name for i in live),
                consumed=tuple(values[i].name for i in live if t in reads[i]),
                carried=tuple(values[i].name for i in carried),
                produced=tuple(values[i].name for i in produced),
                ops=tuple(ops_at[t]),
                merges=tuple(name for name in ops_at[t] if name in merges),
            )
        )
        live = sorted(carried + produced)
    return tuple(stages)
