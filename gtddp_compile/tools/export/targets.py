"""The closed table of functions that a stored program may name: what computes with tensors, and nothing else.

A file says ``"torch.relu"``; that is looked up here and never imported or evaluated. Functions of torch are those
that ``torch.overrides`` lists as operations on tensors, so that ``torch.load`` or ``torch.compile`` have no entry.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from gtddp_compile import kernels
from gtddp_compile.graph import Method

CREATION = (
    *("arange", "as_tensor", "empty", "empty_like", "eye", "full", "full_like", "linspace", "logspace", "ones"),
    *("ones_like", "rand", "rand_like", "randint", "randn", "randn_like", "randperm", "scalar_tensor", "tensor"),
    *("tril_indices", "triu_indices", "zeros", "zeros_like", "broadcast_shapes", "is_tensor", "normal"),
)
"""Functions of torch that make tensors; ``torch.overrides`` lists only those that take them."""

METHODS = frozenset({"new_empty", "new_full", "new_ones", "new_tensor", "new_zeros", "unflatten"})
UNLISTED: Mapping[str, Callable[..., Any]] = {
    "F.hardsigmoid": F.hardsigmoid, "F.hardswish": F.hardswish, "F.upsample": F.upsample,
    "torch._weight_norm": torch._weight_norm,
}  # fmt: skip
"""Methods and functions of the kind that ``torch.overrides`` leaves out."""

OPERATORS = (
    *("abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "inv", "invert", "le", "lt", "matmul", "mod"),
    *("mul", "ne", "neg", "not_", "or_", "pos", "pow", "sub", "truediv", "xor", "is_", "is_not", "contains"),
)
ARITHMETIC = (
    *("ceil", "cos", "exp", "floor", "isqrt", "log", "log2", "pow", "prod", "sin", "sqrt", "tanh", "trunc"),
    "gcd",
)
BUILTINS: Mapping[str, Callable[..., Any]] = {
    f.__name__: f for f in (getattr, len, int, float, bool, tuple, list, min, max, sum, abs, round)
}
ATTRIBUTES = frozenset({"T", "mT", "H", "mH", "real", "imag", "shape", "dtype", "device", "ndim"})
"""What ``getattr`` may ask of a tensor."""

SYSTEM = frozenset(
    {"backward", "const_data_ptr", "data_ptr", "module_load", "numpy", "pin_memory", "record_stream", "register_hook"}
    | {"register_post_accumulate_grad_hook", "retain_grad", "storage", "storage_type", "untyped_storage"}
)
"""Tensor methods that reach outside the computation."""

ATEN_REFUSED = frozenset({"from_file"})


@cache
def functions() -> Mapping[str, Callable[..., Any]]:
    """Every function with an entry, by its name in generated code."""
    takes_tensors = {id(f) for listed in torch.overrides.get_overridable_functions().values() for f in listed}
    found: dict[str, Callable[..., Any]] = {f"operator.{name}": getattr(operator, name) for name in OPERATORS}
    found.update((f"math.{name}", getattr(math, name)) for name in ARITHMETIC)
    spaces = {"torch": torch, "torch.linalg": torch.linalg, "torch.fft": torch.fft, "torch.special": torch.special}
    for prefix, module in (*spaces.items(), ("F", F)):
        for name in dir(module):
            if not name.startswith("_") and id(getattr(module, name)) in takes_tensors:
                found[f"{prefix}.{name}"] = getattr(module, name)
    found.update((f"torch.{name}", getattr(torch, name)) for name in CREATION)
    found.update(UNLISTED)
    found.update(kernels.KERNELS)
    found.update(BUILTINS)
    return found


@cache
def methods() -> frozenset[str]:
    """Tensor methods that a program may call; in-place ones have been replaced by the normal form."""
    names = {f.__name__ for f in torch.overrides.get_overridable_functions()[torch.Tensor]}
    listed = {name for name in names if name.isidentifier() and name[0] != "_" and name[-1] != "_"}
    return (METHODS | listed) - SYSTEM


@cache
def _names() -> Mapping[int, str]:
    return {id(function): name for name, function in functions().items()}


def name_of(target: Any) -> tuple[str, str] | None:
    """``("function" | "method" | "aten", name)`` of an operation's target; ``None`` if it has no entry."""
    if isinstance(target, Method):
        return ("method", target.name) if target.name in methods() else None
    if isinstance(target, torch._ops.OpOverload):
        name = str(target)
        return ("aten", name) if aten(name) is target else None
    found = _names().get(id(target))
    return None if found is None else ("function", found)


def aten(name: str) -> Any:
    """The aten operator called ``"aten.relu.default"``; ``None`` if there is none or it is not one for programs."""
    space, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if space != "aten" or packet in ATEN_REFUSED or packet.startswith("__") or not packet.isidentifier():
        return None
    found = getattr(torch.ops.aten, packet, None)
    if not isinstance(found, torch._ops.OpOverloadPacket) or overload not in found.overloads():
        return None
    operator_found = getattr(found, overload)
    return None if operator_found._schema.is_mutable else operator_found


def target_of(kind: str, name: str) -> Any:
    """The function of an entry; ``None`` if there is no such entry."""
    if kind == "method":
        return Method(name) if name in methods() else None
    return aten(name) if kind == "aten" else functions().get(name)
