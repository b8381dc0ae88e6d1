"""The joint step without ``Γ``: conjugate gradients, preconditioned by Nyström's approximation
(docs/theory.md#nystrom).

``(Λ_T + Γ) w = y`` needs products ``Γ v`` alone, each a weighted gradient and a directional derivative a layer. In
units of ``Λ_T^{1/2}`` it is ``(I + Γ) w = y``. Of ``Γ`` the columns ``C`` of some samples ``J`` are made, with ``W``
their own rows of it; then ``Γ ≈ C W⁻¹ Cᵀ = F Fᵀ`` with ``W = RᵀR``, ``F = C R⁻¹``, and the preconditioner is
``(I + F Fᵀ)⁻¹ = I - F (I + FᵀF)⁻¹ Fᵀ`` (Frangella, Tropp and Udell 2021). ``J`` are the pivots of a random mixture of
few entries of every ``γ``: Gauss' elimination takes the sample that those so far say the least about (Dong and
Martinsson 2023), and its pivots' size tells how many are worth it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, pieces, scaled, wide
from gtddp_compile.kernels.rows import Gradients, gather
from gtddp_compile.kernels.sweep import factor, solve

ROUND = 8
"""Products ``Γ v`` after which more columns are made, four times as many."""

ENOUGH = 0.02
"""A pivot's square, beside ``I``, below which a column costs more than the products that it spares."""

PRODUCT = 3 * 2**14
"""Elements of a product of positions: two of them and their sum stay in the cache."""


def joint_columns(gradients: Gradients, metric: Inverses, rows: Tensor) -> Tensor:
    """``γ M⁻¹ γ_Jᵀ``, ``(B, k)``, from per-sample gradients."""
    pairs = zip(gradients, metric, strict=True)
    parts = (wide(gamma.flatten(1)) @ wide(gamma[rows] * inverse).flatten(1).mT for gamma, inverse in pairs)
    return functools.reduce(torch.add, parts)


def linear_columns(layer: Layer, metric: Inverses, rows: Tensor) -> Tensor:
    """``γ M⁻¹ γ_Jᵀ``, ``(B, k)``, of a linear layer over positions, its metric spherical: by pairs of positions, ``B k
    T² (n + m)`` multiplications, or from per-sample gradients, ``B k n m``.
    """
    x, g = wide(layer.operands[0]), wide(layer.g)
    positions, size = x.shape[1], x.shape[-1] * g.shape[-1]
    if positions**2 * (x.shape[-1] + g.shape[-1]) > size * (1 + positions / rows.shape[0]):
        return joint_columns(((g.mT @ x),), metric[:1], rows)
    return _pairs(x, g, rows) * metric[0]


def _pairs(x: Tensor, g: Tensor, rows: Tensor) -> Tensor:
    """``Σ_st (x_is · x_jt)(g_is · g_jt)``, ``(B, k)``: of one position of some samples with all positions of ``J``."""
    samples, positions, _ = x.shape
    chosen_x, chosen_g = (values[rows].permute(2, 1, 0).flatten(1) for values in (x, g))
    found, step = g.new_empty(samples, rows.shape[0]), max(16, PRODUCT // chosen_x.shape[1])
    space = g.new_empty(3, min(samples, step), chosen_x.shape[1])
    for part in pieces(samples, step):
        own_x, own_g = x[part], g[part]
        total, inputs, outputs = space[:, : len(own_x)]
        total.zero_()
        for s in range(positions):
            torch.mm(own_x[:, s], chosen_x, out=inputs)
            torch.mm(own_g[:, s], chosen_g, out=outputs)
            total.addcmul_(inputs, outputs)
        torch.sum(total.unflatten(1, (positions, -1)), 1, out=found[part])
    return found


Use = tuple[tuple[str, ...], Callable[..., Gradients], Callable[..., Tensor], Layer]
"""Names of its parameters, kernels of ``γᵀ v`` and of ``⟨γ_i, v⟩``, and the layer."""
Columns = tuple[Callable[..., Tensor], Any, Inverses]
"""The kernel of ``γ M⁻¹ γ_Jᵀ``, and what it takes before the rows."""
Players = tuple[tuple[tuple[str, ...], Inverses, tuple[Use, ...], Columns], ...]
"""Of each its parameters, their ``M⁻¹``, the uses of them, and how its columns are made."""


def gram_product(players: Players, vector: Tensor) -> Tensor:
    """``Γ v = γ M⁻¹ γᵀ v``, ``(B,)``."""
    parts = []
    for names, metric, uses, _ in players:
        sums = gather(names, *((own, weighted(scaled(layer, vector))) for own, weighted, _, layer in uses))
        step = {name: inverse * value for name, inverse, value in zip(names, metric, sums, strict=True)}
        parts += [wide(directional(layer, tuple(step[n] for n in own))) for own, _, directional, layer in uses]
    return functools.reduce(torch.add, parts)


def solve_iteratively(
    information: Tensor, target: Tensor, players: Players, columns: int, tolerance: float
) -> tuple[Tensor, tuple[Tensor, ...], int]:
    """``w``, ``(B,)``; of every factor whether Cholesky failed; how many products were made.

    Where ``ROUND`` of them do not do, there are more columns, in the end all of them.

    Args:
        information: the diagonal of ``Λ_T``, ``(B,)``.
        target: ``y``, ``(B,)``.
        players: what ``Γ`` is made of.
        columns: how many are made at first, at most.
        tolerance: of the residual beside the first one, in the norm of the preconditioner.
    """
    failed: tuple[Tensor, ...] = ()
    root, count, enough = information.sqrt(), 0, ENOUGH
    found, first = torch.zeros_like(target), target / root
    left = first
    while True:
        rows = _chosen([parts for *_, parts in players], root, columns, enough)
        gram = functools.reduce(torch.add, (kernel(*taken, rows) for *_, (kernel, *taken) in players))
        precondition, failures = _preconditioner(gram / root.unsqueeze(1) / root[rows], rows)
        failed = (*failed, *failures)
        least, towards = tolerance**2 * (first @ precondition(first)), precondition(left)
        along, size = towards, left @ towards
        for _ in range(ROUND):
            if size <= least:
                break
            product = along + gram_product(players, along / root) / root
            length = size / (along @ product)
            found, left, count = found + length * along, left - length * product, count + 1
            towards = precondition(left)
            before, size = size, left @ towards
            along = towards + size / before * along
        if not size > least or len(rows) == len(target):
            return found / root, failed, count
        columns, enough = 4 * len(rows), 0.0


def _chosen(parts: Sequence[Columns], root: Tensor, columns: int, enough: float) -> Tensor:
    """``J``: of so many samples, by torch's random numbers, those whose pivots' squares are above ``enough``."""
    if columns >= len(root):
        return torch.arange(len(root), device=root.device)
    entries = torch.cat([_some(taken, metric, -(-2 * columns // len(parts))) for _, taken, metric in parts], 1)
    mixture = torch.rand(entries.shape[1], columns, dtype=root.dtype, device=root.device).sub_(0.5).mul_(12**0.5)
    mixed = (entries @ mixture).div_(root.unsqueeze(1))
    eliminated, swaps, _ = torch.linalg.lu_factor_ex(mixed)
    order = list(range(len(root)))
    for place, other in enumerate(swaps.tolist()):
        order[place], order[other - 1] = order[other - 1], order[place]
    count = int((eliminated.diagonal().square() >= enough).sum())
    return torch.tensor(order[: max(1, count)], device=root.device)


def _some(taken: Layer | Gradients, metric: Inverses, count: int) -> Tensor:
    """About so many entries of ``γ M^{-1/2}``, ``(B, ...)``, drawn at random and scaled up to stand for all."""
    if isinstance(taken, Layer):  # whole rows or columns of a sample's matrix
        one, whole = sorted((taken.operands[0], taken.g), key=lambda values: values.shape[-1])
        size = one.shape[-1]
        drawn = torch.randperm(size)[: -(-count // whole.shape[-1])].tolist()
        found = torch.cat([wide(whole * one[..., i : i + 1]).sum(1) for i in drawn], 1) * metric[0] ** 0.5
    else:
        pairs = zip(taken, metric, strict=True)
        found = torch.cat([wide(gamma * inverse**0.5).flatten(1) for gamma, inverse in pairs], 1)
        size = found.shape[1]
        drawn = torch.randperm(size)[:count].tolist()
        found = found[:, drawn]
    return found.mul_((size / len(drawn)) ** 0.5)


def _preconditioner(gram: Tensor, rows: Tensor) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
    """``v -> (I + F Fᵀ)⁻¹ v`` from columns of ``Γ``, and of both factors whether Cholesky failed."""
    (upper,), failed = factor((_resolved(gram[rows]),))
    features = torch.linalg.solve_triangular(upper, gram, upper=True, left=False)
    inner = features.mT @ features
    inner.diagonal().add_(1.0)
    factors, also = factor((inner,))
    return lambda v: v - features @ solve(factors, features.mT @ v), (*failed, *also)


def _resolved(own: Tensor) -> Tensor:
    """``W``, with ``τ = (eps · trace)^⅔`` added to its diagonal where it is singular to that: beside ``I`` it is wrong
    by ``τ`` then, and ``F`` by ``eps · trace / √τ`` at most.
    """
    least = (torch.finfo(own.dtype).eps * own.trace()) ** (2 / 3)
    upper, failed = torch.linalg.cholesky_ex(own, upper=True)
    weak = (failed != 0) | (upper.diagonal().square().amin() < least)
    return own + torch.diag(torch.where(weak, least, 0.0).expand(len(own)))
