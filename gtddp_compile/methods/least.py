"""What torch's own losses are above the least that their targets leave, whatever the outputs (docs/theory.md#aim)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.kernels.loss import least_cross_entropy, poisson_excess, smoothed_least

BySample = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(elements, outputs, targets)`` -> one number a sample, as the loss adds its elements up."""
Known = Callable[[Any, BySample, Tensor, Tensor, Tensor], Tensor | None]


def _of_classes(loss: Any, by_sample: BySample, phi: Tensor, outputs: Tensor, targets: Tensor) -> Tensor | None:
    smoothing, weight = loss.label_smoothing, loss.weight
    if targets.shape == outputs.shape:
        shares = _as_precise(targets, outputs) * (1.0 - smoothing) + smoothing / outputs.shape[1]
        if weight is not None:
            shares = shares * weight.reshape(-1, *(1 for _ in outputs.shape[2:]))
        return phi - by_sample(least_cross_entropy(shares, 1), outputs, targets)
    if not smoothing:
        return None
    return phi - by_sample(smoothed_least(outputs, targets, weight, smoothing, loss.ignore_index), outputs, targets)


def _of_shares(loss: Any, by_sample: BySample, phi: Tensor, outputs: Tensor, targets: Tensor) -> Tensor | None:
    """Of logits or of probabilities, whose loss has no ``pos_weight``."""
    if targets.shape != outputs.shape:
        return None
    share, more, weight = _as_precise(targets, outputs), getattr(loss, "pos_weight", None), loss.weight
    least = least_cross_entropy(torch.stack([share if more is None else share * more, 1.0 - share]), 0)
    return phi - by_sample(least if weight is None else least * weight, outputs, targets)


def _of_counts(loss: Any, by_sample: BySample, phi: Tensor, outputs: Tensor, targets: Tensor) -> Tensor | None:
    if targets.shape != outputs.shape:
        return None
    eps = None if loss.log_input else loss.eps
    return by_sample(poisson_excess(outputs, _as_precise(targets, outputs), eps), outputs, targets)


def _as_precise(targets: Tensor, outputs: Tensor) -> Tensor:
    return targets.to(torch.promote_types(targets.dtype, outputs.dtype))


KNOWN: Mapping[type[nn.Module], Known] = {
    nn.CrossEntropyLoss: _of_classes,
    nn.BCEWithLogitsLoss: _of_shares,
    nn.BCELoss: _of_shares,
    nn.PoissonNLLLoss: _of_counts,
}
"""Losses whose least depends on the targets; ``None``: it is 0, or outputs that targets share cannot reach it."""


def excess_of(known: Known, loss: Any, by_sample: BySample, phi: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    """What every sample's loss is above its least, (B,).

    Args:
        known: of the loss's kind.
        loss: the module with reduction "none".
        by_sample: how it adds its elements up.
        phi: the losses. One of exactly 0, and one whose targets the loss is not made for (shares above 1, counts below
            0: it has no least), is its own excess; no other's is less than 0, which rounding can make of it.
        outputs, targets: of the batch.
    """
    found = known(loss, by_sample, phi, outputs, targets)
    if found is None:
        return phi
    least = torch.finfo(phi.dtype).tiny
    return torch.where(found.isnan() | (phi == 0), phi, found.to(phi.dtype).clamp_min(least))
