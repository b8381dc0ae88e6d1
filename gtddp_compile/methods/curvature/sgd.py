"""Stochastic gradient descent (Table 1, first row): spherical curvature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature.base import Curvature, Group, Move, State
from gtddp_compile.methods.curvature.numbers import Scalar, scalar


@dataclass(frozen=True)
class SGD(Curvature):
    """Spherical curvature ``M = I / lr`` (docs/theory.md#curvatures), with torch.optim.SGD's options.

    With ``ĝ = γᵀ w + ℓ_u`` of a parameter's own shape::

        b  ← ĝ at the first step, momentum · b + (1 - dampening) · ĝ afterwards
        δu = -lr · b                              (nesterov: -lr · (ĝ + momentum · b))

    Without momentum ``δu = -M⁻¹ ĝ``. No cross terms in a coalition. It is the cheapest method: the Gram
    matrices of a linear layer separate, ``Γ = lr · (X Xᵀ) ∘ (G Gᵀ)``.

    Do not use it where parameters differ much in scale (embeddings, attention, deep networks without
    normalisation): take :class:`~gtddp_compile.methods.curvature.Adam`; nor where the inputs of linear layers are ill
    conditioned: take K-FAC.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        momentum: factor of the momentum buffer; 0: none.
        dampening: dampening of the momentum.
        weight_decay: coupled decay ``λ``, ``ℓ_u = λ u``.
        nesterov: Nesterov momentum; needs a momentum and no dampening.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of torch.optim.SGD's range.
    """

    lr: Scalar = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False

    name = "sgd"
    metric = "spherical"
    needs_statistics = False
    nonnegative = ("lr", "momentum", "weight_decay")

    def check(self, options: Group) -> None:
        """As every method's; Nesterov's momentum is not dampened."""
        super().check(options)
        if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
            raise CompileError(
                "SGD: nesterov=True needs a momentum and zero dampening, as in torch.optim.SGD",
                "Set momentum above 0 and dampening=0, or nesterov=False",
            )

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """Empty: torch.optim.SGD creates ``"momentum_buffer"`` at the first step, which is not dampened."""
        self.check(group)
        return {}

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """The state as it is."""
        return dict(state)

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor | float:
        """``lr``."""
        return scalar(group["lr"], param)

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``b``, or ``ĝ + momentum · b``, and the state with the new momentum buffer."""
        new, momentum, direction = dict(state), group["momentum"], g_hat
        if momentum != 0:
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = torch.clone(g_hat).detach()
            else:
                buffer = torch.mul(buffer, momentum).add_(g_hat, alpha=1 - group["dampening"])
            new["momentum_buffer"] = buffer
            direction = torch.add(g_hat, buffer, alpha=momentum) if group["nesterov"] else buffer
        return Move(direction, None, group["lr"], new)

    def rate(self, group: Group) -> float | None:
        """``lr`` without momentum and decay."""
        plain = group["momentum"] == 0 and group["weight_decay"] == 0 and not isinstance(group["lr"], Tensor)
        return float(group["lr"]) if plain else None
