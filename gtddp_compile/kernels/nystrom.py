"""The joint step without ``Γ``: conjugate gradients, preconditioned by Nyström's approximation
(docs/theory.md#nystrom).

``(Λ_T + Γ) w = y`` needs products ``Γ v`` alone, each a weighted gradient and a directional derivative a layer. In
units of ``Λ_T^{1/2}`` it is ``(I + Γ) w = y``. Of ``Γ`` the columns of some samples are made, a few at a time: what
those so far leave over of ``Γ``'s diagonal is the probability of the next (randomly pivoted Cholesky: Chen, Epperly,
Tropp and Webber 2025), until little is left. They are ``Γ ≈ F Fᵀ``, and the preconditioner is
``(I + F Fᵀ)⁻¹ = I - F (I + FᵀF)⁻¹ Fᵀ`` (Frangella, Tropp and Udell 2021).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, pieces, scaled, wide
from gtddp_compile.kernels.linear import linear_gram_diagonal, linear_per_sample
from gtddp_compile.kernels.rows import Gradients, gather, rows_gram_diagonal
from gtddp_compile.kernels.sweep import Blocks, factor, solve

ROUND = 8
"""Products ``Γ v`` after which there may be four times as many columns."""

AT_ONCE = 16
"""The share of the columns that are made together."""

LEFT = 16.0
"""``tr (Γ - F Fᵀ)``, beside ``I``, at which further columns cost more than the products that they spare."""

FLOOR = 1e-30
"""What a sample that was not taken leaves over at least: it may still be drawn."""

SHARE = 1e-6
"""Of a block's trace, what is no longer resolved."""

PRODUCT = 2**16
"""Elements of a product of positions: two of them and their sum stay in the cache."""


def drawn_rows(phi: Tensor, columns: int) -> Tensor:
    """The samples whose columns are made first, few of so many: at random, by torch's generator."""
    return torch.randperm(phi.shape[0], device=phi.device)[: -(-columns // AT_ONCE)]


def columns_diagonal(vector: Tensor, rows: Tensor) -> Blocks:
    """Columns of ``diag(v)``, ``(B, k)``."""
    found = vector.new_zeros(vector.shape[0], rows.shape[0])
    return (found.index_put_((rows, torch.arange(rows.shape[0], device=rows.device)), vector[rows]),)


def joint_columns(gradients: Gradients, metric: Inverses, rows: Tensor) -> Blocks:
    """``γ M⁻¹ γ_Jᵀ``, ``(B, k)``, from per-sample gradients."""
    pairs = zip(gradients, metric, strict=True)
    parts = (wide(gamma.flatten(1)) @ wide(gamma[rows] * inverse).flatten(1).mT for gamma, inverse in pairs)
    return (functools.reduce(torch.add, parts),)


def linear_columns(layer: Layer, metric: Inverses, rows: Tensor) -> Blocks:
    """``γ M⁻¹ γ_Jᵀ``, ``(B, k)``, of a linear layer over positions, its metric spherical: by pairs of positions."""
    return (_pairs(wide(layer.operands[0]), wide(layer.g), rows) * metric[0],)


def _is_small(layer: Layer, columns: int) -> bool:
    """Whether per-sample gradients, ``B k n m`` multiplications, are cheaper than pairs, ``B k T² (n + m)``."""
    positions, inputs, outputs = (*layer.operands[0].shape[1:], layer.g.shape[-1])
    return positions**2 * (inputs + outputs) > inputs * outputs * (1 + positions / columns)


def _pairs(x: Tensor, g: Tensor, rows: Tensor) -> Tensor:
    """``Σ_st (x_is · x_jt)(g_is · g_jt)``, ``(B, k)``: of one position of some samples with all positions of ``J``."""
    samples, positions, _ = x.shape
    chosen_x, chosen_g = (values[rows].transpose(0, 1).flatten(0, 1).mT for values in (x, g))
    found = g.new_empty(samples, rows.shape[0])
    for part in pieces(samples, max(16, PRODUCT // chosen_x.shape[1])):
        own_x, own_g = x[part], g[part]
        total = own_x[:, 0] @ chosen_x
        total *= own_g[:, 0] @ chosen_g
        for s in range(1, positions):
            total.addcmul_(own_x[:, s] @ chosen_x, own_g[:, s] @ chosen_g)
        found[part] = total.unflatten(1, (positions, -1)).sum(1)
    return found


Use = tuple[tuple[str, ...], Callable[..., Gradients], Callable[..., Tensor], Layer]
"""Names of its parameters, kernels of ``γᵀ v`` and of ``⟨γ_i, v⟩``, and the layer."""
Columns = tuple[Callable[..., Blocks], Any, Inverses]
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
    columns: Blocks, information: Tensor, target: Tensor, rows: Tensor, players: Players, tolerance: float, most: int
) -> tuple[Tensor, tuple[Tensor, ...], int]:
    """``w``, ``(B,)``; of every factor whether Cholesky failed; how many products were made.

    Where ``ROUND`` of them do not do, there are more columns, in the end all of them.

    Args:
        columns: of ``Λ``, ``(B, k)``, the first ones.
        information: the diagonal of ``Λ_T``, ``(B,)``.
        target: ``y``, ``(B,)``.
        rows: whose columns those are.
        players: what ``Γ`` is made of.
        tolerance: of the residual beside the first one, in the norm of the preconditioner.
        most: how many columns are made before the first product at most.
    """
    root, count = information.sqrt(), 0
    parts = [_columns(player, most) for player in players]
    diagonal = functools.reduce(torch.add, (_diagonal(*taken) for _, *taken in parts)) / information
    state = _State(root.new_empty(0, len(root)), diagonal, diagonal, ())
    state = _taken(state, (columns[0] - columns_diagonal(information, rows)[0]) / root.unsqueeze(1) / root[rows], rows)
    found, left, first, enough = torch.zeros_like(target), target / root, target / root, LEFT
    while True:
        state = _grown(state, parts, root, most, enough)
        precondition, failures = _preconditioner(state.features)
        state = state._replace(failed=(*state.failed, *failures))
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
        if not size > least or len(state.features) == len(target):
            return found / root, state.failed, count
        most, enough = 4 * len(state.features), 0.0


class _State(NamedTuple):
    """``Fᵀ``, ``(k, B)``; of ``Γ`` and of ``Γ - F Fᵀ`` the diagonal, ``(B,)``; of factors whether Cholesky failed."""

    features: Tensor
    diagonal: Tensor
    left: Tensor
    failed: tuple[Tensor, ...]


def _columns(player: tuple[Any, ...], most: int) -> Columns:
    """How columns of a player are made, so many in all: of a small layer from per-sample gradients."""
    kernel, taken, metric = player[-1]
    if isinstance(taken, Layer) and _is_small(taken, most):
        return joint_columns, linear_per_sample(taken), metric[:1]
    return kernel, taken, metric


def _diagonal(taken: Layer | Gradients, metric: Inverses) -> Tensor:
    return wide((linear_gram_diagonal if isinstance(taken, Layer) else rows_gram_diagonal)(taken, metric))  # type: ignore[operator]


def _grown(state: _State, parts: Sequence[Columns], root: Tensor, most: int, enough: float) -> _State:
    """With more columns, until there are so many or what they leave of the trace is no more than ``enough``."""
    while (missing := min(most, len(root)) - len(state.features)) > 0 and state.left.sum() > enough:
        rows = (state.left / torch.empty_like(root).exponential_()).topk(min(missing, -(-most // AT_ONCE))).indices
        gram = functools.reduce(torch.add, (kernel(taken, metric, rows)[0] for kernel, taken, metric in parts))
        state = _taken(state, gram / root.unsqueeze(1) / root[rows], rows)
    return state


def _taken(state: _State, gram: Tensor, rows: Tensor) -> _State:
    """With some samples' columns of ``Γ``, ``(B, b)``: a block of Cholesky's factor."""
    features, diagonal, left, failed = state
    rest = gram.mT - features[:, rows].mT @ features
    (upper,), failures = factor((_resolved(rest[:, rows], diagonal[rows].sum()),))
    more = torch.linalg.solve_triangular(upper.mT, rest, upper=False)
    left = torch.where(left > 0, (left - more.square().sum(0)).clamp_min(FLOOR), 0.0).index_fill(0, rows, 0.0)
    return _State(torch.cat([features, more]), diagonal, left, (*failed, *failures))


def _preconditioner(features: Tensor) -> tuple[Callable[[Tensor], Tensor], tuple[Tensor, ...]]:
    """``v -> (I + F Fᵀ)⁻¹ v``, and of its factor whether Cholesky failed."""
    inner = features @ features.mT
    inner.diagonal().add_(1.0)
    factors, failed = factor((inner,))
    return lambda v: v - solve(factors, features @ v) @ features, failed


def _resolved(own: Tensor, scale: Tensor) -> Tensor:
    """A block of ``Γ - F Fᵀ``, with ``τ`` added to its diagonal where it is singular to that: ``F Fᵀ`` is less than
    ``Γ`` by ``τ`` then in few directions. ``τ`` is ``(eps · scale)^⅔``, ``scale`` the trace of ``Γ``'s own block, and
    ``SHARE`` of the block's trace at least: rows that are nearly the same would make rounding large everywhere else.
    """
    least = torch.maximum((torch.finfo(own.dtype).eps * scale) ** (2 / 3), SHARE * own.trace())
    upper, failed = torch.linalg.cholesky_ex(own, upper=True)
    weak = (failed != 0) | (upper.diagonal().square().amin() < least)
    return own + torch.diag(torch.where(weak, least, 0.0).expand(len(own)))
