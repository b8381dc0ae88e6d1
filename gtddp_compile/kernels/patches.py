"""Patches of convolutions, and per-sample gradients made of them (docs/theory.md#gram-matrices).

With patches unfolded, a convolution is a linear layer at ``T`` output positions, group by group: ``x``
becomes ``(B, G, n, T)`` with ``n = (channels / G) · kernel``, ``g`` is ``(B, G, m, T)`` with ``m = outputs /
G``, and ``γ_i = Σ_t g_it x_itᵀ``. Patches are unfolded a bounded piece at a time (``CHUNK`` elements), each
at most once a call.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Geometry, Layer, pieces

CONVOLUTIONS = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
"""By the axes of the input."""

CHUNK = 2**22
"""Bound on the elements of an intermediate tensor: what is read again soon stays in the last-level cache."""

GROUPED = 256
"""Output positions from which a grouped convolution of any number of channels beats unfolded patches on a CPU."""

BLOCK = 8
"""Channels that torch's own convolutions take together: with fewer, patches are faster."""

VECTOR = 16
"""Channels whose products torch's own convolutions compute together: the rest costs as much as one more of these."""


def _conv_margins(kernel: tuple[int, ...], how: Geometry) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis; ``"same"`` puts the odd one after, as torch does."""
    if how.padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if isinstance(how.padding, str):
        totals = [gap * (size - 1) for size, gap in zip(kernel, how.dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((width, width) for width in how.padding)


def _conv_padded(x: Tensor, margins: tuple[tuple[int, int], ...]) -> Tensor:
    """``x`` with zeros around its spatial axes."""
    widths = [width for pair in reversed(margins) for width in pair]
    return F.pad(x, widths) if any(widths) else x


def _conv_groups(values: Tensor, groups: int) -> Tensor:
    """``(B, channels, …)`` as ``(B, G, channels / G, …)``."""
    shape = values.shape
    return values.reshape(shape[0], groups, shape[1] // groups, *shape[2:])


def _conv_windows(x: Tensor, kernel: tuple[int, ...], how: Geometry) -> Tensor:
    """A view ``(…, *kernel, *positions)`` of an input ``(…, *pixels)`` that is padded already."""
    first, axes = x.dim() - len(kernel), len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, how.stride, how.dilation, strict=True)):
        x = x.unfold(first + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x.permute(*range(first), *range(first + axes, first + 2 * axes), *range(first, first + axes))


def _conv_patches(x: Tensor, kernel: tuple[int, ...], how: Geometry) -> Tensor:
    """Patches ``(B, G, n, T)`` of an input that is padded already."""
    x = _conv_windows(x, kernel, how)
    positions = math.prod(x.shape[2 + len(kernel) :])
    return x.reshape(x.shape[0], how.groups, x.shape[1] // how.groups * math.prod(kernel), positions)


def _conv_grouped(positions: int, channels: int, kernel: int) -> bool:
    """Whether a grouped convolution beats unfolded patches (measured), whose copies weigh most."""
    return kernel > 1 and channels >= BLOCK and (positions >= GROUPED or 16 * positions >= channels**2)


def _conv_gradients(x: Tensor, g: Tensor, kernel: tuple[int, ...], how: Geometry) -> Tensor:
    """``γ`` ``(B, G, m, n)`` from a padded ``x`` ``(B, G, channels, …)`` and ``g`` ``(B, G, m, …)``."""
    samples, groups, channels = x.shape[:3]
    outputs, positions = g.shape[2], g[0, 0, 0].numel()
    if x.device.type == "cpu" and _conv_grouped(positions, channels, math.prod(kernel)):
        # One weight gradient with every sample a group of its own, no patches unfolded; torch copies all it reads.
        parts = pieces(samples, max(1, 2 * CHUNK // (x[0].numel() + g[0].numel())))
        if len(parts) > 1:
            return torch.cat([_conv_gradients(x[rows], g[rows], kernel, how) for rows in parts])
        count = samples * groups
        weight = x.new_empty(1).expand(count * outputs, channels, *kernel)
        own, part = (value.reshape(1, -1, *value.shape[3:]) for value in (g, x))
        gradients = _conv_weight_gradient(part, own, weight, how, (0,) * len(kernel), count)
        return gradients.reshape(samples, groups, outputs, -1)
    step = max(1, CHUNK // (groups * channels * math.prod(kernel) * positions))
    pairs = ((g[rows].flatten(3), x[rows].flatten(1, 2)) for rows in pieces(samples, step))
    blocks = [own @ _conv_patches(part, kernel, how).mT for own, part in pairs]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _conv_weight_gradient(
    x: Tensor, g: Tensor, weight: Tensor, how: Geometry, padding: tuple[int, ...], groups: int
) -> Tensor:
    """The weight's gradient as torch makes it; of ``weight`` the shape alone is read."""
    found: Tensor = torch.ops.aten.convolution_backward(
        g, x, weight, None, how.stride, padding, how.dilation, False, (0,) * len(padding), groups, [False, True, False]
    )[1]
    return found


def _conv_blocks(x: Tensor, g: Tensor, kernel: tuple[int, ...], how: Geometry) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients, some input channels at a time: ``(channels, (B, G, m, channels · kernel))``."""
    step = max(1, CHUNK // (g.shape[0] * g.shape[1] * g.shape[2] * math.prod(kernel)))
    if step >= VECTOR and g[0, 0, 0].numel() >= GROUPED:
        step = -(-step // VECTOR) * VECTOR
    for channels in pieces(x.shape[2], step):
        yield channels, _conv_gradients(x[:, :, channels], g, kernel, how)


def _conv_images(layer: Layer) -> tuple[Tensor, Tensor]:
    """``x`` and ``g`` image by image: ``(B k, channels, …)``."""
    x, g, weight = layer.operands[0], layer.g, layer.params[0]
    return (x.flatten(0, 1), g.flatten(0, 1)) if weight is not None and x.dim() > weight.dim() else (x, g)


def _conv_weight(layer: Layer) -> tuple[Tensor, tuple[int, ...]]:
    """The weight, and its kernel's size."""
    weight = layer.params[0]
    assert weight is not None  # a convolution has one
    return weight, tuple(weight.shape[2:])


def _conv_samples(rows: Tensor, samples: int) -> Tensor:
    """Rows of images ``(B k, …)`` added up sample by sample: ``(B, …)``."""
    return rows if rows.shape[0] == samples else rows.unflatten(0, (samples, -1)).sum(1)


def _conv_bias(g: Tensor, samples: int) -> Tensor:
    """``γ`` of the bias, ``(B, m)``, from ``g`` image by image."""
    return _conv_samples(g.flatten(2).sum(2), samples)


def _conv_products(g: Tensor, seen: Tensor, samples: int, groups: int) -> Tensor:
    """``Σ_t seen_it g_itᵀ``, group by group, ``(B, …)``; both image by image."""
    rows, others = (value.reshape(len(value), groups, -1, value[0, 0].numel()) for value in (g, seen))
    return _conv_samples((others @ rows.mT).flatten(1), samples)  # few rows first: half of what the other order takes


def _conv_beside(rows: Tensor, samples: int) -> Tensor:
    """Positions of all images of a sample side by side: ``(B k, G, n, T)`` as ``(B, G, n, k T)``."""
    return rows if rows.shape[0] == samples else rows.unflatten(0, (samples, -1)).movedim(1, 3).flatten(3)
