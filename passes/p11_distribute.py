"""Distribute: the instructions of one rank, whose shard is a part of the batch that several processes share.

Takes the program of one process; guarantees that every rank makes the update of the joined batch, by collectives that
stand in the program. What is added up over samples (statistics, gradients, steps) is added up over ranks where the base
method gets it. With ``coupling="local"`` a rank's samples are a group, and nothing else is shared. With ``"full"`` Γ is
of all samples, and a rank takes its own part of ``w``. Γ is made in one of two ways, whichever moves less
(``lowering.traffic``): ``"rows"``: every rank gets all rows (inputs and gradients of a layer, or their coordinates) and
makes every Γ; ``"blocks"``: a layer's rows go to one rank, which makes its Γ, and the sum of all Γ is reduced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from gtddp_compile.lowering.instructions import SAMPLES, Function, Instruction, Var
from gtddp_compile.lowering.lowered import Lowered
from gtddp_compile.lowering.plan import Plan
from gtddp_compile.lowering.shared import divided
from gtddp_compile.lowering.traffic import BUCKET, elements, gram_way

GRAMS = {"gram_blocks": 1, "joint_gram": 0, "kronecker_gram": 0, "coordinates_gram": 0, "turned_gram": 1}
"""Where the kernels that make Γ have the samples among their operands."""

SUMS = ("m.observe", "m.observe_moment", "m.observe_coordinates", "m.apply", "m.apply_block", "m.apply_steps",
        "m.descend", "m.descend_block", "m.descend_steps")  # fmt: skip
"""Calls whose last operand is a sum over samples."""

JOINED = {"m.losses": "m.joined_losses", "m.above": "m.joined_above", "m.terminal": "m.joined_terminal",
          "factor": "factor_together"}  # fmt: skip
"""What takes the place of a call that sees one rank's samples."""


def distribute(lowered: Lowered) -> Lowered:
    """The program of a rank; of one process as it is."""
    if lowered.plan.ranks == 1:
        return lowered
    found = _Distributed(lowered)
    written = (new for one in lowered.instructions for new in found.of(one))
    return replace(lowered, instructions=tuple(_in_buckets(written, lowered.plan)))


def _in_buckets(written: Iterable[Instruction], plan: Plan) -> Iterator[Instruction]:
    """The same with the sums of several updates in one collective, and the updates behind it."""
    held, later, waiting, size = list[Instruction](), list[Instruction](), set[str](), 0
    for one in written:
        if one.phase == "joint" and one.function == "m.all_reduce" and one.writes != "lambda_all":
            held.append(one)
            waiting.add(one.written[0])
        elif waiting.intersection(one.reads):
            later.append(one)
            waiting.update(one.written)
            size += elements(plan, one.named.get("names", ()))
        else:
            yield one
        if size >= BUCKET:
            yield from (*_as_one(held), *later)
            held, later, waiting, size = [], [], set(), 0
    yield from (*_as_one(held), *later)


def _as_one(held: list[Instruction]) -> list[Instruction]:
    if len(held) < 2:
        return held
    writes = tuple(name for one in held for name in one.written)
    return [replace(held[-1], writes=writes, args=(tuple(one.args[0] for one in held),))]


class _Distributed:
    """Rewrites instruction by instruction; knows what has been added up over ranks already."""

    def __init__(self, lowered: Lowered) -> None:
        plan = lowered.plan
        self._plan, self._end, self._full = plan, len(plan.stages), plan.gathers and plan.form.name == "joint"
        self._blocks = self._full and gram_way(plan) == "blocks"
        self._taken = {name for one in lowered.instructions for name in one.written}
        self._sums: dict[Any, Any] = {}
        self._made = 0
        self._last_decision = "w" if plan.max_step is None else "w_capped"

    def of(self, one: Instruction) -> Iterator[Instruction]:
        """What a rank does in an instruction's place."""
        for part in divided(one):
            if part.function == "m.keep":  # figures would be of a shard: but whether the step holds
                if "weights" in (part.kwargs or {}):
                    yield part
            elif part.function in SUMS and part.args[-1] is not None and not self._is_clipped(part):
                yield from self._summed(part, slice(len(part.args) - 1, None))
            elif part.function == "clip_gradients":
                yield from self._summed(part, slice(1, None))
            elif part.function == "m.observe_channels" or (part.function == "Rows" and part.writes[:5] == "seen_"):
                yield replace(part, kwargs={**(part.kwargs or {}), "joined": Var("m")})
            elif part.function in GRAMS and self._full:
                yield from self._gram(part)
            else:
                yield from self._of_batch(part)

    # --- sums ---------------------------------------------------------------------------------------------------------

    def _is_clipped(self, one: Instruction) -> bool:
        return self._plan.max_grad_norm is not None and one.phase == "joint"

    def _summed(self, one: Instruction, which: slice) -> Iterator[Instruction]:
        """The call with sums over ranks in place of some operands, each made once."""
        args, wanted = list(one.args), one.args[which]
        own = tuple(part for part in wanted if not (isinstance(part, Var) and part in self._sums))
        for part in own:
            name = self._named(f"{part.name}_all" if isinstance(part, Var) else "sums_all")
            yield self._emit(one, name, "m.all_reduce", part, note="over ranks")
            if isinstance(part, Var):
                self._sums[part] = Var(name)
            else:
                wanted = tuple(Var(name) if other is part else other for other in wanted)
        args[which] = [self._sums.get(part, part) if isinstance(part, Var) else part for part in wanted]
        yield replace(one, args=tuple(args))

    # --- Γ and the one system -----------------------------------------------------------------------------------------

    def _gram(self, one: Instruction) -> Iterator[Instruction]:
        at = GRAMS[one.function]
        whole, owner = self._named(f"{one.written[0]}_rows"), self._made % self._plan.ranks
        self._made += 1
        if not self._blocks:
            yield self._emit(one, whole, "m.all_samples", one.args[at], note="rows of all ranks")
            yield replace(one, args=(*one.args[:at], Var(whole), *one.args[at + 1 :]))
            return
        yield self._emit(one, whole, "m.samples_at", owner, one.args[at], note=f"rows of all ranks, at rank {owner}")
        args = (*one.args[:at], Var(whole), *one.args[at + 1 :])
        yield replace(one, function="m.made_at", args=(owner, Function(one.function), *args))

    def _of_batch(self, one: Instruction) -> Iterator[Instruction]:
        """What reads how many samples there are, or is a vector over them."""
        counted = one.function in ("rows_of", "group_scale") and (self._full or one.function == "group_scale")
        if counted:
            one = replace(one, args=tuple(Var("samples") if arg == SAMPLES else arg for arg in one.args))
        if one.function == "m.terminal":
            one = replace(one, args=one.args[:5], kwargs={"group": "rank"} if self._plan.coupling == "local" else None)
        if one.function == "m.losses":
            one = replace(one, writes=("phi", "samples"), note="phi_i; B of all ranks")
        one = replace(one, function=JOINED.get(one.function, one.function))
        if self._full and one.writes == "information":
            yield replace(one, writes="information_own")
            yield self._emit(one, "information", "m.all_samples", Var("information_own"), note="of all ranks")
        elif self._blocks and one.function == "blocks_diagonal":
            yield replace(one, function="m.made_at", args=(0, Function("blocks_diagonal"), *one.args))
        elif one.phase == "joint" and "lambda_0" in one.reads and self._blocks:
            whole = self._emit(one, "lambda_all", "m.all_reduce", Var("lambda_0"), note="every Gamma")
            yield from (whole, one.renamed({"lambda_0": "lambda_all"}))
        elif one.written[:1] in (("w",), ("w_capped",)):
            yield from self._decided(one)
        else:
            yield one

    def _decided(self, one: Instruction) -> Iterator[Instruction]:
        """``w`` of all ranks, of which each takes its own; no parameter has moved yet."""
        if self._full:
            targets = {f"y_{t}": "y_all" for t in (0, self._end)}
            if one.writes == "w":
                (own,) = (name for name in one.reads if name in targets)
                yield self._emit(one, "y_all", "m.all_samples", Var(own), note="of all ranks")
            one = one.renamed({**targets, "w": "w_all"})
            yield one.writing(lambda name: f"{name}_all")
        else:
            yield one
        last = one.writes == self._last_decision
        if last and self._full:
            yield self._emit(one, self._last_decision, "m.own_samples", Var(f"{self._last_decision}_all"))
        if last:
            yield self._emit(one, (), "m.agree", Var(self._last_decision), note="on every rank, or on none")

    # --- small parts --------------------------------------------------------------------------------------------------

    def _emit(self, one: Instruction, writes: Any, function: str, *args: Any, note: str = "") -> Instruction:
        return Instruction(one.phase, one.stage, writes, function, args, note=note)

    def _named(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name
