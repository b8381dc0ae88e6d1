"""K-FAC (Martens and Grosse 2015; for convolutions KFC, Grosse and Martens 2016; Table 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.methods.curvature.base import Group, State
from gtddp_compile.methods.curvature.kronecker import BlockKind, Kronecker


@dataclass(frozen=True)
class KFAC(Kronecker):
    """Kronecker-factored curvature ``M = (A + π √λ I) ⊗ (B + √λ / π I) / lr`` (docs/theory.md#curvatures).

    ``A = E[x xᵀ]`` of the homogeneous inputs (a one appended for the bias), ``B = E[V_h V_hᵀ]`` of the output
    gradients, ``V_h = α_{t+1} g_h`` (Eq. 43, 44); both are running averages. Convolutions: inputs are unfolded patches,
    summed over positions, gradients averaged over them (KFC). ``M⁻¹ vec(G) = lr vec(B⁻¹ G A⁻¹)`` (Eq. 45). With
    feedback off ``V_h`` is the loss gradient and this is K-FAC as published (Proposition 4). Players that decide
    together have the joint factors of Eq. 50 and ``M⁻¹_uv = [A⁻¹]_uv ⊗ [B⁻¹]_uv`` (Theorem 3).

    Layers that are neither linear nor convolutions: ``E[γ γᵀ] + λ I`` exactly up to ``small`` parameters, its diagonal
    beyond.

    Do not use it for layers of many thousands of inputs (the factors are dense): take Adam. :class:`EKFAC` is the
    better approximation at the price of eigendecompositions.

    Args:
        lr: learning rate ``η``; the update is preconditioned, so rates near 1 are possible with damping to match.
        damping: ``λ``, Tikhonov damping of the Kronecker product, split between the factors.
        stat_decay: weight of the past in the running averages, ``min(1 - 1/k, stat_decay)`` at step k.
        refresh: steps between two inversions of the factors.
        stat_every: steps between two updates of the factors' averages. What lies between two refreshes is not read
            before the second, so a multiple of ``refresh`` loses only the averaging; the batches left out cost nothing.
        early: in so many first steps both are made more often, at steps 1, 2, 3, 5, 9, …
        momentum: as torch.optim.SGD's, of the preconditioned gradient.
        weight_decay: coupled decay ``λ u``, part of the gradient, not of the statistics.
        small: largest number of parameters of an exact block.
        pi: split the damping by the factors' mean eigenvalues (their sec. 6.3); False: ``π = 1``.
        maximize: not available: negate the loss.

    The factors are inverted by Cholesky. Where that fails (no damping and fewer samples than inputs, or overflow) the
    eigenvalues are raised to machine precision times the largest; ``diagnostics["solve_fallbacks"]`` counts it.

    Raises:
        CompileError: an option is out of range.
    """

    small: int = 256
    pi: bool = True

    name = "kfac"

    def refreshed(self, kind: BlockKind, state: State, group: Group) -> dict[str, Any]:
        """``X Xᵀ = (A + a I)⁻¹``, ``Y Yᵀ = (B + b I)⁻¹``; of a ``"dual"`` block the inverses themselves."""
        x, g = state["factor_x"], state["factor_g"]
        a, b = split_damping(x, g, group["damping"], pi=group["pi"], exact=kind == "exact")
        word, found = ("inverse", inverse) if kind == "dual" else ("map", inverse_root)
        (of_x, failed_x), (of_g, failed_g) = found(x, a), found(g, b)
        failed = state.get("fallbacks", 0) + failed_x + failed_g
        return {f"{word}_x": of_x, f"{word}_g": of_g, "fallbacks": failed}


def split_damping(x: Tensor, g: Tensor, damping: float, *, pi: bool, exact: bool) -> tuple[Tensor, Tensor]:
    """``(π √λ, √λ / π)`` of every group, ``(G,)``; all of it on the gradients' side for an exact block.

    ``π² = (tr A / n) / (tr B / m)``; 1 where a factor is zero.
    """
    ones = torch.ones(x.shape[0], dtype=x.dtype, device=x.device)
    if exact:
        return 0.0 * ones, damping * ones
    root = damping**0.5 * ones
    if not pi:
        return root, root
    mean_x, mean_g = x.diagonal(dim1=1, dim2=2).mean(1), g.diagonal(dim1=1, dim2=2).mean(1)
    ratio = torch.where((mean_x > 0) & (mean_g > 0), mean_x / mean_g, ones) ** 0.5
    return root * ratio, root / ratio


def inverse_root(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``X`` with ``X Xᵀ = (F + d I)⁻¹``, ``(G, n, n)``, and whether Cholesky failed (a 0-d count)."""
    lower, failed = _cholesky(factor, damping)
    if failed:
        return _raised_root(factor, damping), failed
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    found: Tensor = torch.linalg.solve_triangular(lower.mT, eye.expand_as(lower), upper=True, left=False)
    return found, failed


def inverse_and_root(factor: Tensor, damping: Tensor, of: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``(F + d I)⁻¹`` and ``X``, or ``X`` times a few columns, and whether Cholesky failed: by as few products as that
    takes.
    """
    if of is None:
        root, failed = inverse_root(factor, damping)
        return root @ root.mT, root, failed
    lower, failed = _cholesky(factor, damping)
    if failed:
        root = _raised_root(factor, damping)
        return root @ root.mT, root @ of, failed
    return torch.cholesky_inverse(lower), torch.linalg.solve_triangular(lower.mT, of, upper=True), failed


def inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """``(F + d I)⁻¹``, ``(G, n, n)``, and whether Cholesky failed (a 0-d count)."""
    lower, failed = _cholesky(factor, damping)
    if failed:
        root = _raised_root(factor, damping)
        return root @ root.mT, failed
    found: Tensor = torch.cholesky_inverse(lower)
    return found, failed


def _damped(factor: Tensor, damping: Tensor) -> Tensor:
    found = factor.clone()
    found.diagonal(dim1=1, dim2=2).add_(damping.unsqueeze(1))
    return found


def _cholesky(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """The Cholesky factor of ``F + d I``, and whether there is none (a 0-d count)."""
    lower, info = torch.linalg.cholesky_ex(_damped(factor, damping))
    return lower, (info != 0).any().to(factor.dtype)


def _raised_root(factor: Tensor, damping: Tensor) -> Tensor:
    """A root of the inverse by eigenvalues, none of them below rounding."""
    values, basis = torch.linalg.eigh(_damped(factor, damping))
    least = values[:, -1:].clamp_min(torch.finfo(factor.dtype).tiny) * torch.finfo(factor.dtype).eps
    found: Tensor = basis * values.clamp_min(least).rsqrt().unsqueeze(1)
    return found
