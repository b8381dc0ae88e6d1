"""Forms of a convolution's Gram matrix ``Γ_ij = Σ_st (x_is · x_jt)(g_is · g_jt)`` (docs/theory.md#gram-matrices).

``x_is`` is sample ``i``'s patch at position ``s``; which form is cheapest depends on the shapes alone.
"""

import itertools
import math

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Geometry
from gtddp_compile.kernels.patches import CHUNK, _conv_margins

ADD = 40
"""What an elementwise multiplication or addition on a large tensor costs, in multiplications of a matrix product."""


def conv_gram_form(samples: int, positions: int, pixels: int, channels: int, kernel: int, outputs: int) -> str:
    """The cheapest way to the Gram matrix of a spherical weight, by multiplications a group.

    Args:
        samples: ``B``.
        positions: ``T``, of the output.
        pixels: ``S``, of the input.
        channels, outputs: of one group.
        kernel: elements of the kernel; ``n = channels · kernel``.

    Returns:
        ``"patches"``: sum over pairs of positions, ``½ B² T² (n + m)``. ``"pixels"``: as that, but inner products
        of patches are sums of inner products of pixels, ``B² S² channels`` and ``kernel`` additions a pair;
        one block of memory, so for at most ``4 CHUNK`` pairs. ``"materialised"``: per-sample gradients, ``B m n T +
        B² m n``, and patches copied, ``B T n``.
    """
    patch, pairs = channels * kernel, (samples * positions) ** 2
    costs = {
        "patches": pairs * (patch + outputs + ADD) / 2,
        "materialised": samples * patch * (outputs * (positions + samples) + (ADD * positions if kernel > 1 else 0)),
    }
    if kernel > 1 and max(pairs, (samples * pixels) ** 2) <= 4 * CHUNK:
        costs["pixels"] = (samples * pixels) ** 2 * channels + pairs * (outputs + ADD * (1 + kernel / 2))
    return min(costs, key=costs.__getitem__)


def _conv_add_gram(gram: Tensor, rows: Tensor) -> None:
    """``gram += rows rowsᵀ``, three of its four blocks by products."""
    half = len(rows) // 2
    gram[:half].addmm_(rows[:half], rows.mT)
    gram[half:, half:].addmm_(rows[half:], rows[half:].mT)
    gram[half:, :half] = gram[:half, half:].mT


def _conv_pairs(x: Tensor, g: Tensor) -> Tensor:
    """``Σ_st (x_is · x_jt)(g_is · g_jt)``, ``(B, B)``: ``x`` ``(B, G, n, T)``, ``g`` ``(B, G, m, T)``.

    Positions lie outermost, and of a pair of positions ``s < t`` and ``t < s`` only the first is computed: the
    other is its transpose.
    """
    samples, groups, _, positions = x.shape
    x, g = (value.permute(1, 3, 0, 2).contiguous() for value in (x, g))  # (G, T, B, …)
    step = max(1, math.ceil(positions / 4))
    if not torch.compiler.is_compiling():
        step = max(1, min(step, CHUNK // (groups * samples**2 * positions)))
    gram = x.new_zeros(samples, samples)
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        own = (x[:, start:stop].flatten(1, 2), g[:, start:stop].flatten(1, 2))
        gram += _conv_pair_sum(*own, *own, samples)
        if stop < positions:
            later = _conv_pair_sum(*own, x[:, stop:].flatten(1, 2), g[:, stop:].flatten(1, 2), samples)
            gram += later + later.mT
    return gram


def _conv_pair_sum(x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor, samples: int) -> Tensor:
    """``(x xᵀ) ∘ (g gᵀ)`` of rows ``(G, positions · B, …)``, summed over groups and pairs of positions."""
    product = (x @ other_x.mT).mul_(g @ other_g.mT)
    return product.reshape(x.shape[0], -1, samples, other_x.shape[1] // samples, samples).sum((0, 1, 3))


def _conv_pixel_pairs(x: Tensor, g: Tensor, kernel: tuple[int, ...], how: Geometry) -> Tensor:
    """As :func:`_conv_pairs`, inner products of patches as sums of those of pixels.

    ``x`` ``(B, G, channels, …)`` is not padded; ``g`` is ``(B, G, m, …)``. For each element ``k`` of the kernel the
    pixel Gram matrix, moved by ``k`` in both its positions, is added; what lies in the margins is zero.
    """
    samples, groups, axes = x.shape[0], x.shape[1], len(kernel)
    margins = _conv_margins(kernel, how)
    pixels, positions = tuple(x.shape[3:]), tuple(g.shape[3:])
    order = (1, *range(3, 3 + axes), 0, 2)
    rows = x.permute(order).reshape(groups, -1, x.shape[2])
    of_pixels = (rows @ rows.mT).reshape(groups, *pixels, samples, *pixels, samples)
    total = x.new_zeros(groups, *positions, samples, *positions, samples)
    for element in itertools.product(*map(range, kernel)):
        target, source = [], []
        for axis, index in enumerate(element):
            shift, step = index * how.dilation[axis] - margins[axis][0], how.stride[axis]
            first = max(0, -(shift // step))  # the first output position whose pixel is there
            last = min(positions[axis], (pixels[axis] - 1 - shift) // step + 1)
            target.append(slice(first, max(first, last)))
            source.append(slice(first * step + shift, max(first, last) * step + shift, step))
        if all(part.stop > part.start for part in target):
            whole = slice(None)
            total[(whole, *target, whole, *target)] += of_pixels[(whole, *source, whole, *source)]
    rows = g.permute(order).reshape(groups, -1, g.shape[2])
    product = total.reshape(groups, rows.shape[1], rows.shape[1]).mul_(rows @ rows.mT)
    return product.reshape(groups, -1, samples, math.prod(positions), samples).sum((0, 1, 3))
