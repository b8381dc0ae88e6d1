"""The length of a step, chosen by forward passes on the batch that it was made from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gtddp_compile.losses import Loss
from gtddp_compile.runtime.method import BaseMethod


def choose_length(
    m: BaseMethod,
    grid: tuple[float, ...],
    model: nn.Module,
    buffers: Mapping[str, Tensor],
    loss: Loss,
    inputs: tuple[Any, ...],
    targets: Any,
    again: Callable[[], None],
) -> float:
    """Leave the parameters at the best of the step lengths, or where they were if none is better than no step.

    Args:
        m: after the step was made: it knows the parameters before and after.
        grid: lengths in units of the step.
        model: run by ``torch.func.functional_call``, so that nothing of it is written.
        buffers: as they were before the step; every trial has a copy.
        loss: of the outputs as the model returns them.
        inputs, targets: the batch.
        again: restores the random state that the step began with.

    Returns:
        The length taken; 0 for no step.
    """
    assert m.loss is not None
    best, least = 0.0, float(m.loss)
    for length in grid:
        again()
        trial = {name: torch.lerp(old, new, length) for name, old, new in m.moved()}
        with torch.no_grad():
            copies = {name: value.clone() for name, value in buffers.items()}
            outputs = functional_call(model, (trial, copies), inputs)
            found = float(loss.total(loss.per_sample(outputs, targets)))
        if found < least:
            best, least = length, found
    again()
    if best != 1.0:
        m.lengthen(best)
    return best
