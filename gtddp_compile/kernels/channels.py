"""The metric of input channels: ``M⁻¹`` acts on those of a convolution's pixel, or of a position of a linear layer."""

import math

import torch
from torch import Tensor

from gtddp_compile.kernels.approximate import _signs
from gtddp_compile.kernels.bundle import Joined, Layer, wide
from gtddp_compile.kernels.patches import CONVOLUTIONS, _conv_images


def channel_pixels(layer: Layer, blocks: int = 1) -> Tensor:
    """Inputs as ``(G, c, N)``: the channels of every pixel, or of every position, there in so many blocks."""
    if layer.how is None:  # a linear layer
        x = layer.operands[0]
        return x.reshape(-1, blocks, x.shape[-1] // blocks).permute(1, 2, 0)
    images, _ = _conv_images(layer)
    found: Tensor = images.flatten(2).unflatten(1, (layer.how.groups, -1)).permute(1, 2, 0, 3).flatten(2)
    return found


def channel_factor(
    pixels: Tensor, positions: float, old: Tensor | None = None, keep: float = 0.0, joined: Joined | None = None
) -> Tensor:
    """``A`` ``(G, c, c)``: ``Σ x xᵀ`` over the pixels of a sample, as often as an element of the kernel meets them.

    With ``old`` the running average ``keep · old + (1 - keep) · new``. ``pixels`` is ``(G, c, N)``; a sample has
    ``positions`` outputs. ``joined``: there is a part of the batch, ``A`` is of all.
    """
    flat = wide(pixels)
    share = (1.0 - keep if old is not None else 1.0) / flat.shape[2]
    found: Tensor = (flat @ flat.mT).mul_(share * positions)
    found = found if joined is None else joined.all_reduce(found * joined.share)
    return found if old is None else found.add_(old, alpha=keep)


def conv_whitened(layer: Layer, maps: Tensor) -> Layer:
    """The layer where the metric is spherical, its input ``x X`` at every pixel; ``X`` is ``(G, c, c)``."""
    (x, _), shape = _conv_images(layer), layer.operands[0].shape
    filters = maps.mT.reshape(-1, maps.shape[-1], *(1 for _ in x.shape[2:])).to(x.dtype)
    return layer._replace(operands=(CONVOLUTIONS[x.dim()](x, filters, groups=maps.shape[0]).reshape(shape),))


def few_pixels(pixels: int, rows: int) -> bool:
    """Whether ``A⁻¹`` is multiplied with all pixels rather than with a gradient of so many rows of channels."""
    return 2 * pixels <= rows


def channel_rows(gradients: tuple[Tensor, ...], maps: Tensor) -> tuple[Tensor, ...]:
    """``γ`` of a weight and bias in coordinates where the metric is spherical, ``γ X``; columns in any order."""
    weight, *bias = gradients
    samples, (groups, width, _) = weight.shape[0], maps.shape
    if weight.dim() == 3:
        return (_blockwise(weight.to(maps.dtype), maps), *bias)
    if groups == 1:  # channels last: one product of all rows
        return ((weight.to(maps.dtype).movedim(2, -1).reshape(-1, width) @ maps[0]).view(samples, -1), *bias)
    split = weight.to(maps.dtype).reshape(samples, groups, -1, width, weight[0, 0, 0].numel())
    return ((maps.mT.unsqueeze(1) @ split).reshape(weight.shape), *bias)


def linear_whitened(layer: Layer, maps: Tensor) -> Layer:
    """The layer where the metric of its inputs is spherical, ``x X`` at every position; ``X`` has ``G`` blocks."""
    x = layer.operands[0]
    return layer._replace(operands=(_blockwise(x, maps.to(x.dtype)),))


def _blockwise(rows: Tensor, maps: Tensor) -> Tensor:
    """Rows ``(…, G c)`` times a matrix of blocks ``(G, c, c)``."""
    if len(maps) == 1:
        return rows @ maps[0]
    found: Tensor = torch.einsum("...gc,gcd->...gd", rows.unflatten(-1, (len(maps), -1)), maps)
    return found.flatten(-2)


def channel_signs(factor: Tensor, shape: tuple[int, ...], columns: int, seed: int) -> Tensor:
    """Random filters ``(G, c, columns · kernel)`` for weights of that shape, without the metric's map."""
    groups, width = factor.shape[:2]
    if len(shape) == 1:
        return _signs(shape[0], columns, factor, seed).view(groups, width, columns)
    count = math.prod(shape)
    random: Tensor = _signs(groups * columns, count, factor, seed) * (count / columns) ** 0.5
    return random.view(groups, columns, width, -1).transpose(1, 2).flatten(2)


def channel_filters(mapped: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Random filters with the metric's map in them, ``(G · columns, c, kernel…)``; of a linear layer ``(columns, n)``.

    Patches times them are projections of whitened patches, ``E[f fᵀ] = A⁻¹ / columns``.

    Args:
        mapped: ``X`` times :func:`channel_signs`.
        shape: of the weight without its outputs.
    """
    if len(shape) == 1:
        return mapped.flatten(0, 1).mT
    kernel = math.prod(shape[1:])
    return mapped.reshape(*mapped.shape[:2], -1, kernel).transpose(1, 2).reshape(-1, *shape)


def channel_step(gradient: Tensor, inverse: Tensor) -> Tensor:
    """``A⁻¹`` on the input channels of a gradient, ``(m, c, kernel…)``."""
    groups, width = inverse.shape[0], inverse.shape[1]
    if gradient.dim() == 2 or (groups == 1 and gradient[0].numel() == width):  # a kernel of one element
        return _blockwise(gradient.flatten(1).to(inverse.dtype), inverse).reshape(gradient.shape).to(gradient.dtype)
    split = gradient.to(inverse.dtype).reshape(groups, gradient.shape[0] // groups, width, -1).mT
    found: Tensor = (split.reshape(groups, -1, width) @ inverse).view(split.shape).mT  # one product of all elements
    return found.reshape(gradient.shape).contiguous().to(gradient.dtype)


def channel_carried(gradient: Tensor, inverse: Tensor, last: Tensor, mu: float, rate: float) -> Tensor:
    """``μ v - η ĝ A⁻¹`` of a linear layer's weight, in the product where the inputs are one block."""
    if len(inverse) > 1:
        return torch.add(last * mu, channel_step(gradient, inverse), alpha=-rate)
    return torch.addmm(last, gradient, inverse[0], beta=mu, alpha=-rate)
