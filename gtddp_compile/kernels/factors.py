"""Richer value Hessians: ``r`` columns a sample instead of the gradient alone (docs/theory.md#columns).

Two layouts. A value's columns travel as ``(1 + r, B, …)``: row 0 is the ordinary gradient ``g`` (the linear term, kept
apart), rows 1 … r the pulled-back factor. Vectors and matrices over columns are ordered sample by sample,
``(i, a) -> i r + a``, so that a group of samples is a block. Layer kernels see columns as further samples; where an
operation cannot be evaluated on repeated samples (``mixes``), they are called once a column.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Layer, column_samples, part_of, wide
from gtddp_compile.kernels.rows import joint_gram
from gtddp_compile.kernels.sweep import gram_blocks
from gtddp_compile.kernels.turned import turned_rows

CHUNK = 2**24
"""Bound on the elements of an intermediate tensor."""

Blocks = tuple[Tensor, ...]
Kernel = Callable[..., Any]


def combine(g: Tensor, start: float, weights: Tensor) -> Tensor:
    """The cotangent ``α_T g_i + Σ_a w_ia z_ia`` of every sample: ``A + G w`` of one value."""
    by_sample = weights.to(g.dtype).reshape(g.shape[1], -1)
    total: Tensor = start * g[0] + torch.einsum("ba,ab...->b...", by_sample, g[1:])
    return total


def combined(layer: Layer, start: float, weights: Tensor) -> Layer:
    """The layer with :func:`combine` of its columns as the gradient."""
    return layer._replace(g=combine(layer.g, start, weights))


def contract_factors(g: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """``c = Zᵀ δx``, shape (B r,)."""
    delta = (after - before).reshape(1, after.shape[0], -1)
    found = torch.linalg.vecdot(g[1:].reshape(g.shape[0] - 1, after.shape[0], -1), delta)
    return wide(found.T.reshape(-1))


def clip_factors(change: Tensor, bound: float | None, rank: int) -> Tensor:
    """``c`` with every sample's ``‖c_i‖`` within the bound.

    ``½ ‖c_i‖² = ½ δx_iᵀ V δx_i`` is the second-order change of the sample's loss; its ``δx`` is scaled as a whole. With
    the gradient as the only column this is the bound on ``|c_i|``.
    """
    if bound is None:
        return change
    by_sample = change.reshape(-1, rank)
    norms = by_sample.norm(dim=1, keepdim=True)
    outside = norms > bound
    scaled = torch.where(outside, by_sample * (bound / norms.clamp_min(bound)), by_sample)
    return scaled.reshape(-1)


# --- layer kernels over columns ---------------------------------------------------------------------------------------


def _mixes(layer: Layer) -> bool:
    """Whether the layer cannot be evaluated on repeated samples."""
    return getattr(layer.how, "mixes", False)


def factor_rows(per_sample: Kernel, layer: Layer) -> tuple[Tensor, ...]:
    """``Ψ``, ``(B k, *shape)`` for each wanted parameter: what the k columns of ``g`` pull back to."""
    if _mixes(layer):
        found = [per_sample(layer._replace(g=column)) for column in layer.g]
        return tuple(torch.stack(rows, 1).flatten(0, 1) for rows in zip(*found, strict=True))
    rows: tuple[Tensor, ...] = per_sample(column_samples(layer))
    return rows


def factor_gram(
    gram: Kernel, per_sample: Kernel, layer: Layer, metric: tuple[Any, ...], rows: Sequence[slice], **options: Any
) -> Blocks:
    """``[γ Ψ] M⁻¹ [γ Ψ]ᵀ`` of one layer over all 1 + r columns, a block a group: ``Γ`` and the cross terms with
    ``γ``.
    """
    if _mixes(layer):
        return joint_gram(factor_rows(per_sample, layer), metric, rows)
    return gram_blocks(gram, column_samples(layer), metric, rows, **options)


def factor_directional(directional: Kernel, layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨ψ_ia, v⟩``, shape (B r,); one call of the layer's kernel a column (``None`` in ``v``: zero)."""
    if direction[0] is None:
        return layer.g.new_zeros((len(layer.g) - 1) * layer.g.shape[1])
    found = [directional(layer._replace(g=column), direction) for column in layer.g[1:]]
    return torch.stack(found, 1).flatten()


def split_columns(blocks: Blocks, rank: int, start: float, scales: tuple[float, ...]) -> tuple[Blocks, Tensor]:
    """``Γ`` and ``τ Ψ M⁻¹ γᵀ α_T`` from the Gram matrix over all columns."""
    grams, crosses = [], []
    for block, scale in zip(blocks, scales, strict=True):
        tiles = block.reshape(-1, 1 + rank, block.shape[0] // (1 + rank), 1 + rank)
        samples = tiles.shape[0]
        grams.append(tiles[:, 1:, :, 1:].reshape(samples * rank, samples * rank))
        crosses.append(scale * start * tiles[:, 1:, :, 0].sum(2).flatten())
    return tuple(grams), torch.cat(crosses)


def sample_grams(per_sample: Kernel, layer: Layer, metric: tuple[Any, ...]) -> Tensor:
    """``Γ_ii``, ``(B, r, r)``: a block of the Gram matrix a sample."""
    rank, batch = layer.g.shape[0] - 1, layer.g.shape[1]
    size = sum(p.numel() for p, want in zip(layer.params, layer.wants, strict=True) if want and p is not None)
    step = batch if _mixes(layer) else max(1, CHUNK // max(1, rank * size))
    found = []
    for start in range(0, batch, step):
        rows = slice(start, start + step)
        own = layer if _mixes(layer) else part_of(layer, rows)
        psi = factor_rows(per_sample, own._replace(g=layer.g[1:, rows]))
        found.append(joint_sample_grams(psi, metric, rank))
    return torch.cat(found)


def joint_sample_grams(psi: tuple[Tensor, ...], metric: tuple[Any, ...], rank: int) -> Tensor:
    """``Γ_ii`` from ``Ψ`` itself, ``(B, r, r)``."""
    found = []
    for rows, inverse in itertools.starmap(turned_rows, zip(psi, metric, strict=True)):
        flat, scaled = (values.reshape(-1, rank, rows[0].numel()) for values in (rows, rows * inverse))
        found.append(scaled @ flat.mT)
    return wide(sum(found[1:], found[0]))


# --- one block a sample -----------------------------------------------------------------------------------------------


def samples_identity(value: float, ones: Tensor, rank: int) -> Tensor:
    """``value · I_r`` a sample, ``(B, r, r)``."""
    identity = torch.eye(rank, dtype=ones.dtype, device=ones.device)
    return value * identity.expand(ones.shape[0], rank, rank)


def samples_apply(own: Tensor, vector: Tensor) -> Tensor:
    """The block-diagonal matrix times a vector (B r,)."""
    return (own @ vector.reshape(own.shape[0], -1, 1)).flatten()


def samples_solve(own: Tensor, vector: Tensor) -> Tensor:
    """Its inverse times a vector (B r,)."""
    solved: Tensor = torch.linalg.solve(own, vector.reshape(own.shape[0], -1, 1))
    return solved.flatten()


def samples_inverse(own: Tensor) -> Blocks:
    """Its inverse as one block over all columns."""
    return (torch.block_diag(*torch.linalg.inv(own)),)


def samples_of_inverse(factors: Blocks, rank: int) -> Tensor:
    """The samples' own blocks of ``X⁻¹``, from the Cholesky factor of ``X``."""
    found = []
    for factor in factors:
        inverse = torch.cholesky_inverse(factor, upper=True)
        samples = inverse.shape[0] // rank
        index = torch.arange(samples, device=inverse.device)
        found.append(inverse.reshape(samples, rank, samples, rank)[index, :, index])
    return torch.cat(found)


def shrink_samples(root: Tensor, gram: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Z ← Z R`` with ``R Rᵀ = I - sign · q_uᵀ M⁻¹ q_u``, in the coordinates of the pulled-back factor.

    Args:
        root: ``(B, r, r)``: a sample's Hessian is ``Z root rootᵀ Zᵀ``, so that ``q_u = Ψ_iᵀ root``.
        gram: ``Γ_ii``, ``(B, r, r)``.
        sign: 1, or -1 as Eq. 21-23 print it.

    Returns:
        the new root, the new block ``root rootᵀ``, and how many eigenvalues of ``R Rᵀ`` were negative (taken as 0).
    """
    inner = root.mT @ gram @ root
    identity = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    values, vectors = torch.linalg.eigh(identity - sign * (inner + inner.mT) / 2)
    new = root @ (vectors * values.clamp_min(0).sqrt().unsqueeze(1))
    return new, new @ new.mT, (values < 0).sum()
