"""Adagrad (docs/theory.md#curvatures): diagonal curvature from the sum of all squared gradients so far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.methods.curvature.base import Curvature, Group, Move, State
from gtddp_compile.methods.curvature.numbers import Scalar, counted, scalar, statistics_gradient, zeros


@dataclass(frozen=True)
class Adagrad(Curvature):
    """Diagonal curvature ``M = diag(√s + eps) · r_t / lr`` (docs/theory.md#curvatures), torch.optim.Adagrad's options.

    With ``Q_u = g_stat`` and ``ĝ = γᵀ w + ℓ_u``, elementwise and of the parameter's own shape, at step t::

        s  ← s + Q_u²
        r_t = 1 + (t - 1) · lr_decay
        δu = -M⁻¹ ĝ = -lr / r_t · ĝ / (√s + eps)

    No cross terms in a coalition.

    Do not use it for long runs, as ``s`` never forgets and steps shrink like ``1 / √t``: take
    :class:`~gtddp_compile.methods.curvature.RMSprop`; nor for wide layers in a hurry: a diagonal ``M`` does not
    separate in the Gram matrices, that of :class:`~gtddp_compile.methods.curvature.SGD` and K-FAC does.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        lr_decay: how fast the rate falls, ``η / (1 + (t - 1) · lr_decay)``.
        weight_decay: coupled decay ``λ``, ``ℓ_u = λ u``.
        initial_accumulator_value: ``s`` before the first step.
        eps: added to the denominator.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of torch.optim.Adagrad's range.
    """

    lr: Scalar = 1e-2
    lr_decay: float = 0.0
    weight_decay: float = 0.0
    initial_accumulator_value: float = 0.0
    eps: float = 1e-10
    maximize: bool = False

    name = "adagrad"
    nonnegative = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"``; like the parameter: ``"sum"``."""
        self.check(group)
        state = zeros(param, "sum")
        state["sum"].fill_(group["initial_accumulator_value"])
        return state

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count and sum of squares after ``Q_u``."""
        g = statistics_gradient("Adagrad", g_stat)
        return {**state, "step": counted(state["step"]), "sum": torch.addcmul(state["sum"], g, g)}

    def denominator(self, param: Tensor, state: State, group: Group) -> Tensor:
        """``(√s + eps) · r_t``, shape of the parameter: what slows the rate down is part of ``D``, ``lr`` is not."""
        below = torch.sqrt(state["sum"]).add_(group["eps"])
        return below if group["lr_decay"] == 0 else below.mul_(scalar(_slowed(state["step"], group), param))

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``ĝ / D``."""
        below = self.denominator(param, state, group) if denominator is None else denominator
        return Move(g_hat, below, group["lr"], dict(state))


def _slowed(step: Tensor, group: Group) -> Scalar:
    """``r_t``: a float, or a tensor while torch traces, where the step count is not known."""
    taken: Scalar = step.to(torch.float64) if torch.compiler.is_compiling() else step.item()
    slowed: Scalar = 1 + (taken - 1) * group["lr_decay"]
    return slowed
