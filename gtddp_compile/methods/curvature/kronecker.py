"""What K-FAC and EK-FAC share: options, running averages, and the metric of players that decide together.

The curvature belongs to a *block*: one player, its weight and bias jointly, or the players of a coalition (Theorem 3).
A block is

* ``"kronecker"``: linear and convolution layers, from their homogeneous inputs and ``V_h``;
* ``"dual"``: the same of a layer with one position a sample, which needs the inverse factors and no roots of them;
* ``"channels"``: convolutions and layers of tokens under a metric of inputs alone, from the covariance of the channels
  at a pixel or position;
* ``"shared"``: players with the same rows (Corollary 7; EK-FAC alone);
* ``"exact"``: any other player of at most ``small`` parameters, the ``E[γ γᵀ]`` of its per-sample gradients (the same
  algebra with the input 1);
* ``"diagonal"``: larger ones, ``E[γ²]``, parameter by parameter, by the methods that every curvature has.

A block's factors are in the state of its first parameter; every parameter has its own ``"step"`` and
``"momentum_buffer"``. All methods are pure.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from gtddp_compile.kernels.kronecker import Maps, Metric, Rows, kronecker_factor_shapes, kronecker_factors
from gtddp_compile.methods.curvature.base import Curvature, Group, Move, State, with_momentum
from gtddp_compile.methods.curvature.numbers import (
    Scalar,
    counted,
    number,
    out_of_range,
    refuse_fractions,
    scalar,
    statistics_gradient,
    zeros,
)

BlockKind = Literal["kronecker", "dual", "channels", "shared", "exact"]

COUNTS = ("age", "averaged")
"""Of a state: steps since a block was put together, and batches that its factors are averages of."""
PACE = ("damping", "shrinkage", "pi", "stat_decay", "stat_every", "refresh", "early")
"""Options of the factors, and of what is made of them."""
DERIVED = ("map_x", "map_g", "null_x", "null_g", "moment", "inverse_x", "inverse_g", "filters")
"""Keys of a block's state that are made of its factors."""


@dataclass(frozen=True)
class Kronecker(Curvature):
    """Options and state of a Kronecker-factored curvature; see :class:`KFAC` and :class:`EKFAC`."""

    lr: Scalar = 1e-2
    damping: float = 1e-3
    stat_decay: float = 0.95
    refresh: int = 10
    stat_every: int = 10
    momentum: float = 0.0
    weight_decay: float = 0.0
    maximize: bool = False
    early: int = 10

    name = "kronecker"
    metric = "kronecker"
    nonnegative: ClassVar[tuple[str, ...]] = ("lr", "damping", "momentum", "weight_decay")
    small = 0
    """Largest number of parameters of an exact block."""
    widest = 0
    """Inputs of a linear layer up to which its factor is one matrix; 0: it always is."""
    inputs_alone = False
    """Whether the metric is of inputs alone; players without rows then have a multiple of the identity."""
    shares = False
    """Whether there is a form of its own for players of the same rows (Corollary 7)."""
    rescales = False
    """Whether the metric's diagonal in its own basis is a matrix of its own, and no product of two."""

    def check(self, options: Group) -> None:
        """As every method's; averages forget, and what is counted is whole."""
        super().check(options)
        name = type(self).__name__
        if not 0.0 <= number(name, "stat_decay", options["stat_decay"]) < 1.0:
            raise out_of_range(name, "stat_decay", options["stat_decay"], "a value in [0, 1)")
        refuse_fractions(name, options, refresh=1, stat_every=1, early=0, small=0)

    # --- parameter by parameter ---------------------------------------------------------------------------------------

    def reads_values(self, group: Group) -> bool:
        """Of the decay alone."""
        return bool(group["weight_decay"])

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"`` and, with momentum, a zero ``"momentum_buffer"``; factors appear with the first statistics."""
        self.check(group)
        return zeros(param, *(("momentum_buffer",) if group["momentum"] > 0 else ()))

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count and running ``E[γ²]`` of a parameter with the diagonal rule (``g_stat`` is the batch's)."""
        moment, new = statistics_gradient(type(self).__name__, g_stat), self._stepped(state)
        new["second_moment"] = self._average(state.get("second_moment"), moment, new["step"], group)
        return new

    def divisor(self, state: State, group: Group) -> Any:
        """``η M`` of a parameter with the diagonal rule, ``E[γ²] + damping``."""
        return state["second_moment"] + group["damping"]

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor | float:
        """``lr / (E[γ²] + damping)`` of a parameter with the diagonal rule."""
        inverse: Tensor | float = scalar(group["lr"], param) / self.divisor(state, group)
        return inverse

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """Of a parameter with the diagonal rule."""
        return with_momentum(g_hat / self.divisor(state, group), state, group)

    # --- block by block -----------------------------------------------------------------------------------------------

    def observe_block(
        self,
        kind: BlockKind,
        layers: Sequence[Rows],
        start: float,
        states: Sequence[Sequence[State]],
        group: Group,
        *,
        moments: bool = True,
    ) -> list[dict[str, Any]]:
        """States of a block's parameters after statistics.

        Args:
            kind: what the block is.
            layers: one a player (:class:`gtddp_compile.kernels.Rows`), one for all of a ``"shared"`` block;
                their output gradients are ``V_h = α_{t+1} g_h``.
            start: ``α_T``.
            states: of every player's parameters.
            group: options of the block's first player.
            moments: take further statistics here; otherwise :meth:`observe_coordinates` does.
        """
        found = [self._stepped(state) for own in states for state in own]
        lead = found[0]
        shapes = {key: shape for key, shape in kronecker_factor_shapes(layers).items() if key in self.factor_keys()}
        biased = [len(own) > 1 for own in states[: len(layers)]]
        due = self._running(lead, group, shapes, lambda old, keep: self.factors(layers, start, old, keep, biased))
        if due or ("inverse_x" if kind == "dual" else "map_x") not in lead:
            renew(lead, self.refreshed(kind, lead, group))
        if moments:
            lead.update(self.moments(layers, start, lead, group))
        return found

    def observe_alike(
        self, kind: BlockKind, layer: Rows, start: float, states: Sequence[Sequence[State]], group: Group
    ) -> list[list[dict[str, Any]]]:
        """:meth:`observe_block` of players of one shape, each a group of one layer's rows, as one.

        Args:
            kind: what each block is.
            layer: rows of all players.
            start: ``α_T``.
            states: of every player's parameters; the first ones are :func:`in_step`.
            group: options that all of them have.
        """
        steps = {id(state["step"]): counted(state["step"]) for own in states for state in own}  # many are one tensor
        found = [[{**state, "step": steps[id(state["step"])]} for state in own] for own in states]
        leads, keys = [own[0] for own in found], self.factor_keys()

        def together(key: str) -> Tensor:
            return torch.cat([lead[key] for lead in leads])

        def factors(old: State | None, keep: float) -> dict[str, Tensor]:
            before = None if old is None else {key: together(key) for key in keys}
            return self.factors((layer,), start, before, keep, (len(states[0]) > 1,), apart=True)

        shapes = {key: (1, *shape[1:]) for key, shape in kronecker_factor_shapes((layer,)).items() if key in keys}
        taken = dict(leads[0])
        due = self._running(taken, group, shapes, factors)
        counts, parts = {key: taken[key] for key in COUNTS}, {key: taken[key] for key in keys if len(taken[key]) > 1}
        for k, lead in enumerate(leads):
            lead.update(counts, **{key: whole[k : k + 1] for key, whole in parts.items()})
            _in_precision(lead)
        if due or ("inverse_x" if kind == "dual" else "map_x") not in taken:
            made = self.refreshed(kind, {key: parts[key] if key in parts else together(key) for key in keys}, group)
            failed = made.pop("fallbacks")
            for k, lead in enumerate(leads):
                own = {key: whole[k : k + 1] for key, whole in made.items()}
                own["fallbacks"] = lead.get("fallbacks", failed)
                renew(lead, self.refreshed(kind, lead, group) if failed else own)
        return found

    def _running(
        self,
        lead: dict[str, Any],
        group: Group,
        shapes: Mapping[str, tuple[int, ...]],
        factors: Callable[[State | None, float], dict[str, Tensor]],
    ) -> bool:
        """Take the batch into the running factors, when its turn is; whether what is made of them is due."""
        fresh = any(key not in lead for key in self.factor_keys()) or any(lead[k].shape != shapes[k] for k in shapes)
        if fresh:  # the first step, or a block that was put together differently when it was compiled again
            lead["averaged"] = lead["age"] = torch.zeros_like(lead["step"])
        age = int(lead["age"])
        lead["age"] = counted(lead["age"])
        early = age < group["early"] and age & (age - 1) == 0  # the first steps, ever further apart
        if early or age % group["stat_every"] == 0:
            lead["averaged"] = counted(lead["averaged"])
            lead.update(factors(None if fresh else lead, self._keep(lead["averaged"], group)))
        _in_precision(lead)
        return early or age % group["refresh"] == 0

    def block_metric(
        self, kind: BlockKind, state: State, widths: Sequence[tuple[int, int]], groups: Sequence[Group]
    ) -> Metric:
        """The block's metric, as the kernels take it.

        Args:
            kind: what the block is.
            state: of its first parameter, after :meth:`observe_block`.
            widths: ``(n, m)`` of every player: its rows of the joint maps.
            groups: options of every player.
        """
        rates = tuple(float(group["lr"]) for group in groups)
        scale, cross = self.scales(kind, state, groups[0], len(widths))
        if kind == "shared":
            return ((state["map_x"], state["map_g"]),) * len(widths), scale, cross, rates
        return split_maps(state, widths), scale, cross, rates

    def factor_keys(self) -> tuple[str, ...]:
        """Keys of the factors in a state."""
        return ("factor_x", "factor_g")

    def factors(
        self, layers: Sequence[Rows], start: float, old: State | None, keep: float, biased: Sequence[bool],
        *, apart: bool = False,
    ) -> dict[str, Tensor]:  # fmt: skip
        """Running averages of the factors, of which ``keep`` is from the old ones.

        ``biased``: of every layer, whether the last of its inputs is a bias's; ``apart``: a group is a layer.
        """
        keys = self.factor_keys()
        before = tuple(None if old is None else old[key] for key in keys)
        return dict(zip(keys, kronecker_factors(layers, start, before, keep), strict=True))

    @abstractmethod
    def refreshed(self, kind: BlockKind, state: State, group: Group) -> dict[str, Any]:
        """``"map_x"``, ``"map_g"`` (and what belongs to them) from the running factors; ``"inverse_x"`` and
        ``"inverse_g"`` instead of a ``"dual"`` block.
        """

    def moments(self, layers: Sequence[Rows], start: float, state: State, group: Group) -> dict[str, Any]:
        """Further statistics of the batch, taken every step."""
        return {}

    def observe_coordinates(self, moment: Tensor, state: State, group: Group) -> dict[str, Any]:
        """The state after the batch's ``E[(α γ̂)²]`` (``rescales``: otherwise nobody asks)."""
        return {**state, "moment": moment}

    def scales(self, kind: BlockKind, state: State, group: Group, players: int) -> tuple[Tensor | float, Tensor | None]:
        """``scale`` and ``cross`` of the metric: where the maps say everything, 1 and none."""
        return 1.0, None

    def _stepped(self, state: State) -> dict[str, Any]:
        return {**state, "step": counted(state["step"])}

    def _average(self, old: Tensor | None, new: Tensor, count: Tensor, group: Group) -> Tensor:
        """Martens and Grosse's running average: the old one counts ``min(1 - 1/k, stat_decay)`` at step k."""
        if old is None:
            return new
        return torch.lerp(new, old, self._keep(count, group))

    def _keep(self, count: Tensor, group: Group) -> float:
        return min(1.0 - 1.0 / float(count), float(group["stat_decay"]))


def renew(state: dict[str, Any], made: Mapping[str, Any]) -> None:
    """Put what is made of a state's factors in the place of what was."""
    for key in DERIVED:
        state.pop(key, None)
    state.update(made)


def _in_precision(state: dict[str, Any]) -> None:
    """load_state_dict casts a state to the parameter's own precision; factors are at least float32."""
    state.update((key, state[key].to(state["factor_x"].dtype)) for key in DERIVED if key in state)


def in_step(states: Sequence[State], groups: Sequence[Group]) -> bool:
    """Whether players' statistics are taken alike: the same options, counts and entries."""

    def same(one: Any, other: Any) -> bool:
        return one is other or bool(one == other)

    first, options = states[0], [[group.get(key) for key in PACE] for group in groups]
    alike = all(own == options[0] for own in options) and all(state.keys() == first.keys() for state in states)
    return alike and all(same(state[key], first[key]) for key in COUNTS if key in first for state in states)


def split_maps(state: State, widths: Sequence[tuple[int, int]]) -> Maps:
    """Every player's rows of the joint maps: ``x̂ = Σ_p x_p X_p``."""
    xs = state["map_x"].split([n for n, _ in widths], 1)
    gs = state["map_g"].split([m for _, m in widths], 1) if "map_g" in state else [None] * len(widths)
    return tuple(zip(xs, gs, strict=True))
