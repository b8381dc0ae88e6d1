"""Rule of ``x W``, what a linear layer's derivative is when it is taken backwards."""

from __future__ import annotations

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.base import Rule


class TransposedRule(Rule):
    """``h = x W`` with any number of position axes; operands ``(x,)``, parameters (weight, no bias)."""

    name = "transposed"
    files = ("transposed",)
    subtracts = True

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """A value with a batch axis times a parameter."""
        has_batch = op.shape is None or len(op.shape) >= 2
        given = tuple(map(type, op.args))
        return op.kind == "transposed" and given == (Ref, ParamRef) and has_batch and not op.mixes_samples

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """``(x,)``."""
        return (op.args[0],)

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """``(weight, no bias)``."""
        return (op.args[1], None)
