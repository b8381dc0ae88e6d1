"""Explicit Jacobians of every stage's augmented dynamics, by automatic differentiation of the normal form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.graph import BufferRef, ControlGraph, Leaf, ParamRef, map_leaves
from gtddp_compile.kernels import random_state, restore_random_state
from gtddp_compile.passes.p06_derive import cut_after
from gtddp_compile.runtime.method import BaseMethod

Pairs = dict[tuple[str, str], Tensor]


@dataclass(frozen=True)
class StageJacobians:
    """Blocks for the whole batch, samples side by side: row ``i n + k`` is entry k of sample i.

    Attributes:
        state: ``∂o/∂v``, by (value after, value before): ``(B n_o, B n_v)``.
        outputs: ``∂o/∂h``, by (value after, use): ``(B n_o, B n_h)``.
        layers: ``∂h/∂u``, by use: ``(B n_h, m)``.
        owner: the player of each use.
        mixes: whether an operation of the stage mixes samples.
        dtype: of all of them.
    """

    state: Pairs
    outputs: Pairs
    layers: dict[str, Tensor]
    owner: Mapping[str, str]
    mixes: bool
    dtype: torch.dtype

    @property
    def control(self) -> Pairs:
        """``∂o/∂u``, by (value after, player): ``(B n_o, m)``, every use of the player's parameters."""
        found: Pairs = {}
        for (o, use), block in self.outputs.items():
            key = (o, self.owner[use])
            part = block @ self.layers[use]
            found[key] = found[key] + part if key in found else part
        return found

    def rows(self, samples: Tensor, batch: int) -> StageJacobians:
        """The same for some of the samples."""
        return replace(
            self,
            state={key: rows_of_samples(block, samples, batch) for key, block in self.state.items()},
            outputs={key: rows_of_samples(block, samples, batch) for key, block in self.outputs.items()},
            layers={use: _pick(block, samples, batch, 0) for use, block in self.layers.items()},
        )

    def pull_back(self, g: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """``g_v = Σ_o (∂o/∂v)ᵀ g_o``, each ``(B, n)``: ordinary back-propagation, samples mixed as they are."""
        batch = next(iter(g.values())).shape[0]
        found: dict[str, Tensor] = {}
        for (o, v), block in self.state.items():
            part = (block.T @ g[o].reshape(-1)).reshape(batch, -1)
            found[v] = found[v] + part if v in found else part
        return found

    def pull_back_hessian(self, h: Pairs) -> Pairs:
        """``Σ (∂o/∂v)ᵀ h_oo' ∂o'/∂v'``: a Hessian in the values after, in the values before."""
        outs, ins = {o for o, _ in self.state}, dict.fromkeys(v for _, v in self.state)
        found: Pairs = {}
        for v in ins:
            for w in ins:
                parts = [self.state[o, v].T @ h[o, r] @ self.state[r, w] for o in outs for r in outs]
                found[v, w] = torch.stack(parts).sum(0)
        return found


def _pick(block: Tensor, samples: Tensor, batch: int, axis: int) -> Tensor:
    width = block.shape[axis] // batch
    index = (samples.unsqueeze(1) * width + torch.arange(width)).flatten()
    return block.index_select(axis, index)


def rows_of_samples(block: Tensor, samples: Tensor, batch: int) -> Tensor:
    """Rows and columns of some samples of a matrix over the whole batch, samples side by side."""
    return _pick(_pick(block, samples, batch, 0), samples, batch, 1)


def effective(jacobians: StageJacobians, g: Mapping[str, Tensor], batch: int) -> StageJacobians:
    """The block-diagonal reading of a stage that mixes samples (theory: 4e).

    Sample i's block is corrected by the rank-one term with which it pulls ``g_i`` back to ``∂Σ_jφ_j/∂x_i``, what every
    sample contributes through the batch statistics included.
    """
    if not jacobians.mixes:
        return jacobians

    def corrected(block: Tensor, g_o: Tensor) -> Tensor:
        tiles = block.reshape(batch, block.shape[0] // batch, batch, -1)
        blocks = []
        for i in range(batch):
            own = tiles[i, :, i]
            total = torch.einsum("jo,jon->n", g_o, tiles[:, :, i])
            missing = total - g_o[i] @ own
            norm = g_o[i] @ g_o[i]
            blocks.append(own + torch.outer(g_o[i] / norm, missing) if norm > 0 else own)
        joined: Tensor = torch.block_diag(*blocks)
        return joined

    return replace(
        jacobians,
        state={(o, v): corrected(block, g[o]) for (o, v), block in jacobians.state.items()},
        outputs={(o, use): corrected(block, g[o]) for (o, use), block in jacobians.outputs.items()},
    )


class Trajectory:
    """The network's values, evaluated operation by operation; a stage can be evaluated again around them."""

    def __init__(
        self, graph: ControlGraph, p: Mapping[str, Tensor], b: Mapping[str, Tensor], inputs: tuple[Any, ...]
    ) -> None:
        self.graph, self.p, self.b = graph, p, b
        advancing = {name for op in graph.ops.ops for name in op.advances}
        self._still = {name: None if name in advancing else value for name, value in b.items()}
        self._random: dict[int, list[Tensor]] = {}
        self.values: dict[str, Any] = dict(zip(graph.ops.inputs, inputs, strict=True))
        for index in range(-1, len(graph.stages)):
            self._random[index] = random_state()
            self._run(index, self.values, p, b)
        self._random[len(graph.stages)] = random_state()

    def _ops(self, stage: int) -> tuple[str, ...]:
        names = self.graph.prologue if stage < 0 else self.graph.stages[stage].ops
        return tuple(name for name in names if self.graph.op(name).kind != "input")

    def _run(
        self,
        stage: int,
        values: dict[str, Any],
        p: Mapping[str, Tensor],
        b: Mapping[str, Any],
        shift: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Evaluate a stage in place; ``shift`` is added to the outputs of the named operations."""
        for name in self._ops(stage):
            value = evaluate_op(self.graph, name, values, p, b)
            values[name] = value + shift[name].reshape(value.shape) if shift and name in shift else value

    def terminal(self, m: BaseMethod, targets: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """``φ`` and its gradient in every output that players move, ``(B, n)`` each."""
        moved = cut_after(self.graph, self.graph.stages[-1])
        leaves = {name: self.values[name].detach().requires_grad_() for name in moved}
        with torch.enable_grad():
            outputs = map_leaves(self.graph.ops.output, lambda leaf: leaves.get(leaf.name, self.values.get(leaf.name)))
            phi = m.losses(outputs, targets)
            g = torch.autograd.grad(phi.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        batch = phi.shape[0]
        return phi.detach(), {name: part.reshape(batch, -1) for name, part in zip(leaves, g, strict=True)}

    def terminal_hessian(self, m: BaseMethod, targets: Any) -> Pairs:
        """``H_i`` of every sample in every output that players move, block-diagonal; sampled where it is asked for."""
        moved = cut_after(self.graph, self.graph.stages[-1])
        leaves = {name: self.values[name].detach().requires_grad_() for name in moved}
        outputs = map_leaves(self.graph.ops.output, lambda leaf: leaves.get(leaf.name, self.values.get(leaf.name)))
        hessian = m.explicit_hessian(outputs, targets, tuple(leaves.values()))
        self._random[len(self.graph.stages)] = random_state()  # sampling it is part of the first sweep
        sizes = [leaf[0].numel() for leaf in leaves.values()]
        tiles = [row.split(sizes, 2) for row in hessian.split(sizes, 1)]
        return {(a, c): torch.block_diag(*tiles[i][j]) for i, a in enumerate(leaves) for j, c in enumerate(leaves)}

    # --- Jacobians ----------------------------------------------------------------------------------------------------

    def jacobians(self, t: int) -> StageJacobians:
        """All blocks of stage ``t`` around the trajectory."""
        stage = self.graph.stages[t]
        after = cut_after(self.graph, stage)
        computed = tuple(name for name in after if name not in stage.live)
        uses = self._uses(t)
        points = [self.values[name].reshape(-1) for name in stage.live]
        points += [torch.zeros_like(self.values[use]).reshape(-1) for use in uses]

        def dynamics(*arguments: Tensor) -> tuple[Tensor, ...]:
            values = dict(self.values)
            for name, flat in zip(stage.live, arguments, strict=False):
                values[name] = flat.reshape(self.values[name].shape)
            shift = dict(zip(uses, arguments[len(stage.live) :], strict=True))
            restore_random_state(self._random[t])
            self._run(t, values, self.p, self._still, shift)
            return tuple(values[name].reshape(-1) for name in computed)

        with torch.enable_grad():
            found = torch.autograd.functional.jacobian(dynamics, tuple(points)) if computed else ()
        columns = [*stage.live, *uses]
        blocks = {(o, c): found[i][j] for i, o in enumerate(computed) for j, c in enumerate(columns)}
        for o in after:
            if o in stage.live:  # carried: an identity block
                for name, flat in zip(columns, points, strict=True):
                    own = self.values[o].numel()
                    blocks[o, name] = (
                        torch.eye(own, dtype=flat.dtype) if name == o else flat.new_zeros(own, flat.numel())
                    )
        return StageJacobians(
            state={key: block for key, block in blocks.items() if key[1] in stage.live},
            outputs={key: block for key, block in blocks.items() if key[1] in uses},
            layers={use: self._layer(use, player) for use, player in uses.items()},
            owner=uses,
            mixes=any(self.graph.op(name).mixes_samples for name in stage.ops),
            dtype=points[0].dtype,
        )

    def _uses(self, t: int) -> dict[str, str]:
        """Operations of the stage that read a deciding player's parameters, and whose they are."""
        ops = set(self.graph.stages[t].ops)
        return {use: player.name for player in self.graph.players for use in player.uses if use in ops}

    def _layer(self, use: str, player: str) -> Tensor:
        """``∂h/∂u`` of one use, parameters flat and side by side."""
        owner = self.graph.player[player]
        shapes = [self.p[name].shape for name in owner.parameters]

        def layer(flat: Tensor) -> Tensor:
            pieces = flat.split([shape.numel() for shape in shapes])
            moved = {
                name: piece.reshape(shape) for name, piece, shape in zip(owner.parameters, pieces, shapes, strict=True)
            }
            p, values = {**self.p, **moved}, dict(self.values)
            for name in (*owner.expressions, use):
                values[name] = evaluate_op(self.graph, name, values, p, self._still)
            result: Tensor = values[use].reshape(-1)
            return result

        with torch.enable_grad():
            point = torch.cat([self.p[name].flatten() for name in owner.parameters])
            found: Tensor = torch.autograd.functional.jacobian(layer, point)
        return found

    # --- the second sweep ---------------------------------------------------------------------------------------------

    def begin_again(self) -> dict[str, Any]:
        """Values of the new trajectory before the first stage."""
        return {name: self.values[name] for name in self.graph.prologue}

    def run_again(self, t: int, moved: dict[str, Any], q: Mapping[str, Tensor]) -> None:
        """Evaluate stage ``t`` with the new parameters, the same random numbers and no advancing of buffers."""
        restore_random_state(self._random[t])
        self._run(t, moved, q, self._still)
        restore_random_state(self._random[len(self.graph.stages)])

    def change(self, moved: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
        """``δv = v' - v`` of the named values, ``(B, n)``."""
        found = {}
        for name in names:
            delta = moved[name] - self.values[name]
            found[name] = delta.reshape(delta.shape[0], -1)
        return found


def evaluate_op(
    graph: ControlGraph, name: str, values: Mapping[str, Any], p: Mapping[str, Tensor], b: Mapping[str, Any]
) -> Any:
    """One operation of the normal form."""
    op = graph.op(name)

    def value(leaf: Leaf) -> Any:
        if isinstance(leaf, ParamRef):
            return p[leaf.name]
        return b[leaf.name] if isinstance(leaf, BufferRef) else values[leaf.name]

    assert op.target is not None
    return op.target(*map_leaves(op.args, value), **map_leaves(dict(op.kwargs), value))
