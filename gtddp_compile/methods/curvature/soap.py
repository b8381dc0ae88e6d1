"""SOAP (Vyas et al. 2024): AdamW's second moments in the eigenbases of Shampoo's factors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.turned import Turned, as_matrix, inverse_times, turned_rows
from gtddp_compile.methods.curvature.adam import AdamW, bias_correction
from gtddp_compile.methods.curvature.base import Group, Move, State
from gtddp_compile.methods.curvature.numbers import (
    Scalar,
    number,
    out_of_range,
    refuse_fractions,
    scalar,
    statistics_gradient,
)
from gtddp_compile.methods.curvature.shampoo import empty_factors, sides_of


@dataclass(frozen=True)
class SOAP(AdamW):
    """``M = U diag(√v + eps) Uᵀ / (lr √(1 - β₂ᵗ))``, ``U = U_L ⊗ U_R`` (docs/theory.md#curvatures).

    ``U_L``, ``U_R`` are eigenbases of the averages ``L`` of ``Q_u Q_uᵀ`` and ``R`` of ``Q_uᵀ Q_u``, parameters seen as
    matrices as by :class:`~gtddp_compile.methods.curvature.Shampoo`; vectors have none, which makes AdamW of them.
    Options and defaults are the authors'. At step t, with ``Q_u = g_stat`` and ``ĝ = γᵀ w``::

        v  ← β₂ · v + (1 - β₂) · (U_Lᵀ Q_u U_R)²
        m  ← β₁ · m + (1 - β₁) · ĝ,     m̂ = m / (1 - β₁ᵗ)
        δu = -M⁻¹ m̂                     (and decoupled decay of what that makes)

    The bases are of the steps before, and follow by one power iteration and a QR decomposition every
    ``precondition_frequency`` steps. The authors spend the first step on the first bases; here it is taken, so that
    this is their method after a call with the first batch. Where the first gradient does not determine a direction it
    is arbitrary in theirs and a fixed random one here. Kernels of convolutions, which they treat axis by axis, are
    matrices. No cross terms in a coalition.

    Do not use it where decompositions are slow (wide layers on a GPU): take
    :class:`~gtddp_compile.methods.curvature.Muon`; nor with a small ``eps`` where few samples decide: a direction that
    no mean gradient has shown is free.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        betas: ``(β₁, β₂)``, smoothing of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: ``λ``, decoupled.
        shampoo_beta: smoothing of the factors; ``None``: ``β₂``.
        precondition_frequency: steps between two bases.
        max_precond_dim: a longer side keeps its coordinates.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of range.
    """

    lr: Scalar = 3e-3
    betas: tuple[float, float] = (0.95, 0.95)
    amsgrad: bool = field(default=False, init=False)
    shampoo_beta: float | None = None
    precondition_frequency: int = 10
    max_precond_dim: int = 10000

    name = "soap"
    metric = "turned diagonal"

    def check(self, options: Group) -> None:
        """As AdamW's; the factors' smoothing is in [0, 1), and what is counted is whole."""
        super().check(options)
        refuse_fractions("SOAP", options, max_precond_dim=0, precondition_frequency=1)
        beta = options["shampoo_beta"]
        if beta is not None and not 0.0 <= number("SOAP", "shampoo_beta", beta) < 1.0:
            raise out_of_range("SOAP", "shampoo_beta", beta, "a value in [0, 1) or None")

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """AdamW's, and of a matrix the sides' ``"factor_g"`` ``(m, m)`` and ``"factor_x"`` ``(n, n)``."""
        factors = empty_factors(param, group["max_precond_dim"], "gx" if param.dim() > 1 else "")
        return {**super().init_state(param, group), **factors}

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count, bases if it is their turn, ``v`` after ``Q_u`` in them, then factors."""
        g, taken = as_matrix(statistics_gradient("SOAP", g_stat)), int(state["step"])
        share = 1 - (group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"])
        new, sides = dict(state), sides_of(g, state)
        for side, own in sides.items():
            if taken == 0:
                new[f"factor_{side}"] = own @ own.mT * share
                new[f"map_{side}"] = first_basis(new[f"factor_{side}"])
            elif taken % group["precondition_frequency"] == 0:
                new[f"map_{side}"], order = next_basis(state[f"factor_{side}"], state[f"map_{side}"])
                square = as_matrix(new["exp_avg_sq"]).index_select("gx".index(side), order)
                new["exp_avg_sq"] = square.reshape(param.shape)
        turned, _ = turned_rows(g[None], Turned(new.get("map_x"), new.get("map_g"), 1.0))
        new = super().observe(param, turned.reshape(param.shape), new, group)
        for side, own in sides.items():
            new[f"factor_{side}"] = torch.lerp(new[f"factor_{side}"], own @ own.mT, share)
        return new

    def denominator(self, param: Tensor, state: State, group: Group) -> None:  # type: ignore[override]
        """``None``: the metric is diagonal in the bases alone."""
        return None

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Turned:  # type: ignore[override]
        """``lr √(1 - β₂ᵗ) / (√v + eps)`` in the bases."""
        below = torch.sqrt(as_matrix(state["exp_avg_sq"])).add_(group["eps"])
        rate = bias_correction(group["betas"][1], state["step"]) ** 0.5 * group["lr"]
        return Turned(state.get("map_x"), state.get("map_g"), below.reciprocal_().mul_(scalar(rate, param)))

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``M⁻¹ m / lr``; decay is of the parameter that has moved."""
        own = super().move(param, g_hat, state, group)
        above = inverse_times(self.inverse_metric(param, state, {**group, "lr": 1.0}), own.above)
        return own._replace(above=above, rate=own.rate if own.decay is None else own.rate * (1 - own.decay))


def first_basis(factor: Tensor) -> Tensor:
    """Eigenvectors, the largest eigenvalue first; fixed random directions in place of those without any."""
    values, basis = torch.linalg.eigh(factor)
    size = len(values)
    known = basis.flip(1)[:, values.flip(0) > size * torch.finfo(values.dtype).eps * values[-1]]
    random = torch.randn(size, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    found: Tensor = torch.linalg.qr(torch.cat([known, random[:, known.shape[1] :].to(known)], 1)).Q
    return found


def next_basis(factor: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One power iteration and a QR decomposition from an old basis; of which old direction each is the follower."""
    product = factor @ basis
    order = (basis * product).sum(0).argsort(descending=True)
    return torch.linalg.qr(product[:, order]).Q, order
