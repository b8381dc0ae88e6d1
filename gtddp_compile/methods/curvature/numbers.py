"""Options and states as numbers: what the base methods' checks and updates share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError

Scalar = float | Tensor


def number(name: str, option: str, value: object) -> float:
    """``value`` as a float, for checking; a tensor has to hold one element."""
    found = math.nan
    if isinstance(value, Tensor | int | float) and not isinstance(value, bool):
        found = float(value) if not isinstance(value, Tensor) or value.numel() == 1 else math.nan
    if not math.isfinite(found):
        raise out_of_range(name, option, value, "a finite number, or a tensor of one element")
    return found


def out_of_range(name: str, option: str, value: object, wanted: str) -> CompileError:
    """The error of a bad option."""
    shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() != 1 else value
    return CompileError(f"{name}: {option} is {shown!s}", f"Give {option} {wanted}")


def refuse_fractions(name: str, options: Mapping[str, Any], **least: int) -> None:
    """Options that count something are whole numbers, no smaller than is said here."""
    for option, smallest in least.items():
        value = options.get(option, smallest)
        if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
            raise out_of_range(name, option, value, f"an integer that is at least {smallest}")


def scalar(value: Scalar, param: Tensor) -> Scalar:
    """An option as a factor of tensors like ``param``: a float, or a 0-d tensor that keeps their dtype."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().reshape(())
    return value.to(param.dtype) if param.dim() == 0 else value


def counted(count: Tensor) -> Tensor:
    """A 0-d count and one more. Where reading it waits for no device it is made of the number: an addition of 0-d
    tensors takes three times as long, and a step counts several times a parameter.
    """
    if torch.compiler.is_compiling() or type(count) is not Tensor or not count.is_cpu:
        return count + 1  # of a tensor that torch.export follows there is no number
    return torch.scalar_tensor(float(count) + 1, dtype=count.dtype)


def zeros(param: Tensor, *keys: str) -> dict[str, Tensor]:
    """torch.optim's first state: ``"step"``, a 0-d float tensor on the CPU, and zeros like the parameter."""
    wide = torch.get_default_dtype() == torch.float64
    step = torch.zeros((), dtype=torch.float64 if wide else torch.float32)
    return {"step": step, **{key: torch.zeros_like(param).detach() for key in keys}}


def statistics_gradient(name: str, g_stat: Tensor | None) -> Tensor:
    """``g_stat`` of a method that cannot do without it."""
    if g_stat is None:
        raise ValueError(f"{name} takes statistics from the gradient: observe() needs g_stat")
    return g_stat
