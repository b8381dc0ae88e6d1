"""Values of the first trajectory that only their own change is asked of: an inner product is kept in their place.

``c`` needs ``⟨g, δx⟩ = ⟨g, x'⟩ - ⟨g, x⟩``. Where the forward sweep reads an old value for this alone (what a
normalisation takes in, an input whose layer keeps its per-sample gradients), ``⟨g, x⟩`` is computed when the backward
sweep has ``g``: one number a sample instead of the value. Where somebody else reads it, the difference is taken first.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from gtddp_compile.instructions import Code, Instruction, Var, render_instruction
from gtddp_compile.recompute import Sweeps

NAME = re.compile(r"(?<!['\w.])[A-Za-z_]\w*(?!['\w])")


def let_go(sweeps: Sweeps) -> Sweeps:
    """The same sweeps with the contractions of such values split in two."""
    reads = Counter(name for part in sweeps.forward.values() for one in part for name in read_by(one))
    contracts = [one for part in sweeps.forward.values() for one in part if compares(one)]
    compared = Counter(one.args[2].name for one in contracts)
    alone = {name for name, count in compared.items() if reads[name] == count}
    defined = {
        write.removeprefix("*"): t for t, part in sweeps.pulled.items() for one in part for write in one.writes
    }  # the stage of the backward sweep that gives a gradient its last value; of the outputs', the loss does
    gains, pulled = dict(sweeps.gains), dict(sweeps.pulled)
    for one in contracts:
        g, _, before = one.args
        if before.name not in alone:
            continue
        product = Instruction("backward", 0, (f"*{_kept(one)}",), "contract_value", (g, before), note="<g, x>")
        if g.name in defined:
            t = defined[g.name]
            gains[t] = (replace(product, stage=t), *gains[t])
        else:
            t = max(pulled)
            pulled[t] = (replace(product, stage=t), *pulled[t])
    forward = {t: tuple(_split(part, alone)) for t, part in sweeps.forward.items()}
    return replace(sweeps, pulled=pulled, gains=gains, forward=forward)


def compares(instruction: Instruction) -> bool:
    """Whether it is a contraction ``⟨g, x' - x⟩``, the new and the old value its second and third argument."""
    return instruction.function == "contract" and all(isinstance(arg, Var) for arg in instruction.args)


def _kept(contract: Instruction) -> str:
    return f"before_{contract.writes[0].removeprefix('*')}"


def _split(part: tuple[Instruction, ...], alone: set[str]) -> Iterator[Instruction]:
    for one in part:
        if compares(one) and one.args[2].name in alone:
            g, after, _ = one.args
            text = f"contract_value({g.name}, {after.name}) - {_kept(one)}"
            yield replace(one, function="=", args=(Code(text),))
        else:
            yield one


def read_by(instruction: Instruction) -> set[str]:
    """Every name that an instruction reads."""
    return set(NAME.findall(render_instruction(replace(instruction, writes=()))))
