"""Per-sample parameter gradients of an embedding, and of parameters that are added by themselves.

An embedding is a linear layer of one-hot inputs: ``⟨x_is, x_jt⟩`` is 1 where two positions look up the same row, so
``Γ_ij = Σ_st [k_is = k_jt] g_is · M⁻¹_k g_jt`` for every metric, ``B² T² m`` multiplications. With fewer rows in the
table than pairs of positions ``γ`` is built instead. What is added has ``γ = g``, summed over the positions that share
an entry.
"""

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, is_spherical, pieces
from gtddp_compile.kernels.rows import rows_directional, rows_gram, rows_gram_diagonal

CHUNK = 2**22
"""Bound on the elements of an intermediate tensor."""


def _embedding_rows(layer: Layer) -> tuple[Tensor, Tensor]:
    """Which rows a sample looks up, ``(B, T)``, and their gradients, ``(B, T, m)``: none at the row of padding."""
    samples, width = layer.g.shape[0], layer.g.shape[-1]
    keys, g = layer.operands[0].reshape(samples, -1), layer.g.reshape(samples, -1, width)
    if layer.how is None:
        return keys, g
    (table, *_), padding = layer.params, layer.how.padding_idx
    assert table is not None
    return keys, g.masked_fill((keys == padding % len(table)).unsqueeze(2), 0.0)


def embedding_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``, ``(B, rows, m)``."""
    (keys, g), (table, *_) = _embedding_rows(layer), layer.params
    assert table is not None  # an embedding has one
    gamma = g.new_zeros(len(g), *table.shape)
    return (gamma.scatter_add_(1, keys.unsqueeze(2).expand_as(g), g),)


def embedding_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``, ``(rows, m)``."""
    (keys, g), (table, *_) = _embedding_rows(layer), layer.params
    assert table is not None
    return (g.new_zeros(table.shape).index_add_(0, keys.flatten(), g.flatten(0, 1)),)


def embedding_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``."""
    keys, g = _embedding_rows(layer)
    return (direction[0][keys] * g).flatten(1).sum(1)


def embedding_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    (keys, g), (table, *_), (inverse,) = _embedding_rows(layer), layer.params, metric
    samples, positions = keys.shape
    if table is not None and len(table) < positions**2:
        return rows_gram(embedding_per_sample(layer), metric)
    scaled = g * (inverse if is_spherical(inverse) else inverse[keys])  # type: ignore[index]
    blocks = []
    for part in pieces(samples, max(1, CHUNK // (samples * positions**2))):
        pairs = scaled[part].flatten(0, 1) @ g.flatten(0, 1).mT
        pairs = pairs * (keys[part].reshape(-1, 1) == keys.reshape(1, -1))
        blocks.append(pairs.reshape(-1, positions, samples, positions).sum((1, 3)))
    return torch.cat(blocks)


def embedding_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    return rows_gram_diagonal(embedding_per_sample(layer), metric)


def shift_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)``: ``g``, summed over the axes that the parameter lacks or has one entry of."""
    g, (own, *_) = layer.g, layer.params
    assert own is not None  # what is added
    missing = g.dim() - own.dim()
    shared = [axis for axis in range(1, g.dim()) if axis < missing or own.shape[axis - missing] == 1]
    return ((g.sum(shared) if shared else g).reshape(-1, *own.shape),)


def shift_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``, of the parameter's shape."""
    return tuple(rows.sum(0) for rows in shift_per_sample(layer))


def shift_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``."""
    return rows_directional(shift_per_sample(layer), direction)


def shift_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    return rows_gram(shift_per_sample(layer), metric)


def shift_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    return rows_gram_diagonal(shift_per_sample(layer), metric)
