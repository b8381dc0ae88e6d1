"""Activation checkpointing: the program that runs segments of its stages again.

``memory="recompute"`` keeps the cut before every segment and lets go of all else: a segment of stages is run again from
there when the backward sweep reaches it, and once more, with its gradients, when the forward sweep does. What crosses
into a later segment (values of the cut, their gradients) is kept because later instructions read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from gtddp_compile.graph import ControlGraph
from gtddp_compile.instructions import Code, Function, Instruction, Phase, Var
from gtddp_compile.segments import Segments

WORD = re.compile(r"'[^']*'|(?<![\w.])[A-Za-z_]\w*")


@dataclass(frozen=True)
class Sweeps:
    """The instructions of a program by what they do, each by stage (-1: before the first stage, and the loss).

    ``deferred``: nothing else of the backward sweep reads the recursion, so that all its B×B algebra comes at its end:
    small operations between large products find nothing of what they need in the caches.
    """

    trajectory: Mapping[int, tuple[Instruction, ...]]
    loss: tuple[Instruction, ...]
    pulled: Mapping[int, tuple[Instruction, ...]]
    gains: Mapping[int, tuple[Instruction, ...]]
    recursion: Mapping[int, tuple[Instruction, ...]]
    forward: Mapping[int, tuple[Instruction, ...]]
    deferred: bool = False

    def kept(self) -> tuple[Instruction, ...]:
        """Every sweep once, the whole trajectory kept."""
        found = [instruction for part in self.trajectory.values() for instruction in part] + list(self.loss)
        stages = sorted(self.pulled, reverse=True)
        for stage in stages:
            found += [*self.pulled[stage], *self.gains[stage], *(() if self.deferred else self.recursion[stage])]
        for stage in stages if self.deferred else ():
            found += self.recursion[stage]
        return tuple(found + [instruction for part in self.forward.values() for instruction in part])


def run_again(sweeps: Sweeps, segments: Segments, graph: ControlGraph) -> tuple[Instruction, ...]:
    """The same program with the trajectory run again, segment by segment, in both directions."""
    if len(segments.starts) == 1:
        return sweeps.kept()
    return tuple(_Recomputed(sweeps, segments, graph).instructions())


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
        for index in range(last + 1 if sweeps.forward else 0):
            names = {}
            yield from self._segment_again(index, "_old", names)
            for t in reversed(self._segments[index]):
                yield from _copied(sweeps.pulled[t], "_old", names, "gradients")
            yield from self._rewind(index, "forward")
            for t in self._segments[index]:
                yield from _renamed(sweeps.forward[t], names)
        if self._rewound:
            phase: Phase = "forward" if sweeps.forward else "backward"
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
            sources[_variable(instruction.writes[0])] = instruction.args[0].name
        else:
            yield replace(rename(instruction, sources), phase="checkpoint")


def _copied(
    instructions: Iterable[Instruction], suffix: str, names: dict[str, str], phase: Phase
) -> Iterable[Instruction]:
    """The instructions with variables of their own; ``names`` learns them."""
    for instruction in instructions:
        read = rename(instruction, names)
        names.update({v: f"{v}_{suffix}" for v in map(_variable, instruction.writes) if v != "_"})
        writes = tuple(re.sub(r"\w+", lambda m: names.get(m[0], m[0]), write) for write in instruction.writes)
        yield replace(read, writes=writes, phase=phase)


def _renamed(instructions: Iterable[Instruction], names: Mapping[str, str]) -> Iterable[Instruction]:
    return (rename(instruction, names) for instruction in instructions)


def rename(instruction: Instruction, names: Mapping[str, str]) -> Instruction:
    """The instruction with what it reads renamed; what it writes keeps its name."""
    kwargs = instruction.kwargs
    return replace(
        instruction,
        args=_tree(instruction.args, names),
        kwargs=kwargs if kwargs is None else {key: _tree(value, names) for key, value in kwargs.items()},
    )


def _tree(value: Any, names: Mapping[str, str]) -> Any:
    if isinstance(value, Var | Code | Function):
        text = value.text if isinstance(value, Code) else value.name
        return type(value)(WORD.sub(lambda found: names.get(found[0], found[0]), text))
    if isinstance(value, tuple | list):
        return type(value)(_tree(item, names) for item in value)
    return {key: _tree(item, names) for key, item in value.items()} if isinstance(value, dict) else value


def _advancing_nothing(instruction: Instruction) -> Instruction:
    """Buffers advance in the first pass alone."""
    args = tuple(Var("b_again") if arg == Var("b") else arg for arg in instruction.args)
    return replace(instruction, args=args)


def _variable(write: str) -> str:
    return write.removeprefix("*")
