"""RMSprop (Table 1, second row): diagonal curvature from running second moments."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.methods.curvature.base import NONE, Group, Memory, MetricKind, State
from gtddp_compile.methods.curvature.checks import (
    Scalar,
    check_ranges,
    first_step,
    scalar,
    statistics_gradient,
    subtract,
    subtract_quotient,
)


@dataclass(frozen=True)
class RMSprop:
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

    def __post_init__(self) -> None:
        _check(self.defaults())

    @property
    def metric(self) -> MetricKind:
        """Diagonal."""
        return "diagonal"

    @property
    def needs_statistics(self) -> bool:
        """Second moments (centered: first moments too) of ``Q_u``."""
        return True

    def defaults(self) -> dict[str, Any]:
        """Options of a param_group."""
        return asdict(self)

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"``; zeros like the parameter: ``"square_avg"``, ``"momentum_buffer"``, ``"grad_avg"``."""
        _check(group)
        state: dict[str, Any] = {"step": first_step(), "square_avg": torch.zeros_like(param).detach()}
        if group["momentum"] > 0:
            state["momentum_buffer"] = torch.zeros_like(param).detach()
        if group["centered"]:
            state["grad_avg"] = torch.zeros_like(param).detach()
        return state

    def linear_term(self, param: Tensor, group: Group) -> Tensor | None:
        """``λ u``, shape of the parameter."""
        decay = group["weight_decay"]
        return None if decay == 0 else param * scalar(decay, param)

    def observe(
        self, param: Tensor, g_stat: Tensor | None, state: State, group: Group, into: Memory = NONE
    ) -> dict[str, Any]:
        """Step count and moments after ``Q_u``."""
        g, alpha, new = statistics_gradient("RMSprop", g_stat), group["alpha"], dict(state)
        new["step"] = state["step"] + 1
        square = torch.mul(state["square_avg"], alpha, out=into.get("square_avg"))
        new["square_avg"] = square.addcmul_(g, g, value=1 - alpha)
        if group["centered"]:
            new["grad_avg"] = torch.lerp(state["grad_avg"], g, 1 - alpha, out=into.get("grad_avg"))
        return new

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor:
        """``lr / (√v + eps)``, shape of the parameter."""
        return self.denominator(param, state, group).reciprocal_().mul_(scalar(group["lr"], param))

    def denominator(self, param: Tensor, state: State, group: Group, into: Memory = NONE) -> Tensor:
        """``√v + eps``, shape of the parameter."""
        square, memory = state["square_avg"], into.get("denominator")
        if group["centered"]:
            mean = state["grad_avg"]
            root = torch.addcmul(square, mean, mean, value=-1, out=memory).sqrt_()
        else:
            root = torch.sqrt(square, out=memory)
        return root.add_(group["eps"])

    def apply(self, param: Tensor, g_hat: Tensor, state: State, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """``δu`` and the state with the new momentum buffer; both of the parameter's shape."""
        new, momentum, denominator = dict(state), group["momentum"], self.denominator(param, state, group)
        step = -scalar(group["lr"], param)
        if momentum > 0:
            new["momentum_buffer"] = torch.mul(state["momentum_buffer"], momentum).addcdiv_(g_hat, denominator)
            return new["momentum_buffer"] * step, new
        return torch.div(g_hat, denominator).mul_(step), new

    def descend(
        self, param: Tensor, g_hat: Tensor, state: State, group: Group,
        denominator: Tensor | None = None, into: Memory = NONE,
    ) -> dict[str, Any]:  # fmt: skip
        """As :meth:`apply`, added to the parameter in place."""
        momentum, lr = group["momentum"], group["lr"]
        if denominator is None:
            denominator = self.denominator(param, state, group, into)
        if momentum > 0:
            buffer = torch.mul(state["momentum_buffer"], momentum, out=into.get("momentum_buffer"))
            subtract(param, buffer.addcdiv_(g_hat, denominator), lr)
            return {**state, "momentum_buffer": buffer}
        subtract_quotient(param, g_hat, denominator, lr)
        return dict(state)

    def rate(self, group: Group) -> float | None:
        """None: the metric is diagonal."""
        return None


def _check(options: Group) -> None:
    check_ranges("RMSprop", options, "lr", "eps", "momentum", "weight_decay", "alpha")
