"""Rules of parameters without inputs to be multiplied by: a table that is looked up, and what is added by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.base import Rule
from gtddp_compile.lowering.layers.binding import bind, is_direct


class EmbeddingRule(Rule):
    """``F.embedding`` of rows that are all trained, every look-up counted once."""

    name = "embedding"
    files = ("table",)

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """Of a value, the table a parameter itself, no option but the table's."""
        bound = bind(op) if op.kind == "embedding" and not op.mixes_samples else None
        if bound is None or not is_direct(bound, ("input",)):
            return False
        padded = bound["padding_idx"] is not None
        return padded == bool(self.how) and bound["max_norm"] is None and not bound["scale_grad_by_freq"]

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """The table alone."""
        return ((bind(op) or {})["weight"],)


class PaddedRule(EmbeddingRule):
    """The same with ``padding_idx``: that row is read, and its look-ups have no gradient."""

    name = "padded"
    how = "Table"

    @property
    def prefix(self) -> str:
        """The embedding's kernels."""
        return "embedding"

    def options(self, op: Op) -> Mapping[str, Any]:
        """``padding_idx``, which may count from the end."""
        return {"padding_idx": (bind(op) or {})["padding_idx"]}


class ShiftRule(Rule):
    """``h = x + b``: ``b`` is broadcast to a value as wide as the result, and shared by samples."""

    name = "shift"
    files = ("table",)

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
        """``(b,)``."""
        return tuple(arg for arg in op.args if isinstance(arg, ParamRef))
