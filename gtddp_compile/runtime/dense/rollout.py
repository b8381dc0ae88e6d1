"""The dense backend's policy on the linearised dynamics, stage by stage (docs/theory.md#linear-rollout)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.algebra.numeric import evaluate
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.runtime.dense.metric import DenseMetric


@dataclass
class Gains:
    """Gains of one stage for one group: ``δu = k + Σ K_v δv``, controls side by side.

    ``values``, ``size``, ``widths``: what the derivation's symbols stand for, sizes of their axes, and of every value
    after the stage; ``metric``: the stage's.
    """

    k: Tensor
    feedback: dict[str, Tensor]
    values: dict[Any, Tensor]
    size: dict[Any, int]
    widths: dict[str, int]
    metric: DenseMetric


def rolled_out(stages: Sequence[DerivedStage], gains: list[Gains], bound: float | None) -> list[Tensor]:
    """``δû`` of every stage for one group: ``δx̂' = f̂_x δx̂ + f̂_u δû``; ``bound``: ``max_step``."""
    change: dict[str, Tensor] = {}
    steps: list[Tensor] = []
    for stage, found in zip(stages, gains, strict=True):
        d, values, size = stage.derivation, dict(found.values), found.size
        for i, ins in stage.inputs.items():
            rows = size[d.q_x[i].symbol.shape[0]]
            moved = [change[name] for name in ins if name in change]  # before the first stage nothing has moved
            values[d.change[i]] = torch.cat(moved) if moved else found.k.new_zeros(rows, 1)
        delta = evaluate(d.rolled["u"].expression, values, size)
        steps.append(delta)
        pieces = delta.split(found.metric.sizes)
        values.update((d.moved[letter], piece) for letter, piece in zip(stage.controls, pieces, strict=True))
        change = {}
        for o, outs in stage.outputs.items():
            expression = d.rolled[o].expression  # of a detached value zero, of as many rows as it has
            rows = sum(found.widths[name] for name in outs)
            after = evaluate(expression, values, {**size, expression.shape[0]: rows})
            change.update(zip(outs, after.split([found.widths[name] for name in outs]), strict=True))
    return _capped(steps, gains, bound)


def _capped(steps: list[Tensor], gains: list[Gains], bound: float | None) -> list[Tensor]:
    """The part ``-M⁻¹ (C w)`` that the samples ask for within ``max_step``, its norm in ``M``."""
    if bound is None:
        return steps
    metrics = [found.metric for found in gains]
    carried = [-torch.linalg.solve(metric.curvature, metric.linear) for metric in metrics]
    asked = [step - own for step, own in zip(steps, carried, strict=True)]
    square = sum(float((part.T @ metric.curvature @ part).sum()) for part, metric in zip(asked, metrics, strict=True))
    scale = min(1.0, bound / max(square, torch.finfo(steps[0].dtype).tiny) ** 0.5)
    return [own + scale * part for own, part in zip(carried, asked, strict=True)]
