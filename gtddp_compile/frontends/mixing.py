"""Which operations mix samples, found by trial: derivatives of one sample's part of a value by the others' operands.

The theory's value function is one block a sample, so an operation whose value for sample i depends on sample j ≠ i
(batch-norm in training mode, centring by the batch's mean, attention across a batch) is read approximately
(docs/theory.md#mixing). Nothing but derivatives counts there, so they are what is looked at: every operation that a
player moves is differentiated alone, around the example inputs, and what reaches operands of other samples is exactly
zero unless it mixes. No name and no rounding decides. What only moves entries from one sample to another (a
permutation) has no samples of its own, and what it does is told where it meets something that has.

A recording that holds for every size of the batch is tried on a few samples of it; one made of a batch of one (which
has nothing to mix) holds for that size alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.frontends.reference import SEED, descending, evaluate, leaves, only_moves, start
from gtddp_compile.frontends.traced import Untraceable
from gtddp_compile.frontends.trials import COPIES, several, some
from gtddp_compile.graph import DETACHED, GUARD, UNKNOWN, Op, OpGraph

FEW = (3, 2)
"""Samples that a recording for every size is tried on: another number than the example's, so that an axis which happens
to be as long as the batch is none of samples."""
AWAY = 16
"""Parameters that are zero are tried between zero and a sixteenth."""
MIXES, NOBODYS = "mixes", "nobody's"


def find_mixing(graph: OpGraph, model: nn.Module, inputs: tuple[Any, ...]) -> OpGraph:
    """The graph, with shapes and layouts, with every operation marked that mixes samples.

    Raises:
        CompileError: the operations cannot be differentiated one by one.
    """
    refusal = None
    for batch, tried, away in _trials(graph, inputs):
        try:
            mixing, nobody = _Trial(graph, model, batch, away=away).found(tried)
        except Untraceable as found:  # the recording holds for its own batch alone, or for these parameters
            refusal = found.apart()
            continue
        ops = (replace(op, layout=UNKNOWN) if op.name in nobody else op for op in graph.ops)
        return replace(graph, ops=tuple(replace(op, mixes_samples=op.name in mixing) for op in ops))
    if refusal is None or graph.batch == 1:
        return graph
    raise refusal.refusal(
        f"whether operations mix samples cannot be told: {refusal.why}",
        "Pass other example inputs, or write the operation in differentiable functions of torch",
    )


def _trials(graph: OpGraph, inputs: tuple[Any, ...]) -> Iterator[tuple[int, tuple[Any, ...], bool]]:
    """Batches to try, in order, and whether parameters that are zero are moved away from there."""
    batch, general = graph.batch, graph.frontend == "fx"
    if batch == 1 and general:
        for bold in (True, False):
            yield COPIES, tuple(several(value, bold=bold) for value in inputs), True
    if not batch or batch == 1:
        return
    if general:
        few = next(size for size in FEW if size != batch)
        yield few, tuple(some(value, batch, few) for value in inputs), True
    yield batch, inputs, True
    yield batch, inputs, False


@dataclass(frozen=True)
class _Part:
    """A tensor whose samples are known: entry k of ``axis`` is of sample ``owner[k]``."""

    tensor: Tensor
    axis: int
    owner: Tensor

    def of(self, value: Tensor, samples: Tensor) -> tuple[Tensor, Tensor]:
        """A tensor of the same shape with the axis in front, and which entries of it belong to some samples."""
        return value.movedim(self.axis, 0), samples[self.owner]


@dataclass(frozen=True)
class _Value:
    """A value, and what its derivatives lead to: itself, where its samples are known."""

    value: Any
    reached: Mapping[str, _Part] = field(default_factory=dict)


class _Trial:
    """One pass through the graph, every operation differentiated by what it reads."""

    def __init__(self, graph: OpGraph, model: nn.Module, batch: int, *, away: bool) -> None:
        self._graph, self._batch = graph, batch
        params, self._buffers = leaves(model)
        trained = {info.name for info in graph.parameters if info.trainable}
        self._params = {name: _parameter(p, away=away and name in trained) for name, p in params.items()}
        self._deciding = {op.name for op in graph.ops if trained.intersection(op.parameters)}
        self._moved = graph.downstream(self._deciding, lambda op: not op.reads_sizes)
        """Operations whose value changes in a step, not through sizes alone."""
        self._read = {name for op in graph.ops if op.name in self._deciding for name in op.operands}
        self._followed = graph.upstream(graph.output_names, lambda op: op.kind != DETACHED and not op.reads_sizes)
        """Operations that the loss's derivative passes through."""
        self._orders = {op.layout.order for op in graph.ops if op.layout is not None}
        self._values: dict[str, _Value] = {}
        self._drawn = torch.empty(0)

    def found(self, inputs: tuple[Any, ...]) -> tuple[set[str], set[str]]:
        """Operations that mix samples, and those whose value has entries of which nothing tells whose they are."""
        verdicts: dict[str, set[str]] = {"": set(), MIXES: set(), NOBODYS: set()}
        given = dict(zip(self._graph.inputs, inputs, strict=True))
        with torch.random.fork_rng(), torch.enable_grad():
            start()
            for op in self._graph.ops:
                reads = op.operands if op.name in self._followed else ()
                before = {name: part for read in reads for name, part in self._values[read].reached.items()}
                with torch.set_grad_enabled(bool(before)):
                    value = self._evaluate(op, given)
                self._values[op.name], verdict = self._seen(op, value, before)
                verdicts[verdict].add(op.name)
                for name in {*self._graph.finished[op.name]} - self._orders:
                    del self._values[name]
        return verdicts[MIXES], verdicts[NOBODYS]

    def _evaluate(self, op: Op, given: Mapping[str, Any]) -> Any:
        if op.kind == GUARD:
            return None
        if op.target is None:
            return given[op.name]
        read = {name: self._values[name].value for name in op.operands}
        return descending(op, evaluate(op, read, self._params, self._buffers))

    def _seen(self, op: Op, value: Any, before: Mapping[str, _Part]) -> tuple[_Value, str]:
        """The value as later operations read it, and ``MIXES`` or ``NOBODYS`` if it is so."""
        if not isinstance(value, Tensor):
            return _Value(value, {} if op.is_size else before), ""
        if not (value.is_floating_point() or value.is_complex()) or op.name not in self._graph.reached:
            return _Value(value.detach()), ""
        leaf = value.detach()
        part, moves = self._part(op, leaf), op.name in self._moved
        if part is None:  # it counts where it comes together with what samples have
            unknown = moves and not op.samples.fits(tuple(value.shape), self._batch)
            return _Value(value, before), NOBODYS if unknown else ""
        asked = {name: own for name, own in before.items() if op.name in self._deciding or name in self._moved}
        mixes = value.requires_grad and bool(asked) and self._mixes(op, value, part, asked)
        if mixes and not self._meets(op) and only_moves(leaf, [own.tensor for own in asked.values()]):
            return _Value(value, before), NOBODYS
        if not moves and op.name not in self._read:
            return _Value(leaf), MIXES if mixes else ""
        leaf.requires_grad_()
        return _Value(leaf, {op.name: part}), MIXES if mixes else ""

    def _meets(self, op: Op) -> bool:
        """Whether an operand with samples comes together with one that has none of its own."""
        reached = {read: self._values[read].reached for read in op.operands}
        return len({read in parts for read, parts in reached.items() if parts}) > 1

    def _part(self, op: Op, value: Tensor) -> _Part | None:
        """Which entries are whose, where the layout says so."""
        layout, batch = op.samples, self._batch
        if not layout.fits(tuple(value.shape), batch) or (
            layout.order is not None and layout.order not in self._values
        ):
            return None
        rank = torch.arange(value.shape[layout.axis])
        if layout.order is not None:
            rank = torch.argsort(self._values[layout.order].value).cpu()
        return _Part(value, layout.axis, layout.owner(rank, batch))

    def _mixes(self, op: Op, value: Tensor, part: _Part, asked: Mapping[str, _Part]) -> bool:
        """Whether the first sample's part depends on what others have, or theirs on what it has."""
        first = torch.arange(self._batch) == 0
        for others in (first, ~first):
            cotangent = self._cotangent(value)
            rows, index = part.of(cotangent, others)
            rows[index.to(rows.device)] = 0
            wanted = [own.tensor for own in asked.values()]
            try:
                found = torch.autograd.grad(value, wanted, cotangent, retain_graph=True, allow_unused=True)
            except RuntimeError as error:  # autograd's word for an operation without a derivative
                raise Untraceable(f"no derivative: {error}", module=op.module, source=op.source) from error
            for own, gradient in zip(asked.values(), found, strict=True):
                if gradient is None:
                    continue
                rows, index = own.of(gradient, others)
                # 0 · ∞, the derivative of a root at zero, is no number and no sign of anything.
                if bool((rows[index.to(rows.device)].nan_to_num(0.0, 1.0, 1.0) != 0).any()):
                    return True
        return False

    def _cotangent(self, value: Tensor) -> Tensor:
        """Random numbers of a value's shape, the same for all: drawing them anew would be most of the trial."""
        if len(self._drawn) < value.numel():
            self._drawn = torch.randn(value.numel())
        found = self._drawn[: value.numel()].view(value.shape).to(value.device, value.dtype, copy=True)
        return found * (1 + 1j) if found.is_complex() else found


def _parameter(value: Tensor, *, away: bool) -> Tensor:
    """A parameter for the trial. Where it is zero for now (a last layer's scale) derivatives would tell nothing."""
    value = value.detach()
    if not away or not (value.is_floating_point() or value.is_complex()):
        return value
    zero = value == 0
    count = int(zero.count_nonzero())
    if not count:
        return value
    drawn = torch.rand(count, generator=torch.Generator().manual_seed(SEED), dtype=torch.float32)
    return value.masked_scatter(zero, (drawn / AWAY).to(value.device, value.dtype))
