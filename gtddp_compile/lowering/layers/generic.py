"""Rule of last resort: any differentiable operation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.base import Rule


class GenericRule(Rule):
    """Per-sample gradients by automatic differentiation; operands and parameters in the order they appear.

    Three options are the emitter's: ``function`` (``function(params, *operands) -> h``, which it generates),
    and what ``gtddp_compile.kernels.generic_probe`` finds by a trial: ``mixes``, ``vectorised``,
    ``forward_mode``. Operands that are not tensors (sizes) it binds into ``function`` and leaves out.
    """

    name = "generic"
    files = ("generic",)
    how = "Operation"

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """Every operation whose value is one differentiable tensor, that draws and writes nothing."""
        return op.target is not None and op.is_tensor and op.is_differentiable and not op.random and not op.advances

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """Every value and buffer the operation reads, without repeats."""
        return tuple(dict.fromkeys(leaf for leaf in op.leaves if isinstance(leaf, Ref | BufferRef)))

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """Every parameter the operation reads, without repeats."""
        return tuple(ParamRef(name) for name in op.parameters)

    def options(self, op: Op) -> Mapping[str, Any]:
        """``mixes`` and ``batched`` (values are, buffers are not; the emitter may know better)."""
        return {"mixes": op.mixes_samples, "batched": tuple(isinstance(leaf, Ref) for leaf in self.operands(op))}
