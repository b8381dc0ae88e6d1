"""Cheaper Gram matrices, by name (docs/theory.md#gram-matrices): a separable metric, and a random sketch of the inputs.

A diagonal metric ``M⁻¹`` (outputs × inputs) does not separate. ``separable`` puts ``M_ab ≈ r_a c_b`` with ``r`` the
row means of ``M`` and ``c`` its column means over their mean, exact where ``M`` has rank one: then ``Γ`` is the
spherical one of ``x ∘ √(1/c)`` and ``g ∘ √(1/r)``. Means of ``M⁻¹`` itself will not do: they are those of its largest
entries, which belong to parameters that have no gradient. Elements of a convolution's kernel share their channel's
``c``.

``sketch`` multiplies every sample's gradient by the same random signs ``Ω`` (inputs × k, ``E[Ω Ωᵀ] = k I``) before the
product: ``γ_i Ω / √k = Σ_t g_it (Ωᵀ x_it)ᵀ / √k`` needs the projected inputs alone, never ``γ_i``. ``Γ`` stays positive
semidefinite, is unbiased over the signs, and its entries' relative error falls as ``√(2 / k)`` at worst. Signs are the
same at every step. ``centre`` is for convolutions, see there. ``low`` makes the gradients of a layer with positions in
bfloat16. Biases, being small, are exact.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.conv import conv_gram
from gtddp_compile.kernels.linear import linear_gram
from gtddp_compile.kernels.patches import _conv_images, _conv_margins, _conv_padded, _conv_samples

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


def _separate(metric: Any, groups: int = 1) -> tuple[Tensor | float, Tensor | float]:
    """``(√r, √c)`` of a weight's metric; floats if it is spherical; as it is if it is separated already."""
    if isinstance(metric, tuple):
        return metric
    if not isinstance(metric, Tensor) or metric.dim() == 0:
        return metric**0.5, 1.0
    table = metric if metric.dtype == torch.float64 else metric.float()
    by_output, by_input = separated(table.clamp_min(SMALLEST).reciprocal_(), 1.0, groups)
    return by_output.to(metric.dtype), by_input.to(metric.dtype)


def _apart(metric: Any, groups: int = 1) -> tuple[Tensor | float | None, Tensor | float | None, Tensor | float]:
    """``√r``, ``√c`` and what is left of the metric; a spherical one is left as a whole, and scales no activations."""
    if not isinstance(metric, tuple) and (not isinstance(metric, Tensor) or metric.dim() == 0):
        return None, None, metric
    return (*_separate(metric, groups), 1.0)


def _along(values: Tensor, factor: Tensor | float | None, axis: int) -> Tensor:
    """``values`` times a factor for each entry of one axis, or as they are."""
    if factor is None:
        return values
    if isinstance(factor, Tensor) and factor.dim():
        factor = factor.reshape(factor.shape[0], *(1,) * (values.dim() - 1 - axis % values.dim()))
    scaled: Tensor = values * factor
    return scaled


def _signs(rows: int, columns: int, like: Tensor, seed: int) -> Tensor:
    """Random signs over ``√columns``, the same for the same seed; the global generators are left alone."""
    drawn = torch.randint(0, 2, (rows, columns), generator=torch.Generator().manual_seed(seed))
    signs = (drawn * 2 - 1).to(like.device, like.dtype)
    return signs / math.sqrt(columns)


def _bias(g: Tensor, wants: tuple[bool, ...], metric: tuple[Tensor | float, ...], axis: int) -> Tensor | float:
    """The bias's part, ``g`` summed over positions; ``axis`` is the channels'."""
    if not wants[1]:
        return 0.0
    rows = g.movedim(axis, 1).flatten(2).sum(2) if g.dim() > 2 else g
    rows = rows * metric[-1] ** 0.5
    return rows @ rows.mT


def linear_separable_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated, ``(B, B)``."""
    bias = _bias(g, wants, metric, -1)
    if not wants[0]:
        return g.new_zeros(g.shape[0], g.shape[0]) + bias
    by_output, by_input, rest = _apart(metric[0])
    scaled = (_along(operands[0], by_input, -1),)
    return linear_gram(scaled, _along(g, by_output, -1), params, (True, False), (rest,)) + bias


def linear_sketch_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    *,
    columns: int,
    seed: int,
) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated and its inputs projected to ``columns``, ``(B, B)``."""
    bias = _bias(g, wants, metric, -1)
    if not wants[0]:
        return g.new_zeros(g.shape[0], g.shape[0]) + bias
    by_output, by_input, rest = _apart(metric[0])
    x = operands[0]
    projected = x @ _along(_signs(x.shape[-1], columns, x, seed), by_input, 0)
    return linear_gram((projected,), _along(g, by_output, -1), params, (True, False), (rest,)) + bias


def conv_separable_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated, ``(B, B)``."""
    channels = g.dim() - params[0].dim() + 1  # behind a sample's images, where it has several
    bias = _bias(g, wants, metric, channels)
    if not wants[0]:
        return g.new_zeros(g.shape[0], g.shape[0]) + bias
    by_output, by_input, rest = _apart(metric[0], groups)
    scaled, g = (_along(operands[0], by_input, channels),), _along(g, by_output, channels)
    own = conv_gram(
        scaled, g, params, (True, False), (rest,), stride=stride, padding=padding, dilation=dilation, groups=groups
    )
    return own + bias


def conv_sketch_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
    columns: int,
    seed: int,
) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated and patches projected to ``columns``, ``(B, B)``.

    The projection of the patches is a convolution with random filters: nothing is unfolded.
    """
    channels = g.dim() - params[0].dim() + 1  # behind a sample's images, where it has several
    bias = _bias(g, wants, metric, channels)
    if not wants[0]:
        return g.new_zeros(g.shape[0], g.shape[0]) + bias
    by_output, by_input, rest = _apart(metric[0], groups)
    samples, shape = g.shape[0], params[0].shape[1:]
    x, g = _conv_images(operands, g, params)
    filters = _signs(groups * columns, shape.numel(), x, seed) * (shape.numel() / columns) ** 0.5
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape) - 1]
    projected = function(
        _along(x, by_input, 1), filters.reshape(-1, *shape), None, stride, padding, dilation, groups
    )  # fmt: skip
    rows = _along(g, by_output, 1).reshape(len(g), groups, -1, projected[0, 0].numel())
    gamma = _conv_samples(rows @ projected.reshape(len(g), groups, columns, -1).mT, samples).flatten(1)
    return gamma @ gamma.mT * rest + bias


def conv_centre_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``γ M⁻¹ γᵀ`` with the weight's metric separated and the kernel's central element in place of all, ``(B, B)``.

    The gradients of a kernel's elements are those of the same pixels, moved: each element's Gram matrix is taken to be
    the central one's, times the share of output positions whose pixel is inside the image. Nothing is unfolded, and an
    element costs what a 1×1 convolution does.
    """
    channels = g.dim() - params[0].dim() + 1  # behind a sample's images, where it has several
    bias = _bias(g, wants, metric, channels)
    if not wants[0]:
        return g.new_zeros(g.shape[0], g.shape[0]) + bias
    by_output, by_input, rest = _apart(metric[0], groups)
    x, kernel, share = operands[0], params[0].shape[2:], 1.0
    margins = _conv_margins(tuple(kernel), padding, dilation)
    seen_by_centre: list[slice] = []  # of every axis, in x without its margins
    for axis, (size, gap, step, margin) in enumerate(zip(kernel, dilation, stride, margins, strict=True)):
        pixels, positions = x.shape[axis - len(kernel)], g.shape[axis - len(kernel)]
        shifts = [index * gap - margin[0] for index in range(size)]
        seen = [sum(0 <= at * step + shift < pixels for at in range(positions)) for shift in shifts]
        share *= sum(seen) / max(1, seen[size // 2])
        first = shifts[size // 2]
        seen_by_centre.append(slice(first, first + (positions - 1) * step + 1, step))
    pixels_of = x.shape[x.dim() - len(kernel) :]
    if any(part.start < 0 or part.stop > size for part, size in zip(seen_by_centre, pixels_of, strict=True)):
        x = _conv_padded(x, margins)
        moved = zip(seen_by_centre, margins, strict=True)
        seen_by_centre = [slice(part.start + low, part.stop + low, part.step) for part, (low, _) in moved]
    crop: tuple[Any, ...] = (..., *seen_by_centre)
    centre = _along(x[crop], by_input, channels)
    ones, zeros = tuple(1 for _ in kernel), tuple(0 for _ in kernel)
    shape = (params[0].flatten(2)[..., :1].reshape(*params[0].shape[:2], *ones),)
    own = conv_gram(
        (centre,), _along(g, by_output, channels), shape, (True, False),
        (share * rest,), stride=ones, padding=zeros, dilation=ones, groups=groups,
    )  # fmt: skip
    return own + bias
