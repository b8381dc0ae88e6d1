"""Feedback modes: what a player's policy answers to most (paper: Fig. 6c)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gtddp_compile.errors import CompileError
from gtddp_compile.kernels import random_state, restore_random_state
from gtddp_compile.optimizer import CompiledOptimizer
from gtddp_compile.runtime.dense.backend import Sweeps
from gtddp_compile.runtime.dense.jacobians import Trajectory


def feedback_modes(
    optimizer: CompiledOptimizer, player: str, inputs: Any, targets: Any, k: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """As :meth:`gtddp_compile.CompiledOptimizer.feedback_modes`."""
    batch, targets = optimizer._batch(inputs, targets)
    program, _ = optimizer._specialise(batch)
    graph, options = program.graph, replace(program.options, backend="dense")
    wrong = options.feedback is not True or optimizer._ranks is not None or optimizer._view.shards.divided
    if wrong or player not in graph.player or k < 1:
        raise CompileError(
            f"there are no {k} feedback modes of {player!r}",
            f"Ask for at least one, with feedback=True and in one process, of {sorted(graph.player)}",
        )
    before, (params, buffers, _) = random_state(), _double(optimizer._working_copy(program))
    batch, targets = _double((batch, targets))
    m = optimizer._base_method(program, params, dict(params))
    m.states, m.samples = _double(m.states), batch[0].shape[0]
    trajectory = Trajectory(graph, params, buffers, batch)
    sweeps = Sweeps(replace(program, options=options), m, trajectory, targets)
    sweeps.backward()
    restore_random_state(before)
    stage = graph.stages[graph.player[player].stage]
    groups = sweeps.gains[stage.index]
    place, live = stage.players.index(player), list(groups[0].feedback)
    blocks = [torch.cat([group.feedback[name] for group in groups], 1) for name in live]  # samples in order
    own = torch.cat(blocks, 1).split(groups[0].metric.sizes)[place]
    _, values, rows = torch.linalg.svd(own, full_matrices=False)
    widths, count = [block.shape[1] for block in blocks], len(values[:k])
    parts = zip(live, rows[:k].split(widths, 1), strict=True)
    shaped = {name: part.reshape(count, m.samples, *trajectory.sample_shape(name)) for name, part in parts}
    return values[:k], shaped


def _double(tree: Any) -> Any:
    """In float64: the dense recursions take eigenvalues of matrices of a rank far below their size."""
    return tree_map(
        lambda value: value.double() if torch.is_tensor(value) and value.is_floating_point() else value, tree
    )
