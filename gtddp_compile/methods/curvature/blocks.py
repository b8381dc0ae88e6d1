"""The base method's side of metrics that belong to players: statistics, metric and update of one block at a time.

A block is named by its players' parameters: ``(("a.weight", "a.bias"), ("b.weight",))``. Its gradients travel as
``(G, m, n)`` matrices, the bias as the last column (the homogeneous coordinate); an exact block's as one column.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Joined, Layer, wide
from gtddp_compile.kernels.channels import channel_carried, channel_step, few_pixels
from gtddp_compile.kernels.coordinates import (
    Coordinates,
    alike_carried,
    coordinates_step,
    dual_carried,
    dual_step,
    few_rows,
    kronecker_coordinates,
)
from gtddp_compile.kernels.kronecker import Metric, Rows, kronecker_precondition, made_rows
from gtddp_compile.methods.curvature.base import Group, Move, with_momentum
from gtddp_compile.methods.curvature.kronecker import BlockKind, Kronecker, in_step
from gtddp_compile.methods.curvature.updates import ParameterUpdates

Names = tuple[tuple[str, ...], ...]
Parts = tuple[tuple[Tensor, ...], ...]
"""Of every parameter of every player a tensor of its shape."""


class BlockUpdates(ParameterUpdates):
    """What generated programs call ``m`` for Kronecker-factored curvatures."""

    @property
    def _kronecker(self) -> Kronecker:
        assert isinstance(self._curvature, Kronecker)  # the compiler emits these calls for no other
        return self._curvature

    def observe_block(
        self, stage: int, kind: BlockKind, names: Names, layers: Sequence[Rows], start: float, *, moments: bool = True
    ) -> None:
        """Factors of a block of a stage from its layers' inputs and ``V_h = α g_h`` (Eq. 43, 44, 50), and moments."""
        flat = [name for player in names for name in player]
        states = [[self.states[name] for name in player] for player in names]
        found = self._kronecker.observe_block(kind, layers, start, states, self._groups[flat[0]], moments=moments)
        self.states.update(zip(flat, found, strict=True))

    def observe_factors(self, stage: int, kind: BlockKind, names: Names, layers: Sequence[Rows], start: float) -> None:
        """As :meth:`observe_block` where moments are taken from coordinates: :meth:`observe_coordinates`."""
        self.observe_block(stage, kind, names, layers, start, moments=False)

    def observe_coordinates(self, names: Names, moment: Tensor) -> None:
        """Running ``E[(α γ̂)²]`` ``(G, M, N)`` of one player, from the batch's."""
        first = names[0][0]
        self.states[first] = self._kronecker.observe_coordinates(moment, self.states[first], self._groups[first])

    def observe_uniform(self, names: tuple[str, ...], positions: float) -> None:
        """Parameters without rows under a metric of inputs alone (:class:`gtddp_compile.FOOF`)."""
        for name in names:
            # FOOF's: the compiler emits this call for no other.
            self.states[name] = self._kronecker.observe_uniform(  # type: ignore[attr-defined]
                self.states[name], positions
            )

    def observe_channels(
        self, names: tuple[str, ...], layer: Layer, positions: float, sketch: tuple[int, int] | None = None,
        blocks: int = 1, joined: Joined | None = None,
    ) -> Tensor:  # fmt: skip
        """Statistics of a layer's input channels (:class:`gtddp_compile.FOOF`).

        Returns:
            ``X`` with ``X Xᵀ = A⁻¹``, or with ``sketch`` (columns, seed) the filters that project whitened patches.
        """
        states = [self.states[name] for name in names]
        observe = self._kronecker.observe_channels  # type: ignore[attr-defined]  # FOOF's, and asked of no other
        found = observe(layer, positions, states, self._groups[names[0]], sketch, blocks, joined)
        self.states.update(zip(names, found, strict=True))
        maps: Tensor = found[0]["map_x" if sketch is None else "filters"]
        return maps

    def channels_metric(self, names: tuple[str, ...]) -> tuple[float, ...]:
        """``M⁻¹`` of a weight in whitened channels, and of its bias."""
        return tuple(
            float(self._groups[name]["lr"]) if self._params[name].dim() > 1 else float(self._inverse(name))
            for name in names
        )

    def block_maps(self, names: Names) -> tuple[Tensor, Tensor | None]:
        """``(X, Y)`` of one player: into coordinates where its metric is diagonal (``None``: the identity)."""
        state = self.states[names[0][0]]
        return state["map_x"], state.get("map_g")

    def block_inverses(self, names: Names) -> tuple[Tensor, Tensor | None]:
        """``(A⁻¹, B⁻¹)`` of one player (``None``: the identity)."""
        state = self.states[names[0][0]]
        return state["inverse_x"], state.get("inverse_g")

    def rate(self, names: tuple[str, ...]) -> float:
        """The learning rate of one player."""
        return float(self._groups[names[0]]["lr"])

    def observe_alike(self, stage: int, kind: BlockKind, names: Names, layers: Sequence[Rows], start: float) -> None:
        """:meth:`observe_block` of players that are computed together, from the groups of one layer's rows."""
        leads = [(self.states[player[0]], self._groups[player[0]]) for player in names]
        if not torch.compiler.is_compiling() and in_step(*zip(*leads, strict=True)):
            states = [[self.states[name] for name in player] for player in names]
            found = self._kronecker.observe_alike(kind, layers[0], start, states, leads[0][1])
            for player, taken in zip(names, found, strict=True):
                self.states.update(zip(player, taken, strict=True))
            return
        ((x,), g, *_) = layers[0].layer
        for k, player in enumerate(names):
            own = Layer((x[:, k : k + 1],), g[:, k : k + 1], (), ())
            self.observe_block(stage, kind, (player,), (Rows(made_rows, own),), start)

    def alike_inverses(self, names: Names) -> tuple[Tensor, Tensor | None]:
        """:meth:`block_inverses` of players that are computed together, ``(L, n, n)`` and ``(L, m, m)``."""
        by_x, by_g = zip(*(self.block_inverses((player,)) for player in names), strict=True)
        return torch.cat(by_x), None if by_g[0] is None else torch.cat(by_g)

    def alike_rates(self, names: Names) -> Tensor | float:
        """Their learning rates: the one that all have, or ``(L, 1, 1)``."""
        found = [self.rate(player) for player in names]
        if all(rate == found[0] for rate in found):
            return found[0]
        like: Tensor = self.states[names[0][0]]["inverse_x"]
        return like.new_tensor(found).reshape(-1, 1, 1)

    def last_steps(self, names: Names) -> tuple[tuple[Tensor, ...] | None, float]:
        """:meth:`last_step` of players that are computed together: ``v`` ``(L, m, n)``, ``(L, m)``, and one ``μ``."""
        return (None, 0.0) if self._ahead else self._carrying_alike(names)

    def _carrying_alike(self, names: Names) -> tuple[tuple[Tensor, ...], float]:
        """``v`` and ``μ`` of what their step adds; players with a ``μ`` of their own have it in their ``v``."""
        found = [self._carrying(player) for player in names]
        rates, parts = [float(mu) for _, mu in found], list(zip(*(last for last, _ in found), strict=True))
        if all(mu == rates[0] for mu in rates):
            return tuple(torch.stack(part) for part in parts), rates[0]
        scaled = [[v * mu for v, mu in zip(part, rates, strict=True)] for part in parts]
        return tuple(torch.stack(part) for part in scaled), 1.0

    def observe_moment(self, names: tuple[str, ...], moments: tuple[Tensor, ...]) -> None:
        """Running ``E[γ²]`` of parameters with the diagonal rule."""
        for name, moment in zip(names, moments, strict=True):
            arguments = self._params[name], moment, self.states[name], self._groups[name]
            self.states[name] = self._curvature.observe(*arguments)

    def block_metric(self, kind: BlockKind, names: Names) -> Metric:
        """``M⁻¹`` of a block, as the kernels take it."""
        return self._kronecker.block_metric(kind, self.states[names[0][0]], *self._widths_and_groups(kind, names))

    def _widths_and_groups(self, kind: BlockKind, names: Names) -> tuple[list[tuple[int, int]], list[Group]]:
        """``(n, m)`` and options of every player."""
        shapes = [self._shape(kind, player) for player in names]
        return [(shape[2], shape[1]) for shape in shapes], [self._groups[player[0]] for player in names]

    def drift_block(self, kind: BlockKind, names: Names) -> Parts:
        """``M⁻¹ ℓ_u = M⁻¹ λ u - μ v`` of every player."""
        if not self._decays(names):
            return tuple(tuple(self._less_inertia(name, None) for name in player) for player in names)
        return _each(self._less_inertia, names, self._scaled(kind, names, self._zeros(names), 1))

    def open_block(self, kind: BlockKind, names: Names, gradients: Parts) -> Parts:
        """``k = -M⁻¹ (γᵀ α + ℓ_u)`` of every player (Eq. 4; of a coalition Eq. 18, 53)."""
        return self._scaled(kind, names, gradients, -1)

    def descend_block(self, kind: BlockKind, names: Names, gradients: Parts) -> None:
        """As :meth:`apply_block` where nobody reads ``δu``: one pass over every new parameter."""
        if kind == "channels" and self._plain(names[0]) and gradients[0][0].dim() == 2 and not self._decays(names):
            (player,), (parts,) = names, gradients
            (last, mu), inverse = self._carrying(player), self.states[player[0]]["inverse_x"]
            own = float(mu), float(self._groups[player[0]]["lr"])
            self._move(player[0], self._stepped(player[0], channel_carried(parts[0], inverse, last[0], *own)))
            for name, part in zip(player[1:], parts[1:], strict=True):
                self._descended(name, self._moved(name, self._of_bias(name, part)))
            return
        self._descend(names, self._directions(kind, names, gradients))

    def descend_dual(self, names: Names, coordinates: Coordinates, weights: Tensor) -> None:
        """As :meth:`descend_block`, from the rows of one player in ``"dual"`` coordinates."""
        (player,) = names
        rate = self._groups[player[0]]["lr"]
        if not self._plain(player) or any(self._groups[name]["lr"] != rate for name in player):
            self.descend_steps("dual", names, (dual_step(coordinates, weights),))
            return
        last, mu = self._carrying(player)
        found = dual_carried(coordinates, weights, last, float(mu), float(rate))
        for name, delta in zip(player, found, strict=True):
            self._move(name, self._stepped(name, delta))

    def descend_alike(
        self, names: Names, coordinates: Coordinates, weights: Tensor, last: tuple[Tensor, ...] | None = None,
        mu: float = 0.0,
    ) -> None:  # fmt: skip
        """:meth:`descend_dual` of players that are computed together.

        Args:
            names: of their parameters.
            coordinates: of the rows of all.
            weights: ``w``.
            last, mu: what :meth:`last_steps` found.
        """
        rates = {self._groups[name]["lr"] for player in names for name in player}
        if len(rates) > 1 or not all(map(self._plain, names)):
            self.descend_each(names, dual_step(coordinates, weights))
            return
        if last is None:
            last, mu = self._carrying_alike(names)
        (rate,) = rates
        found = alike_carried(coordinates, weights, last, mu, float(rate))
        for player, deltas in zip(names, zip(*found, strict=True), strict=True):
            for name, delta in zip(player, deltas, strict=True):
                self._move(name, self._stepped(name, delta))

    def descend_each(self, names: Names, steps: Tensor) -> None:
        """:meth:`descend_steps` of players that are computed together, from ``(L, m, n)``."""
        for k, player in enumerate(names):
            self.descend_steps("dual", (player,), (steps[k : k + 1],))

    def _plain(self, player: tuple[str, ...]) -> bool:
        """Whether a linear layer's step is ``μ v - M⁻¹ ĝ``, and a product in its own precision can make it."""
        param = self._params[player[0]]
        for name in player:
            group = self._groups[name]
            if "inertia" not in group or group["momentum"] != 0:
                return False
        return param.dim() == 2 and param.dtype in (torch.float32, torch.float64)

    def descend_steps(self, kind: BlockKind, names: Names, steps: tuple[Tensor, ...]) -> None:
        """As :meth:`descend_block`, from ``M⁻¹ C w / η`` ``(G, m, n)`` of every player."""
        self._descend(names, self._stepping(kind, names, steps))

    def descend_rows(
        self,
        names: tuple[str, ...],
        weighted: Callable[..., tuple[Tensor, ...]],
        rows: Callable[..., tuple[Tensor, Tensor]],
        layer: Layer,
    ) -> None:
        """:meth:`descend_block` of one layer; its rows, if few, are mapped instead of its gradient."""
        x, v_h = rows(layer)
        if not few_rows(x.shape[0] * x.shape[2], x.shape[3], v_h.shape[3]):  # a larger batch than was compiled for
            self.descend_block("kronecker", (names,), (weighted(layer),))
            return
        coordinates = kronecker_coordinates(x, v_h, self.block_maps((names,)), "rows")
        ones = coordinates[0].new_ones(x.shape[0])
        step = coordinates_step(coordinates, ones, self.block_metric("kronecker", (names,)))
        self.descend_steps("kronecker", (names,), (step,))

    def descend_inputs(
        self,
        names: tuple[str, ...],
        weighted: Callable[..., tuple[Tensor, ...]],
        whitened: Callable[..., Layer],
        layer: Layer,
    ) -> None:
        """:meth:`descend_block` of one layer under a metric of channels: its inputs, if few, get ``A⁻¹``."""
        weight, inverse = self._params[names[0]], self.states[names[0]]["inverse_x"]
        pixels = layer.operands[0].numel() // inverse[..., 0].numel()
        rows = weight[:, 0].numel() // (1 if layer.how is None else layer.how.groups)
        if not few_pixels(pixels, rows):  # a larger batch than was compiled for
            self.descend_block("channels", (names,), (weighted(layer),))
            return
        step, *bias = weighted(whitened(layer, inverse))
        for name, part in zip(names, (step, *(self._of_bias(names[1], part) for part in bias)), strict=True):
            self._descended(name, self._moved(name, part.to(wide(self._params[name]).dtype)))

    def apply_block(self, kind: BlockKind, names: Names, gradients: Parts) -> Parts:
        """Consume ``ĝ = γᵀ w + ℓ_u`` of every player; returns each one's ``δu``."""
        return self._apply(names, self._directions(kind, names, gradients))

    def apply_steps(self, kind: BlockKind, names: Names, steps: tuple[Tensor, ...]) -> Parts:
        """As :meth:`apply_block`, from ``M⁻¹ C w / η`` ``(G, m, n)`` of every player."""
        return self._apply(names, self._stepping(kind, names, steps))

    def _descend(self, names: Names, directions: Parts) -> None:
        _each(lambda name, part: self._descended(name, self._moved(name, part)), names, directions)

    def _apply(self, names: Names, directions: Parts) -> Parts:
        return _each(lambda name, part: self._applied(name, self._moved(name, part)), names, directions)

    def _moved(self, name: str, direction: Tensor) -> Move:
        return with_momentum(direction, self.states[name], self._groups[name])

    # --- matrices -----------------------------------------------------------------------------------------------------

    def _directions(self, kind: BlockKind, names: Names, gradients: Parts) -> Parts:
        """``(M⁻¹ (g + ℓ))_p / η_p``."""
        gradients = _each(self._with_decay, names, gradients)
        if kind == "channels":
            return tuple(map(self._channel_directions, names, gradients))
        folded = [self._fold(kind, player, parts) for player, parts in zip(names, gradients, strict=True)]
        if kind == "dual":
            inverse_x, inverse_g = self.block_inverses(names)
            mapped = folded[0].to(inverse_x.dtype) @ inverse_x
            mapped = mapped if inverse_g is None else inverse_g @ mapped
            return (self._unfold(kind, names[0], mapped.to(folded[0].dtype)),)
        found = kronecker_precondition(folded, self.block_metric(kind, names))
        return tuple(self._unfold(kind, player, matrix) for player, matrix in zip(names, found, strict=True))

    def _channel_directions(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inverse = self.states[names[0]]["inverse_x"]
        return tuple(
            channel_step(gradient, inverse) if gradient.dim() > 1 else self._of_bias(name, gradient)
            for name, gradient in zip(names, gradients, strict=True)
        )

    def _of_bias(self, name: str, gradient: Tensor) -> Tensor:
        found: Tensor = gradient / self._kronecker.divisor(self.states[name], self._groups[name])
        return found

    def _stepping(self, kind: BlockKind, names: Names, steps: Sequence[Tensor]) -> Parts:
        """``M⁻¹ (C w + ℓ) / η`` parameter by parameter, from ``M⁻¹ C w / η``."""
        found = tuple(self._unfold(kind, player, step) for player, step in zip(names, steps, strict=True))
        found = _each(lambda name, part: part.to(wide(self._params[name]).dtype), names, found)
        if not self._decays(names):
            return found
        decays = self._directions(kind, names, self._zeros(names))
        return tuple(tuple(map(torch.add, *pair)) for pair in zip(found, decays, strict=True))

    def _shape(self, kind: BlockKind, names: tuple[str, ...]) -> tuple[int, int, int]:
        """``(G, m, n)`` of one player's gradients: groups of a convolution, or blocks of a wide layer's inputs."""
        params = [self._params[name] for name in names]
        if kind == "exact":
            return 1, sum(param.numel() for param in params), 1
        weight = max(params, key=torch.Tensor.dim)
        width = weight[0].numel() + (len(params) > 1)
        groups = self.states[names[0]]["factor_x"].shape[0] if "factor_x" in self.states[names[0]] else 1
        if weight.dim() == 2:
            return groups, len(weight), -(-width // groups)
        return groups, len(weight) // groups, width

    def _fold(self, kind: BlockKind, names: tuple[str, ...], parts: tuple[Tensor, ...]) -> Tensor:
        """``(G, m, n)`` of one player's gradients, the bias's last among the inputs."""
        groups, outputs, width = self._shape(kind, names)
        if kind == "exact":
            return torch.cat([part.flatten() for part in parts]).reshape(1, outputs, 1)
        bias_last = sorted(parts, key=torch.Tensor.dim, reverse=True)
        if groups > 1 and parts[0].dim() <= 2:
            whole = torch.cat([part.reshape(outputs, -1) for part in bias_last], -1)
            whole = F.pad(whole, (0, groups * width - whole.shape[1]))
            return whole.reshape(outputs, groups, width).transpose(0, 1)
        return torch.cat([part.reshape(groups, outputs, -1) for part in bias_last], -1)

    def _unfold(self, kind: BlockKind, names: tuple[str, ...], matrix: Tensor) -> tuple[Tensor, ...]:
        params = [self._params[name] for name in names]
        if kind == "exact":
            pieces = matrix.flatten().split([param.numel() for param in params])
        else:
            width = max(param[0].numel() for param in params)
            if len(matrix) > 1 and max(param.dim() for param in params) == 2:
                matrix = matrix.transpose(0, 1).flatten(1)[:, : width + (len(params) > 1)]
            pieces = tuple(matrix[..., :width] if param.dim() > 1 else matrix[..., width:] for param in params)
        return tuple(piece.reshape(param.shape) for piece, param in zip(pieces, params, strict=True))

    def _scaled(self, kind: BlockKind, names: Names, gradients: Parts, sign: int) -> Parts:
        """``± M⁻¹ (g + ℓ)``."""
        directions = self._directions(kind, names, gradients)
        return _each(lambda name, part: part * (sign * float(self._groups[name]["lr"])), names, directions)

    def _decays(self, names: Names) -> bool:
        return any(self._linear(name) is not None for player in names for name in player)

    def _zeros(self, names: Names) -> Parts:
        return tuple(tuple(torch.zeros_like(self._params[name]) for name in player) for player in names)


def _each(function: Callable[[str, Tensor], Any], names: Names, parts: Parts) -> tuple[tuple[Any, ...], ...]:
    """A function of every parameter's name and tensor."""
    return tuple(tuple(map(function, player, own)) for player, own in zip(names, parts, strict=True))
