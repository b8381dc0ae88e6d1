"""Per-sample gradients ``γ`` themselves, a tensor ``(B, *shape)`` a parameter: where they are small, kept, or several
uses add up before the product.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Layer, is_spherical, pieces, wide
from gtddp_compile.kernels.linear import linear_inputs
from gtddp_compile.kernels.turned import turned_rows

Gradients = tuple[Tensor, ...]


def _rows_flat(gamma: Tensor) -> Tensor:
    """``(B, m)``."""
    return gamma.reshape(gamma.shape[0], -1)


def rows_gram(gradients: Gradients, metric: tuple[Any, ...]) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    pairs = zip(gradients, metric, strict=True)
    return functools.reduce(torch.add, (_rows_gram(*turned_rows(gamma, inverse)) for gamma, inverse in pairs))


def _rows_gram(gamma: Tensor, inverse: Any) -> Tensor:
    """``γ M⁻¹ γᵀ`` of one parameter; a diagonal metric is applied a bounded piece at a time."""
    gamma = _rows_flat(gamma)
    if is_spherical(inverse):
        plain = linear_inputs(gamma)
        return plain if isinstance(inverse, float) and inverse == 1.0 else plain * inverse
    gram = gamma.new_zeros(gamma.shape[0], gamma.shape[0])
    step = max(1, 2**22 // gamma.shape[0])
    scale = inverse.flatten().to(gamma.dtype)
    for part in pieces(gamma.shape[1], step):
        gram.addmm_(gamma[:, part] * scale[part], gamma[:, part].mT)
    return gram


def joint_gram(gradients: Gradients, metric: tuple[Any, ...], rows: Sequence[slice]) -> tuple[Tensor, ...]:
    """``Γ = γ M⁻¹ γᵀ``, a block a group of samples."""
    return tuple(rows_gram(tuple(wide(gamma[row]) for gamma in gradients), metric) for row in rows)


def rows_weighted(gradients: Gradients, weights: Tensor) -> Gradients:
    """``γᵀ w``, of each parameter's shape."""
    return tuple((weights.to(gamma.dtype) @ gamma.flatten(1)).reshape(gamma.shape[1:]) for gamma in gradients)


def rows_directional(gradients: Gradients, direction: Gradients) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``."""
    pairs = zip(gradients, direction, strict=True)
    return functools.reduce(torch.add, (_rows_flat(gamma) @ change.flatten() for gamma, change in pairs))


def positions(gradients: tuple[Tensor, ...], samples: int, size: int) -> float:
    """Outputs of a sample by ``size``, the gradients' own, at least 1: how often it uses parameters of that size."""
    return max(1.0, sum(g.numel() for g in gradients) / max(1, samples * size))


def along(directional: Callable[..., Tensor], taken: Layer | Gradients, direction: tuple[Tensor | None, ...]) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``, by a kernel; ``None`` in ``v``: zero, nothing is left of the last step."""
    if direction[0] is None:
        g = taken.g if isinstance(taken, Layer) else taken[0]
        return g.new_zeros(len(g))
    return directional(taken, direction)


def rows_gram_diagonal(gradients: Gradients, metric: tuple[Any, ...]) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    pairs = zip(gradients, metric, strict=True)
    return functools.reduce(torch.add, (_rows_flat(gamma.square() * inverse).sum(1) for gamma, inverse in pairs))


def second_moment(gradients: Gradients, start: float) -> Gradients:
    """``Σ_i V_u² / α_T`` of every parameter: the diagonal of the batch's curvature."""
    return tuple(rows.square().sum(0) / start for rows in gradients)


def gather(order: tuple[str, ...], *parts: tuple[tuple[str, ...], Gradients]) -> Gradients:
    """Add up what several uses say about the same parameters, in the given order."""
    totals: dict[str, Tensor] = {}
    for names, tensors in parts:
        for name, tensor in zip(names, tensors, strict=True):
            totals[name] = totals[name] + tensor if name in totals else tensor
    return tuple(totals[name] for name in order)
