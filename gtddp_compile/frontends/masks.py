"""Dropout of what is made of parameters alone: its mask becomes an operation of its own.

An embedding of positions that goes through dropout is ``u`` times a mask. As one operation it would own parameters and
draw random numbers; apart, the mask is a value like any other that no player moves, drawn once a sweep, and the product
an expression of the parameters. ``dropout(1)`` draws what ``dropout(u)`` draws, in the same order.

So it is with attention that reads trained parameters (a bias of positions, learned queries): where it drops weights, it
is written out as torch computes it then, so it draws the same too, and each of its operations reads its own parameters.
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from gtddp_compile import kernels
from gtddp_compile.graph import Method, Op, OpGraph, ParamRef, Ref

KIND, ATTENTION = "dropout", "scaled_dot_product_attention"
SIGNATURE = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


def masks_apart(graph: OpGraph) -> OpGraph:
    """The same function with every dropout of a parameter expression written as a product with its mask."""
    graph = _attention_apart(graph)
    made, ops = _expressions(graph), list[Op]()
    for op in graph.ops:
        if op.name in made and op.random and op.kind == KIND and op.args and isinstance(op.args[0], Ref | ParamRef):
            ops += _mask(op)
            product = (op.args[0], Ref(f"{op.name}.mask"))
            op = replace(op, kind="mul", target=operator.mul, args=product, kwargs={}, random=False)
        ops.append(op)
    return replace(graph, ops=tuple(ops))


def _expressions(graph: OpGraph) -> frozenset[str]:
    """Operations on parameters, and on what is made of them alone."""
    apart = {op.name for op in graph.ops} - graph.reached
    return graph.downstream(
        (op.name for op in graph.ops if op.parameters and op.name in apart), lambda op: op.name in apart
    )


def _attention_apart(graph: OpGraph) -> OpGraph:
    """The same function with every attention that draws and reads parameters written out."""
    made, ops = _expressions(graph), list[Op]()
    for op in graph.ops:
        reads = bool(op.parameters) or any(name in made for name in op.operands)
        ops += _written_out(op) if op.random and op.kind == ATTENTION and reads else (op,)
    return replace(graph, ops=tuple(ops))


def _written_out(op: Op) -> tuple[Op, ...]:
    """``dropout(softmax(s q kᵀ + mask)) v``, as torch computes it where it drops weights."""
    given = {**dict.fromkeys(SIGNATURE), **dict(zip(SIGNATURE, op.args, strict=False)), **op.kwargs}
    ops: list[Op] = []

    def add(word: str, kind: str, target: Any, *args: Any) -> Ref:
        name, random = f"{op.name}.{word}", kind == KIND
        ops.append(Op(name, kind, target, args, module=op.module, source=op.source, random=random))
        return Ref(name)

    def size(word: str, value: Any, axis: int) -> Ref:
        return add(word, "size", Method("size"), value, axis)

    def spread(word: str, part: Any) -> Ref:
        """Heads that several of the query's share, once for each of these."""
        heads = size(f"{word}_queries", query, -3), size(f"{word}_heads", part, -3)
        count = add(f"{word}_shared", "floordiv", operator.floordiv, *heads)
        return add(f"{word}_spread", "repeat_interleave", torch.repeat_interleave, part, count, -3)

    query, key, value, mask, scale = (given[name] for name in ("query", "key", "value", "attn_mask", "scale"))
    if given["enable_gqa"]:
        key, value = spread("key", key), spread("value", value)
    scores = add("products", "matmul", torch.matmul, query, add("keys", "transpose", torch.transpose, key, -2, -1))
    if scale is None:
        scale = add("scale", "pow", operator.pow, size("width", query, -1), -0.5)
    weights = add("scaled", "mul", operator.mul, scores, scale)
    if mask is None and not given["is_causal"]:
        weights = add("weights", "softmax", torch.softmax, weights, -1)
    else:
        weights = add("scores", "masked_scores", kernels.masked_scores, weights, mask)
        weights = add("weights", "softmax", torch.ops.aten._safe_softmax.default, weights, -1)
    kept = add("kept", KIND, F.dropout, weights, given["dropout_p"], True)
    return (*ops, replace(op, kind="matmul", target=torch.matmul, args=(kept, value), kwargs={}, random=False))


def _mask(op: Op) -> tuple[Op, ...]:
    """``dropout(1)`` of the operand's size; ``detach`` says that the size alone is read."""
    still, ones, mask = (f"{op.name}.{word}" for word in ("detach", "ones", "mask"))
    where: dict[str, Any] = {"module": op.module, "source": op.source}
    return (
        Op(still, "detach", torch.detach, (op.args[0],), **where),
        Op(ones, "ones_like", torch.ones_like, (Ref(still),), **where),
        replace(op, name=mask, args=(Ref(ones), *op.args[1:])),
    )
