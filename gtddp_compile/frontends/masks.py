"""Dropout of what is made of parameters alone: its mask becomes an operation of its own.

An embedding of positions that goes through dropout is ``u`` times a mask. As one operation it would own parameters and
draw random numbers; apart, the mask is a value like any other that no player moves, drawn once a sweep, and the product
an expression of the parameters. ``dropout(1)`` draws what ``dropout(u)`` draws, in the same order.

So it is with attention to which a trained bias of positions is added: where it drops weights, it is written out, and
the sum of scores and bias alone reads the bias. That is how torch computes it then, so it draws the same too.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from gtddp_compile.graph import Method, Op, OpGraph, ParamRef, Ref

KIND, ATTENTION = "dropout", "scaled_dot_product_attention"
SIGNATURE = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


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
        if op.random and op.kind == ATTENTION and any(leaf.name in made for leaf in _refs(op)):
            op = _written_out(op, ops)
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def _refs(op: Op) -> list[Ref]:
    return [leaf for leaf in op.leaves if isinstance(leaf, Ref)]


def _written_out(op: Op, ops: list[Op]) -> Op:
    """``dropout(softmax(s q kᵀ + bias)) v``; the last product is returned, the others are appended."""
    given = {**dict(zip(SIGNATURE, op.args, strict=False)), **op.kwargs}
    if given.get("enable_gqa") or given.get("is_causal"):
        return op

    def add(word: str, kind: str, target: Any, *args: Any, **kwargs: Any) -> Ref:
        name, random = f"{op.name}.{word}", kind == KIND
        ops.append(Op(name, kind, target, args, kwargs, module=op.module, source=op.source, random=random))
        return Ref(name)

    keys = add("keys", "transpose", torch.transpose, given["key"], -2, -1)
    scores = add("products", "matmul", torch.matmul, given["query"], keys)
    scale = given.get("scale")
    if scale is None:
        width = add("width", "size", Method("size"), given["query"], -1)
        scale = add("scale", "pow", operator.pow, width, -0.5)
    scores = add("scaled", "mul", operator.mul, scores, scale)
    scores = add("scores", "add", operator.add, scores, given["attn_mask"])
    weights = add("weights", "softmax", torch.softmax, scores, -1)
    kept = add("kept", KIND, F.dropout, weights, given["dropout_p"], True)
    return replace(op, kind="matmul", target=torch.matmul, args=(kept, given["value"]), kwargs={}, random=False)


def _mask(op: Op) -> tuple[Op, ...]:
    """``dropout(1)`` of the operand's size; ``detach`` says that the size alone is read."""
    still, ones, mask = (f"{op.name}.{word}" for word in ("detach", "ones", "mask"))
    where: dict[str, Any] = {"module": op.module, "source": op.source}
    return (
        Op(still, "detach", torch.detach, (op.args[0],), **where),
        Op(ones, "ones_like", torch.ones_like, (Ref(still),), **where),
        replace(op, name=mask, args=(Ref(ones), *op.args[1:])),
    )
