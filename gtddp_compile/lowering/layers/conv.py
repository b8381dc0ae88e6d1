"""Rule of ``F.conv1d``, ``F.conv2d`` and ``F.conv3d``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F

from gtddp_compile.graph.ops import Op
from gtddp_compile.lowering.layers.base import Rule
from gtddp_compile.lowering.layers.binding import bind, is_direct

AXES = {F.conv1d: 1, F.conv2d: 2, F.conv3d: 3}
"""Spatial axes of each function."""


class ConvRule(Rule):
    """Convolutions with stride, padding, dilation and groups; operands ``(x,)``, parameters (weight, bias).

    Transposed convolutions are left to the generic rule.
    """

    name = "conv"
    files = ("conv", "conv_pairs", "channels", "approximate")
    how = "Geometry"
    rows = True

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """A convolution of a value with a batch axis, its weight and bias parameters themselves."""
        bound = bind(op) if op.kind == "conv" and op.target in AXES else None
        if bound is None or op.target is None:
            return False
        has_batch = op.shape is None or len(op.shape) == AXES[op.target] + 2
        return has_batch and not op.mixes_samples and bound["weight"] is not None and is_direct(bound, ("input",))

    def options(self, op: Op) -> Mapping[str, Any]:
        """``stride``, ``padding`` (or ``"same"``), ``dilation``, one entry an axis, and ``groups``."""
        bound = bind(op) or {}
        axes = AXES[op.target] if op.target is not None else 0
        padding = 0 if bound["padding"] == "valid" else bound["padding"]
        return {
            "stride": _per_axis(bound["stride"], axes),
            "padding": padding if isinstance(padding, str) else _per_axis(padding, axes),
            "dilation": _per_axis(bound["dilation"], axes),
            "groups": bound["groups"],
        }


def _per_axis(value: int | tuple[int, ...] | list[int], axes: int) -> tuple[int, ...]:
    """One entry an axis, as torch reads an int or a tuple of one."""
    entries = (value,) if isinstance(value, int) else tuple(value)
    return entries * axes if len(entries) == 1 else entries
