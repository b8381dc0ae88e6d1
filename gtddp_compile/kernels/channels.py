"""The metric of a convolution's input channels: ``M⁻¹`` acts on the channels of a pixel, wherever it is."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.approximate import _signs
from gtddp_compile.kernels.patches import _conv_images, _conv_samples
from gtddp_compile.kernels.sweep import wide

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""By the axes of the input."""


def channel_factor(x: Tensor, positions: float, groups: int, old: Tensor | None = None, keep: float = 0.0) -> Tensor:
    """``A`` ``(G, c, c)``: ``Σ x xᵀ`` over the pixels of a sample, as often as an element of the kernel meets them.

    With ``old`` the running average ``keep · old + (1 - keep) · new``. ``x`` is ``(images, channels, pixels…)``; a
    sample has ``positions`` outputs over all its images.
    """
    rows = x if x.dtype in (torch.float32, torch.float64) else x.float()
    rows = rows.flatten(2).unflatten(1, (groups, -1))  # (images, G, c, pixels)
    share = (1.0 - keep if old is not None else 1.0) / rows.shape[0] / rows.shape[3]
    flat = rows.permute(1, 2, 0, 3).flatten(2)  # (G, c, images · pixels)
    found: Tensor = (flat @ flat.mT).mul_(share * positions)
    return found if old is None else found.add_(old, alpha=keep)


def conv_whitened(operands: tuple[Tensor, ...], g: Tensor, params: tuple[Tensor, ...], maps: Tensor) -> tuple[Tensor]:
    """The input in coordinates where the metric is spherical, ``x X`` at every pixel; ``X`` is ``(G, c, c)``."""
    (x, _), shape = _conv_images(operands, g, params), operands[0].shape
    filters = maps.mT.reshape(-1, maps.shape[-1], *(1 for _ in shape[g.dim() - params[0].dim() + 2 :])).to(x.dtype)
    return (CONVOLUTIONS[x.dim()](x, filters, groups=maps.shape[0]).reshape(shape),)


def channel_rows(gradients: tuple[Tensor, ...], maps: Tensor) -> tuple[Tensor, ...]:
    """``γ`` of a convolution's weight and bias in coordinates where the metric is spherical, ``γ X``."""
    weight, *bias = gradients
    samples, (groups, width, _) = weight.shape[0], maps.shape
    split = weight.to(maps.dtype).reshape(samples, groups, -1, width, weight[0, 0, 0].numel())
    return ((maps.mT.unsqueeze(1) @ split).reshape(weight.shape), *bias)


def channel_filters(maps: Tensor, shape: tuple[int, ...], columns: int, seed: int) -> Tensor:
    """Random filters with the metric's map in them, ``(G · columns, c, kernel…)``.

    Patches times them are projections of whitened patches, ``E[f fᵀ] = A⁻¹ / columns``.
    """
    groups, count = maps.shape[0], math.prod(shape)
    random = _signs(groups * columns, count, maps, seed) * (count / columns) ** 0.5
    filters: Tensor = maps.unsqueeze(1) @ random.reshape(groups, columns, shape[0], -1)
    return filters.reshape(-1, *shape)


def conv_sketched(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    filters: Tensor,
    metric: tuple[float, ...],
    direction: tuple[Tensor, ...] | None,
    rows: Sequence[slice],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """A sketch of ``Γ`` under the metric of channels, and ``⟨γ_i, v⟩`` of a change of the parameters.

    One convolution of the input makes both: its filters are the change of the weight and random ones
    (:func:`channel_filters`). ``direction`` ``None``: ``Γ`` alone.
    """
    samples = g.shape[0]
    x, g = _conv_images(operands, g, params)
    filters = filters.to(x.dtype)
    weights = [filters] if direction is None else [direction[0].to(x.dtype), filters]
    if groups > 1:
        seen = [CONVOLUTIONS[x.dim()](x, w, None, stride, padding, dilation, groups) for w in weights]
    else:
        whole = CONVOLUTIONS[x.dim()](x, weights[0] if direction is None else torch.cat(weights), None, stride, padding,
                                      dilation)  # fmt: skip
        seen = list(whole.split([len(w) for w in weights], 1))
    flat, count = g.flatten(2), len(g)
    gamma = flat.reshape(count, groups, -1, flat.shape[2]) @ seen[-1].reshape(count, groups, -1, flat.shape[2]).mT
    sketched = _conv_samples(gamma.flatten(1), samples) * metric[0] ** 0.5
    bias = _conv_samples(flat.sum(2), samples) if wants[1] else None
    if bias is not None:
        sketched = torch.cat([sketched, bias * metric[-1] ** 0.5], 1)
    sketched = wide(sketched)
    grams = tuple(sketched[row] @ sketched[row].mT for row in rows)
    if direction is None:
        return grams, None
    change = _conv_samples((g * seen[0]).flatten(1).sum(1), samples)
    return grams, change if bias is None else change + bias @ direction[1]


def channel_step(gradient: Tensor, inverse: Tensor) -> Tensor:
    """``A⁻¹`` on the input channels of a convolution's gradient, ``(m, c, kernel…)``."""
    groups, width = inverse.shape[0], inverse.shape[1]
    split = gradient.to(inverse.dtype).reshape(groups, gradient.shape[0] // groups, width, -1)
    found: Tensor = inverse.unsqueeze(1) @ split
    return found.reshape(gradient.shape).to(gradient.dtype)
