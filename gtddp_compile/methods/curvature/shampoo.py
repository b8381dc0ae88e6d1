"""Shampoo (Gupta, Koren and Singer 2018): roots of sums of gradients' squares, on both sides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.turned import Turned, as_matrix, inverse_times
from gtddp_compile.methods.curvature.base import Curvature, Group, Move, State, with_momentum
from gtddp_compile.methods.curvature.numbers import (
    Scalar,
    counted,
    number,
    out_of_range,
    refuse_fractions,
    scalar,
    statistics_gradient,
    zeros,
)


@dataclass(frozen=True)
class Shampoo(Curvature):
    """``M = (L + eps I)^(1/p) ⊗ (R + eps I)^(1/p) / lr`` of every parameter (docs/theory.md#curvatures).

    A parameter is the matrix ``(m, n)`` of its first axis by all others (a kernel's patches side by side), a vector
    ``(m, 1)``. With ``Q_u = g_stat`` and ``ĝ = γᵀ w + ℓ_u`` in this shape::

        L  ← L + Q_u Q_uᵀ,  R ← R + Q_uᵀ Q_u      (stat_decay β < 1: averages β L + (1 - β) Q_u Q_uᵀ, bias-corrected)
        b  ← momentum · b + (L + eps I)^(-1/p) ĝ (R + eps I)^(-1/p)
        δu = -lr · b                               (without momentum: -M⁻¹ ĝ)

    The root ``p`` is twice the number of sides: 4 of a matrix, as published, 2 of a vector and of a matrix with one
    side. No grafting of another method's step length: the coupled step has a length of its own. No cross terms in a
    coalition, none between a layer's weight and bias.

    Do not use it for tables of many thousands of rows without ``widest``, as the factors are dense, nor for long runs
    with ``stat_decay=1``, as the sums never forget: take :class:`~gtddp_compile.methods.curvature.SOAP`.

    Args:
        lr: learning rate ``η``, a float or a tensor of one element.
        momentum: as torch.optim.SGD's, of the preconditioned gradient; 0: none.
        weight_decay: coupled decay ``λ``, ``ℓ_u = λ u``.
        eps: added to the factors.
        stat_decay: weight of the past in the factors; 1: sums.
        root: ``p``; ``None``: see above.
        one_sided: the shorter side alone.
        widest: a longer side has no factor.
        refresh: steps between two roots.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of range.
    """

    lr: Scalar = 0.1
    momentum: float = 0.0
    weight_decay: float = 0.0
    eps: float = 1e-4
    stat_decay: float = 1.0
    root: float | None = None
    one_sided: bool = False
    widest: int = 8192
    refresh: int = 1
    maximize: bool = False

    name = "shampoo"
    metric = "turned"
    nonnegative = ("lr", "momentum", "weight_decay", "eps")

    def check(self, options: Group) -> None:
        """As every method's; the decay is in [0, 1], the root positive, and what is counted is whole."""
        super().check(options)
        refuse_fractions("Shampoo", options, widest=0, refresh=1)
        if not 0.0 <= number("Shampoo", "stat_decay", options["stat_decay"]) <= 1.0:
            raise out_of_range("Shampoo", "stat_decay", options["stat_decay"], "a value in [0, 1]")
        if options["root"] is not None and not number("Shampoo", "root", options["root"]) > 0:
            raise out_of_range("Shampoo", "root", options["root"], "a positive number or None")

    def init_state(self, param: Tensor, group: Group) -> dict[str, Any]:
        """``"step"``, the sides' ``"factor_g"`` ``(m, m)`` and ``"factor_x"`` ``(n, n)``, ``"momentum_buffer"``."""
        self.check(group)
        outputs, inputs = as_matrix(param).shape
        shorter = "g" if param.dim() < 2 or outputs <= inputs else "x"
        sides = shorter if group["one_sided"] or param.dim() < 2 else "gx"
        momentum = ("momentum_buffer",) if group["momentum"] > 0 else ()
        return {**zeros(param, *momentum), **empty_factors(param, group["widest"], sides)}

    def observe(self, param: Tensor, g_stat: Tensor | None, state: State, group: Group) -> dict[str, Any]:
        """Step count, factors after ``Q_u`` and, when it is their turn, what is made of them."""
        g, keep = as_matrix(statistics_gradient("Shampoo", g_stat)), group["stat_decay"]
        new, taken = {**state, "step": counted(state["step"])}, int(state["step"])
        sides = sides_of(g, state)
        for side, own in sides.items():
            new[f"factor_{side}"] = torch.addmm(state[f"factor_{side}"], own, own.mT, beta=keep, alpha=1 - keep or 1)
            if taken % group["refresh"] == 0:
                grown = 1.0 if keep == 1 else 1 - keep ** (taken + 1)
                root = group["root"] or 2 * len(sides)
                new[f"map_{side}"] = inverse_root(new[f"factor_{side}"] / grown, group["eps"], root)
        return new

    def inverse_metric(self, param: Tensor, state: State, group: Group) -> Turned:  # type: ignore[override]
        """``lr`` times both inverse roots."""
        return Turned(state.get("map_x"), state.get("map_g"), scalar(group["lr"], param))

    def move(self, param: Tensor, g_hat: Tensor, state: State, group: Group, denominator: Tensor | None = None) -> Move:
        """``M⁻¹ ĝ / lr``, or the momentum buffer of it."""
        turned = Turned(state.get("map_x"), state.get("map_g"), 1.0)
        return with_momentum(inverse_times(turned, g_hat), state, group)


def empty_factors(param: Tensor, widest: int, sides: str = "gx") -> dict[str, Tensor]:
    """``"factor_g"`` ``(m, m)`` and ``"factor_x"`` ``(n, n)`` before the first step, of sides up to ``widest``."""
    sizes = dict(zip("gx", as_matrix(param).shape, strict=True))
    return {f"factor_{side}": param.new_zeros(sizes[side], sizes[side]) for side in sides if sizes[side] <= widest}


def sides_of(g: Tensor, state: State) -> dict[str, Tensor]:
    """The gradient ``(m, n)`` with each side in front that has a factor."""
    return {side: own for side, own in (("g", g), ("x", g.mT)) if f"factor_{side}" in state}


def inverse_root(factor: Tensor, eps: float, root: float) -> Tensor:
    """``Y`` with ``Y Yᵀ = (F + eps I)^(-1/p)``; eigenvalues below zero are rounding."""
    values, basis = torch.linalg.eigh(factor)
    least = torch.finfo(factor.dtype).tiny
    found: Tensor = basis * values.clamp_min(0).add_(eps).clamp_min_(least) ** (-0.5 / root)
    return found
