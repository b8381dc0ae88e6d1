"""A layer's per-sample gradients in coordinates where its Kronecker metric is diagonal, made once a step.

With rows ``x`` ``(B, G, T, n)`` and ``g`` ``(B, G, T, m)`` (``kernels/kronecker.py``) and maps ``X``, ``Y`` of one
player, ``γ̂_i = Yᵀ γ_i X = Σ_t (g_it Y)(x_it X)ᵀ`` is what everything else of the step is made of: ``Γ_ij = η ⟨γ̂_i, s ∘
γ̂_j⟩``, EK-FAC's moments ``E[(α γ̂)²]`` and the update ``M⁻¹ C w / η = Y (s ∘ Σ_i w_i γ̂_i) Xᵀ``. Coordinates are the
pair ``(x X, g Y)`` (form ``"rows"``), or ``(γ̂,)`` (form ``"samples"``), where a sample has more positions than pay.
With one position a sample nothing has to be mapped back: form ``"dual"`` is ``(x, g, x A⁻¹, g B⁻¹)``, ``Γ = η (x A⁻¹
xᵀ) ∘ (g B⁻¹ gᵀ)`` and ``M⁻¹ C w / η = (w ∘ g B⁻¹)ᵀ (x A⁻¹)``; groups lead, ``(G, B, n)``.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.approximate import _separate
from gtddp_compile.kernels.bundle import Layer, wide
from gtddp_compile.kernels.linear import linear_gram, linear_inputs

Coordinates = tuple[Tensor, ...]
Metric = tuple[tuple[tuple[Tensor, Tensor | None], ...], Tensor | float, Tensor | None, tuple[float, ...]]


def coordinates_form(samples: int, positions: int, inputs: int, outputs: int) -> str:
    """The cheaper coordinates of one group, by multiplications of the map, the Gram matrix and the update."""
    rows, weight = samples * positions, inputs * outputs
    back = weight * (inputs + outputs)
    pairs = rows**2 * (inputs + outputs)
    by_rows = rows * (inputs**2 + outputs**2 + weight) + min(pairs, (rows + samples**2) * weight)
    by_samples = rows * weight + samples * back + samples**2 * weight + samples * weight
    return "rows" if positions == 1 or by_rows <= by_samples else "samples"


def few_rows(rows: int, inputs: int, outputs: int) -> bool:
    """Whether mapping that many rows is less than mapping a matrix of the weight's size."""
    return rows * (inputs**2 + outputs**2) < inputs * outputs * (inputs + outputs)


def groups_gram(kernel: Callable[[Layer, Any], Tensor], x: Tensor, g: Tensor, scale: Tensor | float) -> Tensor:
    """What a linear layer's ``kernel`` makes of rows under a scale ``(G, m, n)``, summed over groups."""
    found = [
        kernel(Layer((x[:, k],), g[:, k], (), (True, False)), (scale[k] if isinstance(scale, Tensor) else scale,))
        for k in range(x.shape[1])
    ]
    return found[0] if len(found) == 1 else torch.stack(found).sum(0)


def kronecker_coordinates(x: Tensor, g: Tensor, maps: tuple[Tensor, Tensor | None], form: str) -> Coordinates:
    """The coordinates of a layer's rows."""
    map_x, map_g = maps
    x, g = x.to(map_x.dtype), g.to(map_x.dtype)
    if form == "rows":
        return _coordinates_map(x, map_x), g if map_g is None else _coordinates_map(g, map_g)
    return (_mapped(g.mT @ x, maps),)


def sample_coordinates(gradients: tuple[Tensor, ...], maps: tuple[Tensor, Tensor | None]) -> Coordinates:
    """The coordinates of form ``"samples"`` from ``γ`` itself, of the weight and, where it is trained, of the bias."""
    parts = [part.reshape(part.shape[0], maps[0].shape[0], -1, part[0, 0].numel()) for part in gradients]
    gamma = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
    return (_mapped(gamma.to(maps[0].dtype), maps),)


def _mapped(gamma: Tensor, maps: tuple[Tensor, Tensor | None]) -> Tensor:
    """``Yᵀ γ X`` of every sample (``None``: ``Y = I``)."""
    map_x, map_g = maps
    gamma = _coordinates_map(gamma, map_x)
    return gamma if map_g is None else map_g.mT @ gamma


def dual_coordinates(x: Tensor, g: Tensor, inverses: tuple[Tensor, Tensor | None]) -> Coordinates:
    """A layer's rows, and the same times the inverse factors (``None``: the identity)."""
    inverse_x, inverse_g = inverses
    x, g = (rows[:, :, 0].transpose(0, 1).to(inverse_x.dtype) for rows in (x, g))
    return x, g, x @ inverse_x, g if inverse_g is None else g @ inverse_g


def dual_gram(coordinates: Coordinates, rate: float, rows: Sequence[slice]) -> tuple[Tensor, ...]:
    """``Γ = η (x A⁻¹ xᵀ) ∘ (g B⁻¹ gᵀ)``, a block a group of samples; symmetric to rounding."""
    plain = coordinates[1] is coordinates[3]
    if len(rows) == 1:
        return (_dual_gram(coordinates, plain).mul_(rate),)
    return tuple(_dual_gram(tuple(part[:, row] for part in coordinates), plain).mul_(rate) for row in rows)


def _dual_gram(coordinates: Coordinates, plain: bool) -> Tensor:
    """``plain``: ``B`` is the identity."""
    x, g, mapped_x, _ = coordinates
    if plain and (len(g) == 1 or g.stride(0) == 0):  # blocks of inputs have the same output gradients
        by_g = linear_inputs(g[0])
        return (mapped_x[0] @ x[0].mT if len(x) == 1 else (mapped_x @ x.mT).sum(0)).mul_(by_g)
    return _dual_grams(coordinates).sum(0)


def _dual_grams(coordinates: Coordinates) -> Tensor:
    """``(x A⁻¹ xᵀ) ∘ (g B⁻¹ gᵀ)`` of every group, ``(G, B, B)``."""
    x, g, mapped_x, mapped_g = coordinates
    return (mapped_x @ x.mT).mul_(mapped_g @ g.mT)


def alike_rows(inputs: Sequence[Tensor], gradients: Sequence[Tensor], bias: bool) -> tuple[Tensor, Tensor]:
    """Rows ``(B, L, 1, n)`` and ``(B, L, 1, m)`` of L linear layers of one shape and one position a sample, as those of
    one layer with L groups.
    """
    x, g = (torch.stack([wide(rows.reshape(len(rows), -1)) for rows in side]) for side in (inputs, gradients))
    x = F.pad(x, (0, 1), value=1.0) if bias else x
    return x.transpose(0, 1).unsqueeze(2), g.transpose(0, 1).unsqueeze(2)


def alike_grams(coordinates: Coordinates, rate: Tensor | float, rows: Sequence[slice]) -> tuple[Tensor, ...]:
    """:func:`dual_gram` of every layer, ``(L, b, b)`` a group of samples; ``rate``: a number, or ``(L, 1, 1)``."""
    return tuple(_dual_grams(tuple(part[:, row] for part in coordinates)).mul_(rate) for row in rows)


def alike_sum(*grams: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """``Γ`` of all layers, a block a group of samples."""
    return tuple(
        functools.reduce(torch.add, (wide(block.sum(0)) for block in blocks)) for blocks in zip(*grams, strict=True)
    )


def alike_along(coordinates: Coordinates, last: Sequence[Tensor] | None, mu: float) -> Tensor:
    """``-μ ⟨γ_i, v⟩`` of every layer, ``(L, B)``; ``None``: nothing is left of the last step."""
    x, g, _, _ = coordinates
    if last is None or mu == 0:
        return g.new_zeros(g.shape[:2])
    weight, *bias = last
    found = (g @ weight).mul_(x[..., : weight.shape[2]]).sum(2)
    for own in bias:
        found += (g @ own.unsqueeze(2)).squeeze(2)
    return found.mul_(-mu)


def alike_carried(
    coordinates: Coordinates, weights: Tensor, last: Sequence[Tensor], mu: float, rate: float
) -> tuple[tuple[Tensor, ...], ...]:
    """:func:`dual_carried` of every layer: ``L`` weights and, where they are trained, biases.

    ``last``, a copy side by side of what layers have, is written over: one matrix of all weights less.
    """
    _, _, x, g = coordinates
    (weight, *bias), g = last, (g * weights.to(g.dtype).unsqueeze(1)).mT
    width = weight.shape[2]
    weight.baddbmm_(g, x[..., :width], beta=mu, alpha=-rate)
    for own in bias:
        own.unsqueeze(2).baddbmm_(g, x[..., width:], beta=mu, alpha=-rate)
    return tuple(part.unbind() for part in last)


def dual_step(coordinates: Coordinates, weights: Tensor) -> Tensor:
    """``M⁻¹ C w / η`` as ``(G, m, n)`` (Eq. 45)."""
    _, _, x, g = coordinates
    return (g * weights.to(g.dtype).unsqueeze(1)).mT @ x


def dual_carried(
    coordinates: Coordinates, weights: Tensor, last: Sequence[Tensor], mu: float, rate: float
) -> list[Tensor]:
    """``μ v - M⁻¹ C w`` of a linear layer's weight (and bias), by the product that makes the step.

    Args:
        coordinates: ``"dual"``, the input 1 of the bias the last.
        weights: ``w``, ``(B,)``.
        last: ``v`` of the weight ``(m, n)`` and, where it is trained, of the bias ``(m,)``.
        mu: ``μ``; 0: ``v`` is not read.
        rate: ``η``.
    """
    _, _, x, g = coordinates
    g = (g * (weights.to(g.dtype) * -rate).unsqueeze(1)).mT
    (weight, *bias), width, found = last, x.shape[2], torch.empty_like(last[0])
    for k, first in enumerate(range(0, weight.shape[1], width)):
        at = slice(first, min(first + width, weight.shape[1]))
        torch.addmm(weight[:, at], g[k], x[k, :, : at.stop - first], beta=mu, out=found[:, at])
    k, place = divmod(weight.shape[1], width)
    return [found, *(torch.addmv(own, g[k], x[k, :, place], beta=mu) for own in bias)]


def _coordinates_map(rows: Tensor, matrix: Tensor) -> Tensor:
    """``(B, G, T, n)`` times ``(G, n, N)``: one product a group, not one a sample."""
    samples, groups, positions, width = rows.shape
    flat = rows.transpose(0, 1).reshape(groups, samples * positions, width)
    return (flat @ matrix).reshape(groups, samples, positions, -1).transpose(0, 1)


def _coordinates_flat(rows: Tensor) -> Tensor:
    """``(B, G, T, n)`` as ``(G, B T, n)``."""
    return rows.transpose(0, 1).reshape(rows.shape[1], -1, rows.shape[3])


def _coordinates_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """``Σ_i w_i rows_i``."""
    return (weights @ rows.flatten(1)).reshape(rows.shape[1:])


def coordinates_gram(
    coordinates: Coordinates, metric: Metric, rows: Sequence[slice], *, separable: bool = False
) -> tuple[Tensor, ...]:
    """``Γ = γ M⁻¹ γᵀ``, a block a group of samples; ``separable``: with the scale separated."""
    _, scale, _, (rate,) = metric
    if separable and isinstance(scale, Tensor):
        by_g, by_x = _separated_scale(scale)
        if len(coordinates) == 2:
            coordinates = (coordinates[0] * by_x, coordinates[1] * by_g)
        else:
            coordinates = (coordinates[0] * by_g.mT * by_x,)
        scale = 1.0
    return tuple(_coordinates_gram(tuple(part[row] for part in coordinates), scale) * rate for row in rows)


def _separated_scale(scale: Tensor) -> tuple[Tensor, Tensor]:
    """``(√r, √c)`` of a scale ``(G, m, n)`` (``kernels/approximate.py``), ``(G, 1, m)`` and ``(G, 1, n)``."""
    by_g, by_x = zip(*map(_separate, scale), strict=True)
    return torch.stack(by_g).unsqueeze(1), torch.stack(by_x).unsqueeze(1)


def _coordinates_gram(coordinates: Coordinates, scale: Tensor | float) -> Tensor:
    if len(coordinates) == 1:
        (gamma,) = coordinates
        if not isinstance(scale, Tensor):
            return linear_inputs(gamma.flatten(1)) * scale
        whole: Tensor = (gamma * scale).flatten(1) @ gamma.flatten(1).mT
        return whole
    x, g = coordinates
    return groups_gram(linear_gram, x, g, scale)


def coordinates_moment(coordinates: Coordinates, weights: Tensor, start: float) -> Tensor:
    """``E[(α γ̂)²]`` ``(G, M, N)``: with the eigenbases as maps, what EK-FAC puts in place of ``λ_B λ_Aᵀ``."""
    squares = weights.to(coordinates[0].dtype).square() / start
    if len(coordinates) == 1:
        return _coordinates_sum(squares, coordinates[0].square())
    x, g = coordinates
    if x.shape[2] > 1:
        return _coordinates_sum(squares, (g.mT @ x).square_())
    g = g.square() * squares.reshape(-1, 1, 1, 1)
    return _coordinates_flat(g).mT @ _coordinates_flat(x.square())


def coordinates_step(coordinates: Coordinates, weights: Tensor, metric: Metric) -> Tensor:
    """``M⁻¹ C w / η`` as ``(G, m, n)`` (Eq. 45).

    Without a scale there need not be a matrix of the weight's size between the maps: rows are mapped back instead where
    they are few.
    """
    ((map_x, map_g),), scale, _, _ = metric
    weights = weights.to(coordinates[0].dtype)
    if len(coordinates) == 1:
        return _coordinates_back(_coordinates_sum(weights, coordinates[0]) * scale, map_x, map_g)
    x, g = _coordinates_flat(coordinates[0]), _coordinates_flat(coordinates[1] * weights.reshape(-1, 1, 1, 1))
    if not isinstance(scale, Tensor) and few_rows(x.shape[1], x.shape[2], g.shape[2]):
        found: Tensor = (g if map_g is None else g @ map_g.mT).mT @ (x @ map_x.mT)
        return found if scale == 1.0 else found * scale
    return _coordinates_back(g.mT @ x * scale, map_x, map_g)


def _coordinates_back(matrix: Tensor, map_x: Tensor, map_g: Tensor | None) -> Tensor:
    """``Y matrix Xᵀ``."""
    return (matrix if map_g is None else map_g @ matrix) @ map_x.mT
