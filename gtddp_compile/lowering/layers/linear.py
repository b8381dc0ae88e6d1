"""Rule of ``F.linear``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.binding import bind, is_direct, roles


class LinearRule:
    """``h = x Wᵀ + b`` with any number of position axes; operands ``(x,)``, parameters (weight, bias)."""

    name = "linear"
    prefix = "linear"
    prepare = False
    rows = True
    subtracts = True
    pieces = True

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """``F.linear`` of a value with a batch axis, its weight and bias parameters themselves."""
        bound = bind(op) if op.kind == "linear" else None
        has_batch = op.shape is None or len(op.shape) >= 2
        return (
            bound is not None
            and has_batch
            and not op.mixes_samples
            and bound["weight"] is not None
            and is_direct(bound, ("input",))
        )

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """``(x,)``."""
        return ((bind(op) or {})["input"],)

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """``(weight, bias)``."""
        return roles(bind(op) or {})

    def options(self, op: Op) -> Mapping[str, Any]:
        """None."""
        return {}
