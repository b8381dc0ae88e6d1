"""Rule of ``F.linear``."""

from __future__ import annotations

from gtddp_compile.graph.ops import Op
from gtddp_compile.lowering.layers.base import Rule
from gtddp_compile.lowering.layers.binding import bind, is_direct


class LinearRule(Rule):
    """``h = x Wᵀ + b`` with any number of position axes; operands ``(x,)``, parameters (weight, bias)."""

    name = "linear"
    files = ("linear", "channels", "approximate")
    rows = subtracts = True

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """``F.linear`` of a value with a batch axis, its weight and bias parameters themselves."""
        bound = bind(op) if op.kind == "linear" and not op.mixes_samples else None
        has_batch = op.shape is None or len(op.shape) >= 2
        return bound is not None and has_batch and bound["weight"] is not None and is_direct(bound, ("input",))
