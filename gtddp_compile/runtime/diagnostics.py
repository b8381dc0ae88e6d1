"""Figures of the last step, computed when somebody looks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.program import UpdateProgram


class Diagnostics:
    """What a step left behind for whoever asks."""

    def __init__(
        self,
        loss: Tensor | None = None,
        figures: Mapping[int, Mapping[str, Any]] | None = None,
        program: UpdateProgram | None = None,
        *,
        skipped: bool = False,
    ) -> None:
        self._loss, self._stages, self._program, self._skipped = loss, figures or {}, program, skipped
        self._found: dict[str, Any] | None = None

    def figures(self) -> Mapping[str, Any]:
        """All figures; empty before the first step."""
        if self._found is None:
            self._found = self._evaluate() if self._loss is not None else {}
        return self._found

    def _evaluate(self) -> dict[str, Any]:
        stages = self._stages.values()
        found: dict[str, Any] = {
            "loss": float(self._loss) if self._loss is not None else None,
            "skipped": self._skipped,
            "clipped_changes": int(sum(int(stage["outside"]) for stage in stages if "outside" in stage)),
            "clipped_radicands": int(sum(int(stage["radicands"]) for stage in stages if "radicands" in stage)),
        }
        if any("factor" in stage for stage in stages):
            found["open_norm"], found["feedback_norm"] = self._norms()
            found["predicted_decrease"] = self._decrease()
        return found

    def _norms(self) -> tuple[dict[str, float], dict[str, float]]:
        """``√(wᵀ Γ_p w)`` of the open weights and of what feedback adds to them: norms of ``δu`` in the metric
        ``M``.
        """
        opened, fed = {}, {}
        for stage in self._stages.values():
            if "factor" not in stage:
                continue
            own = kernels.solve(stage["factor"], stage["target"])
            extra = stage["weights"] - own
            for player, gamma in stage["gammas"].items():
                opened[player], fed[player] = _norm(gamma, own), _norm(gamma, extra)
        return opened, fed

    def _decrease(self) -> float:
        """``½ Σ_t Q_uᵀ Q_uu⁻¹ Q_u`` without the decay's own part: as ``α = α' + P' Cᵀ k``, ``½ (P'⁻¹ α')ᵀ (α' -
        α)``.
        """
        total = 0.0
        for index, stage in self._stages.items():
            if "factor" not in stage:
                continue
            pulled = stage["target"] + stage.get("drift", 0)
            after = self._stages[index + 1]
            before = after["alpha"] if "alpha" in after else kernels.solve(after["factor"], after["target"])
            total += 0.5 * float(pulled @ (before - kernels.solve(stage["factor"], stage["target"])))
        return total


def _norm(gamma: tuple[Tensor, ...], weights: Tensor) -> float:
    pieces = weights.split([block.shape[0] for block in gamma])
    return float(torch.stack([v @ block @ v for v, block in zip(pieces, gamma, strict=True)]).sum().clamp_min(0).sqrt())
