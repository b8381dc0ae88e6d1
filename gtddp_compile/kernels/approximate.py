"""Cheaper Gram matrices, by name (docs/theory.md#gram-matrices): a separable metric, and a random sketch of the inputs.

A diagonal metric ``M⁻¹`` (outputs × inputs) does not separate. ``separable`` puts ``M_ab ≈ r_a c_b`` with ``r`` the
row means of ``M`` and ``c`` its column means over their mean, exact where ``M`` has rank one: then ``Γ`` is the
spherical one of ``x ∘ √(1/c)`` and ``g ∘ √(1/r)``. Means of ``M⁻¹`` itself will not do: they are those of its largest
entries, which belong to parameters that have no gradient. Elements of a convolution's kernel share their channel's
``c``.

``sketch`` multiplies every sample's gradient by the same random signs ``Ω`` (inputs × k, ``E[Ω Ωᵀ] = k I``) before the
product: ``γ_i Ω / √k = Σ_t g_it (Ωᵀ x_it)ᵀ / √k`` needs the projected inputs alone, never ``γ_i``. ``Γ`` stays positive
semidefinite, is unbiased over the signs, and its entries' relative error falls as ``√(2 / k)`` at worst. Signs are the
same at every step. Biases, being small, are exact.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Layer, is_spherical
from gtddp_compile.kernels.conv import conv_gram
from gtddp_compile.kernels.linear import _linear_rows, linear_gram
from gtddp_compile.kernels.patches import (
    CONVOLUTIONS,
    _conv_bias,
    _conv_images,
    _conv_products,
    _conv_samples,
    _conv_weight,
)

SMALLEST = 1e-30
"""A metric below this (a learning rate of 0) is no metric: entries are held there so that means stay finite."""


def separated(denominator: Tensor, rate: Tensor | float, groups: int = 1) -> tuple[Tensor, Tensor]:
    """``(√r, √c)`` of a weight's ``M⁻¹ = rate / denominator ≈ r cᵀ``: by output ``(m,)``, by input
    ``(groups · n,)``.
    """
    table = denominator.reshape(groups, denominator.shape[0] // groups, denominator.shape[1], -1)
    table = table.mean(3) if table.shape[3] > 1 else table.squeeze(3)
    rows = table.mean(2)
    columns = table.mean(1) / rows.mean(1, keepdim=True)
    return (rows / rate).rsqrt_().flatten(), columns.rsqrt_().flatten()


def _separate(metric: Tensor, groups: int = 1) -> tuple[Tensor, Tensor]:
    """``(√r, √c)`` of a weight's diagonal metric."""
    table = metric if metric.dtype == torch.float64 else metric.float()
    by_output, by_input = separated(table.clamp_min(SMALLEST).reciprocal_(), 1.0, groups)
    return by_output.to(metric.dtype), by_input.to(metric.dtype)


def _along(values: Tensor, factor: Tensor, axis: int) -> Tensor:
    """``values`` times a factor for each entry of one axis."""
    return values * factor.reshape(factor.shape[0], *(1,) * (values.dim() - 1 - axis % values.dim()))


def _signs(rows: int, columns: int, like: Tensor, seed: int) -> Tensor:
    """Random signs over ``√columns``, the same for the same seed; the global generators are left alone."""
    drawn = torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))
    signs = (drawn * 2 - 1).to(like.device, like.dtype)
    return signs / math.sqrt(columns)


def _separately(
    exact: Callable[[Layer, Any], Tensor], layer: Layer, metric: tuple[Any, ...],
    of_weight: Callable[[Layer, Tensor | float], Tensor],
) -> Tensor:  # fmt: skip
    """``γ M⁻¹ γᵀ``: the bias's part exactly, the weight's by ``of_weight``.

    This gets the layer with the separated metric in its inputs and output gradients, and what is left of the metric: 1,
    or a spherical one as a whole, which scales no activations.
    """
    if not layer.wants[0]:
        return exact(layer, metric)
    inverse, g, how, weight = metric[0], layer.g, layer.how, layer.params[0]
    # The axis of channels; a convolution's is behind a sample's images, where it has several.
    channels = -1 if how is None or weight is None else g.dim() - weight.dim() + 1
    x, scaled, rest = layer.operands[0], g, inverse
    if isinstance(inverse, tuple) or not is_spherical(inverse):  # separated already, or a table
        pair = inverse if isinstance(inverse, tuple) else _separate(inverse, 1 if how is None else how.groups)
        x, scaled, rest = _along(x, pair[1], channels), _along(g, pair[0], channels), 1.0
    found = of_weight(Layer((x,), scaled, layer.params, (True, False), how), rest)
    if not layer.wants[1]:
        return found
    rows: Tensor = (g if g.dim() == 2 else g.movedim(channels, 1).flatten(2).sum(2)) * metric[-1] ** 0.5
    return found + rows @ rows.mT


def linear_separable_gram(layer: Layer, metric: tuple[Any, ...]) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated, ``(B, B)``."""
    return _separately(linear_gram, layer, metric, lambda own, rest: linear_gram(own, (rest,)))


def conv_separable_gram(layer: Layer, metric: tuple[Any, ...]) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated, ``(B, B)``."""
    return _separately(conv_gram, layer, metric, lambda own, rest: conv_gram(own, (rest,)))


def linear_sketch_gram(layer: Layer, metric: tuple[Any, ...], *, columns: int, seed: int) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated and its inputs projected to ``columns``, ``(B, B)``."""

    def of_weight(own: Layer, rest: Tensor | float) -> Tensor:
        x = own.operands[0]
        return linear_gram(own._replace(operands=(x @ _signs(x.shape[-1], columns, x, seed),)), (rest,))

    return _separately(linear_gram, layer, metric, of_weight)


def conv_sketch_gram(layer: Layer, metric: tuple[Any, ...], *, columns: int, seed: int) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated and patches projected to ``columns``, ``(B, B)``."""

    def of_weight(own: Layer, rest: Tensor | float) -> Tensor:
        (x, g), (weight, _), groups = _conv_images(own), _conv_weight(own), own.how.groups
        filters = _signs(groups * columns, weight[0].numel(), x, seed) * (weight[0].numel() / columns) ** 0.5
        seen = CONVOLUTIONS[x.dim()](x, filters.reshape(-1, *weight.shape[1:]), None, *own.how)
        gamma = _conv_products(g, seen, len(own.g), groups)
        return gamma @ gamma.mT * rest

    return _separately(conv_gram, layer, metric, of_weight)


def conv_sketched(
    layer: Layer, filters: Tensor, metric: tuple[Any, ...], direction: tuple[Any, ...] | None
) -> tuple[Tensor, Tensor]:
    """A sketch ``(B, …)`` of a convolution's ``γ``, whose products are ``Γ``, and ``⟨γ_i, v⟩`` of a change.

    One convolution of the input makes both: its filters are the change of the weight and random ones
    (projections of patches: nothing is unfolded). ``direction`` ``None``, or of it: no change, the sketch alone.
    """
    (x, g), samples, how = _conv_images(layer), layer.g.shape[0], layer.how
    filters, convolve = filters.to(x.dtype), CONVOLUTIONS[x.dim()]
    change, *rest = (None,) if direction is None else direction
    weights = [filters] if change is None else [change.to(x.dtype), filters]
    if how.groups > 1:
        seen = [convolve(x, weight, None, *how) for weight in weights]
    else:
        whole = convolve(x, weights[0] if change is None else torch.cat(weights), None, *how)
        seen = list(whole.split([len(weight) for weight in weights], 1))
    sketch = _conv_products(g, seen[-1], samples, how.groups) * metric[0] ** 0.5
    bias = _conv_bias(g, samples) if layer.wants[1] else None
    if bias is not None:
        sketch = torch.cat([sketch, bias * metric[-1] ** 0.5], 1)
    if change is None:
        return sketch, sketch.new_zeros(samples)
    moved = _conv_samples((g * seen[0]).flatten(1).sum(1), samples)
    return sketch, moved if bias is None else moved + bias @ rest[0]


def linear_sketched(
    layer: Layer, filters: Tensor, metric: tuple[Any, ...], direction: tuple[Any, ...] | None
) -> tuple[Tensor, Tensor]:
    """As :func:`conv_sketched`, of a linear layer with positions; filters are ``(columns, n)``."""
    x, g = _linear_rows(layer.operands[0]), _linear_rows(layer.g)
    change, *rest = (None,) if direction is None else direction
    moved = g.new_zeros(len(g)) if change is None else (g @ change).mul_(x).flatten(1).sum(1)
    seen, bias = x @ (filters.to(x.dtype) * metric[0] ** 0.5).mT, layer.wants[1]
    sketch = (F.pad(seen, (0, int(bias)), value=1.0)).mT @ g  # (B, columns and the bias's, m)
    if bias and change is not None:
        moved = moved + sketch[:, -1] @ rest[0]
    if bias:
        sketch[:, -1] *= metric[-1] ** 0.5
    return sketch.flatten(1), moved
