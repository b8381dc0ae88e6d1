"""The dense backend: the derivation itself, executed with explicit Jacobians and matrices.

Slow and memory-hungry on purpose: it multiplies out what the collapse avoids, and is what the generated code is
compared with. Of its own are Jacobians, the value recursion, gains, projections, clips and the solves with ``M``. What
it shares with that code is the derivation and the base method's side (``runtime.method``): the loss a sample,
``start``, the aim and sampled terminal columns, the curvature's statistics and factors, and how a gradient is consumed;
for those the tests have other oracles. For networks of a few hundred activations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sympy import MatAdd, MatrixExpr, MatrixSymbol
from torch import Tensor

from gtddp_compile.algebra.numeric import evaluate
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.kernels import target_entries
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.runtime.dense.jacobians import NO_BLOCK_READING, Pairs, StageJacobians, Trajectory, rows_of_samples
from gtddp_compile.runtime.dense.metric import DenseMetric, Seen
from gtddp_compile.runtime.dense.rollout import Gains, rolled_out
from gtddp_compile.runtime.method import BaseMethod
from gtddp_compile.runtime.precision import Precision
from gtddp_compile.runtime.program import UpdateProgram


@dataclass
class Group:
    """One group of samples, standing for the batch: its value function, and entries of each value before the stage."""

    samples: Tensor
    share: float
    value_x: dict[str, Tensor]
    value_xx: dict[tuple[str, str], Tensor]
    width: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Statistics:
    """What the whole batch gives for a stage: ``M``, the loss's Hessian at the cut before, ``γ`` ``(B, m)``."""

    jacobians: StageJacobians
    metric: DenseMetric
    hessian: Pairs
    gamma: Tensor


class DenseBackend:
    """Executes the derived equations literally (docs/theory.md#gains)."""

    def __init__(self, program: UpdateProgram) -> None:
        self.program, options = program, program.options
        _refuse_several_precisions(program.graph)
        mixing = [op for op in program.graph.ops.ops if op.mixes_samples]
        if mixing and options.factored and options.feedback and options.mixing == "block":
            # With several columns no Jacobian of one sample reproduces the block reading (docs/theory.md#mixing).
            why = "the dense backend has no block reading of an operation that mixes samples with"
            raise mixing[0].refusal(f"{why} terminal={options.terminal!r}", NO_BLOCK_READING)

    def run(
        self,
        m: BaseMethod,
        p: dict[str, Tensor],
        b: dict[str, Tensor],
        q: dict[str, Tensor],
        inputs: tuple[Any, ...],
        targets: Any,
    ) -> Tensor:
        """Both sweeps; same contract as the fast backend's ``run``.

        Raises:
            CompileError: under ``torch.autocast``: a reference is of one precision.
        """
        if Precision.around(p.values()).autocast:
            raise CompileError(
                "the dense backend was called under torch.autocast, and is a reference of one precision",
                "Call it outside, or use backend='fast'",
            )
        m.samples = inputs[0].shape[0]
        trajectory = Trajectory(self.program.graph, m.look_ahead(p, targets), b, inputs)
        return Sweeps(self.program, m, trajectory, targets).run(q)


def _refuse_several_precisions(graph: ControlGraph) -> None:
    """Matrices of one stage are multiplied with those of the next."""
    uses = [name for stage in graph.stages for name in graph.uses_in(stage.ops)]
    moved = [value.name for value in graph.values if value.control is None and not value.fixed]
    found = [graph.op(name) for name in uses + moved]
    for op in found:
        if op.is_differentiable and op.dtype != found[0].dtype:
            raise op.refusal(
                f"the dense backend is a reference of one precision, and {op.name!r} is {op.dtype} where "
                f"{found[0].name!r} is {found[0].dtype}",
                "Convert the model (model.double()) and leave casts out of it, or use backend='fast'",
            )


class Sweeps:
    """Both sweeps of one step.

    Args:
        program: the derivation and its options.
        m: the base method.
        trajectory: the network's values.
        targets: of the batch.
    """

    def __init__(self, program: UpdateProgram, m: BaseMethod, trajectory: Trajectory, targets: Any) -> None:
        self.graph, self.options, self.stages = program.graph, program.options, program.derived.stages
        self.m, self.trajectory = m, trajectory
        self.linear = self.options.feedback is True and self.options.rollout_kind == "linear"
        self.factored = self.options.factored and bool(self.options.feedback)
        size = self.options.coupling if isinstance(self.options.coupling, int) else None
        self.phi, above, self.g = trajectory.terminal(m, targets)
        self.most = target_entries(targets)
        plan = program.lowered.plan
        _, aim, self.start = m.terminal(above, *plan.terminal, size)
        self.reach, self.early = plan.reach, m.early(plan.early)
        self.aim = aim * (1.0 + self.early) * (m.pace() if plan.terminal[0] == "geometric" else 1.0)
        self.hessian = trajectory.terminal_hessian(m, targets) if self.factored else outer_products(self.g)
        batch = torch.arange(trajectory.batch)
        self.groups = [self._terminal(samples) for samples in batch.split(size or len(batch))]
        self.gains: list[list[Gains]] = []
        self.measures: list[Pairs] = []

    def run(self, q: dict[str, Tensor]) -> Tensor:
        """Fills ``q``; the per-sample losses."""
        self.backward()
        if self.linear:
            self._joint()
        else:
            self._forward(q)
        self.m.check_finite()
        return self.phi

    def _terminal(self, samples: Tensor) -> Group:
        """``V_x = α_T g``, ``V_xx`` of the blocks ``H_i`` over B and the aim (docs/theory.md#terminals)."""
        keep = 1.0 if self.options.feedback else 0.0  # Proposition 4: no value Hessian
        weight = keep * self.start / self.aim[samples] * (self.start if self.options.papers_scale else 1.0)
        value_x = {name: self.start * value[samples].reshape(-1, 1) for name, value in self.g.items()}
        value_xx = {}
        for pair, block in self.hessian.items():
            own = rows_of_samples(block, samples, self.trajectory.batch)
            value_xx[pair] = own * weight.repeat_interleave(own.shape[0] // len(samples)).unsqueeze(1)
        return Group(samples, len(samples) / self.trajectory.batch, value_x, value_xx)

    # --- backward sweep -----------------------------------------------------------------------------------------------

    def backward(self) -> None:
        """Every stage's gains; nothing is written."""
        seen = [self._statistics(stage) for stage in reversed(self.stages)] if self.reach else []
        for group in self.groups if self.reach else ():
            self._reach(group, self.reach + self.early, seen)
        for n, stage in enumerate(reversed(self.stages)):
            found = seen[n] if self.reach else self._statistics(stage)
            self.gains.insert(0, [self._group_gains(stage, group, found) for group in self.groups])
            self.hessian = found.hessian
            self.measures.insert(0, self.hessian)

    def _reach(self, group: Group, reach: float, seen: Sequence[Statistics]) -> None:
        """The loss of a group counts so often that ``Γ``'s diagonal is ``reach`` times ``P_T⁻¹``'s, each its mean."""
        information = (self.aim[group.samples] / self.start).sum()
        gram = sum(
            torch.einsum("bm,mn,bn->", rows, found.metric.inverse / group.share, rows)
            for found in seen
            for rows in (found.gamma[group.samples],)
        )
        scale = float((reach * information / gram).clamp(1.0, self.most)) if gram > 0 else 1.0
        group.value_x = {name: scale * value for name, value in group.value_x.items()}
        group.value_xx = {pair: scale * block for pair, block in group.value_xx.items()}

    def _statistics(self, stage: DerivedStage) -> Statistics:
        """A stage's Jacobians, and its metric from all groups' statistics."""
        blocks = self.trajectory.blocks(stage.index)
        jacobians = self.trajectory.assemble(stage.index, blocks)
        after, self.g = self.g, jacobians.pull_back(self.g)
        if self.options.mixing == "block" and blocks.mixes:
            blocks = blocks.effective(after)
            jacobians = self.trajectory.assemble(stage.index, blocks)
        if self.linear:  # statistics of ordinary gradients
            whole = {name: self.start * g.reshape(-1, 1) for name, g in after.items()}
        else:
            whole = {name: torch.cat([group.value_x[name] for group in self.groups]) for name in self.groups[0].value_x}
        metric = DenseMetric(self.m, self.graph, stage.index, stage.blocks)
        metric.observe(seen := Seen(self.trajectory, blocks, jacobians, self.start), whole)
        hessian = jacobians.pull_back_hessian(self.hessian) if self.factored else outer_products(self.g)
        return Statistics(jacobians, metric, hessian, metric.rows(seen, after))

    def _environment(
        self, stage: DerivedStage, jacobians: StageJacobians, group: Group
    ) -> tuple[dict[Any, Tensor], dict[Any, int]]:
        """Values of the derivation's symbols: bundles are concatenated values."""
        d, values, size = stage.derivation, {}, {}
        group.width = {v: block.shape[1] for (_, v), block in jacobians.state.items()}
        for o, outs in stage.outputs.items():
            values[d.value_x[o]] = torch.cat([group.value_x[name] for name in outs])
            for o2, outs2 in stage.outputs.items():
                block = torch.cat([torch.cat([group.value_xx[a, c] for c in outs2], 1) for a in outs])
                values[d.value_xx[o, o2]] = block
            for i, ins in stage.inputs.items():
                empty = values[d.value_x[o]].new_zeros(values[d.value_x[o]].shape[0], 0)  # a state of no values
                columns = [torch.cat([jacobians.state[a, c] for a in outs]) for c in ins]
                values[d.state[o, i]] = block = torch.cat([empty, *columns], 1)
                values.update(_without_identity(d.state[o, i], block))
                size[d.q_x[i].symbol.shape[0]] = block.shape[1]
            for u, player in stage.controls.items():
                block = torch.cat([jacobians.control[a, player] for a in outs])
                values[d.control[o, u]] = block
                size[d.q_u[u].symbol.shape[0]] = block.shape[1]
        return values, size

    def _group_gains(self, stage: DerivedStage, group: Group, found: Statistics) -> Gains:
        """Every equation of the derivation in turn; the group's own ``M`` and ``ℓ_u`` are its share of the batch's."""
        d, metric = stage.derivation, found.metric
        values, size = self._environment(stage, found.jacobians.rows(group.samples, self.trajectory.batch), group)
        blocks = [row.split(metric.sizes, 1) for row in metric.curvature.split(metric.sizes)]
        for n, (letter, own) in enumerate(zip(stage.controls, metric.linear.split(metric.sizes), strict=True)):
            values[d.linear[letter]] = group.share * own
            for k, other in enumerate(stage.controls):
                if (letter, other) in d.curvature:
                    values[d.curvature[letter, other]] = group.share * blocks[n][k]
        for equation in d.equations():
            values[equation.symbol] = evaluate(equation.expression, values, size)
        after = {name: group.value_x[name].shape[0] for outs in stage.outputs.values() for name in outs}
        self._advance(stage, group, values)
        feedback: dict[str, Tensor] = {}
        for i, ins in stage.inputs.items():
            widths = [group.value_x[name].shape[0] for name in ins]
            feedback.update(zip(ins, (group.share * values[d.gains[i].symbol]).split(widths, 1), strict=True))
        return Gains(group.share * values[d.k.symbol], feedback, values, size, after, metric)

    def _advance(self, stage: DerivedStage, group: Group, values: dict[Any, Tensor]) -> None:
        """The value function at the cut before the stage, projected as the coupling says."""
        d, count = stage.derivation, len(group.samples)
        value_x: dict[str, Tensor] = {}
        value_xx: dict[tuple[str, str], Tensor] = {}
        width = {}
        for i, ins in stage.inputs.items():
            total = values[d.new_value_x[i].symbol]
            width[i] = [group.width[name] for name in ins]
            value_x.update(zip(ins, total.split(width[i]), strict=True))
        for (i, j), equation in d.new_value_xx.items():
            blocks = [row.split(width[j], 1) for row in values[equation.symbol].split(width[i])]
            for a, row in zip(stage.inputs[i], blocks, strict=True):
                for c, block in zip(stage.inputs[j], row, strict=True):
                    value_xx[a, c] = block
                    value_xx[c, a] = block.T if (a, c) != (c, a) else block
        if self.options.coupling == "block":
            value_xx = {pair: _per_sample(block, count) for pair, block in value_xx.items()}
            if self.options.recursion == "substituted" and stage.index:  # nobody reads the first stage's
                self.m.keep(stage.index, radicands=self._clip_negative(stage, group, values, value_xx))
        group.value_x, group.value_xx = value_x, value_xx

    def _clip_negative(self, stage: DerivedStage, group: Group, values: dict[Any, Tensor], value_xx: Pairs) -> Tensor:
        """Negative eigenvalues of ``I - q_uᵀ Q_uu⁻¹ q_u`` count as 0 (docs/theory.md#columns); returns how many.

        ``V_xx' = Z Zᵀ`` by its symmetric root, sample by sample; what the clip takes away is added back to ``V_xx``.
        """
        d, count = stage.derivation, len(group.samples)
        after = torch.cat([torch.cat([values[d.value_xx[o, o2]] for o2 in stage.outputs], 1) for o in stage.outputs])
        f_x = torch.cat([torch.cat([values[d.state[o, i]] for i in stage.inputs], 1) for o in stage.outputs])
        f_u = torch.cat([torch.cat([values[d.control[o, u]] for u in stage.controls], 1) for o in stage.outputs])
        after_widths = {o: group.value_x[o].shape[0] // count for outs in stage.outputs.values() for o in outs}
        before_widths = {v: group.width[v] // count for ins in stage.inputs.values() for v in ins}
        negative = torch.zeros((), dtype=torch.int64)
        for sample in range(count):
            rows, where = _places(after_widths, sample, count)[0], _places(before_widths, sample, count)
            roots, vectors = torch.linalg.eigh(after[rows][:, rows])
            z = vectors * roots.clamp_min(0).sqrt()
            q_u, q_x = f_u[rows].T @ z, f_x[rows][:, where[0]].T @ z
            radicand = torch.eye(z.shape[1], dtype=z.dtype) - q_u.T @ torch.linalg.solve(values[d.joint_uu.symbol], q_u)
            found, u = torch.linalg.eigh((radicand + radicand.T) / 2)
            negative += (found < 0).sum()
            missing = q_x @ (u * found.clamp_max(0)) @ u.T @ q_x.T
            for a, (rows_a, own_a) in where[1].items():
                for c, (rows_c, own_c) in where[1].items():
                    value_xx[a, c][rows_a, rows_c] -= missing[own_a, own_c]
        return negative

    # --- forward sweep ------------------------------------------------------------------------------------------------

    def _joint(self) -> None:
        """The policy rolled out on the linearised dynamics, ``δx̂' = f̂_x δx̂ + f̂_u δû``, stage by stage.

        A group's own rollout is that of a batch like it; the update is the groups' by their shares.
        """
        parts = [
            [
                group.share * step
                for step in rolled_out(self.stages, [found[n] for found in self.gains], self.options.max_step)
            ]
            for n, group in enumerate(self.groups)
        ]
        for found, *steps in zip(self.gains, *parts, strict=True):
            found[0].metric.apply(torch.stack(steps).sum(0))
        self.trajectory.settle()

    def _forward(self, q: dict[str, Tensor]) -> None:
        """``û = u + k + K̂ δx̂``, stage by stage along the new trajectory (docs/theory.md#gains)."""
        moved = {name: self.trajectory.values[name] for name in self.graph.prologue}
        for stage, gains in zip(self.stages, self.gains, strict=True):
            change = self.trajectory.change(moved, self.graph.stages[stage.index].live)
            change = self._believed(stage.index, change)
            total = torch.stack([found.k for found in gains]).sum(0)
            if self.options.feedback is True:
                for group, found in zip(self.groups, gains, strict=True):
                    for name, gain in found.feedback.items():
                        total += gain @ change[name][group.samples].reshape(-1, 1)
            gains[0].metric.apply(total)
            if stage.index + 1 < len(self.stages):
                self.trajectory.recompute(stage.index, moved, q)

    def _believed(self, t: int, change: dict[str, Tensor]) -> dict[str, Tensor]:
        """Scale each sample's ``δx̂`` so that the change it predicts stays within the clip (docs/theory.md#trust).

        ``c² = δx̂ᵀ H δx̂`` with the terminal Hessian pulled back along the trajectory: ``⟨g, δx̂⟩²`` where it is ``g gᵀ``.
        """
        clip, batch = self.options.feedback_clip, self.trajectory.batch
        if clip is None or self.options.feedback is not True or not change:
            return change
        square = torch.zeros(batch, dtype=self.trajectory.dtype)
        for (a, c_), block in self.measures[t].items():
            own = torch.stack([block.reshape(batch, -1, batch, change[c_].shape[1])[i, :, i] for i in range(batch)])
            square += torch.einsum("bi,bij,bj->b", change[a], own, change[c_])
        c, limit = square.clamp_min(0).sqrt(), clip * self.aim
        self.m.keep(t, predicted=c, change=torch.minimum(c, limit))
        factor = torch.where(c > limit, limit / c.clamp_min(torch.finfo(c.dtype).tiny), torch.ones_like(c))
        return {name: factor.unsqueeze(1) * delta for name, delta in change.items()}


def outer_products(g: dict[str, Tensor]) -> Pairs:
    """``∇φ_i ∇φ_iᵀ`` of every sample, block-diagonal."""
    return {
        (a, c): torch.block_diag(*(torch.outer(x, y) for x, y in zip(g[a], g[c], strict=True))) for a in g for c in g
    }


def _without_identity(expression: MatrixExpr, block: Tensor) -> dict[Any, Tensor]:
    """The ``J`` of a block ``k I + J``: what a value passes on itself, and through the stage's operations."""
    if not isinstance(expression, MatAdd):
        return {}
    found: dict[Any, Tensor] = {}
    (symbol,) = (term for term in expression.args if isinstance(term, MatrixSymbol))
    (identity,) = (term for term in expression.args if term != symbol)
    found[symbol] = block - float(identity.as_coeff_mmul()[0]) * torch.eye(len(block), dtype=block.dtype)
    return found


def _places(widths: Mapping[str, int], sample: int, count: int) -> tuple[Tensor, dict[str, tuple[slice, slice]]]:
    """Where one sample's entries are among values side by side; by value: in its rows, in the sample's state."""
    index, places, offset, own = [], {}, 0, 0
    for name, width in widths.items():
        index.append(offset + sample * width + torch.arange(width))
        places[name] = (slice(sample * width, (sample + 1) * width), slice(own, own + width))
        offset, own = offset + count * width, own + width
    return torch.cat(index), places


def _per_sample(block: Tensor, count: int) -> Tensor:
    """Only what couples a sample with itself (paper: Sec. 4.2)."""
    rows, columns = block.shape[0] // count, block.shape[1] // count
    keep: Tensor = torch.block_diag(*(torch.ones(rows, columns, dtype=block.dtype) for _ in range(count)))
    return block * keep
