"""Adam and AdamW (docs/theory.md#curvatures): diagonal, bias-corrected; a first moment takes the gradient's place."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gtddp_compile.methods.curvature.base import Curvature, Group, Move, State
from gtddp_compile.methods.curvature.numbers import (
    Scalar,
    counted,
    number,
    out_of_range,
    scalar,
    statistics_gradient,
    zeros,
)


@dataclass(frozen=True)
class Adam(Curvature):
    """Diagonal curvature ``M = diag(√v̂ + eps) / lr`` (docs/theory.md#curvatures), with torch.optim.Adam's options.

    With ``Q_u = g_stat`` and ``ĝ = γᵀ w + ℓ_u``, elementwise and of the parameter's own shape, at step t::

        v  ← β₂ · v + (1 - β₂) · Q_u²,   v̂ = v / (1 - β₂ᵗ)       (amsgrad: the largest v so far)
        m  ← β₁ · m + (1 - β₁) · ĝ,      m̂ = m / (1 - β₁ᵗ)
        δu = -M⁻¹ m̂                                              (decoupled decay: … - lr · λ · u)

    The first moment takes the place of ``Q_u`` in ``k = -M⁻¹ Q_u``; ``M`` holds no factor ``1 - β₁``. No
    cross terms in a coalition.

    Do not use it to compare with the paper's Table 1, which has no Adam: take RMSprop; nor for wide layers in
    a hurry: a diagonal ``M`` does not separate in the Gram matrices, that of
    :class:`~gtddp_compile.methods.curvature.SGD` and K-FAC does. With weight decay prefer :class:`AdamW`: coupled
    decay is divided by ``√v̂``.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        betas: ``(β₁, β₂)``, smoothing of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: ``λ``: coupled, ``ℓ_u = λ u``, unless ``decoupled_weight_decay``.
        amsgrad: use the largest second moment seen.
        maximize: not available: negate the loss.
        decoupled_weight_decay: decay the parameter itself, as AdamW does.

    Raises:
        CompileError: an option is out of torch.optim.Adam's range.
    """

    lr: Scalar = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    amsgrad: bool = False
    maximize: bool = False
    decoupled_weight_decay: bool = False

    name = "adam"
    nonnegative: ClassVar[tuple[str, ...]] = ("lr", "eps", "weight_decay")

    def check(self, options: Group) -> None:
        """As every method's; the betas are in [0, 1)."""
        super().check(options)
        name, betas = type(self).__name__, options["betas"]
        if not isinstance(betas, (tuple, list)) or len(betas) != 2:
            raise out_of_range(name, "betas", betas, "as a pair of numbers in [0, 1)")
        for index, beta in enumerate(betas):
            if not 0.0 <= number(name, f"betas[{index}]", beta) < 1.0:
                raise out_of_range(name, f"betas[{index}]", beta, "a value in [0, 1)")

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"``; zeros like the parameter: ``"exp_avg"``, ``"exp_avg_sq"``, ``"max_exp_avg_sq"``."""
        self.check(group)
        return zeros(param, *("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 3 if group["amsgrad"] else 2])

    def linear_term(self, param: Tensor, group: Group) -> Tensor | None:
        """``λ u`` of coupled decay, shape of the parameter."""
        return None if group["decoupled_weight_decay"] else super().linear_term(param, group)

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count and second moment after ``Q_u``."""
        g, beta2 = statistics_gradient("Adam", g_stat), group["betas"][1]
        square = torch.mul(state["exp_avg_sq"], beta2).addcmul_(g, g, value=1 - beta2)
        new = {**state, "step": counted(state["step"]), "exp_avg_sq": square}
        if group["amsgrad"]:
            new["max_exp_avg_sq"] = torch.maximum(state["max_exp_avg_sq"], square)
        return new

    def denominator(self, param: Tensor, state: State, group: Group) -> Tensor:
        """``√v̂ + eps``, shape of the parameter."""
        second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
        correction = bias_correction(group["betas"][1], state["step"]) ** 0.5
        return torch.sqrt(second).div_(scalar(correction, param)).add_(group["eps"])

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``m``, ``D`` and ``lr / (1 - β₁ᵗ)``; decoupled decay beside it."""
        beta1, lr, decay = group["betas"][0], group["lr"], group["weight_decay"]
        mean = torch.lerp(state["exp_avg"], g_hat, 1 - beta1)
        below = self.denominator(param, state, group) if denominator is None else denominator
        shrunk = scalar(lr, param) * decay if decay != 0 and group["decoupled_weight_decay"] else None
        return Move(mean, below, lr / bias_correction(beta1, state["step"]), {**state, "exp_avg": mean}, shrunk)


@dataclass(frozen=True)
class AdamW(Adam):
    """:class:`Adam` with decoupled weight decay: ``δu = -M⁻¹ m̂ - lr · λ · u``, torch.optim.AdamW's options.

    The decay is no part of ``Q_u``: the recursions see the loss alone, ``ℓ_u = 0``.

    Do not use it where the decay stands for a prior on the weights that the value function should know: take
    :class:`Adam` with ``weight_decay``.

    Args:
        lr, betas, eps, amsgrad, maximize: as :class:`Adam`.
        weight_decay: ``λ``, decoupled.

    Raises:
        CompileError: an option is out of torch.optim.AdamW's range.
    """

    weight_decay: float = 1e-2
    decoupled_weight_decay: bool = field(default=True, init=False)

    name = "adamw"


def bias_correction(beta: float, step: Tensor) -> Scalar:
    """``1 - βᵗ``: a float, or a tensor while torch traces, where the step count is not known."""
    if torch.compiler.is_compiling():
        return 1 - torch.pow(beta, step.to(torch.float64))
    return float(1 - beta ** step.item())
