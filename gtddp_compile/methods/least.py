"""The least that torch's own losses can be with given targets, whatever the outputs (docs/theory.md#aim)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile import kernels

Best = Callable[[Any, Tensor, Tensor], Tensor | None]


def _of_classes(loss: nn.CrossEntropyLoss, outputs: Tensor, targets: Tensor) -> Tensor | None:
    return kernels.best_classes(outputs, targets, loss.weight, loss.label_smoothing)


def _of_logits(loss: nn.BCEWithLogitsLoss, _: Tensor, targets: Tensor) -> Tensor:
    return kernels.best_logits(targets, loss.pos_weight)


def _of_shares(_: nn.BCELoss, __: Tensor, targets: Tensor) -> Tensor:
    return kernels.best_shares(targets)


def _of_rates(loss: nn.PoissonNLLLoss, _: Tensor, targets: Tensor) -> Tensor:
    return kernels.best_rates(targets, loss.log_input)


BEST: Mapping[type[nn.Module], Best] = {
    nn.CrossEntropyLoss: _of_classes,
    nn.BCEWithLogitsLoss: _of_logits,
    nn.BCELoss: _of_shares,
    nn.PoissonNLLLoss: _of_rates,
}
"""Of a loss whose least value depends on the targets: the outputs at which it has it. ``None``: it is 0."""


def least_of(
    best: Callable[[Tensor, Tensor], Tensor | None],
    elements: Callable[[Tensor, Tensor], Tensor],
    outputs: Tensor,
    targets: Tensor,
) -> Tensor | None:
    """``φ`` of the best outputs, (B,)."""
    found = best(outputs, targets)
    return None if found is None else elements(torch.broadcast_tensors(found, outputs)[0], targets)
