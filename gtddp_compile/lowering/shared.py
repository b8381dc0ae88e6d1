"""What several parts of one batch, micro-batches or ranks, have in common: one call each, of what adds up over them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gtddp_compile.lowering.instructions import Apply, Function, Instruction


def divided(one: Instruction) -> tuple[Instruction, ...]:
    """The same, where an instruction folds a sum over samples into the call that uses it: the sum is apart."""
    given = one.named
    if one.function == "m.descend_by":
        return (_asking(one, "m.descend", given["names"], _called(one, given["weighted"], "layer")),)
    if one.function in ("m.descend_rows", "m.descend_inputs"):
        gradient = _called(one, given["weighted"], "layer")
        kind = "kronecker" if one.function == "m.descend_rows" else "channels"
        return (_asking(one, "m.descend_block", kind, (given["names"],), (gradient,)),)
    if one.function == "m.descend_dual":
        step = _called(one, Function("dual_step"), "coordinates", "weights")
        return (_asking(one, "m.descend_steps", "dual", given["names"], (step,)),)
    if one.function == "m.descend_alike":
        step = _called(one, Function("dual_step"), "coordinates", "weights")
        return (_asking(one, "m.descend_each", given["names"], step),)
    return (one,)


def _called(one: Instruction, function: Function, *operands: Any) -> Apply:
    """A function of some operands of an instruction, by name, or as they are."""
    given = one.named
    return Apply(function.name, tuple(given[o] if isinstance(o, str) else o for o in operands))


def _asking(one: Instruction, function: str, *arguments: Any) -> Instruction:
    return replace(one, function=function, args=arguments, kwargs=None)
