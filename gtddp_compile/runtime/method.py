"""The base method's side of one step: losses, statistics, metric, update. Everything is kept aside until the
step is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.curvature import Curvature
from gtddp_compile.losses import Loss, check


class NonFiniteLoss(Exception):
    """The loss is not finite: the step is given up and nothing has changed. Carries the loss."""

    def __init__(self, loss: Tensor) -> None:
        super().__init__(f"the loss is {float(loss)}")
        self.loss = loss


class BaseMethod:
    """What generated programs call ``m``.

    Args:
        curvature: the base method.
        params: parameters before the step, by name.
        new: dictionary that receives the parameters after it; starts as a copy of ``params``.
        states: optimizer state of every parameter, by name; read, never written.
        groups: options of every parameter's group, by name.
        loss: the per-sample losses.
        first: compare them with the user's own loss (until a step has succeeded).
    """

    def __init__(
        self,
        curvature: Curvature,
        params: Mapping[str, Tensor],
        new: dict[str, Tensor],
        states: Mapping[str, Mapping[str, Any]],
        groups: Mapping[str, Mapping[str, Any]],
        loss: Loss,
        *,
        first: bool = True,
    ) -> None:
        self._curvature, self._params, self._new = curvature, params, new
        self._groups, self._loss, self._first = groups, loss, first
        self.states: dict[str, Mapping[str, Any]] = dict(states)
        self.figures: dict[int, dict[str, Any]] = {}
        self.loss: Tensor | None = None
        self._random: list[list[Tensor]] = []

    # --- losses -------------------------------------------------------------------------------------------------------

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """``φ``, shape (B,); gives the step up if their total is not finite."""
        if self._first:
            self._check(outputs, targets)
        try:
            phi = self._loss.per_sample(outputs, targets)
        except (IndexError, RuntimeError, ValueError):
            self._check(outputs, targets)  # says what is wrong with the targets, if it is they
            raise
        self.loss = self._loss.total(phi.detach())
        if not torch.isfinite(self.loss):
            raise NonFiniteLoss(self.loss)
        return phi

    def _check(self, outputs: Any, targets: Any) -> None:
        with torch.no_grad():
            check(self._loss, outputs, targets)

    def terminal(self, phi: Tensor) -> tuple[Tensor, float]:
        """Ones, shape (B,), and ``α_T``: 1/B for a mean loss, 1 for a sum."""
        dtype = phi.dtype if phi.dtype in (torch.float32, torch.float64) else torch.float32
        ones = torch.ones(phi.shape[0], dtype=dtype, device=phi.device)
        return ones, 1.0 / phi.shape[0] if self._loss.reduction == "mean" else 1.0

    # --- curvature ----------------------------------------------------------------------------------------------------

    def observe(self, names: tuple[str, ...], gradients: tuple[Tensor, ...] | None) -> None:
        """Statistics from ``Q_u = γᵀ α + ℓ_u`` (``gradients`` without ``ℓ_u``), and the step count."""
        for index, name in enumerate(names):
            g = None if gradients is None else self._with_decay(name, gradients[index])
            self.states[name] = self._curvature.observe(self._params[name], g, self.states[name], self._groups[name])

    def metric(self, names: tuple[str, ...]) -> tuple[Tensor | float, ...]:
        """``M⁻¹`` of each parameter."""
        return tuple(
            self._curvature.inverse_metric(self._params[name], self.states[name], self._groups[name]) for name in names
        )

    def drift(self, names: tuple[str, ...]) -> tuple[Tensor, ...]:
        """``M⁻¹ ℓ_u`` of each parameter."""
        found = []
        for name, inverse in zip(names, self.metric(names), strict=True):
            linear = self._curvature.linear_term(self._params[name], self._groups[name])
            found.append(torch.zeros_like(self._params[name]) if linear is None else inverse * linear)
        return tuple(found)

    def open_gain(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """``k = -M⁻¹ (γᵀ α + ℓ_u)`` (Eq. 4 with Table 1's ``Q_uu``)."""
        pairs = zip(names, gradients, self.metric(names), strict=True)
        return tuple(-(inverse * self._with_decay(name, gradient)) for name, gradient, inverse in pairs)

    def apply(self, names: tuple[str, ...], gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Consume ``ĝ = γᵀ w + ℓ_u``: new parameters and states are kept aside; returns ``δu``."""
        found = []
        for name, gradient in zip(names, gradients, strict=True):
            param = self._params[name]
            delta, self.states[name] = self._curvature.apply(
                param, self._with_decay(name, gradient), self.states[name], self._groups[name]
            )
            self._new[name] = param + delta
            found.append(delta)
        return tuple(found)

    def _with_decay(self, name: str, gradient: Tensor) -> Tensor:
        linear = self._curvature.linear_term(self._params[name], self._groups[name])
        return gradient if linear is None else gradient + linear

    # --- for the dense backend ----------------------------------------------------------------------------------------

    def dense_curvature(self, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """Diagonal of ``M`` and ``ℓ_u`` of one player, its parameters flat and side by side."""
        metric, linear = [], []
        for name, inverse in zip(names, self.metric(names), strict=True):
            param = self._params[name]
            metric.append((1 / (inverse * torch.ones_like(param))).flatten())
            decay = self._curvature.linear_term(param, self._groups[name])
            linear.append((torch.zeros_like(param) if decay is None else decay).flatten())
        return torch.cat(metric), torch.cat(linear)

    def unflatten(self, names: tuple[str, ...], vector: Tensor) -> tuple[Tensor, ...]:
        """One player's flat column as tensors of its parameters' shapes."""
        pieces = vector.flatten().split([self._params[name].numel() for name in names])
        return tuple(piece.reshape(self._params[name].shape) for name, piece in zip(names, pieces, strict=True))

    # --- figures and random state -------------------------------------------------------------------------------------

    def keep(self, stage: int, **figures: Any) -> None:
        """Figures of a stage for ``diagnostics``, evaluated only when asked for."""
        self.figures.setdefault(stage, {}).update(figures)

    def mark(self) -> None:
        """The random state at the beginning of the first stage."""
        self._random = [random_state()]

    def rewind(self) -> None:
        """Draw the same random numbers again in the second sweep."""
        self._random.append(random_state())
        restore_random_state(self._random[0])

    def settle(self) -> None:
        """The random state after one sweep: a step draws as much as one forward pass."""
        restore_random_state(self._random[1])


def random_state() -> list[Tensor]:
    """The generators' states (CPU, then every GPU in use)."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def restore_random_state(states: list[Tensor]) -> None:
    """Undo every draw since :func:`random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
