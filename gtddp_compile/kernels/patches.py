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

from gtddp_compile.kernels.linear import pieces

CHUNK = 2**22
"""Bound on the elements of an intermediate tensor: what is read again soon stays in the last-level cache."""

GROUPED = 256
"""Output positions from which a grouped convolution of any number of channels beats unfolded patches on a CPU."""

BLOCK = 8
"""Channels that torch's own convolutions take together: with fewer, patches are faster."""

VECTOR = 16
"""Channels whose products torch's own convolutions compute together: the rest costs as much as one more of these."""


def _conv_margins(
    kernel: tuple[int, ...], padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis; ``"same"`` puts the odd one after, as torch does."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if isinstance(padding, str):
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((width, width) for width in padding)


def _conv_padded(x: Tensor, margins: tuple[tuple[int, int], ...]) -> Tensor:
    """``x`` with zeros around its spatial axes."""
    widths = [width for pair in reversed(margins) for width in pair]
    return F.pad(x, widths) if any(widths) else x


def _conv_groups(values: Tensor, groups: int) -> Tensor:
    """``(B, channels, …)`` as ``(B, G, channels / G, …)``."""
    shape = values.shape
    return values.reshape(shape[0], groups, shape[1] // groups, *shape[2:])


def _conv_symmetric(
    x: Tensor, weight: Tensor, padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` and a padding of equal widths on both sides that together say the same."""
    margins = _conv_margins(tuple(weight.shape[2:]), padding, dilation)
    if all(before == after for before, after in margins):
        return x, tuple(before for before, _ in margins)
    return _conv_padded(x, margins), tuple(0 for _ in margins)


def _conv_windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """A view ``(…, *kernel, *positions)`` of an input ``(…, *pixels)`` that is padded already."""
    first, axes = x.dim() - len(kernel), len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(first + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x.permute(*range(first), *range(first + axes, first + 2 * axes), *range(first, first + axes))


def _conv_patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """Patches ``(B, G, n, T)`` of an input that is padded already."""
    x = _conv_windows(x, kernel, stride, dilation)
    positions = math.prod(x.shape[2 + len(kernel) :])
    return x.reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(kernel), positions)


def _conv_grouped(positions: int, channels: int, kernel: int) -> bool:
    """Whether a grouped convolution beats unfolded patches (measured: benchmarks/tried.py), whose copies weigh most."""
    return kernel > 1 and channels >= BLOCK and (positions >= GROUPED or 16 * positions >= channels**2)


def _conv_gradients(
    x: Tensor, g: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """``γ`` ``(B, G, m, n)`` from a padded ``x`` ``(B, G, channels, …)`` and ``g`` ``(B, G, m, …)``."""
    samples, groups, channels = x.shape[:3]
    outputs, positions = g.shape[2], g[0, 0, 0].numel()
    if x.device.type == "cpu" and _conv_grouped(positions, channels, math.prod(kernel)):
        # One weight gradient with every sample a group of its own, no patches unfolded; torch copies all it reads.
        parts = pieces(samples, max(1, 2 * CHUNK // (x[0].numel() + g[0].numel())))
        if len(parts) > 1:
            return torch.cat([_conv_gradients(x[rows], g[rows], kernel, stride, dilation) for rows in parts])
        count, zeros = samples * groups, [0 for _ in kernel]
        weight = x.new_empty(1).expand(count * outputs, channels, *kernel)
        own, part = (value.reshape(1, -1, *value.shape[3:]) for value in (g, x))
        gradients: Tensor = torch.ops.aten.convolution_backward(
            own, part, weight, None, stride, zeros, dilation, False, zeros, count, [False, True, False]
        )[1]
        return gradients.reshape(samples, groups, outputs, -1)
    step = max(1, CHUNK // (groups * channels * math.prod(kernel) * positions))
    pairs = ((g[rows].flatten(3), x[rows].flatten(1, 2)) for rows in pieces(samples, step))
    blocks = [own @ _conv_patches(part, kernel, stride, dilation, groups).mT for own, part in pairs]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _conv_blocks(
    x: Tensor, g: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients, some input channels at a time: ``(channels, (B, G, m, channels · kernel))``."""
    step = max(1, CHUNK // (g.shape[0] * g.shape[1] * g.shape[2] * math.prod(kernel)))
    if step >= VECTOR and g[0, 0, 0].numel() >= GROUPED:
        step = -(-step // VECTOR) * VECTOR
    for channels in pieces(x.shape[2], step):
        yield channels, _conv_gradients(x[:, :, channels], g, kernel, stride, dilation)


def _conv_images(operands: tuple[Tensor, ...], g: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``x`` and ``g`` image by image: ``(B k, channels, …)``."""
    x = operands[0]
    return (x.flatten(0, 1), g.flatten(0, 1)) if g.dim() > params[0].dim() else (x, g)


def _conv_samples(rows: Tensor, samples: int) -> Tensor:
    """Rows of images ``(B k, …)`` added up sample by sample: ``(B, …)``."""
    return rows if rows.shape[0] == samples else rows.unflatten(0, (samples, -1)).sum(1)


def _conv_beside(rows: Tensor, samples: int) -> Tensor:
    """Positions of all images of a sample side by side: ``(B k, G, n, T)`` as ``(B, G, n, k T)``."""
    return rows if rows.shape[0] == samples else rows.unflatten(0, (samples, -1)).movedim(1, 3).flatten(3)
