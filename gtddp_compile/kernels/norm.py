"""Per-sample parameter gradients of a normalisation's affine part, ``h = x̂ ∘ w + b``.

``x̂`` depends on neither ``w`` nor ``b``, so ``γ_w = Σ g ∘ x̂`` and ``γ_b = Σ g`` over the positions of one
sample. ``norm_prepare`` computes ``x̂`` from the operands; it must see the *whole* batch (batch statistics
mix samples), and every other kernel takes the prepared operands ``(x̂,)``, whose leading axis may then be
sliced. The parameters are small: ``γ`` is always built. Where it is kept, ``norm_gamma`` makes it from the operands
themselves instead.

``form`` is ``"batch"``, ``"instance"``, ``"group"`` (parameters along axis 1) or ``"layer"``, ``"rms"``
(parameters along the last axes, ``normalized_shape``).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.batch_norm import Moments, batch_moments

CHUNK = 2**18
"""Elements of what is computed from some of the samples at a time: they stay in the second-level cache."""


def norm_prepare(
    operands: tuple[Tensor, ...],
    *,
    form: str,
    eps: float | None = 1e-5,
    training: bool = False,
    num_groups: int = 1,
    normalized_shape: tuple[int, ...] = (),
) -> tuple[Tensor, ...]:
    """``(x̂,)`` from ``(x,)`` or, where running statistics normalise, ``(x, running_mean, running_var)``.

    Running statistics are never advanced here. ``training`` means that the statistics of the input normalise
    (forms ``"batch"`` and ``"instance"``).
    """
    x = operands[0]
    if form == "layer":
        return (F.layer_norm(x, list(normalized_shape), None, None, 1e-5 if eps is None else eps),)
    if form == "rms":
        return (F.rms_norm(x, list(normalized_shape), None, eps),)
    small = 1e-5 if eps is None else eps
    if form == "group":
        return (F.group_norm(x, num_groups, None, None, small),)
    mean, variance = (None, None) if training else operands[1:3]
    if form == "instance":
        return (F.instance_norm(x, mean, variance, None, None, training, 0.0, small),)
    return (F.batch_norm(x, mean, variance, None, None, training, 0.0, small),)


def _norm_positions(values: Tensor, form: str, normalized_shape: tuple[int, ...]) -> Tensor:
    """Sum over the positions of each sample: ``(B, *shape of a parameter)``."""
    if form in ("layer", "rms"):
        kept = len(normalized_shape)
        return values if values.dim() == kept + 1 else values.flatten(1, -kept - 1).sum(1)
    return values if values.dim() == 2 else values.flatten(2).sum(2)


def norm_per_sample(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    *,
    form: str,
    normalized_shape: tuple[int, ...] = (),
    **options: Any,
) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    result = []
    if wants[0]:
        result.append(_norm_positions(g * operands[0], form, normalized_shape))
    if len(wants) > 1 and wants[1]:
        result.append(_norm_positions(g, form, normalized_shape))
    return tuple(result)


def norm_gamma(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    *,
    form: str,
    eps: float | None = 1e-5,
    training: bool = False,
    moments: Moments | None = None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """``γ`` from operands that are not prepared, some samples at a time: ``x̂`` never exists as a whole.

    ``moments``: a batch's, where somebody has them.
    """
    step = g.shape[0] if torch.compiler.is_compiling() else max(1, CHUNK * g.shape[0] // max(1, g.numel()))
    if form == "batch" and training:
        return _norm_batch_gamma(operands[0], g, wants, 1e-5 if eps is None else eps, step, moments)
    found = []
    for x, own in zip(operands[0].split(step), g.split(step), strict=True):
        prepared = norm_prepare((x, *operands[1:]), form=form, eps=eps, training=training, **options)
        found.append(norm_per_sample(prepared, own, params, wants, form=form, **options))
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def _norm_batch_gamma(
    x: Tensor, g: Tensor, wants: tuple[bool, ...], eps: float, step: int, moments: Moments | None
) -> tuple[Tensor, ...]:
    """The same under the batch's own statistics: ``γ_w = Σ g ∘ (x - mean) / √(var + eps)``."""
    shift = _norm_positions(g, "batch", ())
    if not wants[0]:
        return (shift,)
    mean, variance = batch_moments(x) if moments is None else moments
    centre, products = mean.reshape(-1, *(1,) * (x.dim() - 2)), []
    for part, own in zip(x.split(step), g.split(step), strict=True):
        products.append(_norm_positions((part - centre).mul_(own), "batch", ()))
    scale = (torch.cat(products) * (variance + eps).rsqrt()).to(g.dtype)
    return (scale, shift) if len(wants) > 1 and wants[1] else (scale,)


def norm_weighted(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    **options: Any,
) -> tuple[Tensor, ...]:
    """``γᵀ 1``, of each wanted parameter's shape."""
    return tuple(rows.sum(0) for rows in norm_per_sample(operands, g, params, wants, **options))


def norm_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    **options: Any,
) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    gradients = norm_per_sample(operands, g, params, wants, **options)
    scaled = [(rows * entry**0.5).flatten(1) for rows, entry in zip(gradients, metric, strict=True)]
    gamma = torch.cat(scaled, 1)
    return gamma @ gamma.mT


def norm_gram_diagonal(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    **options: Any,
) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    gradients = norm_per_sample(operands, g, params, wants, **options)
    parts = [(rows.square() * entry).flatten(1).sum(1) for rows, entry in zip(gradients, metric, strict=True)]
    return torch.stack(parts).sum(0)


def norm_directional(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    direction: tuple[Tensor, ...],
    **options: Any,
) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``."""
    gradients = norm_per_sample(operands, g, params, wants, **options)
    parts = [(rows * change).flatten(1).sum(1) for rows, change in zip(gradients, direction, strict=True)]
    return torch.stack(parts).sum(0)
