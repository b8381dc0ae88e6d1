"""Explicit Jacobians of every stage's augmented dynamics, by automatic differentiation of the normal form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.graph import GUARD, UNKNOWN, BufferRef, ControlGraph, Leaf, Op, ParamRef, Player, map_leaves
from gtddp_compile.kernels import random_state, restore_random_state
from gtddp_compile.passes.p06_derive import cut_after
from gtddp_compile.runtime.method import BaseMethod

Pairs = dict[tuple[str, str], Tensor]
NO_BLOCK_READING = "Use mixing='exact', the fast backend, or model.eval() so that running statistics are used"
"""What to do where samples are mixed."""


@dataclass(frozen=True)
class Blocks:
    """What automatic differentiation gives for one stage and the whole batch: row ``i n + k`` is entry k of sample i.

    Attributes:
        values: ``∂o/∂v``, by (value after, value before): ``(B n_o, B n_v)``; tied controls are not among them.
        outputs: ``∂o/∂h``, by (value after, use): ``(B n_o, B n_h)``.
        layers: ``∂h/∂u``, by (use, player): ``(B n_h, m)``.
        mixes: an operation of the stage that mixes samples.
    """

    values: Pairs
    outputs: Pairs
    layers: Pairs
    mixes: Op | None

    def effective(self, g: Mapping[str, Tensor]) -> Blocks:
        """The block-diagonal reading of a stage that mixes samples (docs/theory.md#mixing).

        Sample i's block is corrected by the rank-one term with which it pulls ``g_i`` back to ``∂Σ_jφ_j/∂x_i``, what
        every sample contributes through the batch statistics included.

        Raises:
            CompileError: ``g_i`` is zero, and what others contribute is not.
        """
        if self.mixes is None:
            return self
        return replace(
            self,
            values={(o, v): _corrected(block, g[o], self.mixes) for (o, v), block in self.values.items()},
            outputs={(o, use): _corrected(block, g[o], self.mixes) for (o, use), block in self.outputs.items()},
        )


def _corrected(block: Tensor, g: Tensor, mixes: Op) -> Tensor:
    batch = g.shape[0]
    tiles = block.reshape(batch, block.shape[0] // batch, batch, -1)
    blocks = []
    for i in range(batch):
        own = tiles[i, :, i]
        total = torch.einsum("jo,jon->n", g, tiles[:, :, i])
        missing = total - g[i] @ own
        norm = g[i] @ g[i]
        if not norm and missing.any():
            raise mixes.refusal(
                f"the dense backend has no block reading of an operation that mixes samples where the gradient of one "
                f"of them (sample {i}) is zero and the others' are not",
                NO_BLOCK_READING,
            )
        blocks.append(own + torch.outer(g[i] / norm, missing) if norm > 0 else own)
    joined: Tensor = torch.block_diag(*blocks)
    return joined


@dataclass(frozen=True)
class StageJacobians:
    """``f̂_x`` and ``f̂_u`` of the batch-augmented state.

    A tied player's control is a value of the state, ``params:NAME``, that all samples share. Here every sample carries
    its own copy of it: ``û`` enters all copies by identity blocks, and a later use of sample i reads copy i. The copies
    move alike, ``E δu`` with ``E`` a stack of B identities, so with ``Eᵀ V_x`` and ``Eᵀ V_xx E`` in place of ``V_x``
    and ``V_xx`` this is the formulation with one shared block: the same gains, the same ``K̂ δx̂``. Copies are what the
    paper's block-diagonal reading and the clip of a sample's predicted change need, which act on samples. The gradient
    at copy i is ``γ_i`` of the later uses, so its part of ``c`` is the fast program's ``⟨γ_i, δu⟩``: the two agree.

    Attributes:
        state: ``∂o/∂v``, by (value after, value before): ``(B n_o, B n_v)``.
        control: ``∂o/∂u``, by (value after, player), every use of the player's parameters: ``(B n_o, m)``.
    """

    state: Pairs
    control: Pairs

    def rows(self, samples: Tensor, batch: int) -> StageJacobians:
        """The same for some of the samples."""
        return StageJacobians(
            state={key: rows_of_samples(block, samples, batch) for key, block in self.state.items()},
            control={key: _pick(block, samples, batch, 0) for key, block in self.control.items()},
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


class Trajectory:
    """The network's values, evaluated operation by operation; a stage can be evaluated again around them."""

    def __init__(
        self, graph: ControlGraph, p: Mapping[str, Tensor], b: Mapping[str, Tensor], inputs: tuple[Any, ...]
    ) -> None:
        self.graph, self.p, self.b = graph, p, b
        advancing = graph.ops.advancing
        self._still = {name: None if name in advancing else value for name, value in b.items()}
        self._random: dict[int, list[Tensor]] = {}
        self.batch = inputs[0].shape[0]
        self.dtype = next(iter(p.values())).dtype
        self.values: dict[str, Any] = dict(zip(graph.ops.inputs, inputs, strict=True))
        for index in range(-1, len(graph.stages)):
            self._random[index] = random_state()
            self._run(index, self.values, p, b)
            self.values.update(self._copies(p, index))
        self._random[len(graph.stages)] = random_state()

    def _ops(self, stage: int) -> tuple[str, ...]:
        names = self.graph.prologue if stage < 0 else self.graph.stages[stage].ops
        return tuple(name for name in self.graph.with_expressions(names) if self.graph.op(name).kind != "input")

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
            if self.graph.op(name).kind == GUARD and values is not self.values:
                continue  # the model decides on the trajectory
            value = evaluate_op(self.graph, name, values, p, b)
            values[name] = value + self.as_it_lies(name, shift[name]) if shift and name in shift else value

    def terminal(self, m: BaseMethod, targets: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """``φ``, what it can fall by, and its gradient in every output that players move, ``(B, n)`` each."""
        moved = cut_after(self.graph, self.graph.stages[-1])
        leaves = {name: self.values[name].detach().requires_grad_() for name in moved}
        with torch.enable_grad():
            outputs = map_leaves(self.graph.ops.output, lambda leaf: leaves.get(leaf.name, self.values.get(leaf.name)))
            phi = m.losses(outputs, targets)
            g = torch.autograd.grad(phi.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
        batch, above = phi.shape[0], m.above(phi, outputs, targets)
        parts = zip(leaves, g, strict=True)
        return (
            phi.detach(),
            above.detach(),
            {name: self.by_sample(name, part).reshape(batch, -1) for name, part in parts},
        )

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

    # --- samples ----------------------------------------------------------------------------------------------------

    def by_sample(self, name: str, value: Tensor, values: Mapping[str, Any] | None = None) -> Tensor:
        """Every entry of a value (of a tied control: of its copies), sample by sample: sample 0's first.

        ``values`` of the sweep in which it was computed, where it is not the first: they say in which order it lies.
        """
        order = self._order(name, value.shape, self.values if values is None else values)
        return value.reshape(-1) if order is None else value.reshape(-1)[order]

    def as_it_lies(self, name: str, flat: Tensor) -> Tensor:
        """The inverse of :meth:`by_sample`."""
        shape = self.values[name].shape
        order = self._order(name, shape, self.values)
        return (flat if order is None else flat[order.argsort()]).reshape(shape)

    def sample_shape(self, name: str) -> tuple[int, ...]:
        """What of an operation's value belongs to one sample."""
        return self.graph.op(name).samples.sample_shape(tuple(self.values[name].shape), self.batch)

    def _order(self, name: str, shape: torch.Size, values: Mapping[str, Any]) -> Tensor | None:
        """Entries sorted by the sample they belong to, which is told from their index along one axis."""
        layout = self.graph.op(name).layout if name in self.graph.ops.by_name else None
        if layout in (None, UNKNOWN):
            return None
        along = torch.arange(shape[layout.axis])
        rank = along if layout.order is None else torch.argsort(values[layout.order])  # where each entry belongs
        # Within a sample as they lie, unless their order may change.
        key = layout.owner(rank, self.batch) if layout.order is None else rank
        table = key.reshape([-1 if axis == layout.axis else 1 for axis in range(len(shape))]).expand(shape)
        order: Tensor = table.reshape(-1).argsort(stable=True)
        return order

    # --- Jacobians ----------------------------------------------------------------------------------------------------

    def blocks(self, t: int) -> Blocks:
        """Derivatives of stage ``t`` around the trajectory."""
        stage = self.graph.stages[t]
        live = [name for name in stage.live if self.graph.value[name].control is None and not self._is_constant(name)]
        made = [name for name in cut_after(self.graph, stage) if name in stage.produced and name in self.values]
        computed = [name for name in made if not self._is_constant(name)]
        uses = self.graph.uses_in(stage.ops)
        points = [self.by_sample(name, self.values[name]) for name in live]
        points += [torch.zeros_like(self.values[use]).reshape(-1) for use in uses]

        def dynamics(*arguments: Tensor) -> tuple[Tensor, ...]:
            values = dict(self.values)
            for name, flat in zip(live, arguments, strict=False):
                values[name] = self.as_it_lies(name, flat)
            shift = dict(zip(uses, arguments[len(live) :], strict=True))
            restore_random_state(self._random[t])
            self._run(t, values, self.p, self._still, shift)
            return tuple(self.by_sample(name, values[name]) for name in computed)

        found = _jacobian(dynamics, tuple(points)) if computed else ()
        columns = [*live, *uses]
        pairs = {(o, c): found[i][j] for i, o in enumerate(computed) for j, c in enumerate(columns)}
        return Blocks(
            values={key: block for key, block in pairs.items() if key[1] in live},
            outputs={key: block for key, block in pairs.items() if key[1] in uses},
            layers={
                (use, player.name): self._layer(use, player) for use in uses for player in self.graph.player_using[use]
            },
            mixes=next((op for op in map(self.graph.op, stage.ops) if op.mixes_samples), None),
        )

    def assemble(self, t: int, blocks: Blocks) -> StageJacobians:
        """The augmented Jacobians of stage ``t``: identity blocks of what waits, and every use of every control."""
        stage, state, control = self.graph.stages[t], dict(blocks.values), {}
        batch = self.batch
        width = {
            name: self.values[name].numel() * (batch if self._is_constant(name) else 1)
            for name in (*stage.live, *stage.produced)
        }
        for o in cut_after(self.graph, stage):
            for v in stage.live:
                if v == o:
                    state[o, v] = torch.eye(width[o], dtype=self.dtype)
                elif (o, v) not in state:
                    state[o, v] = torch.zeros(width[o], width[v], dtype=self.dtype)
            for name in stage.players:
                size = self._flat(self.p, self.graph.player[name]).numel()
                copies = torch.eye(size, dtype=self.dtype).repeat(batch, 1)
                born = o == f"params:{name}"
                control[o, name] = copies if born else torch.zeros(width[o], size, dtype=self.dtype)
        for (o, use), block in blocks.outputs.items():
            for player in self.graph.player_using[use]:
                layer = blocks.layers[use, player.name]
                if player.stage == t:
                    control[o, player.name] = control[o, player.name] + block @ layer
                else:
                    own_copies = torch.block_diag(*layer.reshape(batch, -1, layer.shape[1]))
                    key = (o, f"params:{player.name}")
                    state[key] = state[key] + block @ own_copies
        return StageJacobians(state, control)

    def _is_constant(self, name: str) -> bool:
        """Whether a value is no sample's own and never moves (a buffer's, a table's); every sample gets a copy."""
        if not self.graph.value[name].fixed:
            return False
        return not self.graph.op(name).samples.fits(tuple(self.values[name].shape), self.batch)

    def _layer(self, use: str, player: Player) -> Tensor:
        """``∂h/∂u`` of one use, parameters flat and side by side."""
        shapes = [self.p[name].shape for name in player.parameters]
        reads = self.graph.with_expressions((use,))

        def layer(flat: Tensor) -> tuple[Tensor]:
            pieces = flat.split([shape.numel() for shape in shapes])
            moved = {
                name: piece.reshape(shape) for name, piece, shape in zip(player.parameters, pieces, shapes, strict=True)
            }
            p, values = {**self.p, **moved}, dict(self.values)
            for name in reads:
                values[name] = evaluate_op(self.graph, name, values, p, self._still)
            return (self.by_sample(use, values[use]),)

        return _jacobian(layer, (self._flat(self.p, player),))[0][0]

    def _flat(self, p: Mapping[str, Tensor], player: Player) -> Tensor:
        return torch.cat([p[name].flatten() for name in player.parameters])

    def _copies(self, p: Mapping[str, Tensor], stage: int) -> dict[str, Tensor]:
        """Controls decided at a stage that wait for a later use, a copy a sample."""
        waiting = [value for value in self.graph.values if value.control is not None and value.born == stage]
        players = [self.graph.player[str(value.control)] for value in waiting]
        return {
            value.name: self._flat(p, player).expand(self.batch, -1)
            for value, player in zip(waiting, players, strict=True)
        }

    # --- the second sweep ---------------------------------------------------------------------------------------------

    def recompute(self, t: int, moved: dict[str, Any], q: Mapping[str, Tensor]) -> None:
        """Evaluate stage ``t`` with the new parameters, the same random numbers and no advancing of buffers."""
        restore_random_state(self._random[t])
        self._run(t, moved, q, self._still)
        moved.update(self._copies(q, t))
        self.settle()

    def settle(self) -> None:
        """The random state after the first sweep: a step draws as much as one forward pass."""
        restore_random_state(self._random[len(self.graph.stages)])

    def change(self, moved: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Tensor]:
        """``δv = v' - v`` of the named values, ``(B, n)``."""
        found = {}
        for name in names:
            if self._is_constant(name):
                found[name] = torch.zeros(self.batch, self.values[name].numel(), dtype=self.dtype)
                continue
            after, before = self.by_sample(name, moved[name], moved), self.by_sample(name, self.values[name])
            delta = torch.where(after == before, 0, after - before)  # what a mask keeps at -inf has not moved
            found[name] = delta.reshape(self.batch, -1)
        return found


def _jacobian(function: Callable[..., tuple[Tensor, ...]], points: tuple[Tensor, ...]) -> list[list[Tensor]]:
    """``∂y_j/∂x_k`` of flat values, by (output, input): one vector-Jacobian product for all rows at once."""
    with torch.enable_grad():
        leaves = tuple(point.detach().requires_grad_() for point in points)
        found = []
        for value in function(*leaves):
            rows = torch.eye(value.numel(), dtype=value.dtype)
            parts: tuple[Tensor | None, ...] = (None,) * len(leaves)
            if value.requires_grad:
                parts = torch.autograd.grad(
                    value, leaves, rows, retain_graph=True, is_grads_batched=True, allow_unused=True
                )
            pairs = zip(parts, leaves, strict=True)
            found.append([rows.new_zeros(len(rows), leaf.numel()) if p is None else p for p, leaf in pairs])
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
