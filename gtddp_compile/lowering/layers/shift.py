"""Rule of a bias that is added by itself."""

from __future__ import annotations

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.linear import LinearRule


class ShiftRule(LinearRule):
    """``h = x + b``, ``b`` along the last axis: a linear layer whose bias alone is trained."""

    name = "shift"
    prefix = "linear"
    rows = pieces = False

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """A sum of a value as wide as the result and a parameter, neither of them scaled."""
        if op.kind != "add" or len(op.args) != 2 or op.kwargs or op.mixes_samples:
            return False
        kinds = {type(arg) for arg in op.args}
        return kinds == {Ref, ParamRef} and op.shape is not None and len(op.shape) >= 2

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """``(x,)``."""
        return tuple(arg for arg in op.args if isinstance(arg, Ref))

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """``(no weight, bias)``."""
        return (None, *(arg for arg in op.args if isinstance(arg, ParamRef)))
