"""Figures of the last step, computed when somebody looks."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from gtddp_compile import kernels
from gtddp_compile.runtime.program import UpdateProgram


class Diagnostics:
    """What a step left behind for whoever asks."""

    def __init__(
        self, loss: Tensor | None = None, figures: Mapping[int, Mapping[str, Any]] | None = None,
        program: UpdateProgram | None = None, *, skipped: bool = False, skips: int = 0,
    ) -> None:  # fmt: skip
        self._loss, self._kept, self._program = loss, figures or {}, program
        self._skipped, self._skips = skipped, skips
        self._stages: Mapping[int, Mapping[str, Any]] = self._kept
        self._found: dict[str, Any] | None = None

    def figures(self) -> Mapping[str, Any]:
        """All figures; empty before the first step."""
        if self._loss is None:
            return {}
        if self._found is None:
            with torch.autocast(self._loss.device.type, enabled=False):  # whatever is around who looks
                self._found = self._evaluate()
        return self._found

    def _evaluate(self) -> dict[str, Any]:
        assert self._loss is not None
        kind = self._loss.dtype  # in which parameters need not all be
        self._stages = tree_map(lambda value: value.to(kind) if _is_real(value) else value, dict(self._kept))
        joint = self._program is not None and self._program.form.name == "joint"
        if joint and "weights" in self._kept.get(0, {}):  # the dense backend keeps none
            self._stages = with_factors(self._stages)
        stages = self._stages.values()
        found: dict[str, Any] = {
            "loss": float(self._loss),
            "skipped": self._skipped,
            "skipped_steps": self._skips,
            "clipped_changes": sum(self._clipped(stage) for stage in stages if "predicted" in stage),
            "clipped_radicands": int(sum(int(stage["radicands"]) for stage in stages if "radicands" in stage)),
        }
        lengths = [stage["step_length"] for stage in stages if "step_length" in stage]
        if lengths:
            found["step_length"] = lengths[0]
        fallbacks = [value for stage in stages for key, value in stage.items() if key.startswith("fallbacks ")]
        if fallbacks:
            found["solve_fallbacks"] = int(sum(fallbacks))
        found.update(dict.fromkeys(("open_norm", "feedback_norm", "predicted_decrease")))
        lifted = [bool(failed) for stage in stages for failed in stage.get("lifted", ())]
        if any("lifted" in stage for stage in stages):
            found["lifted_grams"] = sum(lifted)
        products = [stage["products"] for stage in stages if "products" in stage]
        if products:
            found["products"] = products[0]
        if any("factor" in stage for stage in stages):
            found["open_norm"], found["feedback_norm"] = self._norms()
            found["predicted_decrease"] = self._decrease()
        return found

    def _clipped(self, stage: Mapping[str, Any]) -> int:
        """Samples whose predicted change was not believed."""
        differs = stage["predicted"] != stage["change"]
        return int((differs if self._start is None else differs.reshape(self._batch, -1).any(1)).sum())

    @property
    def _start(self) -> float | None:
        """``α_T`` where the linear term is kept apart from the columns."""
        return next((stage["start"] for stage in self._stages.values() if "start" in stage), None)

    def _whole(self, columns: Tensor, start: float | None) -> Tensor:
        """Weights as a Gram matrix has them: of the columns, with ``start`` beside them of the ordinary gradients."""
        if start is None:
            return columns
        apart = columns.reshape(self._batch, -1)
        return torch.cat([apart.new_full((self._batch, 1), start), apart], 1).flatten()

    @property
    def _batch(self) -> int:
        return next(int(stage["samples"]) for stage in self._stages.values() if "samples" in stage)

    @property
    def _factored(self) -> list[tuple[int, Mapping[str, Any], Tensor]]:
        """Stages with a factor, and their open weights."""
        found = ((index, stage) for index, stage in self._stages.items() if "factor" in stage)
        return [(index, stage, kernels.solve(stage["factor"], stage["target"])) for index, stage in found]

    def _norms(self) -> tuple[dict[str, float], dict[str, float]]:
        """``√(wᵀ Γ_p w)`` of the open weights and of what feedback adds to them: norms of ``δu`` in ``M``."""
        opened, fed, start = {}, {}, self._start
        for _, stage, own in self._factored:
            for player, gamma in stage["gammas"].items():
                opened[player] = _norm(gamma, self._whole(own, start))
                fed[player] = _norm(gamma, self._whole(stage["weights"] - own, None if start is None else 0.0))
        return opened, fed

    def _decrease(self) -> float:
        """``½ Σ_t Q_uᵀ Q_uu⁻¹ Q_u`` without the decay's own part: as ``α = α' + P' Cᵀ k``, ``½ (P'⁻¹ α')ᵀ (α' - α)``.

        Of a term that is kept apart, ``(b + l)ᵀ Q_uu⁻¹ Q_u`` beside it. Where the loss counts ``c`` times
        (``kernels.reached``), of the loss itself.
        """
        total, start, counted = 0.0, self._start, torch.ones(())
        for index, stage, own in sorted(self._factored, key=operator.itemgetter(0), reverse=True):
            pulled, after = stage["target"] + stage.get("drift", 0), self._stages[index + 1]
            before = after["alpha"] if "alpha" in after else kernels.solve(after["factor"], after["target"])
            if "information" in after:
                before, counted = pulled / after["information"], pulled / after["information"] / before
            total += 0.5 * float((pulled / counted) @ (before - own))
            for gamma in stage["gammas"].values() if start is not None else ():
                left, right = (self._whole(columns, start) for columns in (0 * own, own))
                total += 0.5 * _product(gamma, left, right, scaled=True)
        return total


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def with_factors(figures: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Figures of the joint step as those of the stage-by-stage one: every stage's factor of ``Λ_t``, and its ``w``.

    ``Λ_t = Λ_T + τ Σ Γ_s`` over the stages ``s`` from t on; ``w`` is the same at every stage.
    """
    figures = by_stage(figures)
    last, weights = figures[max(figures)], figures[0]["weights"]
    found = {index: dict(figure) for index, figure in figures.items()}
    total: tuple[Tensor, ...] | None = None
    for index in sorted((index for index, figure in figures.items() if "gammas" in figure), reverse=True):
        for gamma in figures[index]["gammas"].values():
            scales = _scales(gamma)
            if "start" in last:  # the ordinary gradient is a column beside those of the factor
                gamma, _ = kernels.split_columns(gamma, weights.numel() // int(last["samples"]), 1.0, scales)
            if total is None:
                diagonal = last["information"] if "information" in last else torch.ones_like(weights) / last["start"]
                total = kernels.blocks_diagonal(diagonal, _rows(gamma))
            total = kernels.blocks_add(total, kernels.blocks_scale(scales, gamma))
        assert total is not None
        found[index]["factor"], _ = kernels.factor(total)
        found[index]["weights"] = weights
    return found


def by_stage(figures: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Figures of layers that were computed together, which the first stage keeps as ``alike_0``, ``alike_1``, …
    (``lowering/write/alike.py``), as their own stages would have kept them.
    """
    found = {index: dict(figure) for index, figure in figures.items()}
    together = [found[0].pop(key) for key in list(found.get(0, ())) if key.startswith("alike_")]
    for group in together:
        for k, (stage, player) in enumerate(group["players"]):
            own = found.setdefault(stage, {})
            own["gammas"] = {**own.get("gammas", {}), player: tuple(block[k] for block in group["gammas"])}
            if "drift" in group:
                own["drift"] = own.get("drift", 0) + group["drift"][k]
    if together:
        pulled = found[max(found)].pop("target")
        for index in sorted((index for index, figure in found.items() if "gammas" in figure), reverse=True):
            pulled = found[index]["target"] = pulled - found[index].get("drift", 0)
    return found


def _rows(blocks: tuple[Tensor, ...]) -> tuple[slice, ...]:
    """Rows of every block of a matrix."""
    ends = list(itertools.accumulate(block.shape[0] for block in blocks))
    return tuple(slice(start, stop) for start, stop in zip([0, *ends], ends, strict=False))


def _scales(blocks: tuple[Tensor, ...]) -> tuple[float, ...]:
    """``τ`` of every group, which is a block: it stands for the batch."""
    total = sum(block.shape[0] for block in blocks)
    return tuple(total / block.shape[0] for block in blocks)


def _product(gamma: tuple[Tensor, ...], left: Tensor, right: Tensor, *, scaled: bool = False) -> float:
    """``leftᵀ Γ right``; ``scaled``: each group's part as often as it stands for the batch."""
    total, scales = 0.0, _scales(gamma) if scaled else (1.0,) * len(gamma)
    for row, block, scale in zip(_rows(gamma), gamma, scales, strict=True):
        total += float(left[row] @ block @ right[row]) * scale
    return total


def _norm(gamma: tuple[Tensor, ...], weights: Tensor) -> float:
    return math.sqrt(max(0.0, _product(gamma, weights, weights)))
