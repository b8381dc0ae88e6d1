"""The length of a step, chosen by forward passes on the batch that it was made from."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.func import functional_call

from gtddp_compile.frontends.keywords import positional
from gtddp_compile.kernels import random_state, restore_random_state
from gtddp_compile.methods.losses import Loss
from gtddp_compile.runtime.method import BaseMethod
from gtddp_compile.runtime.model import ModelView


def choose_length(
    m: BaseMethod, grid: tuple[float, ...] | None, view: ModelView, loss: Loss, inputs: tuple[Any, ...], targets: Any,
    before: Any,
) -> None:  # fmt: skip
    """Leave the parameters at the best of the step lengths, or where they were if none is better than no step.

    Args:
        m: after the step was made: it knows the parameters before and after.
        grid: lengths in units of the step; ``None``: the step as it is.
        view: of the model, which is run by ``torch.func.functional_call``, so that nothing of it is written.
        loss: of the outputs as the model returns them.
        inputs, targets: the batch.
        before: the random state that the step began with, and every trial does.
    """
    if grid is None:
        return
    assert m.loss is not None
    model, inputs = positional(view.model, inputs)
    after, best, least = random_state(), 0.0, float(m.loss)
    if m.looks_ahead:  # its loss is of another place
        grid, least = (0.0, *grid), math.inf
    for length in grid:
        restore_random_state(before)
        trial = {name: torch.lerp(old, new, length) for name, old, new in m.moved()}
        with torch.no_grad():
            copies = {name: value.clone() for name, value in view.buffers().items()}
            outputs = functional_call(model, (trial, copies), inputs)
            found = float(loss.total(loss.per_sample(outputs, targets)))
        if found < least:
            best, least = length, found
    restore_random_state(after)
    if best != 1.0:
        m.lengthen(best)
    m.keep(0, step_length=best)
