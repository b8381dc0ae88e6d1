"""The dense backend: the derivation itself, executed with explicit Jacobians and matrices.

Slow and memory-hungry on purpose: it multiplies out what the collapse avoids, shares no formula with the generated
code,
and is what that code is compared with. For networks of a few hundred activations.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.algebra.numeric import evaluate
from gtddp_compile.errors import CompileError
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.program import UpdateProgram
from gtddp_compile.runtime.jacobians import StageJacobians, Trajectory, effective
from gtddp_compile.runtime.method import BaseMethod


@dataclass
class Group:
    """One group of samples, standing for the batch: its value function and the gains found so far."""

    samples: Tensor
    share: float
    value_x: dict[str, Tensor]
    value_xx: dict[tuple[str, str], Tensor]


@dataclass
class Gains:
    """Gains of one stage for one group: ``δu = k + Σ K_v δv``, controls side by side."""

    k: Tensor
    feedback: dict[str, Tensor]


class DenseBackend:
    """Executes the derived equations literally (theory: sections 1 and 2)."""

    def __init__(self, program: UpdateProgram) -> None:
        self.program = program
        if any(value.control for value in program.graph.values):
            raise CompileError(
                "the dense backend holds one state a sample; a tied parameter's control is shared by all of them",
                "Use backend='fast' for networks with tied parameters",
            )

    def run(
        self,
        m: BaseMethod,
        p: dict[str, Tensor],
        b: dict[str, Tensor],
        q: dict[str, Tensor],
        inputs: tuple[Any, ...],
        targets: Any,
    ) -> Tensor:
        """Both sweeps; same contract as the fast backend's ``run``."""
        graph, options = self.program.graph, self.program.options
        trajectory = Trajectory(graph, p, b, inputs)
        phi, g = trajectory.terminal(m, targets)
        _, start = m.terminal(phi)
        batch = phi.shape[0]
        groups = [self._terminal(rows, g, start, batch) for rows in self._rows(batch)]
        gains: list[list[Gains]] = []
        gradients: list[dict[str, Tensor]] = []
        for stage in reversed(self.program.derived.stages):
            jacobians = trajectory.jacobians(stage.index)
            after, g = g, jacobians.pull_back(g)
            if options.mixing == "block":
                jacobians = effective(jacobians, after, batch)
            gains.insert(0, self._sweep(m, stage, jacobians, groups, batch))
            gradients.insert(0, g)
        self._forward(m, q, trajectory, groups, gains, gradients)
        return phi

    # --- terminal -----------------------------------------------------------------------------------------------------

    def _rows(self, batch: int) -> list[Tensor]:
        coupling = self.program.options.coupling
        return list(torch.arange(batch).split(coupling if isinstance(coupling, int) else batch))

    def _terminal(self, samples: Tensor, g: dict[str, Tensor], start: float, batch: int) -> Group:
        """``V_x = α_T g`` and ``V_xx`` block-diagonal in the samples: ``∇φ_i ∇φ_iᵀ / B`` (section 2)."""
        keep = 1.0 if self.program.options.feedback else 0.0  # Proposition 4: no value Hessian
        mine = {name: value[samples] for name, value in g.items()}
        value_x = {name: start * value.reshape(-1, 1) for name, value in mine.items()}
        value_xx = {
            (a, c): keep * start * torch.block_diag(*(torch.outer(x, y) for x, y in zip(mine[a], mine[c], strict=True)))
            for a in mine
            for c in mine
        }
        return Group(samples, len(samples) / batch, value_x, value_xx)

    # --- backward sweep -----------------------------------------------------------------------------------------------

    def _sweep(
        self, m: BaseMethod, stage: DerivedStage, jacobians: StageJacobians, groups: list[Group], batch: int
    ) -> list[Gains]:
        """Statistics from all groups, then every group's gains and value recursion."""
        names = {letter: self.program.graph.player[player].parameters for letter, player in stage.controls.items()}
        opened = [self._environment(stage, jacobians.rows(group.samples, batch), group) for group in groups]
        for letter, parameters in names.items():
            equation = stage.derivation.q_u[letter]
            total = None
            for values, size in opened:
                values[stage.derivation.linear[letter]] = torch.zeros(size[equation.symbol.shape[0]], 1).to(
                    jacobians.dtype
                )
                found = evaluate(equation.expression, values, size)
                total = found if total is None else total + found
            assert total is not None
            m.observe(parameters, m.unflatten(parameters, total))
        return [
            self._group_gains(m, stage, group, values, size, names)
            for group, (values, size) in zip(groups, opened, strict=True)
        ]

    def _environment(
        self, stage: DerivedStage, jacobians: StageJacobians, group: Group
    ) -> tuple[dict[Any, Tensor], dict[Any, int]]:
        """Values of the derivation's symbols: bundles are concatenated values."""
        d, values, size = stage.derivation, {}, {}
        for o, outs in stage.outputs.items():
            values[d.value_x[o]] = torch.cat([group.value_x[name] for name in outs])
            for o2, outs2 in stage.outputs.items():
                block = torch.cat([torch.cat([group.value_xx[a, c] for c in outs2], 1) for a in outs])
                values[d.value_xx[o, o2]] = block
            for i, ins in stage.inputs.items():
                empty = values[d.value_x[o]].new_zeros(values[d.value_x[o]].shape[0], 0)  # a state of no values
                columns = [torch.cat([jacobians.state[a, c] for a in outs]) for c in ins]
                values[d.state[o, i]] = block = torch.cat([empty, *columns], 1)
                size[d.q_x[i].symbol.shape[0]] = block.shape[1]
            for u, player in stage.controls.items():
                block = torch.cat([jacobians.control[a, player] for a in outs])
                values[d.control[o, u]] = block
                size[d.q_u[u].symbol.shape[0]] = block.shape[1]
        return values, size

    def _group_gains(
        self,
        m: BaseMethod,
        stage: DerivedStage,
        group: Group,
        values: dict[Any, Tensor],
        size: dict[Any, int],
        names: dict[str, tuple[str, ...]],
    ) -> Gains:
        """Every equation of the derivation in turn; the group's own ``M`` and ``ℓ_u`` are its share of the batch's."""
        d = stage.derivation
        for letter, parameters in names.items():
            metric, linear = m.dense_curvature(parameters)
            values[d.curvature[letter]] = group.share * torch.diag(metric)
            values[d.linear[letter]] = group.share * linear.unsqueeze(1)
        for equation in d.equations():
            values[equation.symbol] = evaluate(equation.expression, values, size)
        self._advance(m, stage, group, values)
        feedback: dict[str, Tensor] = {}
        for i, ins in stage.inputs.items():
            widths = [group.value_x[name].shape[0] for name in ins]
            feedback.update(zip(ins, values[d.gains[i].symbol].split(widths, 1), strict=True))
        return Gains(group.share * values[d.k.symbol], {name: group.share * gain for name, gain in feedback.items()})

    def _advance(self, m: BaseMethod, stage: DerivedStage, group: Group, values: dict[Any, Tensor]) -> None:
        """The value function at the cut before the stage, projected as the coupling says."""
        d, count = stage.derivation, len(group.samples)
        value_x: dict[str, Tensor] = {}
        value_xx: dict[tuple[str, str], Tensor] = {}
        width = {}
        for i, ins in stage.inputs.items():
            total = values[d.new_value_x[i].symbol]
            sizes = self._widths(values, stage, i, ins, count)
            width[i] = sizes
            value_x.update(zip(ins, total.split(sizes), strict=True))
        for (i, j), equation in d.new_value_xx.items():
            blocks = [row.split(width[j], 1) for row in values[equation.symbol].split(width[i])]
            for a, row in zip(stage.inputs[i], blocks, strict=True):
                for c, block in zip(stage.inputs[j], row, strict=True):
                    value_xx[a, c] = block
                    value_xx[c, a] = block.T if (a, c) != (c, a) else block
        if self.program.options.coupling == "block":
            value_xx = {pair: _per_sample(block, count) for pair, block in value_xx.items()}
            if self.program.options.recursion == "substituted":
                m.keep(stage.index, radicands=_clip_negative(value_xx, count))
        group.value_x, group.value_xx = value_x, value_xx

    def _widths(
        self, values: dict[Any, Tensor], stage: DerivedStage, i: str, ins: tuple[str, ...], count: int
    ) -> list[int]:
        sizes = []
        for name in ins:
            shape = self.program.graph.value[name].shape
            sizes.append(count * int(torch.Size(shape).numel()))
        return sizes

    # --- forward sweep ------------------------------------------------------------------------------------------------

    def _forward(
        self,
        m: BaseMethod,
        q: dict[str, Tensor],
        trajectory: Trajectory,
        groups: list[Group],
        gains: list[list[Gains]],
        gradients: list[dict[str, Tensor]],
    ) -> None:
        """``û = u + k + K̂ δx̂``, stage by stage along the new trajectory (section 1)."""
        moved = trajectory.begin_again()
        for stage in self.program.derived.stages:
            change = trajectory.change(moved, self.program.graph.stages[stage.index].live)
            change = self._believe(m, stage.index, change, gradients[stage.index])
            total: Tensor | None = None
            for group, found in zip(groups, gains[stage.index], strict=True):
                delta = found.k.clone()
                if self.program.options.feedback is True:
                    for name, gain in found.feedback.items():
                        delta += gain @ change[name][group.samples].reshape(-1, 1)
                total = delta if total is None else total + delta
            assert total is not None
            self._apply(m, stage, total)
            if stage.index + 1 < len(self.program.derived.stages):
                trajectory.run_again(stage.index, moved, q)

    def _believe(self, m: BaseMethod, t: int, change: dict[str, Tensor], g: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale each sample's ``δx̂`` so that the change it predicts stays within the clip (theory: 4a)."""
        clip = self.program.options.feedback_clip
        if clip is None or self.program.options.feedback is not True or not change:
            return change
        c = torch.stack([(g[name] * delta).sum(1) for name, delta in change.items()]).sum(0)
        outside = c.abs() > clip
        m.keep(t, outside=outside.sum())
        factor = torch.where(outside, clip / c.abs().clamp_min(torch.finfo(c.dtype).tiny), torch.ones_like(c))
        return {name: factor.unsqueeze(1) * delta for name, delta in change.items()}

    def _apply(self, m: BaseMethod, stage: DerivedStage, delta: Tensor) -> None:
        """The base method consumes ``ĝ = -M δu``."""
        names = [self.program.graph.player[player].parameters for player in stage.controls.values()]
        sizes = [m.dense_curvature(parameters)[0].shape[0] for parameters in names]
        for parameters, part in zip(names, delta.split(sizes), strict=True):
            metric, linear = m.dense_curvature(parameters)
            consumed = -metric.unsqueeze(1) * part - linear.unsqueeze(1)
            m.apply(parameters, m.unflatten(parameters, consumed))


def _per_sample(block: Tensor, count: int) -> Tensor:
    """Only what couples a sample with itself (paper: Sec. 4.2)."""
    rows, columns = block.shape[0] // count, block.shape[1] // count
    keep: Tensor = torch.block_diag(*(torch.ones(rows, columns, dtype=block.dtype) for _ in range(count)))
    return block * keep


def _clip_negative(value_xx: dict[tuple[str, str], Tensor], count: int) -> Tensor:
    """Zero the Hessian of every sample whose radicand is negative: its (rank-one) Hessian has a negative trace."""
    trace = sum(block.diagonal().reshape(count, -1).sum(1) for (a, c), block in value_xx.items() if a == c)
    assert isinstance(trace, Tensor)
    negative = trace < 0
    for pair, block in value_xx.items():
        keep = (~negative).to(block.dtype).repeat_interleave(block.shape[0] // count)
        value_xx[pair] = block * keep.unsqueeze(1)
    return negative.sum()
