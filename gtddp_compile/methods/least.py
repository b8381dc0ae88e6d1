"""The least that torch's own losses can be with given targets, whatever the outputs (docs/theory.md#aim)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.kernels.loss import best_classes, best_logits, best_rates, best_shares, smoothed_least


def _of_classes(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor | None:
    if targets.shape == outputs.shape:
        return _at(loss, best_classes(outputs, targets, loss.weight, loss.label_smoothing), outputs, targets)
    if not loss.label_smoothing:
        return None
    return smoothed_least(outputs, targets, loss.weight, loss.label_smoothing, loss.ignore_index)


def _of_logits(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    return _at(loss, best_logits(targets, loss.pos_weight), outputs, targets)


def _of_shares(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    return _at(loss, best_shares(targets), outputs, targets)


def _of_rates(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    return _at(loss, best_rates(targets, loss.log_input), outputs, targets)


def _at(loss: Any, best: Tensor, outputs: Tensor, targets: Tensor) -> Tensor:
    found: Tensor = loss(torch.broadcast_tensors(best, outputs)[0], targets)
    return found


LEAST: Mapping[type[nn.Module], Callable[[Any, Tensor, Tensor], Tensor | None]] = {
    nn.CrossEntropyLoss: _of_classes,
    nn.BCEWithLogitsLoss: _of_logits,
    nn.BCELoss: _of_shares,
    nn.PoissonNLLLoss: _of_rates,
}
"""Of losses whose least value depends on the targets: its elements, by the loss with reduction "none", the outputs
(whose shape and dtype are read) and the targets. ``None``: they are 0."""


def least_of(
    elements: Callable[[Tensor, Tensor], Tensor | None],
    reduced: Callable[[Tensor, Tensor, Tensor], Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> Tensor | None:
    """The least ``φ``, (B,)."""
    found = elements(outputs, targets)
    return None if found is None else reduced(found, outputs, targets)
