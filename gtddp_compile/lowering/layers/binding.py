"""Arguments of functional operations by name, and which of them a rule may rely on."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref, iter_leaves

REQUIRED: Any = inspect.Parameter.empty
"""Default of an argument without one."""

BATCH_NORM = "gtddp_compile.kernels.batch_norm.batch_norm"
"""Batch-norm in normal form, by name: that its running statistics are arguments is all that matters here."""

_CONV: dict[str, Any] = {
    "input": REQUIRED, "weight": REQUIRED, "bias": None,
    "stride": 1, "padding": 0, "dilation": 1, "groups": 1,
}  # fmt: skip

SIGNATURES: dict[Callable[..., Any] | str, dict[str, Any]] = {
    F.linear: {"input": REQUIRED, "weight": REQUIRED, "bias": None},
    F.conv1d: _CONV,
    F.conv2d: _CONV,
    F.conv3d: _CONV,
    **{function: {p.name: p.default for p in inspect.signature(function).parameters.values()}
       for function in (F.embedding, F.layer_norm, F.rms_norm, F.group_norm, F.instance_norm)},
    BATCH_NORM: {
        "x": REQUIRED, "running_mean": REQUIRED, "running_var": REQUIRED, "num_batches_tracked": REQUIRED,
        "weight": REQUIRED, "bias": REQUIRED, "training": False, "momentum": 0.1, "eps": 1e-5, "corrected": False,
        "sync": False,
    },
}  # fmt: skip
"""Arguments, in order, and their defaults, of the functions that have a rule of their own (the normal form's)."""


STATES = ("running_mean", "running_var", "num_batches_tracked")
"""Arguments that are buffers, read or not."""


def key(op: Op) -> Callable[..., Any] | str:
    """What ``SIGNATURES`` calls the operation's function."""
    name = f"{getattr(op.target, '__module__', '')}.{getattr(op.target, '__qualname__', '')}"
    return BATCH_NORM if name == BATCH_NORM else op.target or ""


def bind(op: Op) -> dict[str, Any] | None:
    """The operation's arguments by name, defaults filled in; ``None`` if its function is not in the table."""
    signature = SIGNATURES.get(key(op))
    if signature is None or len(op.args) > len(signature) or not set(op.kwargs) <= set(signature):
        return None
    bound = {**signature, **dict(zip(signature, op.args, strict=False)), **op.kwargs}
    return None if any(value is REQUIRED for value in bound.values()) else bound


def roles(bound: Mapping[str, Any]) -> tuple[ParamRef | BufferRef | None, ...]:
    """Weight and, where the function has one, bias."""
    return tuple(bound[name] for name in ("weight", "bias") if name in bound)


def is_direct(bound: Mapping[str, Any], operands: tuple[str, ...]) -> bool:
    """Whether every argument is what a rule can work with.

    The first operand is a computed value; other operands are values, buffers or absent; weight and bias are
    distinct parameters (or buffers, or absent), not expressions; everything else is a literal.
    """
    first, *others = operands
    states = [bound[name] for name in (*others, *STATES) if name in bound]
    members = [member for member in roles(bound) if member is not None]
    literals = [value for name, value in bound.items() if name not in (*operands, *STATES, "weight", "bias")]
    return (
        isinstance(bound[first], Ref)
        and all(state is None or isinstance(state, Ref | BufferRef) for state in states)
        and all(isinstance(member, ParamRef | BufferRef) for member in members)
        and len(set(members)) == len(members)
        and not any(True for _ in iter_leaves(literals))
    )
