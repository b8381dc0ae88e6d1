"""Rule of the normalisations with an elementwise affine part, and of PReLU, which has one of the negative inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F

from gtddp_compile.graph import LEADING
from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.base import Rule
from gtddp_compile.lowering.layers.binding import BATCH_NORM, bind, is_direct, key, roles

FORMS: dict[Callable[..., Any] | str, str] = {
    BATCH_NORM: "batch", F.layer_norm: "layer", F.group_norm: "group", F.instance_norm: "instance", F.rms_norm: "rms",
    F.prelu: "prelu", torch.ops.aten.prelu.default: "prelu",
}  # fmt: skip
"""Option ``form`` of the kernels for each function."""


class NormRule(Rule):
    """Batch-, layer-, group-, instance- and RMS-norm, ``h = x̂ ∘ w + b``; parameters (weight, bias).

    PReLU too, ``h = x̂ ∘ w + max(x, 0)`` with ``x̂ = min(x, 0)``; parameters (weight,).
    Operands are ``(x,)`` or, where running statistics normalise, ``(x, running_mean, running_var)``.
    ``norm_prepare`` turns the operands of the whole batch into ``(x̂,)``.
    """

    name = "norm"
    files = ("norm",)
    how = "Norm"
    prepare = True
    channels_first = frozenset({"batch_norm", "group_norm", "instance_norm"})

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """A normalisation of a value with a batch axis, its weight and bias parameters themselves."""
        bound = _bound(op) if key(op) in FORMS else None
        if bound is None or not is_direct(bound, _operand_names(bound)):
            return False
        if FORMS[key(op)] == "prelu":  # channels are axis 1 wherever samples lie: other layouts are the generic rule's
            return op.shape is not None and len(op.shape) >= 2 and op.samples == LEADING and not op.mixes_samples
        if "normalized_shape" in bound:
            return op.shape is None or len(op.shape) > len(_shape(bound["normalized_shape"]))
        least = 3 if FORMS[key(op)] == "instance" else 2
        if op.shape is not None and len(op.shape) < least:
            return False
        return all(bound[name] is not None for name in _operand_names(bound))

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """``(x,)`` or, where running statistics normalise, ``(x, running_mean, running_var)``."""
        bound = _bound(op) or {}
        return tuple(bound[name] for name in _operand_names(bound))

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """(weight, bias); of PReLU (weight,)."""
        return roles(_bound(op) or {})

    def options(self, op: Op) -> Mapping[str, Any]:
        """``form``, ``eps`` and, where they apply, ``training``, ``num_groups``, ``normalized_shape``."""
        bound = _bound(op) or {}
        form = FORMS[key(op)]
        if form == "prelu":
            return {"form": form}
        options: dict[str, Any] = {"form": form, "eps": bound["eps"]}
        if form in ("batch", "instance"):
            options["training"] = _uses_input_statistics(bound)
        if form == "group":
            options["num_groups"] = bound["num_groups"]
        if form in ("layer", "rms"):
            options["normalized_shape"] = _shape(bound["normalized_shape"])
        return options


def _bound(op: Op) -> dict[str, Any] | None:
    """The arguments by name; of PReLU without a table, as neither has a default."""
    if FORMS.get(key(op)) != "prelu":
        return bind(op)
    found = {**dict(zip(("input", "weight"), op.args, strict=False)), **op.kwargs}
    return found if len(found) == 2 else None


def _uses_input_statistics(bound: Mapping[str, Any]) -> bool:
    """Whether batch- or instance-norm normalises by the input's own statistics."""
    return bool(bound.get("training", bound.get("use_input_stats", True))) or bound["running_mean"] is None


def _operand_names(bound: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the arguments the kernels need."""
    first = next(iter(bound))
    if "running_mean" not in bound or _uses_input_statistics(bound):
        return (first,)
    return (first, "running_mean", "running_var")


def _shape(value: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    """A shape given as an int, a list or a tuple."""
    return (value,) if isinstance(value, int) else tuple(value)
