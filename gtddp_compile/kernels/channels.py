"""The metric of a convolution's input channels: ``M⁻¹`` acts on the channels of a pixel, whatever its place in the patch."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.patches import _conv_images


def channel_factor(
    x: Tensor, positions: float, groups: int, old: Tensor | None = None, keep: float = 0.0
) -> Tensor:
    """``A`` ``(G, c, c)``: ``Σ x xᵀ`` over the pixels of a sample, as often as an element of the kernel meets them.

    With ``old`` the running average ``keep · old + (1 - keep) · new``. ``x`` is ``(images, channels, pixels…)``; a
    sample has ``positions`` outputs over all its images.
    """
    rows = x if x.dtype in (torch.float32, torch.float64) else x.float()
    rows = rows.flatten(2).unflatten(1, (groups, -1))  # (images, G, c, pixels)
    share = (1.0 - keep if old is not None else 1.0) / rows.shape[0] / rows.shape[3]
    flat = rows.permute(1, 2, 0, 3).flatten(2)  # (G, c, images · pixels)
    found = (flat @ flat.mT).mul_(share * positions)
    return found if old is None else found.add_(old, alpha=keep)


def conv_whitened(operands: tuple[Tensor, ...], g: Tensor, params: tuple[Tensor, ...], maps: Tensor) -> tuple[Tensor]:
    """The input in coordinates where the metric is spherical, ``x X`` at every pixel; ``maps`` is ``X``, ``(G, c, c)``."""
    (x, _), shape = _conv_images(operands, g, params), operands[0].shape
    filters = maps.mT.reshape(-1, maps.shape[-1], *(1 for _ in shape[g.dim() - params[0].dim() + 2 :])).to(x.dtype)
    function = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    return (function(x, filters, groups=maps.shape[0]).reshape(shape),)


def channel_step(gradient: Tensor, maps: Tensor) -> Tensor:
    """``A⁻¹`` on the input channels of a convolution's gradient, ``(m, c, kernel…)``; ``A⁻¹ = X Xᵀ``."""
    groups, width = maps.shape[0], maps.shape[1]
    inverse = maps @ maps.mT
    split = gradient.to(maps.dtype).reshape(groups, gradient.shape[0] // groups, width, -1)
    found: Any = torch.einsum("gmck,gcd->gmdk", split, inverse)
    return found.reshape(gradient.shape).to(gradient.dtype)
