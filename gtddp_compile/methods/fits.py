"""Whether outputs and targets fit a loss and each other, asked at the first step; errors say what to change."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.losses import (
    CALLABLE,
    NEGATIVE_LOG,
    Loss,
    arguments_of,
    is_kind,
    main_of,
    shape_of,
    tensors_in,
)

_CLASS_TARGETS = (*NEGATIVE_LOG, nn.MultiMarginLoss)
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


def check(loss: Loss, outputs: Any, targets: Any) -> None:
    """Outputs and targets fit the loss and each other, and ``φ`` the user's own loss: asked at the first step.

    Raises:
        CompileError: empty batch; outputs and targets of different batch size; a class target out of range; the loss
            cannot take them; or ``φ`` does not add up to the module's value (relative 1e-5, or 1e-9 in float64).
    """
    if loss.module is None:
        if any(leaf.dim() and not leaf.shape[0] for leaf in tensors_in(outputs)):
            raise CompileError("the batch is empty", "Leave empty batches out")
        return
    main = _check_shapes(loss, outputs, targets)
    if is_kind(loss.module, *_CLASS_TARGETS) and targets.shape != main.shape:
        _check_classes(loss, main, targets, getattr(loss.module, "ignore_index", None))
    _check_value(loss, loss.module, outputs, targets)


def _check_value(loss: Loss, module: nn.Module, outputs: Any, targets: Any) -> None:
    """``φ`` adds up to the module's own value; a loss that is not finite is not judged here."""
    try:
        expected = module(*arguments_of(module, outputs, targets)).item()
    except (torch.OutOfMemoryError, CompileError):
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise CompileError(
            f"the loss {loss.name} refuses outputs {shape_of(main_of(module, outputs, loss.name))} and targets"
            f" {shape_of(targets)}: {error}",
            _classes_last(module, outputs, targets) or "Give it the shapes and dtypes it documents",
        ) from error
    phi = loss.per_sample(outputs, targets)
    total, size = loss.total(phi).item(), loss.total(phi.abs()).item()
    close = abs(total - expected) <= _TOLERANCE.get(phi.dtype, 2e-2) * max(size, abs(expected))
    if math.isfinite(total) and not close:
        raise CompileError(
            f"the loss {loss.name} is {expected:.9g}, but its samples add up to {total:.9g}",
            "Write it without a reduction of its own: " + CALLABLE,
        )


def _check_shapes(loss: Loss, outputs: Any, targets: Any) -> Tensor:
    """Tensors with the same batch, and not an empty one; returns the main output."""
    assert loss.module is not None
    main = main_of(loss.module, outputs, loss.name)
    if isinstance(targets, Tensor) and targets.device.type != main.device.type:
        raise CompileError(
            f"the targets are on {targets.device}, the outputs on {main.device}", "Move them: y.to(device)"
        )
    if not isinstance(targets, Tensor):
        raise CompileError(
            f"the loss {loss.name} takes targets as a tensor, but they are {type(targets).__name__}",
            "Give step() a tensor of targets, or " + CALLABLE,
        )
    axes = 2 if is_kind(loss.module, *_CLASS_TARGETS) else 1
    if main.dim() < axes:
        wanted = "(B, C, …)" if axes == 2 else "(B, …)"
        raise CompileError(f"the outputs have shape {tuple(main.shape)}, without a batch axis", f"Make it {wanted}")
    if not main.shape[0]:
        raise CompileError("the batch is empty", "Leave empty batches out")
    if targets.shape[:1] != main.shape[:1]:
        raise CompileError(
            f"outputs {shape_of(main)} and targets {shape_of(targets)} differ in batch size",
            "Give one target a sample, along the first axis",
        )
    return main


def _check_classes(loss: Loss, outputs: Tensor, targets: Tensor, ignored: int | None) -> None:
    """Class targets are integers in [0, C), or the ignored index."""
    classes = outputs.shape[1]
    if targets.is_floating_point() or targets.is_complex():
        raise CompileError(
            f"the loss {loss.name} takes class indices, or probabilities shaped as the outputs"
            f" {shape_of(outputs)}; the targets are {targets.dtype} {shape_of(targets)}",
            "Give targets of dtype torch.int64, or probabilities of that shape",
        )
    bad = (targets < 0) | (targets >= classes)
    if ignored is not None:
        bad &= targets != ignored
    if bad.any():
        place = bad.nonzero()[0].tolist()
        raise CompileError(
            f"the loss {loss.name} was given class target {int(targets[bad][0])} at {place}, but there are"
            f" {classes} classes",
            _classes_last(loss.module, outputs, targets)
            or f"Give targets from 0 to {classes - 1}" + ("" if ignored is None else f", or {ignored} to ignore one"),
        )


def _classes_last(module: nn.Module | None, outputs: Any, targets: Any) -> str:
    """What to do where the outputs look like (B, T, C), as a language model's; otherwise nothing."""
    if module is None or not is_kind(module, *NEGATIVE_LOG) or not isinstance(outputs, Tensor):
        return ""
    if outputs.dim() < 3 or not isinstance(targets, Tensor) or targets.shape != outputs.shape[:-1]:
        return ""
    return (
        f"Classes lie along axis 1, (B, C, T), and the outputs are {shape_of(outputs)}: return them transposed, or pass"
        " a callable, lambda o, y: F.cross_entropy(o.transpose(1, -1), y, reduction='none').flatten(1).mean(1)"
    )
