"""Orders of rows that depend on the data: tokens that a router has sorted by the expert that serves them.

Such rows lie sample by sample once they are put back, which takes an operation of its own: every sweep has its order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.frontends.changes import changes, within
from gtddp_compile.frontends.trials import Trial, is_stopped
from gtddp_compile.graph import Method, Op, OpGraph, Ref
from gtddp_compile.graph.layouts import LEADING, LISTED, Layout

ORDER = ".order"
"""Suffix of the operation that says in which order the rows that an operation takes lie sample by sample."""

STEPS = 6
"""How far indices are followed back."""


def order_after(op: Op) -> str:
    """Name of the order in which the rows that an operation takes lie sample by sample."""
    return f"{op.name}{ORDER}"


def operations(op: Op, graph: OpGraph) -> tuple[Op, ...]:
    """What computes the order of the rows that an operation takes: how many there are, how many samples, the order."""
    index, source = _taken_by(op, graph) or ("", "")
    if (graph.by_name[source].shape or ())[:1] == graph.by_name[index].shape:
        source = index  # as many rows; the value itself may be computed by a later stage than the order is read
    sizes = [
        Op(f"{op.name}.{word}", "size", Method("size"), (Ref(name), 0), module=op.module, source=op.source)
        for word, name in (("rows", source), ("samples", graph.inputs[0]))
    ]
    arguments = (Ref(index), *(Ref(size.name) for size in sizes))
    order = Op(order_after(op), "order_of_rows", kernels.order_of_rows, arguments, module=op.module, source=op.source)
    return (*sizes, replace(order, shape=graph.by_name[index].shape, dtype=torch.int64))


def is_sound(layout: Layout | None, graph: OpGraph, found: Mapping[str, Layout | None]) -> bool:
    """An order is one of samples if the rows that are taken lie sample by sample."""
    if layout is None or layout.order is None:
        return True
    taken = _taken_by(graph.by_name[layout.order.removesuffix(ORDER)], graph)
    return taken is not None and found.get(taken[1]) in (LEADING, LISTED)


class Orders:
    """Orders in which rows may have to be taken, with their values in every run."""

    def __init__(self, graph: OpGraph) -> None:
        self._graph = graph
        self._known: dict[str, list[Tensor]] = {}
        self._roots: dict[str, frozenset[str]] = {}
        self._taking: dict[str, list[str]] = {}
        for op in graph.ops:
            for index, _ in filter(None, [_taken_by(op, graph)]):
                self._taking.setdefault(index, []).append(order_after(op))

    def note(self, op: Op, values: Sequence[Any]) -> None:
        """An index by which rows are taken: the order that undoes it."""
        for order in self._taking.get(op.name, ()) if not is_stopped(values) else ():
            self._known[order] = [torch.argsort(value, stable=True) for value in values]
            self._roots[order] = self._ancestors(op.name)

    def likely(self, op: Op, implied: Sequence[Layout | None]) -> Iterator[Layout]:
        """Those of the operands, then those that go back to the same indices."""
        yield from (o for o in implied if o is not None and o.order is not None)
        roots = frozenset().union(*(self._ancestors(name) for name in op.operands))
        yield from (Layout(0, "inner", name) for name, known in self._roots.items() if roots & known)

    def holds(self, layout: Layout, values: Sequence[Any], trial: Trial) -> bool:
        """Whether the samples of a value lie so, once its rows are put in order, and something changed at all."""
        orders, count = self._known[layout.order or ""], len(values[0]) if values[0].dim() else 0
        if count != len(orders[0]) or count % trial.batch or is_stopped(values):
            return False
        rows = [value[order] for value, order in zip(values, orders, strict=True)]
        seen = [change for change in changes(rows, trial.changed) if change is not None and change.count]
        return bool(seen) and all(within(change, LISTED, trial.batch) for change in seen)

    def _ancestors(self, name: str) -> frozenset[str]:
        """Whole numbers that an operation computes or goes back to by a few steps."""
        found: set[str] = set()
        pending = [(name, 0)]
        while pending:
            current, depth = pending.pop()
            op = self._graph.by_name[current]
            if current in found or op.is_differentiable or op.is_size or op.kind == "input" or depth > STEPS:
                continue
            found.add(current)
            pending += [(operand, depth + 1) for operand in op.operands]
        return frozenset(found)


def _taken_by(op: Op, graph: OpGraph) -> tuple[str, str] | None:
    """The index by which an operation takes rows of a value, and that value: ``value[index]``."""
    if op.kind not in ("index", "getitem", "index_select") or len(op.args) < 2 or not isinstance(op.args[0], Ref):
        return None
    picked = op.args[2] if op.kind == "index_select" and op.args[1] == 0 else op.args[1]
    if isinstance(picked, list | tuple) and len(picked) == 1:
        picked = picked[0]
    if not isinstance(picked, Ref):
        return None
    index = graph.by_name[picked.name]
    whole = index.dtype in (torch.int64, torch.int32) and len(index.shape or ()) == 1
    return (index.name, op.args[0].name) if whole else None
