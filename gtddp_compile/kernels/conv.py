"""Per-sample parameter gradients of convolutions in one to three dimensions (docs/theory.md#gram-matrices).

A convolution is a linear layer at its output positions, its inputs patches (``kernels/patches.py``): the weighted
gradient is torch's own, the others come from per-sample gradients of a piece of the batch or of the input channels, or
(``kernels/conv_pairs.py``) from pairs of positions.

A sample may have several images (frames, windows): ``x`` is ``(B, k, channels, …)`` and ``g`` likewise, and ``γ_i``
sums over them as over positions. Transposed convolutions go through the generic rule.
"""

import math

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, is_spherical, pieces
from gtddp_compile.kernels.conv_pairs import _conv_add_gram, _conv_pairs, _conv_pixel_pairs, conv_gram_form
from gtddp_compile.kernels.patches import (
    CHUNK,
    CONVOLUTIONS,
    _conv_beside,
    _conv_bias,
    _conv_blocks,
    _conv_gradients,
    _conv_groups,
    _conv_images,
    _conv_margins,
    _conv_padded,
    _conv_patches,
    _conv_samples,
    _conv_weight,
    _conv_weight_gradient,
    _conv_windows,
)


def _conv_metric(metric: Tensor, channels: slice, groups: int) -> Tensor:
    """A diagonal metric's part for a block: ``(G, m, channels · kernel)``."""
    shape = metric.shape
    return metric.reshape(groups, shape[0] // groups, *shape[1:])[:, :, channels].flatten(2)


def _conv_few_rows(g: Tensor, weight: Tensor) -> bool:
    """Whether a weight is so much larger than what its gradient is made of that torch's own is slow on a CPU.

    Measured: one product is up to three times faster where all rows are at most half of either
    side of the weight.
    """
    if torch.compiler.is_compiling() or g.device.type != "cpu":  # a graph must not depend on the batch's size
        return False
    return 2 * (g.numel() // g.shape[1]) <= min(weight.shape[0], weight[0].numel())


def conv_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``: the weight's and the bias's shape."""
    (x, g), how, (weight, kernel) = _conv_images(layer), layer.how, _conv_weight(layer)
    bias = (g.flatten(2).sum((0, 2)),) if layer.wants[1] else ()
    if not layer.wants[0]:
        return bias
    margins = _conv_margins(kernel, how)
    if how.groups == 1 and _conv_few_rows(g, weight):  # one product (m, B T) (B T, n) of gradients and patches
        axes, windows = len(kernel), _conv_windows(_conv_padded(x, margins), kernel, how)
        rows = windows.permute(0, *range(2 + axes, 2 + 2 * axes), *range(1, 2 + axes)).reshape(-1, weight[0].numel())
        return ((g.flatten(2).mT.reshape(-1, len(weight)).mT @ rows).view_as(weight), *bias)
    symmetric = all(before == after for before, after in margins)  # what torch's own takes
    widths = tuple(before if symmetric else 0 for before, _ in margins)
    x = x if symmetric else _conv_padded(x, margins)
    return (_conv_weight_gradient(x, g, weight, how, widths, how.groups), *bias)


def conv_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``; each metric spherical or of the parameter's shape."""
    samples = layer.g.shape[0]
    x, g = _conv_images(layer)
    gram = _conv_weight_gram(layer, x, g, metric[0]) if layer.wants[0] else g.new_zeros(samples, samples)
    if not layer.wants[1]:
        return gram
    bias = _conv_bias(g, samples) * metric[-1] ** 0.5
    return gram + bias @ bias.mT


def _conv_weight_gram(layer: Layer, x: Tensor, g: Tensor, metric: Tensor | float) -> Tensor:
    """The weight's part of the Gram matrix, from ``x`` and ``g`` image by image."""
    samples, how, (weight, kernel), spherical = len(layer.g), layer.how, _conv_weight(layer), is_spherical(metric)
    margins, rows, images = _conv_margins(kernel, how), _conv_groups(g, how.groups), len(g) // samples
    sizes = (weight.shape[1], math.prod(kernel))  # with several images a patch is no sum over pixels of one
    form = conv_gram_form(
        samples, images * rows[0, 0, 0].numel(), images * x[0, 0].numel(),
        *(sizes if images == 1 else (math.prod(sizes), 1)), rows.shape[2],
    )  # fmt: skip
    if spherical and form == "pixels":
        return _conv_pixel_pairs(_conv_groups(x, how.groups), rows, kernel, how) * metric
    if spherical and form == "patches":
        patches = _conv_patches(_conv_padded(x, margins), kernel, how)
        return _conv_pairs(_conv_beside(patches, samples), _conv_beside(rows.flatten(3), samples)) * metric
    gram, split = g.new_zeros(samples, samples), _conv_groups(_conv_padded(x, margins), how.groups)
    for channels, gradients in _conv_blocks(split, rows, kernel, how):
        block = _conv_samples(gradients, samples)
        if isinstance(metric, Tensor) and not spherical:
            block = block * _conv_metric(metric, channels, how.groups) ** 0.5
        _conv_add_gram(gram, block.flatten(1))
    return gram * metric if spherical else gram


def conv_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    (x, g), samples, how = _conv_images(layer), layer.g.shape[0], layer.how
    diagonal = g.new_zeros(samples)
    if layer.wants[0]:
        inverse, (_, kernel) = metric[0], _conv_weight(layer)
        x = _conv_groups(_conv_padded(x, _conv_margins(kernel, how)), how.groups)
        for channels, gradients in _conv_blocks(x, _conv_groups(g, how.groups), kernel, how):
            scale = inverse if is_spherical(inverse) else _conv_metric(inverse, channels, how.groups)  # type: ignore[arg-type]
            diagonal = diagonal + (_conv_samples(gradients, samples).square() * scale).flatten(1).sum(1)
    return diagonal + (_conv_bias(g, samples).square() * metric[-1]).sum(1) if layer.wants[1] else diagonal


def conv_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩ = Σ_t g_it · (V * x_i + v_b)_t``, ``(B,)``."""
    (x, g), samples = _conv_images(layer), layer.g.shape[0]
    if not layer.wants[0]:
        return _conv_bias(g, samples) @ direction[0]
    change = CONVOLUTIONS[x.dim()](x, direction[0], direction[1] if layer.wants[1] else None, *layer.how)
    return _conv_samples((g * change).flatten(1).sum(1), samples)


def conv_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    (x, g), samples, how = _conv_images(layer), layer.g.shape[0], layer.how
    bias = (_conv_bias(g, samples),) if layer.wants[1] else ()
    if not layer.wants[0]:
        return bias
    weight, kernel = _conv_weight(layer)
    margins, parts = _conv_margins(kernel, how), []
    for rows in pieces(len(x), max(1, CHUNK // (x[0].numel() + g[0].numel()))):  # padded, and copied by torch
        images = _conv_groups(_conv_padded(x[rows], margins), how.groups)
        parts.append(_conv_gradients(images, _conv_groups(g[rows], how.groups), kernel, how))
    gradients = parts[0] if len(parts) == 1 else torch.cat(parts)
    return (_conv_samples(gradients, samples).reshape(samples, *weight.shape), *bias)


def conv_rows(layer: Layer) -> tuple[Tensor, Tensor]:
    """Homogeneous patches ``(B, G, T, n)`` and output gradients ``(B, G, T, m)`` (kernels of ``kronecker``)."""
    (x, g), samples, how, (_, kernel) = _conv_images(layer), layer.g.shape[0], layer.how, _conv_weight(layer)
    images = _conv_groups(_conv_padded(x, _conv_margins(kernel, how)), how.groups)
    windows = _conv_windows(images, kernel, how).movedim(0, 2 + len(kernel))
    size = windows.shape[1 : 2 + len(kernel)]
    # One buffer (G, n, B, T), written once: a product over all rows reads it as it lies, the ones are its last plane.
    rows = x.new_empty(how.groups, math.prod(size) + layer.wants[1], *windows.shape[2 + len(kernel) :])
    rows[:, : math.prod(size)].unflatten(1, size).copy_(windows)
    if layer.wants[1]:
        rows[:, -1] = 1.0
    rows = rows.reshape(*rows.shape[:2], samples, -1).permute(2, 0, 3, 1)
    return rows, _conv_beside(_conv_groups(g, how.groups).flatten(3), samples).mT
