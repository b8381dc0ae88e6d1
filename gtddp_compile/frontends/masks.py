"""Dropout of what is made of parameters alone: its mask becomes an operation of its own.

An embedding of positions that goes through dropout is ``u`` times a mask. As one operation it would own parameters and
draw random numbers; apart, the mask is a value like any other that no player moves, drawn once a sweep, and the product
an expression of the parameters. ``dropout(1)`` draws what ``dropout(u)`` draws, in the same order.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch

from gtddp_compile.graph import Op, OpGraph, ParamRef, Ref

KIND = "dropout"


def masks_apart(graph: OpGraph) -> OpGraph:
    """The same function with every dropout of a parameter expression written as a product with its mask."""
    made: set[str] = set()
    ops: list[Op] = []
    for op in graph.ops:
        if op.name not in graph.reached and (op.parameters or any(name in made for name in op.operands)):
            made.add(op.name)
            if op.random and op.kind == KIND and op.args and isinstance(op.args[0], Ref | ParamRef):
                ops += _mask(op)
                product = (op.args[0], Ref(f"{op.name}.mask"))
                op = replace(op, kind="mul", target=operator.mul, args=product, kwargs={}, random=False)
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def _mask(op: Op) -> tuple[Op, ...]:
    """``dropout(1)`` of the operand's size; ``detach`` says that the size alone is read."""
    still, ones, mask = (f"{op.name}.{word}" for word in ("detach", "ones", "mask"))
    where: dict[str, Any] = {"module": op.module, "source": op.source}
    return (
        Op(still, "detach", torch.detach, (op.args[0],), **where),
        Op(ones, "ones_like", torch.ones_like, (Ref(still),), **where),
        replace(op, name=mask, args=(Ref(ones), *op.args[1:])),
    )
