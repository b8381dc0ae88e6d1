"""Batch-norm in normal form: its buffers are arguments, advanced in place where they are given."""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Joined, pieces

CACHED = 2**18
"""Elements that are centred at a time: they stay in the second-level cache."""

FEW = 32
"""Positions below which torch finds a batch's moments as fast."""

SMALL = 2**18
"""Elements below which it does."""

Moments = tuple[Tensor, ...]
"""Of every channel, ``(C,)`` each: mean and (biased) variance; then, where the gradient of what was normalised is known
too, what it sums up to with ``x̂`` and alone, a sample."""


def batch_norm(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, num_batches_tracked: Tensor | None,
    weight: Tensor | None, bias: Tensor | None, *, training: bool = False, momentum: float | None = 0.1,
    eps: float = 1e-5, corrected: bool = False, moments: Moments | None = None, sync: bool = False,
) -> Tensor:  # fmt: skip
    """``h = (x - mean) / √(var + eps) ∘ w + b`` over axis 1, as ``torch.nn.BatchNorm1d`` to ``3d`` compute it.

    In training mode the batch's own statistics normalise and the buffers that are not ``None`` advance by
    ``momentum`` (``None``: cumulative average); the second forward sweep passes ``None``. ``corrected``: in the k-th
    batch by ``max(momentum, 1/k)``, so that nothing is left of what they began with. In evaluation mode the running
    statistics normalise, or the batch's own where there are none. ``moments``: those of ``x``, where somebody has
    them; they are not constants to autograd. Compiled code finds its own. ``sync``: it was a SyncBatchNorm, whose
    moments programs over several ranks give.
    """
    if not training:
        own = running_mean is None
        return F.batch_norm(x, running_mean, running_var, weight, bias, own, 0.0, eps)
    tracked = num_batches_tracked
    if corrected and momentum and tracked is not None and running_mean is not None and running_var is not None:
        # Torch advances copies, which autograd keeps. The counter is not read: that would wait for a device.
        copies = running_mean.detach().clone(), running_var.detach().clone()
        found = batch_norm(
            x, *copies, tracked, weight, bias, training=True, momentum=momentum, eps=eps, moments=moments
        )
        gain = tracked.to(x.device, running_mean.dtype).reciprocal().clamp(min=momentum)
        for value, moved in zip((running_mean, running_var), copies, strict=True):
            value.detach().lerp_(moved, gain / momentum)
        return found
    factor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = 1.0 / float(num_batches_tracked)
    mean = None if running_mean is None else running_mean.detach()
    var = None if running_var is None else running_var.detach()
    if moments is None or torch.compiler.is_compiling():
        return F.batch_norm(x, mean, var, weight, bias, True, factor, eps)
    if mean is not None and var is not None:
        entries = moments.entries if isinstance(moments, JoinedMoments) else x.numel() // x.shape[1]
        mean.lerp_(moments[0].to(mean.dtype), factor)
        var.lerp_((moments[1] * (entries / (entries - 1))).to(var.dtype), factor)
    wide = (None if value is None else value.to(moments[0].dtype) for value in (x, weight, bias))
    normalised: Tensor
    if isinstance(moments, JoinedMoments):
        normalised = _NormalisedTogether.apply(*wide, eps, moments)
    else:
        normalised = _Normalised.apply(*wide, eps, *moments)  # type: ignore[no-untyped-call]
    return normalised.to(x.dtype)


class JoinedMoments(NamedTuple):
    """Mean and (biased) variance, ``(C,)`` each, of a batch that several ranks share, and of how many entries."""

    mean: Tensor
    variance: Tensor
    entries: int
    ranks: Joined


def joined_moments(x: Tensor, ranks: Joined) -> JoinedMoments:
    """:func:`batch_moments` of the shards of all ranks: two sums over ranks."""
    with torch.no_grad():
        precise = torch.promote_types(x.dtype, torch.float32)
        lines = x.detach().to(precise).transpose(0, 1).flatten(1)
        total, count = ranks.all_reduce((lines.sum(1), lines.new_tensor([float(lines.shape[1])])))
        mean = total / count
        return JoinedMoments(mean, ranks.all_reduce((lines - mean[:, None]).square().sum(1)) / count, int(count), ranks)


class _NormalisedTogether(torch.autograd.Function):
    """Normalisation by the moments of all ranks, through which every sample's gradient reaches every rank."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, moments: JoinedMoments
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.moments = eps, moments
        return F.batch_norm(x, moments.mean, moments.variance, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (mean, variance, entries, ranks) = ctx.saved_tensors, ctx.moments
        axes, shape = [0, *range(2, x.dim())], (-1, *(1,) * (x.dim() - 2))
        rstd = (variance + ctx.eps).rsqrt()
        normal = (x - mean.view(shape)) * rstd.view(shape)
        own = g.sum(axes), (g * normal).sum(axes)
        shift, scale = (total / entries for total in ranks.all_reduce(own))
        found = (g - shift.view(shape) - normal * scale.view(shape)) * rstd.view(shape)
        found = found if weight is None else found * weight.view(shape)
        return found, None if weight is None else own[1], own[0], None, None


def quick_moments(x: Tensor) -> Moments | None:
    """:func:`batch_moments` where they are found faster here than by torch: in a sweep of a stage.

    Measured: on a CPU torch spends several times as long on them as on normalising.
    """
    here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64) and not torch.compiler.is_compiling()
    large = here and x.numel() >= SMALL and math.prod(x.shape[2:]) >= FEW and x.is_contiguous()
    return batch_moments(x) if large else None


def batch_moments(x: Tensor) -> Moments:
    """Mean and variance of a batch's channels (axis 1), in two passes and in float32 at least; no gradient."""
    with torch.no_grad():
        precise = torch.promote_types(x.dtype, torch.float32)
        lines = x.detach().flatten(2) if x.dim() > 2 else x.detach().unsqueeze(2)
        entries = x.shape[0] * lines.shape[2]
        mean = lines.sum(2, dtype=precise).sum(0) / entries
        rows = pieces(len(x), max(1, CACHED * len(x) // max(1, x.numel())))
        squares = torch.zeros_like(mean)
        for part in rows:
            centred = lines[part] - mean.unsqueeze(1)
            squares += torch.linalg.vector_norm(centred, dim=2).square().sum(0)
    return mean, squares / entries


class _Normalised(torch.autograd.Function):
    """torch's own normalisation and its own gradient, with the moments given."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, mean: Tensor, var: Tensor) -> Tensor:
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _, eps, *moments = inputs
        ctx.save_for_backward(x, weight, *moments)
        ctx.save_for_forward(x, weight, *moments)
        ctx.eps = eps

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        wanted, rstd = list(ctx.needs_input_grad[:3]), (var + ctx.eps).rsqrt()
        found = torch.ops.aten.native_batch_norm_backward(g, x, weight, None, None, mean, rstd, True, ctx.eps, wanted)
        return (*(one if want else None for one, want in zip(found, wanted, strict=True)), None, None, None)

    @staticmethod
    def jvp(ctx: Any, moved: Tensor, *rest: Tensor | None) -> Tensor:
        x, weight, mean, var = ctx.saved_tensors
        scale, shift, *_ = rest
        axes, shape = [0, *range(2, x.dim())], (-1, *(1,) * (x.dim() - 2))
        rstd = (var + ctx.eps).rsqrt().view(shape)
        normal = (x - mean.view(shape)) * rstd
        found: Tensor = (moved - moved.mean(axes, True) - normal * (normal * moved).mean(axes, True)) * rstd
        found = found if weight is None else found * weight.view(shape)
        found = found if scale is None else found + normal * scale.view(shape)
        return found if shift is None else found + shift.view(shape)
