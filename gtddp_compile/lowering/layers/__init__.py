"""Layer rules: how the compiler gets per-sample parameter gradients of each kind of operation."""

from __future__ import annotations

from gtddp_compile.graph.ops import Op
from gtddp_compile.lowering.layers.base import Rule
from gtddp_compile.lowering.layers.conv import ConvRule
from gtddp_compile.lowering.layers.generic import GenericRule
from gtddp_compile.lowering.layers.linear import LinearRule
from gtddp_compile.lowering.layers.norm import NormRule
from gtddp_compile.lowering.layers.table import EmbeddingRule, PaddedRule, ShiftRule
from gtddp_compile.lowering.layers.transposed import TransposedRule

RULES: tuple[Rule, ...] = (
    LinearRule(),
    TransposedRule(),
    ConvRule(),
    NormRule(),
    EmbeddingRule(),
    PaddedRule(),
    ShiftRule(),
    GenericRule(),
)
"""Every rule, most specific first."""

FILES = frozenset(file for rule in RULES for file in rule.files)
"""Modules of kernels that read values of the network or gradients of them."""


def choose(op: Op, trainable: frozenset[str]) -> Rule:
    """The first rule that is exact for ``op`` when the parameters ``trainable`` are trained.

    Raises:
        CompileError: no rule is (the operation draws random numbers, writes buffers or has no tensor value).
    """
    for rule in RULES:
        if rule.handles(op, trainable):
            return rule
    why, remedy = ", but its value is not one differentiable tensor", "Freeze its parameters"
    if op.random:
        why, remedy = " and draws random numbers", "Move the random part into an operation of its own"
    elif op.advances:
        why, remedy = f" and writes {', '.join(op.advances)}", "Freeze its parameters or those buffers"
    raise op.refusal(f"it owns trained parameters{why}", remedy)


__all__ = [
    "FILES", "RULES", "ConvRule", "EmbeddingRule", "GenericRule", "LinearRule", "NormRule", "PaddedRule", "Rule",
    "ShiftRule", "TransposedRule", "choose",
]  # fmt: skip
