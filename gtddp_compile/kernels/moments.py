"""``Σ x xᵀ`` of a convolution's patches without the patches: what K-FAC's factor ``A`` is made of.

Patches that begin a row further down read rows of pixels that others have read. With ``R_r`` ``(n / k, B W)`` the
patches along row ``r`` of the padded image, unfolded along every axis but the first (stride and dilation 1 there,
kernel ``k``), the block of elements ``i`` and ``i + e`` of the kernel's first axis is ``Σ_{r = i}^{i + H - 1} R_r
R_{r+e}ᵀ``: the products of neighbouring rows, made once, are shared by all ``i``: ``n² B T`` multiplications become
``n² B T (1 + (k - 1) / H) / k``.
"""

import math

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Geometry, Layer, wide
from gtddp_compile.kernels.patches import (
    _conv_beside,
    _conv_groups,
    _conv_images,
    _conv_margins,
    _conv_padded,
    _conv_weight,
    _conv_windows,
)

NARROW = 32
"""Elements of a patch below which products of rows are too narrow to be worth it."""


def conv_moment_shares(patch: int, kernel: int, positions: int) -> bool:
    """Whether rows are shared by enough patches; ``kernel`` and ``positions`` (of the output) along the first axis."""
    return patch >= NARROW and positions + kernel - 1 <= 0.6 * kernel * positions


def conv_moment(layer: Layer) -> Tensor:
    """``Σ_it x_it x_itᵀ`` ``(1, n, n)`` of homogeneous patches (one group; stride and dilation 1 on the first axis)."""
    (weight, kernel), how = _conv_weight(layer), layer.how
    channels, images = weight.shape[1], _conv_padded(layer.operands[0], _conv_margins(kernel, how))
    lines_of = Geometry(how.stride[1:], "valid", how.dilation[1:])
    windows = _conv_windows(images, kernel[1:], lines_of)  # (B, c, rows, *kernel[1:], *positions[1:])
    windows = windows.movedim(2, 0).movedim(1, 1 + len(kernel))
    size, count, inner = kernel[0], windows.shape[0], channels * math.prod(kernel[1:])
    lines = windows.new_empty(count + size - 1, *windows.shape[1:])
    lines[:count] = windows
    lines[count:] = 0.0
    lines = wide(lines).reshape(count + size - 1, inner, -1)
    neighbours = lines.unfold(0, size, 1).permute(0, 3, 1, 2).flatten(1, 2)  # a view: (count, size · inner, B …)
    products = torch.bmm(lines[:count], neighbours.mT).unflatten(2, (size, inner))
    whole, height = lines.new_empty(size, inner, size, inner), count - size + 1
    for first in range(size):
        block = products[first : first + height].sum(0)
        for gap in range(size - first):
            whole[first, :, first + gap] = block[:, gap]
            whole[first + gap, :, first] = block[:, gap].mT
    split = (size, channels, inner // channels)
    patches = whole.reshape(*split, *split).permute(1, 0, 2, 4, 3, 5).reshape(size * inner, size * inner)
    if not layer.wants[1]:
        return patches[None]
    found = lines.new_full((1, size * inner + 1, size * inner + 1), height * lines.shape[2])
    sums = lines.sum(2).unfold(0, height, 1).sum(2)[:size]  # of the patches' elements, (size, inner)
    found[0, :-1, :-1] = patches
    found[0, -1, :-1] = found[0, :-1, -1] = sums.reshape(split).transpose(0, 1).flatten()
    return found


def line_rows(layer: Layer) -> tuple[Tensor, Tensor]:
    """A convolution's rows where :func:`conv_moment` makes what is asked of its patches: of these the width alone."""
    (x, outputs), samples = _conv_images(layer), len(layer.g)
    width = _conv_weight(layer)[0][0].numel() + layer.wants[1]
    return x.new_empty(1).expand(samples, 1, 1, width), _conv_beside(_conv_groups(outputs, 1).flatten(3), samples).mT
