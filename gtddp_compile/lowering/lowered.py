"""A program while it is written down: its sweeps, and then one list of instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gtddp_compile.lowering.instructions import Instruction, StageFunction
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
