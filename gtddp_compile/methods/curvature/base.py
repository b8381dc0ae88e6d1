"""What a base method has to provide: its curvature ``Q_uu`` (Table 1) and how it consumes a gradient.

A curvature is an immutable object of options with torch.optim's names and defaults. All methods are pure: they return
new state and leave the old one as it was, so that a failed step changes nothing. Tensors in a state are keyed as
torch.optim keys them (``"exp_avg"``, ``"square_avg"``, ``"momentum_buffer"``, ``"step"``).

With ``g_stat = Q_u = γᵀ α_{t+1} + ℓ_u`` (what statistics are taken from) and ``ĝ = γᵀ w + ℓ_u`` (what takes the
gradient's place in the update), the three calls of one step are, for each parameter::

    state  = c.observe(param, g_stat, state, group)          # second moments, step count
    m_inv  = c.inverse_metric(param, state, group)           # M⁻¹ = η / D, learning rate included
    delta, state = c.apply(param, g_hat, state, group)       # first moment / momentum, then the parameter change

With feedback off ``g_stat = ĝ = ∂J/∂u (+ ℓ_u)`` and the three together are torch.optim's own update (Proposition 4).
``ℓ_u`` is the gradient of coupled weight decay, ``λ u``: :meth:`linear_term`. Decoupled decay (AdamW) is part of
``delta``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from torch import Tensor

Group = Mapping[str, Any]
"""Options of one param_group (lr, weight_decay, …), as torch.optim keeps them."""

State = Mapping[str, Any]
"""State of one parameter."""

Memory = Mapping[str, Tensor]
"""Tensors of a parameter's shape that may be written to instead of new ones: by the key of the state, and
``"denominator"``; they belong to no state."""

NONE: Memory = {}

MetricKind = Literal["spherical", "diagonal", "kronecker"]


class Curvature(Protocol):
    """A base method (docs/theory.md#curvatures; Table 1 of the paper)."""

    name: str

    @property
    def metric(self) -> MetricKind:
        """Shape of ``M``: of one parameter a multiple of the identity or diagonal, or of players, Kronecker-factored.

        The last has further methods (:class:`gtddp_compile.methods.curvature.kronecker.Kronecker`).
        """
        ...

    @property
    def needs_statistics(self) -> bool:
        """Whether :meth:`observe` reads ``g_stat``; if not, the program need not compute it."""
        ...

    def defaults(self) -> dict[str, Any]:
        """Options of a param_group, torch.optim's names and values."""
        ...

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """State of one parameter before the first step, torch.optim's keys."""
        ...

    def linear_term(self, param: Tensor, group: Group) -> Tensor | None:
        """``ℓ_u = λ u`` of coupled weight decay; ``None`` where there is none."""
        ...

    def observe(
        self, param: Tensor, g_stat: Tensor | None, state: State, group: Group, into: Memory = NONE
    ) -> dict[str, Any]:
        """The state after statistics were updated from ``g_stat`` (which contains ``ℓ_u``)."""
        ...

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Tensor | float:
        """``M⁻¹``: a float or 0-d tensor (spherical), or a tensor of the parameter's shape (diagonal)."""
        ...

    def denominator(self, param: Tensor, state: State, group: Group, into: Memory = NONE) -> Tensor | None:
        """``D = η M`` of a diagonal metric, of the parameter's shape; ``None`` where the metric is another."""
        ...

    def apply(self, param: Tensor, g_hat: Tensor, state: State, group: Group) -> tuple[Tensor, dict[str, Any]]:
        """The change of the parameter, ``δu``, and the state after the first moment consumed ``ĝ``."""
        ...

    def descend(
        self, param: Tensor, g_hat: Tensor, state: State, group: Group,
        denominator: Tensor | None = None, into: Memory = NONE,
    ) -> dict[str, Any]:  # fmt: skip
        """As :meth:`apply`, ``δu`` added to ``param`` in place; the state. ``denominator``: ``D`` where it is known."""
        ...

    def rate(self, group: Group) -> float | None:
        """``η`` where ``δu = -η ĝ`` with no state and no ``ℓ_u``, so that a product may add it up; else ``None``."""
        ...
