"""Per-sample parameter gradients of convolutions in one to three dimensions (docs/theory.md#gram-matrices).

A convolution is a linear layer at its output positions, its inputs patches (``kernels/patches.py``): the weighted
gradient is torch's own, the others come from per-sample gradients of a piece of the batch or of the input channels, or
(``kernels/conv_pairs.py``) from pairs of positions.

A sample may have several images (frames, windows): ``x`` is ``(B, k, channels, …)`` and ``g`` likewise, and ``γ_i``
sums over them as over positions.

Options of every kernel: ``stride``, ``padding``, ``dilation`` (tuples, one entry an axis; ``padding`` may be
``"same"``) and ``groups``. Transposed convolutions go through the generic rule.
"""

import math

import torch
from torch import Tensor

from gtddp_compile.kernels.conv_pairs import _conv_add_gram, _conv_pairs, _conv_pixel_pairs, conv_gram_form
from gtddp_compile.kernels.linear import pieces
from gtddp_compile.kernels.patches import (
    CHUNK,
    _conv_beside,
    _conv_blocks,
    _conv_gradients,
    _conv_groups,
    _conv_images,
    _conv_margins,
    _conv_padded,
    _conv_patches,
    _conv_samples,
    _conv_symmetric,
    _conv_windows,
)


def _conv_metric(metric: Tensor, channels: slice, groups: int) -> Tensor:
    """A diagonal metric's part for a block: ``(G, m, channels · kernel)``."""
    shape = metric.shape
    return metric.reshape(groups, shape[0] // groups, *shape[1:])[:, :, channels].flatten(2)


def _conv_few_rows(g: Tensor, weight: Tensor) -> bool:
    """Whether a weight is so much larger than what its gradient is made of that torch's own is slow on a CPU.

    Measured (benchmarks/tried.py): one product is up to three times faster where all rows are at most half of either
    side of the weight.
    """
    if torch.compiler.is_compiling() or g.device.type != "cpu":  # a graph must not depend on the batch's size
        return False
    return 2 * (g.numel() // g.shape[1]) <= min(weight.shape[0], weight[0].numel())


def _conv_product(
    x: Tensor,
    g: Tensor,
    weight: Tensor,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
) -> Tensor:
    """The weight's gradient as one product of output gradients and patches, ``(m, B T) (B T, n)``."""
    kernel, axes = tuple(weight.shape[2:]), weight.dim() - 2
    windows = _conv_windows(_conv_padded(x, _conv_margins(kernel, padding, dilation)), kernel, stride, dilation)
    rows = windows.permute(0, *range(2 + axes, 2 + 2 * axes), *range(1, 2 + axes)).reshape(-1, weight[0].numel())
    return (g.flatten(2).mT.reshape(-1, weight.shape[0]).mT @ rows).view_as(weight)


def conv_weighted(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, ...]:
    """``γᵀ 1``: the weight's and the bias's shape."""
    x, g = _conv_images(operands, g, params)
    bias = (g.flatten(2).sum((0, 2)),) if wants[1] else ()
    if not wants[0]:
        return bias
    if groups == 1 and _conv_few_rows(g, params[0]):
        return (_conv_product(x, g, params[0], stride, padding, dilation), *bias)
    x, widths = _conv_symmetric(x, params[0], padding, dilation)
    zeros, only_weight = [0 for _ in stride], [False, True, False]
    weight: Tensor = torch.ops.aten.convolution_backward(
        g, x, params[0], None, stride, widths, dilation, False, zeros, groups, only_weight
    )[1]
    return (weight, *bias)


def conv_gram(
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
    """``γ M⁻¹ γᵀ``, ``(B, B)``; each metric spherical or of the parameter's shape."""
    samples = g.shape[0]
    gram = g.new_zeros(samples, samples)
    x, g = _conv_images(operands, g, params)
    if wants[0]:
        weight, kernel = metric[0], tuple(params[0].shape[2:])
        spherical = not isinstance(weight, Tensor) or weight.dim() == 0
        margins, rows, images = _conv_margins(kernel, padding, dilation), _conv_groups(g, groups), len(g) // samples
        sizes = (params[0].shape[1], math.prod(kernel))  # with several images a patch is no sum over pixels of one
        form = conv_gram_form(
            samples, images * rows[0, 0, 0].numel(), images * x[0, 0].numel(),
            *(sizes if images == 1 else (math.prod(sizes), 1)), rows.shape[2],
        )  # fmt: skip
        if spherical and form == "pixels":
            gram = _conv_pixel_pairs(_conv_groups(x, groups), rows, kernel, stride, dilation, margins) * weight
        elif spherical and form == "patches":
            patches = _conv_patches(_conv_padded(x, margins), kernel, stride, dilation, groups)
            pairs = (_conv_beside(part, samples) for part in (patches, rows.flatten(3)))
            gram = _conv_pairs(*pairs) * weight
        else:
            split = _conv_groups(_conv_padded(x, margins), groups)
            for channels, gradients in _conv_blocks(split, rows, kernel, stride, dilation):
                block = _conv_samples(gradients, samples)
                scale = 1.0 if spherical else _conv_metric(weight, channels, groups) ** 0.5  # type: ignore[arg-type]
                flat = (block if spherical else block * scale).flatten(1)
                _conv_add_gram(gram, flat)
            gram = gram * weight if spherical else gram
    if not wants[1]:
        return gram
    bias = _conv_samples(g.flatten(2).sum(2), samples) * metric[-1] ** 0.5
    return gram + bias @ bias.mT


def conv_gram_diagonal(
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
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    samples = g.shape[0]
    diagonal = g.new_zeros(samples)
    x, g = _conv_images(operands, g, params)
    if wants[0]:
        weight, kernel = metric[0], tuple(params[0].shape[2:])
        spherical = not isinstance(weight, Tensor) or weight.dim() == 0
        x = _conv_groups(_conv_padded(x, _conv_margins(kernel, padding, dilation)), groups)
        for channels, gradients in _conv_blocks(x, _conv_groups(g, groups), kernel, stride, dilation):
            block = _conv_samples(gradients, samples)
            scale = weight if spherical else _conv_metric(weight, channels, groups)  # type: ignore[arg-type]
            diagonal = diagonal + (block.square() * scale).flatten(1).sum(1)
    if wants[1]:
        diagonal = diagonal + (_conv_samples(g.flatten(2).sum(2), samples).square() * metric[-1]).sum(1)
    return diagonal


def conv_directional(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    direction: tuple[Tensor, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``⟨γ_i, v⟩ = Σ_t g_it · (V * x_i + v_b)_t``, ``(B,)``."""
    samples = g.shape[0]
    x, g = _conv_images(operands, g, params)
    if not wants[0]:
        return _conv_samples(g.flatten(2).sum(2), samples) @ direction[0]
    x, widths = _conv_symmetric(x, params[0], padding, dilation)
    bias, zeros = direction[1] if wants[1] else None, [0 for _ in stride]
    change = torch.convolution(x, direction[0], bias, stride, widths, dilation, False, zeros, groups)
    return _conv_samples((g * change).flatten(1).sum(1), samples)


def conv_per_sample(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    samples, result = g.shape[0], []
    x, g = _conv_images(operands, g, params)
    if wants[0]:
        kernel = tuple(params[0].shape[2:])
        margins, parts = _conv_margins(kernel, padding, dilation), []
        for rows in pieces(len(x), max(1, CHUNK // (x[0].numel() + g[0].numel()))):  # padded, and copied by torch
            images = _conv_groups(_conv_padded(x[rows], margins), groups)
            parts.append(_conv_gradients(images, _conv_groups(g[rows], groups), kernel, stride, dilation))
        gradients = parts[0] if len(parts) == 1 else torch.cat(parts)
        result.append(_conv_samples(gradients, samples).reshape(samples, *params[0].shape))
    if wants[1]:
        result.append(_conv_samples(g.flatten(2).sum(2), samples))
    return tuple(result)


def conv_rows(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Homogeneous patches ``(B, G, T, n)`` and output gradients ``(B, G, T, m)`` (kernels of ``kronecker``)."""
    kernel, samples = tuple(params[0].shape[2:]), g.shape[0]
    x, g = _conv_images(operands, g, params)
    images = _conv_padded(x, _conv_margins(kernel, padding, dilation))
    windows = _conv_windows(_conv_groups(images, groups), kernel, stride, dilation).movedim(0, 2 + len(kernel))
    size = windows.shape[1 : 2 + len(kernel)]
    # One buffer (G, n, B, T), written once: a product over all rows reads it as it lies, the ones are its last plane.
    rows = x.new_empty(groups, math.prod(size) + wants[1], *windows.shape[2 + len(kernel) :])
    rows[:, : math.prod(size)].unflatten(1, size).copy_(windows)
    if wants[1]:
        rows[:, -1] = 1.0
    rows = rows.reshape(*rows.shape[:2], samples, -1).permute(2, 0, 3, 1)
    return rows, _conv_beside(_conv_groups(g, groups).flatten(3), samples).mT
