"""Recompute: the sweeps one after the other; with activation checkpointing, segments of the trajectory run again.

Takes the sweeps; guarantees a straight list of calls in single assignment. ``memory="recompute"`` keeps the cut before
every segment and lets go of all else: a segment of stages is run again from there when the backward sweep reaches it,
and once more, with its gradients, when the forward sweep does. What crosses into a later segment (values of the cut,
their gradients) is kept because later instructions read it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import pairwise

from gtddp_compile.graph import ControlGraph
from gtddp_compile.lowering.instructions import Instruction, Phase, Var
from gtddp_compile.lowering.lowered import Lowered, Sweeps, Written
from gtddp_compile.lowering.segments import Segments


def recompute(written: Written) -> Lowered:
    """The program as one list, with the trajectory kept or run again, segment by segment, in both directions."""
    plan, sweeps, segments = written.plan, written.sweeps, written.plan.segments
    if segments is None or len(segments.starts) == 1:
        instructions = _once(sweeps)
    else:
        instructions = _Recomputed(sweeps, segments, plan.graph).instructions()
    return Lowered(plan, tuple(instructions), written.functions, written.names)


def _once(sweeps: Sweeps) -> Iterable[Instruction]:
    """Every sweep once, the whole trajectory kept."""
    for part in sweeps.trajectory.values():
        yield from part
    yield from sweeps.loss
    stages = sorted(sweeps.pulled, reverse=True)
    for t in stages:
        yield from (*sweeps.pulled[t], *sweeps.gains[t], *(() if sweeps.deferred else sweeps.recursion[t]))
    for t in stages if sweeps.deferred else ():
        yield from sweeps.recursion[t]
    yield from sweeps.decision
    for part in sweeps.forward.values():
        yield from part


class _Recomputed:
    """Writes the segments down; ``_random`` are those that draw."""

    def __init__(self, sweeps: Sweeps, segments: Segments, graph: ControlGraph) -> None:
        self._sweeps, end = sweeps, len(graph.stages)
        self._segments = [range(a, b) for a, b in pairwise((*segments.starts, end))]
        self._random = {
            index
            for index, stages in enumerate(self._segments)
            if any(graph.op(name).random for t in stages for name in graph.stages[t].ops)
        }
        self._rewound = False

    def instructions(self) -> Iterable[Instruction]:
        sweeps, last = self._sweeps, len(self._segments) - 1
        yield from sweeps.trajectory[-1]
        for index, stages in enumerate(self._segments):
            yield from self._mark(index, "trajectory" if index == last else "checkpoint")
            for t in stages:
                yield from sweeps.trajectory[t] if index == last else _without_leaves(sweeps.trajectory[t])
        yield from sweeps.loss
        for index in range(last, -1, -1):
            names: dict[str, str] = {}
            if index < last:
                yield from self._segment_again(index, "_back", names)
            for t in reversed(self._segments[index]):
                yield from _renamed((*sweeps.pulled[t], *sweeps.gains[t], *sweeps.recursion[t]), names)
        yield from sweeps.decision
        phase: Phase = "joint" if sweeps.decision else "forward" if sweeps.forward else "backward"
        for index in range(last + 1 if sweeps.forward else 0):
            names = {}
            yield from self._segment_again(index, "_old", names)
            for t in reversed(self._segments[index]):
                yield from _copied(sweeps.pulled[t], "_old", names, "gradients")
            yield from self._rewind(index, phase) if phase == "forward" else ()
            for t in self._segments[index]:
                yield from _renamed(sweeps.forward[t], names)
        if self._rewound:
            stage = self._segments[-1][-1] if sweeps.forward else 0
            yield Instruction(phase, stage, (), "m.settle", note="a step draws as much as one forward pass")

    def _segment_again(self, index: int, suffix: str, names: dict[str, str]) -> Iterable[Instruction]:
        yield from self._rewind(index, "recompute")
        for t in self._segments[index]:
            yield from map(_advancing_nothing, _copied(self._sweeps.trajectory[t], suffix, names, "recompute"))

    def _mark(self, index: int, phase: Phase) -> Iterable[Instruction]:
        if index in self._random:
            yield Instruction(phase, self._segments[index][0], (), "m.mark", (index,))

    def _rewind(self, index: int, phase: Phase) -> Iterable[Instruction]:
        if index in self._random:
            note = "" if self._rewound else "the same random numbers every time"
            yield Instruction(phase, self._segments[index][0], (), "m.rewind", (index,), note=note)
            self._rewound = True


def _without_leaves(instructions: Iterable[Instruction]) -> Iterable[Instruction]:
    """A stage of the first pass: nothing of it is differentiated."""
    sources: dict[str, str] = {}
    for instruction in instructions:
        if instruction.function == "leaf":
            sources[instruction.written[0]] = instruction.args[0].name
        else:
            yield replace(instruction.renamed(sources), phase="checkpoint")


def _copied(
    instructions: Iterable[Instruction], suffix: str, names: dict[str, str], phase: Phase
) -> Iterable[Instruction]:
    """The instructions with variables of their own; ``names`` learns them."""
    for instruction in instructions:
        read = instruction.renamed(names)
        names.update({v: f"{v}_{suffix}" for v in instruction.written if v != "_"})
        yield replace(read.writing(lambda name: names.get(name, name)), phase=phase)


def _renamed(instructions: Iterable[Instruction], names: Mapping[str, str]) -> Iterable[Instruction]:
    return (instruction.renamed(names) for instruction in instructions)


def _advancing_nothing(instruction: Instruction) -> Instruction:
    """Buffers advance in the first pass alone."""
    args = tuple(Var("b_again") if arg == Var("b") else arg for arg in instruction.args)
    return replace(instruction, args=args)
