"""Stochastic gradient descent (Table 1, first row): spherical curvature."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature.base import NONE, Group, Memory, MetricKind, State
from gtddp_compile.methods.curvature.checks import Scalar, check_ranges, scalar, subtract


@dataclass(frozen=True)
class SGD:
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

    def __post_init__(self) -> None:
        _check(self.defaults())

    @property
    def metric(self) -> MetricKind:
        """A multiple of the identity."""
        return "spherical"

    @property
    def needs_statistics(self) -> bool:
        """None are taken."""
        return False

    def defaults(self) -> dict[str, Any]:
        """Options of a param_group."""
        return asdict(self)

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """Empty: torch.optim.SGD creates ``"momentum_buffer"`` at the first step, which is not dampened."""
        _check(group)
        return {}

    def linear_term(self, param: Tensor, group: Group) -> Tensor | None:
        """``λ u``, shape of the parameter."""
        decay = group["weight_decay"]
        return None if decay == 0 else param * scalar(decay, param)

    def observe(
        self, param: Tensor, g_stat: Tensor | None, state: State, group: Group, into: Memory = NONE
    ) -> dict[str, Any]:
        """The state as it is."""
        return dict(state)

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor | float:
        """``lr``."""
        return scalar(group["lr"], param)

    def denominator(self, param: Tensor, state: State, group: Group, into: Memory = NONE) -> Tensor | None:
        """None: the metric is spherical."""
        return None

    def apply(self, param: Tensor, g_hat: Tensor, state: State, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """``δu`` and the state with the new momentum buffer; both of the parameter's shape."""
        direction, new = self._direction(g_hat, state, group)
        return direction * -scalar(group["lr"], param), new

    def descend(
        self, param: Tensor, g_hat: Tensor, state: State, group: Group,
        denominator: Tensor | None = None, into: Memory = NONE,
    ) -> dict[str, Any]:  # fmt: skip
        """As :meth:`apply`, added to the parameter in place."""
        direction, new = self._direction(g_hat, state, group, into)
        subtract(param, direction, group["lr"])
        return new

    def rate(self, group: Group) -> float | None:
        """``lr`` without momentum and decay."""
        plain = group["momentum"] == 0 and group["weight_decay"] == 0 and not isinstance(group["lr"], Tensor)
        return float(group["lr"]) if plain else None

    def _direction(
        self, g_hat: Tensor, state: State, group: Group, into: Memory = NONE
    ) -> tuple[Tensor, dict[str, Any]]:
        """``-δu / lr`` and the new state."""
        new, momentum, direction = dict(state), group["momentum"], g_hat
        if momentum != 0:
            buffer = state.get("momentum_buffer")
            if buffer is None:
                buffer = torch.clone(g_hat).detach()
            else:
                buffer = torch.mul(buffer, momentum, out=into.get("momentum_buffer"))
                buffer.add_(g_hat, alpha=1 - group["dampening"])
            new["momentum_buffer"] = buffer
            direction = torch.add(g_hat, buffer, alpha=momentum) if group["nesterov"] else buffer
        return direction, new


def _check(options: Group) -> None:
    check_ranges("SGD", options, "lr", "momentum", "weight_decay")
    if options["nesterov"] and (options["momentum"] <= 0 or options["dampening"] != 0):
        raise CompileError(
            "SGD: nesterov=True needs a momentum and zero dampening, as in torch.optim.SGD",
            "Set momentum above 0 and dampening=0, or nesterov=False",
        )
