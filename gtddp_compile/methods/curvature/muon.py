"""Muon (Jordan et al. 2024; torch.optim.Muon): matrices by the polar factor of their averaged gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.turned import Turned, as_matrix, inverse_times
from gtddp_compile.methods.curvature.adam import AdamW
from gtddp_compile.methods.curvature.base import Group, Move, State
from gtddp_compile.methods.curvature.numbers import counted, number, out_of_range, scalar, statistics_gradient, zeros

ADJUSTMENTS = (None, "original", "match_rms_adamw")
"""torch.optim.Muon's ways to make the rate depend on a matrix's shape."""


@dataclass(frozen=True)
class Muon(AdamW):
    """``M = (G̃ G̃ᵀ + d² I)^(1/2) ⊗ I / lr``, ``G̃`` the averaged gradient (docs/theory.md#curvatures).

    torch.optim.Muon orthogonalises the averaged gradient, which is ``(G̃ G̃ᵀ)^(-1/2) G̃``: linear in the gradient under a
    metric that is made of it. With ``Q_u = g_stat``, ``ĝ = γᵀ w`` and ``μ = momentum``, parameters seen as matrices of
    the first axis by all others, and the shorter side taken::

        a  ← μ · a + (1 - μ) · Q_u,   G̃ = a       (nesterov: (1 - μ) · Q_u + μ · a)
        b  ← μ · b + (1 - μ) · ĝ,     G = b        (nesterov likewise)
        δu = -lr · r · (G̃ G̃ᵀ + d² I)^(-1/2) G - lr · λ · u,    d = damping · ‖G̃‖₂

    Feedback changes ``ĝ``, so that the step's average is no longer the metric's. Torch's five Newton-Schulz iterations
    take singular values to 0.7 … 1.2 in bfloat16; here they are 1, but for the damping. Vectors are AdamW's with
    ``betas`` and ``eps``, and so are all parameters of a group with ``matrices=False`` (a user would say so of
    embeddings and of the last layer). No cross terms in a coalition.

    Do not use it for parameters whose rows mean different things (tables, gains): AdamW.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        betas, eps, amsgrad: of what is AdamW's.
        weight_decay: ``λ``, decoupled.
        momentum: ``μ``; 0: none.
        nesterov: see above.
        adjust_lr_fn: ``r``: ``√max(1, m / n)`` (``None``, ``"original"``) or ``0.2 √max(m, n)``
            (``"match_rms_adamw"``) of a matrix ``(m, n)``.
        damping: of singular values, relative to the largest.
        stat_momentum: ``μ`` of the metric's average; ``None``: ``momentum``. With ``inertia`` the step has no momentum
            of its own, and its metric may still be of an average.
        matrices: False in a param_group: its parameters are AdamW's. Read before the first step.
        adamw_ratio: of AdamW's learning rate to ``lr``.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of range.
    """

    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    adjust_lr_fn: str | None = None
    damping: float = 1e-3
    stat_momentum: float | None = None
    matrices: bool = True
    adamw_ratio: float = 1.0

    name = "muon"
    metric = "turned"
    nonnegative = ("lr", "eps", "weight_decay", "momentum", "damping")

    def check(self, options: Group) -> None:
        """As AdamW's; averages forget, and the adjustment is one of torch's."""
        super().check(options)
        for option in ("momentum", "stat_momentum"):
            value = options[option]
            if value is not None and not 0.0 <= number("Muon", option, value) < 1.0:
                raise out_of_range("Muon", option, value, "a value in [0, 1)")
        if options["adjust_lr_fn"] not in ADJUSTMENTS:
            raise out_of_range("Muon", "adjust_lr_fn", options["adjust_lr_fn"], f"one of {ADJUSTMENTS}")
        if not number("Muon", "adamw_ratio", options["adamw_ratio"]) > 0:
            raise out_of_range("Muon", "adamw_ratio", options["adamw_ratio"], "a positive number")

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"``, ``"momentum_buffer"`` and the metric's average ``"grad_avg"``; of a vector AdamW's."""
        if param.dim() < 2 or not group["matrices"]:
            return super().init_state(param, group)
        self.check(group)
        averages = {"momentum_buffer": group["momentum"], "grad_avg": _of_metric(group)}
        return zeros(param, *(key for key, past in averages.items() if past > 0))

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count, the average of ``Q_u`` and its inverse root, one side's."""
        if "exp_avg_sq" in state:
            return super().observe(param, g_stat, state, group)
        new = {key: value for key, value in state.items() if not key.startswith("map_")}
        averaged = _averaged(statistics_gradient("Muon", g_stat), new, "grad_avg", _of_metric(group), group)
        matrix = as_matrix(averaged)
        side, own = ("g", matrix) if matrix.shape[0] <= matrix.shape[1] else ("x", matrix.mT)
        return {**new, "step": counted(state["step"]), f"map_{side}": polar_map(own, group["damping"])}

    def denominator(self, param: Tensor, state: State, group: Group) -> Tensor | None:  # type: ignore[override]
        """AdamW's over the ratio of the rates; ``None`` of a matrix."""
        return super().denominator(param, state, group) / group["adamw_ratio"] if "exp_avg_sq" in state else None

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor | Turned:  # type: ignore[override]
        """``lr · r`` times the inverse root; AdamW's of a vector."""
        if "exp_avg_sq" in state:
            found = super().inverse_metric(param, state, group)
            assert isinstance(found, Tensor)
            return found
        rate = float(group["lr"]) * _adjusted(param, group["adjust_lr_fn"])
        return Turned(state.get("map_x"), state.get("map_g"), rate)

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``M⁻¹ G / lr`` and the decay; AdamW's of a vector."""
        if "exp_avg_sq" in state:
            own = super().move(param, g_hat, state, group, denominator)
            return own if own.decay is None else own._replace(decay=own.decay * group["adamw_ratio"])
        new = dict(state)
        averaged = _averaged(g_hat, new, "momentum_buffer", group["momentum"], group)
        direction = inverse_times(self.inverse_metric(param, state, {**group, "lr": 1.0}), averaged)
        shrunk = scalar(group["lr"], param) * group["weight_decay"] if group["weight_decay"] else None
        return Move(direction, None, group["lr"], new, shrunk)


def polar_map(matrix: Tensor, damping: float) -> Tensor:
    """``Y`` with ``Y Yᵀ = (G Gᵀ + d² I)^(-1/2)`` of ``G`` ``(m, n)``, ``d`` relative to its largest singular value."""
    values, basis = torch.linalg.eigh(matrix @ matrix.mT)
    info = torch.finfo(values.dtype)
    least = values[-1:].clamp_min(info.tiny) * (damping**2 + len(values) * info.eps)
    found: Tensor = basis * values.clamp_min(0).add_(least) ** -0.25
    return found


def _of_metric(group: Group) -> float:
    """``μ`` of the metric's average."""
    found: float = group["momentum"] if group["stat_momentum"] is None else group["stat_momentum"]
    return found


def _averaged(gradient: Tensor, state: dict[str, Any], key: str, past: float, group: Group) -> Tensor:
    """The gradient averaged with the past, into the state; Nesterov's looks ahead once more."""
    if past == 0:
        return gradient
    state[key] = torch.lerp(state[key], gradient, 1 - past)
    return torch.lerp(gradient, state[key], past) if group["nesterov"] else state[key]


def _adjusted(param: Tensor, how: str | None) -> float:
    """``r``."""
    outputs, inputs = as_matrix(param).shape
    found: float = 0.2 * max(outputs, inputs) ** 0.5 if how == "match_rms_adamw" else max(1.0, outputs / inputs) ** 0.5
    return found
