"""Checks and scalars that all base methods share: torch.optim's ranges, worded as :class:`CompileError`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError

Scalar = float | Tensor


def check_ranges(name: str, options: Mapping[str, Any], *nonnegative: str) -> None:
    """``maximize`` is off and every option named in ``nonnegative`` is a number that is at least 0.

    Args:
        name: the base method, for the message.
        options: a param_group, or the fields of a curvature.
        nonnegative: options to check.

    Raises:
        CompileError: one of them is out of range.
    """
    if options.get("maximize"):
        raise CompileError(
            f"{name} was asked for maximize=True, but the recursions minimise the loss",
            "Negate the loss instead: loss=lambda outputs, targets: -gain(outputs, targets)",
        )
    for option in nonnegative:
        value = number(name, option, options[option])
        if not value >= 0.0:
            raise out_of_range(name, option, options[option], "a number that is at least 0")


def number(name: str, option: str, value: object) -> float:
    """``value`` as a float, for checking; a tensor has to hold one element."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    raise out_of_range(name, option, value, "a number, or a tensor of one element")


def out_of_range(name: str, option: str, value: object, wanted: str) -> CompileError:
    """The error of a bad option."""
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() != 1 else value
    return CompileError(f"{name}: {option} is {shown!s}", f"Give {option} {wanted}")


def scalar(value: Scalar, param: Tensor) -> Scalar:
    """An option as a factor of tensors like ``param``: a float, or a 0-d tensor that keeps their dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().reshape(())
    return value.to(param.dtype) if param.dim() == 0 else value


def subtract(param: Tensor, direction: Tensor, rate: Scalar) -> None:
    """``param -= rate · direction`` in place, in one pass where the rate is a number."""
    if isinstance(rate, Tensor):
        param.sub_(direction * scalar(rate, param))
    else:
        param.sub_(direction, alpha=rate)


def subtract_quotient(param: Tensor, numerator: Tensor, denominator: Tensor, rate: Scalar) -> None:
    """``param -= rate · numerator / denominator`` in place, in one pass where the rate is a number."""
    if isinstance(rate, Tensor):
        param.sub_(numerator / denominator * scalar(rate, param))
    else:
        param.addcdiv_(numerator, denominator, value=-rate)


def first_step() -> Tensor:
    """torch.optim's ``"step"`` before the first step: a 0-d float tensor on the CPU."""
    wide = torch.get_default_dtype() == torch.float64
    return torch.zeros((), dtype=torch.float64 if wide else torch.float32)


def statistics_gradient(name: str, g_stat: Tensor | None) -> Tensor:
    """``g_stat`` of a method that cannot do without it."""
    if g_stat is None:
        raise ValueError(f"{name} takes statistics from the gradient: observe() needs g_stat")
    return g_stat
