"""Gram matrices from every sample's mean input and mean gradient, at a level that the exact ones had.

Of ``γ_i = Σ_t g_it x_itᵀ`` the part that all positions share is ``γ̄_i = (Σ_t g_it)(Σ_t x_it)ᵀ / T``; without ``γ_i``,
and without pairs of positions, ``Γ̄ = γ̄ M⁻¹ γ̄ᵀ`` costs ``B² (n + m)`` and one reading of ``x`` and ``g``. What is left
of it hardly agrees between samples: it adds to the diagonal, in proportion to ``d_i = Σ_t ‖x_it‖² ‖g_it‖²``. So

    Γ ≈ a diag(d) + b Γ̄ + (the bias's own part, exactly),        a, b ≥ 0,

positive semidefinite as its terms are. ``a`` and ``b`` are the least squares over the diagonal and beside it of a batch
whose ``Γ`` is known, and are what changes slowly from batch to batch: entries of ``Γ`` belong to their samples.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.approximate import _along, _apart, _bias
from gtddp_compile.kernels.linear import _linear_rows
from gtddp_compile.kernels.patches import _conv_images, _conv_margins, _conv_padded, _conv_samples

Parts = tuple[Tensor, Tensor, Tensor]
"""``d`` ``(B,)``, ``Γ̄`` and the bias's part ``(B, B)``."""


def linear_pooled(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Any, ...],
) -> Parts:
    """The parts of a linear layer's ``Γ``; a diagonal metric is separated."""
    own = g.new_zeros(()) + _bias(g, wants, metric, -1)
    by_output, by_input, rest = _apart(metric[0])
    x, g = _linear_rows(_along(operands[0], by_input, -1)), _linear_rows(_along(g, by_output, -1))
    diagonal = (x.square().sum(2) * g.square().sum(2)).sum(1)
    mean, total = x.mean(1), g.sum(1)
    return diagonal * rest, (mean @ mean.mT) * (total @ total.mT) * rest, own


def conv_pooled(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    metric: tuple[Any, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Parts:
    """The parts of a convolution's ``Γ``: positions are its patches; a diagonal metric is separated."""
    samples, kernel = g.shape[0], tuple(params[0].shape[2:])
    own = g.new_zeros(()) + _bias(g, wants, metric, g.dim() - params[0].dim() + 1)
    by_output, by_input, rest = _apart(metric[0], groups)
    x, g = _conv_images(operands, g, params)
    x = _conv_padded(_along(x, by_input, 1), _conv_margins(kernel, padding, dilation))
    g = _along(g, by_output, 1)
    function = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(kernel)]
    squares = x.square().unflatten(1, (groups, -1)).sum(2)
    norms = function(squares, squares.new_ones(groups, 1, *kernel), None, stride, 0, dilation, groups)
    diagonal = (norms * g.square().unflatten(1, (groups, -1)).sum(2)).flatten(1).sum(1)
    positions = g[0, 0].numel() * (len(g) // samples)
    patch = _conv_samples(_pooled_patch(x, kernel, tuple(g.shape[2:]), stride, dilation), samples) / positions
    total = _conv_samples(g.flatten(2).sum(2), samples)
    rows = [part.unflatten(1, (groups, -1)).flatten(2).transpose(0, 1) for part in (patch, total)]
    shared = ((rows[0] @ rows[0].mT) * (rows[1] @ rows[1].mT)).sum(0)
    return _conv_samples(diagonal, samples) * rest, shared * rest, own


def _pooled_patch(
    x: Tensor, kernel: tuple[int, ...], positions: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """The sum of a sample's patches ``(B, channels, *kernel)``, one axis after the other; ``x`` is padded."""
    for size, count, step, gap in zip(kernel, positions, stride, dilation, strict=True):
        starts = [index * gap for index in range(size)]
        window = (count - 1) * step + 1
        # The axis to be summed is always the third: the kernel's elements go to the end.
        x = torch.stack([x.narrow(2, start, window)[:, :, ::step].sum(2) for start in starts], -1)
    return x


def gram_levels(blocks: Sequence[Tensor], parts: Parts, rows: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """``a`` and ``b`` of a batch whose ``Γ`` is known: least squares beside the diagonal, then on it."""
    diagonal, shared, own = parts
    tiny = torch.finfo(blocks[0].dtype).tiny
    unit = torch.stack([diagonal.amax(), shared.diagonal().amax()]).amax().clamp_min(tiny)  # squares stay in range
    known = [(block - _pooled_block(own, row)) / unit for row, block in zip(rows, blocks, strict=True)]
    levels = [shared[row, row] / unit for row in rows]
    pairs = [(level - torch.diag(level.diagonal()), block) for level, block in zip(levels, known, strict=True)]
    above = torch.stack([(beside * block).sum() for beside, block in pairs]).sum()
    b = _pooled_ratio(above, torch.stack([beside.square().sum() for beside, _ in pairs]).sum())
    rest = torch.cat([(block - b * level).diagonal() for level, block in zip(levels, known, strict=True)])
    d = diagonal / unit
    return _pooled_ratio(d @ rest, d @ d), b


def _pooled_ratio(above: Tensor, below: Tensor) -> Tensor:
    """A least-squares factor, not negative; 0 where there is nothing to fit."""
    return (above / below.clamp_min(torch.finfo(below.dtype).tiny)).clamp_min(0)


def held_blocks(parts: Parts, levels: tuple[Tensor, Tensor], rows: Sequence[slice]) -> tuple[Tensor, ...]:
    """``a diag(d) + b Γ̄`` and the bias's part, a block a group."""
    diagonal, shared, own = parts
    a, b = levels
    return tuple(torch.diag(diagonal[row] * a) + shared[row, row] * b + _pooled_block(own, row) for row in rows)


def _pooled_block(own: Tensor, row: slice) -> Tensor:
    """A group's block of the bias's part, which is a zero where there is none."""
    return own[row, row] if own.dim() else own
