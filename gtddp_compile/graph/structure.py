"""What the structural passes build on the normal form: players, shortcuts, stages, cuts.

``OpGraph`` → ``PlayerGraph`` → ``ShortcutGraph`` → ``Schedule`` → ``ControlGraph``, each immutable, each made by one
pass from the one before. Theory: a *player* is an operation that owns parameters (its control), a *stage* is one player
or a coalition of them deciding at the same time, the *cut* before a stage is the set of values already computed and
still needed: the augmented state of the paper's Eq. 8, 13 and 26 for any acyclic network.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, TypeVar

from gtddp_compile.graph.ops import OpGraph

ShortcutKind = Literal["identity", "parametric", "parameter_free"]
UNSCHEDULED = -1
PROLOGUE = -1
"""Stage of what runs before the first player: constant through the step."""
T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Items by what they have in common, in the order in which they come."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


@dataclass(frozen=True)
class Player:
    """An operation that owns parameters: it decides on a control.

    Attributes:
        name: qualified module name (``"layer1.0.conv1"``), or the parameter's name where a bare parameter is used.
        kind: the deciding operation's kind (``"linear"``, ``"conv"``, ``"batch_norm"``, …).
        parameters: canonical names of the trainable parameters it owns, in the order of use.
        op: name of the operation at which it decides: its first use.
        uses: names of all operations that read its parameters (``op`` first); more than one if weights are tied.
        expressions: operations computed from parameters alone on the way into ``uses`` (``weight * scale``), in order.
        stage: index of its stage; ``UNSCHEDULED`` before the schedule pass.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    op: str
    uses: tuple[str, ...]
    expressions: tuple[str, ...] = ()
    stage: int = UNSCHEDULED


@dataclass(frozen=True)
class Shortcut:
    """A path from a fork to a merge beside the main path.

    Attributes:
        fork: name of the value at which the paths part.
        merge: name of the operation at which they meet.
        kind: ``"identity"`` (the forked value itself arrives), ``"parametric"`` (players on the way: a shortcut mapping
            with controls of its own), ``"parameter_free"`` (operations without parameters on the way).
        players: names of the players on the shortcut path.
        ops: names of the operations on the shortcut path, fork and merge excluded.
        regular: whether the region is single-entry, single-exit: the fork dominates the merge and the merge
            post-dominates the fork.
    """

    fork: str
    merge: str
    kind: ShortcutKind
    players: tuple[str, ...] = ()
    ops: tuple[str, ...] = ()
    regular: bool = True


@dataclass(frozen=True)
class Value:
    """A differentiable value that is live across at least one cut (or is the network's output).

    Attributes:
        name: the operation that computes it; ``"params:NAME"`` for a tied player's control waiting for a later use.
        shape: per-sample shape, batch axis dropped.
        born: stage that computes it; -1 for inputs and what is computed from them before any player.
        dies: last stage that reads it; the number of stages for an output.
        readers: stages that read it, in order.
        fixed: no player has acted on it, so its change δ is zero always.
        control: name of the tied player whose control it is, else ``None``.
    """

    name: str
    shape: tuple[int, ...]
    born: int
    dies: int
    readers: tuple[int, ...] = ()
    fixed: bool = False
    control: str | None = None


@dataclass(frozen=True)
class Stage:
    """One time step of the control problem.

    Attributes:
        index: t.
        players: names of the players deciding at t (a coalition if more than one).
        live: names of the values in the cut before t: the augmented state.
        consumed: those of ``live`` that operations of this stage read.
        carried: those of ``live`` still needed after it (a value can be both).
        produced: names of the values computed here that are in the cut after it.
        ops: names of the operations run here, in order.
        merges: names of the merges run here.
    """

    index: int
    players: tuple[str, ...]
    live: tuple[str, ...]
    consumed: tuple[str, ...]
    carried: tuple[str, ...]
    produced: tuple[str, ...]
    ops: tuple[str, ...]
    merges: tuple[str, ...] = ()


def players_by(pairs: Iterable[tuple[Player, tuple[str, ...]]]) -> dict[str, tuple[Player, ...]]:
    """Players by each of the operations that are named beside them."""
    found: dict[str, tuple[Player, ...]] = {}
    for player, names in pairs:
        found.update((name, (*found.get(name, ()), player)) for name in names)
    return found


@dataclass(frozen=True)
class PlayerGraph:
    """The normal form with its players found; ``unused`` names trainable parameters without a path to the output."""

    ops: OpGraph
    players: tuple[Player, ...]
    unused: tuple[str, ...] = ()

    @cached_property
    def player_using(self) -> dict[str, tuple[Player, ...]]:
        """Players whose parameters an operation reads (first or later use), by the operation's name."""
        return players_by((player, player.uses) for player in self.players)


@dataclass(frozen=True)
class ShortcutGraph:
    """Players and the shortcuts between them."""

    base: PlayerGraph
    shortcuts: tuple[Shortcut, ...]


@dataclass(frozen=True)
class Schedule:
    """A stage for every player and every operation (-1: before the first player, constant through the step)."""

    base: ShortcutGraph
    players: tuple[Player, ...]
    stage_of: Mapping[str, int]
    stages: int
    name: str = "asap"
