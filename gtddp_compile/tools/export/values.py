"""Options, tensors and losses as Python text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import loss as torch_losses

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.losses import Loss

INLINE = 64
"""Tensors of at most so many elements are written as numbers, larger ones as bytes."""


def value_text(value: Any) -> str:
    """A literal; a tensor of one element (a learning rate) as its number."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return value_text(value.item())
    if isinstance(value, Tensor):
        return tensor_text(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    if isinstance(value, tuple | list):
        inner = ", ".join(value_text(item) for item in value)
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{value_text(k)}: {value_text(v)}' for k, v in value.items())}}}"
    if isinstance(value, torch.dtype):
        return str(value)
    raise CompileError(
        f"an option is {value!r}, a {type(value).__name__}, which has no text", "Use numbers, strings and tensors"
    )


def tensor_text(tensor: Tensor) -> str:
    """A constant tensor, bit for bit."""
    plain = tensor.detach().cpu().contiguous()
    if plain.numel() <= INLINE:
        return f"torch.tensor({value_text(plain.tolist())}, dtype={plain.dtype})"
    data = base64_of(plain)
    pieces = ", ".join(repr(data[start : start + 80]) for start in range(0, len(data), 80))
    shape = value_text(tuple(plain.shape))
    return f"torch.frombuffer(bytearray(base64.b64decode(''.join([{pieces}]))), dtype={plain.dtype}).reshape({shape})"


def base64_of(tensor: Tensor) -> str:
    """The elements' bytes, row by row."""
    import base64

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return base64.b64encode(bytes(flat.view(torch.uint8).tolist())).decode()


# --- losses -----------------------------------------------------------------------------------------------------------


def loss_arguments(loss: Loss) -> tuple[str, dict[str, Any]] | None:
    """Class and arguments of one of torch's own losses, those at their default left out; ``None`` for any other."""
    kind = type(loss.module)
    if loss.module is None or getattr(torch_losses, kind.__name__, None) is not kind:
        return None
    found = {}
    for name, parameter in inspect.signature(kind.__init__).parameters.items():
        if name in ("self", "size_average", "reduce"):
            continue
        value = getattr(loss.module, name)
        if isinstance(value, Tensor) or value != parameter.default:
            found[name] = value
    return kind.__name__, found


def make_loss(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """One of torch's own losses from its class and arguments."""
    kind = getattr(torch_losses, name, None) if name in torch_losses.__all__ else None
    if kind is None:
        raise CompileError(f"torch has no loss {name!r}", "Give the loss to compile_optimizer(..., loss=...)")
    known = set(inspect.signature(kind.__init__).parameters) - {"self", "size_average", "reduce"}
    if not set(arguments) <= known:
        raise CompileError(
            f"{name} has no argument {', '.join(sorted(set(arguments) - known))}",
            "Give the loss to compile_optimizer(..., loss=...)",
        )
    made: nn.Module = kind(**arguments)
    return made
