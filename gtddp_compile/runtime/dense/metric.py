"""The stage's whole curvature ``M`` as an explicit matrix: what the dense backend solves with.

Statistics of players' metrics are taken here from unfolded inputs and the dense value function, and ``M⁻¹`` is built
entry by entry from Kronecker products of the factors' maps. Shared with the fast program is what the base method makes
of them: factors and their running averages (``observe_block``), and their maps, damping and rates (``block_metric``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.graph import ControlGraph, Player
from gtddp_compile.lowering.plan import MetricBlock
from gtddp_compile.lowering.uses import describe_use
from gtddp_compile.runtime.dense.jacobians import Blocks, StageJacobians, Trajectory
from gtddp_compile.runtime.method import BaseMethod


@dataclass(frozen=True)
class Seen:
    """What statistics are taken from at one stage: the trajectory, its derivatives, and ``α_T``."""

    trajectory: Trajectory
    blocks: Blocks
    jacobians: StageJacobians
    start: float


class DenseMetric:
    """``M`` and ``ℓ_u`` of one stage, the players' parameters flat and side by side, ``sizes`` of them.

    After :meth:`observe` they are ``curvature`` ``(m, m)``, its ``inverse``, and ``linear`` ``λ u - μ M v`` ``(m, 1)``.

    Args:
        m: the base method.
        graph: the control graph.
        stage: its index.
        blocks: the players by metric.
    """

    def __init__(self, m: BaseMethod, graph: ControlGraph, stage: int, blocks: Sequence[MetricBlock]) -> None:
        self._m, self._graph, self._stage, self._blocks = m, graph, stage, blocks
        self._players = [graph.player[name] for name in graph.stages[stage].players]
        self.sizes = [sum(m.shape(name).numel() for name in player.parameters) for player in self._players]

    # --- statistics ---------------------------------------------------------------------------------------------------

    def observe(self, seen: Seen, value_x: Mapping[str, Tensor]) -> None:
        """Statistics of every block from ``V_x`` of the whole batch (``(B n, 1)`` a value), and what ``M`` becomes."""
        for block in self._blocks:
            names = block.names
            if block.kind == "parameters":
                q_u = self._rows(seen, value_x, block.players[0]).sum(0)
                self._m.observe(names[0], self._m.unflatten(names[0], q_u))
            elif block.kind == "channels":
                use = describe_use(self._graph, block.players[0], self._graph.op(block.players[0].op))
                x = seen.trajectory.values[use.operands[0].name]
                weight = seen.trajectory.p[use.names[0]]
                output = seen.trajectory.values[use.op]
                how = kernels.Geometry(**use.options) if use.options else None
                layer = kernels.Layer((x,), output, (weight,), (True,), how)
                self._m.observe_channels(names[0], layer, self._positions(seen, block), blocks=block.blocks)
            elif block.kind == "uniform":
                self._m.observe_uniform(names[0], self._positions(seen, block))
            elif block.kind == "diagonal":
                moment = self._rows(seen, value_x, block.players[0]).square().sum(0) / seen.start
                self._m.observe_moment(names[0], self._m.unflatten(names[0], moment))
            else:
                players = block.players[:1] if block.kind == "shared" else block.players
                layers = tuple(self._layer(seen, value_x, block, player) for player in players)
                self._m.observe_block(self._stage, block.kind, names, layers, seen.start)
        decay, carried = (
            torch.cat([of(player.parameters) for player in self._players]).unsqueeze(1)
            for of in (self._m.linear_flat, self._m.carried_flat)
        )
        self.inverse = self._inverse()
        # Where the rate is 0, M is as good as infinite; what consumes ĝ has the rate itself.
        still = torch.finfo(self.inverse.dtype).eps * ~self.inverse.any(1)
        self.curvature = torch.linalg.inv(self.inverse + torch.diag(still))
        self.linear = decay - self.curvature @ carried

    def rows(self, seen: Seen, g: Mapping[str, Tensor]) -> Tensor:
        """``γ``, every sample's gradient of its own loss ``(B, m)``, of the gradients ``g`` after the stage."""
        flat = {name: value.reshape(-1, 1) for name, value in g.items()}
        return torch.cat([self._rows(seen, flat, player) for player in self._players], 1)

    def _positions(self, seen: Seen, block: MetricBlock) -> float:
        """At how many positions a sample uses the player's parameters (``kernels.positions``)."""
        outputs = tuple(seen.trajectory.values[name] for name in block.players[0].uses)
        return kernels.positions(outputs, seen.trajectory.batch, block.size)

    def _rows(self, seen: Seen, value_x: Mapping[str, Tensor], player: Player) -> Tensor:
        """``V_u = f_uᵀ V_x`` of every sample, ``(B, m)``."""
        found = [
            (block * value_x[o]).reshape(seen.trajectory.batch, -1, block.shape[1]).sum(1)
            for (o, name), block in seen.jacobians.control.items()
            if name == player.name
        ]
        return torch.stack(found).sum(0)

    def _layer(self, seen: Seen, value_x: Mapping[str, Tensor], block: MetricBlock, player: Player) -> Any:
        """A layer of explicit rows ``(B, G, T, n)`` and ``V_h`` ``(B, G, T, m)``."""
        if block.kind == "exact":
            v_u = self._rows(seen, value_x, player)
            x, v_h = v_u.new_ones(len(v_u), 1, 1, 1), v_u[:, None, None]
        else:
            use = describe_use(self._graph, player, self._graph.op(player.op))
            parts = [part.T @ value_x[o] for (o, name), part in seen.blocks.outputs.items() if name == use.op]
            (operand,) = use.operands
            x, v_h = (
                flat.reshape(seen.trajectory.batch, *seen.trajectory.sample_shape(name))
                for name, flat in (
                    (operand.name, seen.trajectory.by_sample(operand.name, seen.trajectory.values[operand.name])),
                    (use.op, torch.stack(parts).sum(0)),
                )
            )
            x, v_h = _explicit(x, v_h, use.options, use.params, seen.trajectory.p, bias=use.wants[1])
            if block.blocks > 1:  # the inputs in blocks of equal width, zeros behind the last ones
                width = -(-x.shape[-1] // block.blocks)
                x = F.pad(x, (0, block.blocks * width - x.shape[-1]))
                x, v_h = torch.cat(x.split(width, -1), 1), torch.cat([v_h] * block.blocks, 1)
        return kernels.Rows(kernels.made_rows, kernels.Layer((x,), v_h, (), ()))

    def apply(self, delta: Tensor) -> None:
        """The base method consumes ``ĝ = -M δu`` (without ``ℓ_u``, which it adds), every player's part in turn."""
        consumed = -self.curvature @ delta - self.linear
        parts = dict(zip((player.name for player in self._players), consumed.split(self.sizes), strict=True))
        for block in self._blocks:
            pieces = tuple(self._m.unflatten(p.parameters, parts[p.name]) for p in block.players)
            if block.of_players or block.kind == "channels":
                self._m.apply_block(block.kind, block.names, pieces)  # type: ignore[arg-type]
            else:
                self._m.apply(block.players[0].parameters, pieces[0])

    # --- the matrix ---------------------------------------------------------------------------------------------------

    def _inverse(self) -> Tensor:
        ends = list(accumulate(self.sizes))
        pairs = zip(self._players, self.sizes, ends, strict=True)
        offsets = {player.name: slice(end - size, end) for player, size, end in pairs}
        like = self._m.linear_flat(self._players[0].parameters)
        inverse = like.new_zeros(ends[-1], ends[-1])
        for block in self._blocks:
            if block.kind == "channels":
                self._fill_channels(inverse, offsets[block.players[0].name], block.players[0])
            elif block.of_players:
                self._fill(inverse, offsets, block)
            else:
                (player,) = block.players
                inverse[offsets[player.name], offsets[player.name]] = self._m.dense_inverse(player.parameters)
        return inverse

    def _fill(self, inverse: Tensor, offsets: Mapping[str, slice], block: MetricBlock) -> None:
        """``M⁻¹_pq = √(η_p η_q) Σ_kl (X_p Y_p)_kl scale_kl (X_q Y_q)_kl``, columns in the parameters' order."""
        maps, scale, cross, rates = self._m.block_metric(block.kind, block.names)  # type: ignore[arg-type]
        for p, left in enumerate(block.players):
            for q, right in enumerate(block.players):
                weights = _weights(scale, cross, same=p == q)
                if weights is None:
                    continue
                rate = (rates[p] * rates[q]) ** 0.5
                left_g, right_g = (self._output_map(maps[n], player) for n, player in ((p, left), (q, right)))
                sides = (left_g, maps[p][0], right_g, maps[q][0])
                factors = zip(*(side.contiguous() for side in sides), strict=True)
                whole = torch.block_diag(
                    *(
                        rate * torch.kron(gl, xl) @ _diagonal(weights, k, gl, xl) @ torch.kron(gr, xr).T
                        for k, (gl, xl, gr, xr) in enumerate(factors)
                    )
                )
                rows, columns = self._order(block, left), self._order(block, right)
                inverse[offsets[left.name], offsets[right.name]] = whole[rows][:, columns]

    def _fill_channels(self, inverse: Tensor, where: slice, player: Player) -> None:
        """``M⁻¹`` of a weight acts on its input channels alone; a bias is a multiple of the identity."""
        parts = []
        for name in player.parameters:
            shape, rate = self._m.shape(name), self._m.channels_metric((name,))[0]
            if len(shape) == 1:
                parts.append(rate * torch.eye(shape[0], dtype=inverse.dtype))
                continue
            maps = self._m.states[player.parameters[0]]["map_x"]
            channels = maps @ maps.mT
            if len(shape) == 2:  # every output has all blocks of inputs
                channels = torch.block_diag(*channels).unsqueeze(0)
            channels = channels.repeat_interleave(shape[0] // len(channels), 0)
            kernel = torch.eye(shape[2:].numel(), dtype=inverse.dtype)
            parts.append(rate * torch.block_diag(*(torch.kron(own.contiguous(), kernel) for own in channels)))
        inverse[where, where] = torch.block_diag(*parts)

    def _output_map(self, maps: tuple[Tensor, Tensor | None], player: Player) -> Tensor:
        """``Y``, of every group; a metric of inputs alone has the identity."""
        x, g = maps
        if g is not None:
            return g
        shape = max((self._m.shape(name) for name in player.parameters), key=len)
        rows = shape[0] if len(shape) == 2 else shape[0] // len(x)  # blocks of inputs have the outputs whole
        return torch.eye(rows, dtype=x.dtype).repeat(len(x), 1, 1)

    def _order(self, block: MetricBlock, player: Player) -> Tensor:
        """Position of every parameter entry among the entries of ``(G, m, n)`` matrices, bias last in a row."""
        shapes = [self._m.shape(name) for name in player.parameters]
        sizes = [shape.numel() for shape in shapes]
        if block.kind == "exact":
            return torch.arange(sum(sizes))
        bias = any(len(shape) == 1 for shape in shapes)
        rows = shapes[0][0]
        inputs = max(size // rows for shape, size in zip(shapes, sizes, strict=True) if len(shape) > 1)
        if block.blocks > 1:
            width = -(-(inputs + bias) // block.blocks)
            by_block = torch.arange(block.blocks * rows * width).reshape(block.blocks, rows, width)
            grid = by_block.transpose(0, 1).flatten(1)[:, : inputs + bias]
        else:
            grid = torch.arange(rows * (inputs + bias)).reshape(rows, inputs + bias)
        return torch.cat([(grid[:, :inputs] if len(shape) > 1 else grid[:, inputs:]).flatten() for shape in shapes])


def _weights(scale: Tensor | float, cross: Tensor | None, *, same: bool) -> Tensor | float | None:
    if cross is None:
        return scale
    return scale + cross if same else cross


def _diagonal(weights: Tensor | float, group: int, g: Tensor, x: Tensor) -> Tensor:
    size = g.shape[1] * x.shape[1]
    flat = weights[group].flatten() if isinstance(weights, Tensor) else g.new_full((size,), weights)
    return torch.diag(flat)


def _explicit(x: Tensor, v_h: Tensor, options: Mapping[str, Any], params: Sequence[Any], p: Mapping[str, Tensor],
              *, bias: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Homogeneous rows of a linear layer or a convolution, patch by patch."""
    if "groups" not in options:
        rows, columns = x.reshape(len(x), 1, -1, x.shape[-1]), v_h.reshape(len(x), 1, -1, v_h.shape[-1])
    else:
        weight, groups = p[params[0].name], options["groups"]
        x = x.reshape(-1, *x.shape[-weight.dim() + 1 :])  # every image of every sample
        columns = v_h.reshape(len(x), groups, v_h.shape[-weight.dim() + 1] // groups, -1).transpose(2, 3)
        # The derivative of a convolution in its weights, one weight at a time: no unfolding rule to get wrong.
        entries = weight[0].numel()
        basis = torch.eye(entries, dtype=x.dtype).reshape(entries, *weight.shape[1:])
        convolve = (F.conv1d, F.conv2d, F.conv3d)[weight.dim() - 3]
        settings = {name: options[name] for name in ("stride", "padding", "dilation")}
        parts = [convolve(part, basis, **settings) for part in x.chunk(groups, 1)]
        rows = torch.stack([part.flatten(2).transpose(1, 2) for part in parts], 1)
        rows, columns = (part.unflatten(0, (len(v_h), -1)).transpose(1, 2).flatten(2, 3) for part in (rows, columns))
    return (F.pad(rows, (0, 1), value=1.0) if bias else rows), columns
