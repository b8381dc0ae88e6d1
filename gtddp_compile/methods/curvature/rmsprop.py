"""RMSprop (Table 1, second row): diagonal curvature from running second moments."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.methods.curvature.base import Curvature, Group, Move, State
from gtddp_compile.methods.curvature.numbers import Scalar, counted, statistics_gradient, zeros


@dataclass(frozen=True)
class RMSprop(Curvature):
    """Diagonal curvature ``M = diag(√v + eps) / lr`` (docs/theory.md#curvatures), torch.optim.RMSprop's options.

    With ``Q_u = g_stat`` and ``ĝ = γᵀ w + ℓ_u``, elementwise and of the parameter's own shape::

        v  ← alpha · v + (1 - alpha) · Q_u²
        a  ← alpha · a + (1 - alpha) · Q_u        (centered: √(v - a²) takes the place of √v)
        b  ← momentum · b + ĝ / (√v + eps)
        δu = -lr · b                              (without momentum: -M⁻¹ ĝ)

    Table 1 writes ``√(E[Q_u²] + ε)``; torch adds ``eps`` after the root, and torch is followed
    (Proposition 4). No cross terms in a coalition.

    Do not use it where the first steps matter, as ``v`` starts at 0 without bias correction (steps up to
    ``lr / √(1 - alpha)``): take :class:`~gtddp_compile.methods.curvature.Adam`; nor for wide layers in a hurry: a
    diagonal ``M`` does not separate in the Gram matrices, that of :class:`~gtddp_compile.methods.curvature.SGD` and
    K-FAC does.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        alpha: smoothing of the moments.
        eps: added to the denominator.
        weight_decay: coupled decay ``λ``, ``ℓ_u = λ u``.
        momentum: factor of the momentum buffer; 0: none.
        centered: normalise by an estimate of the variance.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of torch.optim.RMSprop's range.
    """

    lr: Scalar = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    maximize: bool = False

    name = "rmsprop"
    nonnegative = ("lr", "eps", "momentum", "weight_decay", "alpha")

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"``; zeros like the parameter: ``"square_avg"``, ``"momentum_buffer"``, ``"grad_avg"``."""
        self.check(group)
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return zeros(param, "square_avg", *momentum, *(("grad_avg",) if group["centered"] else ()))

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count and moments after ``Q_u``."""
        g, alpha = statistics_gradient("RMSprop", g_stat), group["alpha"]
        new = {**state, "step": counted(state["step"])}
        new["square_avg"] = torch.mul(state["square_avg"], alpha).addcmul_(g, g, value=1 - alpha)
        if group["centered"]:
            new["grad_avg"] = torch.lerp(state["grad_avg"], g, 1 - alpha)
        return new

    def denominator(self, param: Tensor, state: State, group: Group) -> Tensor:
        """``√v + eps``, shape of the parameter."""
        square = state["square_avg"]
        if group["centered"]:
            mean = state["grad_avg"]
            return torch.addcmul(square, mean, mean, value=-1).sqrt_().add_(group["eps"])
        return torch.sqrt(square).add_(group["eps"])

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``ĝ / D``, or the momentum buffer of it."""
        below = self.denominator(param, state, group) if denominator is None else denominator
        if group["momentum"] > 0:
            buffer = torch.mul(state["momentum_buffer"], group["momentum"]).addcdiv_(g_hat, below)
            return Move(buffer, None, group["lr"], {**state, "momentum_buffer": buffer})
        return Move(g_hat, below, group["lr"], dict(state))
