"""A program while it is written down: its sweeps, and then one list of instructions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from gtddp_compile.lowering.instructions import Apply, Instruction, StageFunction, variables
from gtddp_compile.lowering.plan import Plan


@dataclass(frozen=True)
class Sweeps:
    """The instructions of a program by what they do, each by stage (-1: before the first stage, and the loss).

    ``deferred``: nothing else of the backward sweep reads the recursion, so that all its B×B algebra comes at its end:
    small operations between large products find nothing of what they need in the caches. ``decision``: what comes
    between the backward sweep and the updates: the weights of the joint step, the norm of all gradients.
    """

    trajectory: Mapping[int, tuple[Instruction, ...]]
    loss: tuple[Instruction, ...]
    pulled: Mapping[int, tuple[Instruction, ...]]
    gains: Mapping[int, tuple[Instruction, ...]]
    recursion: Mapping[int, tuple[Instruction, ...]]
    forward: Mapping[int, tuple[Instruction, ...]]
    deferred: bool = False
    decision: tuple[Instruction, ...] = ()

    def with_layers(self) -> Sweeps:
        """A layer that is read once is made where it is read, and one that nobody reads nowhere."""
        parts = [self.pulled, self.gains, self.recursion, self.forward, {0: self.decision}]
        every = [one for part in parts for written in part.values() for one in written]
        read = Counter(name for one in every for name in variables((one.args, dict(one.kwargs or {}))))
        made = {one.written[0]: Apply("Layer", one.args) for one in every if one.function == "Layer"}
        inline = {name: layer for name, layer in made.items() if read[name] < 2}

        def change(written: tuple[Instruction, ...]) -> tuple[Instruction, ...]:
            kept = (one for one in written if one.function != "Layer" or one.written[0] not in inline)
            return tuple(one.replacing(lambda found: inline.get(found.name, found)) for one in kept)

        pulled, gains, recursion, forward, decision = ({t: change(w) for t, w in part.items()} for part in parts)
        return replace(self, pulled=pulled, gains=gains, recursion=recursion, forward=forward, decision=decision[0])


@dataclass(frozen=True)
class Written:
    """The sweeps, before anything is decided about what is kept between them.

    Attributes:
        plan: what is written down.
        sweeps: the instructions.
        functions: of the stages, and of players that go through a generic kernel.
        names: identifiers of qualified names.
    """

    plan: Plan
    sweeps: Sweeps
    functions: tuple[StageFunction, ...]
    names: dict[str, str]


@dataclass(frozen=True)
class Lowered:
    """The plan, the instructions that carry it out, and the functions of its stages."""

    plan: Plan
    instructions: tuple[Instruction, ...]
    functions: tuple[StageFunction, ...]
    names: dict[str, str]
