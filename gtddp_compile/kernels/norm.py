"""Per-sample parameter gradients of a normalisation's affine part, ``h = x̂ ∘ w + b``, and of PReLU's slopes.

``x̂`` depends on neither ``w`` nor ``b``, so ``γ_w = Σ g ∘ x̂`` and ``γ_b = Σ g`` over the positions of one
sample. ``norm_prepare`` computes ``x̂`` from the operands; it must see the *whole* batch (batch statistics
mix samples), and every other kernel takes the prepared operands ``(x̂,)``, whose leading axis may then be
sliced. The parameters are small: ``γ`` is always built. Where it is kept, ``norm_gamma`` makes it from the operands
themselves instead.

PReLU is ``h = x̂ ∘ w + max(x, 0)`` with ``x̂ = min(x, 0)``; one slope may serve all channels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.batch_norm import Moments, batch_moments
from gtddp_compile.kernels.bundle import Inverses, Layer, Norm
from gtddp_compile.kernels.rows import rows_directional, rows_gram, rows_gram_diagonal

CHUNK = 2**18
"""Elements of what is computed from some of the samples at a time: they stay in the second-level cache."""


def norm_prepare(operands: tuple[Tensor, ...], how: Norm, moments: Moments | None = None) -> tuple[Tensor, ...]:
    """``(x̂,)`` from ``(x,)`` or, where running statistics normalise, ``(x, running_mean, running_var)``.

    Running statistics are never advanced here. ``moments``: a batch's, where ``x`` is not all of it.
    """
    x, shape = operands[0], list(how.normalized_shape)
    if how.form == "prelu":
        return (x.clamp_max(0),)
    if how.form == "rms":
        return (F.rms_norm(x, shape, None, how.eps),)
    small = 1e-5 if how.eps is None else how.eps
    if how.form == "layer":
        return (F.layer_norm(x, shape, None, None, small),)
    if how.form == "group":
        return (F.group_norm(x, how.num_groups, None, None, small),)
    if moments is not None:
        return (F.batch_norm(x, moments[0].to(x.dtype), moments[1].to(x.dtype), None, None, False, 0.0, small),)
    mean, variance = (None, None) if how.training else operands[1:3]
    function = F.instance_norm if how.form == "instance" else F.batch_norm
    return (function(x, mean, variance, None, None, how.training, 0.0, small),)


def _norm_positions(values: Tensor, how: Norm) -> Tensor:
    """Sum over the positions of each sample: ``(B, *shape of a parameter)``."""
    if how.form in ("layer", "rms"):
        kept = len(how.normalized_shape)
        return values if values.dim() == kept + 1 else values.flatten(1, -kept - 1).sum(1)
    return values if values.dim() == 2 else values.flatten(2).sum(2)


def norm_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    (x, *_), g, params, wants, how = layer
    if how.form == "prelu" and params[0] is not None and params[0].numel() == 1:
        return ((g * x).flatten(1).sum(1).reshape(-1, *params[0].shape),)
    scale = (_norm_positions(g * x, how),) if wants[0] else ()
    return (*scale, _norm_positions(g, how)) if any(wants[1:]) else scale


def norm_gamma(layer: Layer, moments: Moments | None = None) -> tuple[Tensor, ...]:
    """``γ`` from operands that are not prepared, some samples at a time: ``x̂`` never exists as a whole.

    ``moments``: a batch's, where somebody has them.
    """
    operands, g, params, wants, how = layer
    step = g.shape[0] if torch.compiler.is_compiling() else max(1, CHUNK * g.shape[0] // max(1, g.numel()))
    if how.form == "batch" and how.training:
        return _norm_batch_gamma(layer, step, moments)
    found = []
    for x, own in zip(operands[0].split(step), g.split(step), strict=True):
        prepared = norm_prepare((x, *operands[1:]), how)
        found.append(norm_per_sample(Layer(prepared, own, params, wants, how)))
    return tuple(torch.cat(rows) for rows in zip(*found, strict=True))


def _norm_batch_gamma(layer: Layer, step: int, moments: Moments | None) -> tuple[Tensor, ...]:
    """The same under the batch's own statistics: ``γ_w = Σ g ∘ (x - mean) / √(var + eps)``."""
    (x, *_), g, _, wants, how = layer
    shift = (_norm_positions(g, how),) if any(wants[1:]) else ()
    if not wants[0]:
        return shift
    mean, variance = batch_moments(x) if moments is None else moments[:2]
    centre, products = mean.reshape(-1, *(1,) * (x.dim() - 2)), []
    for part, own in zip(x.split(step), g.split(step), strict=True):
        products.append(_norm_positions((part - centre).mul_(own), how))
    small = 1e-5 if how.eps is None else how.eps
    return ((torch.cat(products) * (variance + small).rsqrt()).to(g.dtype), *shift)


def norm_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``, of each wanted parameter's shape."""
    return tuple(rows.sum(0) for rows in norm_per_sample(layer))


def norm_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    return rows_gram(norm_per_sample(layer), metric)


def norm_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    return rows_gram_diagonal(norm_per_sample(layer), metric)


def norm_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``."""
    return rows_directional(norm_per_sample(layer), direction)
