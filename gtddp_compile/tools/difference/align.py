"""Which operation and which stage of one program is which of the other.

Operations are aligned in the order of the trace, by what they are and where they stand in the model, so that ``add_1``
can be the other program's ``add``; stages by the players that decide in them. Everything else is compared in the
first program's words, after this translation.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property

from gtddp_compile.graph import BufferRef, Op, ParamRef, Ref, map_leaves
from gtddp_compile.graph.ops import Leaf
from gtddp_compile.lowering.instructions import Instruction, Var, render_instruction
from gtddp_compile.runtime.program import UpdateProgram

AT = re.compile(r"_at(\d+)$")
STAGED = re.compile(r"(stage|alpha|factor|gamma|lambda|outside|lifted|[a-z])_(\d+)(?=$|_)")
STAGE_FIRST = ("m.keep", "m.observe_block", "m.observe_factors")
"""Calls whose first argument is the stage."""
NEW = "\N{PRIME}"
"""Marks names of the second program that the first one has nothing for."""


def matched(left: Sequence[Hashable], right: Sequence[Hashable]) -> dict[int, int]:
    """Positions in ``right`` with the positions in ``left`` that they correspond to, both in order."""
    blocks = SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    return {block.b + i: block.a + i for block in blocks for i in range(block.size)}


@dataclass(frozen=True)
class Alignment:
    """A translation of the second program's names into the first one's."""

    left: UpdateProgram
    right: UpdateProgram

    @cached_property
    def ops(self) -> Mapping[str, str]:
        """Operations of the second program that the first one has, with their names there."""
        ours, theirs = self.left.graph.ops.ops, self.right.graph.ops.ops
        pairs = matched([_signature(op) for op in ours], [_signature(op) for op in theirs])
        return {theirs[b].name: ours[a].name for b, a in pairs.items()}

    @cached_property
    def stages(self) -> Mapping[int, int]:
        """Stages of the second program with the first one's: the same players, or some of them where these differ."""
        ours = [frozenset(stage.players) for stage in self.left.graph.stages]
        theirs = [frozenset(stage.players) for stage in self.right.graph.stages]
        found = matched(ours, theirs)
        free = [index for index in range(len(ours)) if index not in found.values()]
        for index in (index for index in range(len(theirs)) if index not in found):
            alike = [other for other in free if ours[other] & theirs[index]]
            if alike:
                found[index] = alike[0]
                free.remove(alike[0])
        return {**found, -1: -1, len(theirs): len(ours)}

    def op(self, name: str) -> str:
        """Name of an operation of the second program in the first one's words; ``params:NAME`` stays as it is."""
        return name if name.startswith("params:") else self.ops.get(name, f"{name}{NEW}")

    def stage(self, index: int) -> str:
        """A stage of the second program in the first one's count."""
        return str(self.stages[index]) if index in self.stages else f"{index}{NEW}"

    def arguments(self, op: Op, *, translated: bool) -> str:
        """An operation's arguments as text, in the first program's words."""

        def word(leaf: Leaf) -> _Bare:
            name = self.op(leaf.name) if translated and isinstance(leaf, Ref) else leaf.name
            return _Bare({ParamRef: "p:", BufferRef: "b:"}.get(type(leaf), "") + name)

        shown = [repr(map_leaves(arg, word)) for arg in op.args]
        return ", ".join([*shown, *(f"{key}={map_leaves(value, word)!r}" for key, value in sorted(op.kwargs.items()))])

    @cached_property
    def _variables(self) -> Mapping[str, str]:
        """Variables of the second program's operations in the first one's words."""
        names = self.left.lowered.names
        return {
            variable: names[self.ops[op]] if self.ops.get(op) in names else f"{variable}{NEW}"
            for op, variable in self.right.lowered.names.items()
        }

    @cached_property
    def _variable(self) -> re.Pattern[str]:
        """An operation's variable as the last part of a name: ``relu`` in ``g_relu_at3``."""
        longest = sorted(self._variables, key=len, reverse=True)
        return re.compile(rf"(?<![A-Za-z0-9])({'|'.join(map(re.escape, longest))})(?=$|_at\d+$|_new$)")

    def instruction(self, instruction: Instruction) -> str:
        """An instruction of the second program in the first one's variables and stages."""
        if instruction.function in STAGE_FIRST:
            here = Var(self.stage(instruction.stage))
            instruction = replace(instruction, args=(here, *instruction.args[1:]))
        own = any(function.name == instruction.function for function in self.right.lowered.functions)
        function = self._word(instruction.function) if own else instruction.function
        return render_instruction(
            replace(instruction.with_variables(self._word).writing(self._word), function=function)
        )

    def _word(self, word: str) -> str:
        variable = self._variable.search(word)
        head, tail = (word[: variable.start()], word[variable.end() :]) if variable else (word, "")
        name = self._variables[variable[1]] if variable else ""
        head = STAGED.sub(lambda found: f"{found[1]}_{self.stage(int(found[2]))}", head, count=1)
        return head + name + AT.sub(lambda found: f"_at{self.stage(int(found[1]))}", tail)


class _Bare(str):
    """A name that prints without quotes."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _signature(op: Op) -> Hashable:
    """What an operation is: its kind, the module it is in, the parameters it reads."""
    return op.kind, op.module, op.parameters
