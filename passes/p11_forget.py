"""Forget: values of the first trajectory that only their own change is asked of.

Takes the sweeps; guarantees that an inner product is kept in the place of such a value: ``c`` needs
``⟨g, δx⟩ = ⟨g, x'⟩ - ⟨g, x⟩``. Where the forward sweep reads an old value for this alone (what a normalisation takes
in, an input whose layer keeps its per-sample gradients), ``⟨g, x⟩`` is computed when the backward sweep has ``g``: one
number a sample instead of the value. Where somebody else reads it, the difference is taken first. Where the trajectory
is run again, nothing is kept that could be let go of.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from gtddp_compile.lowering.instructions import Code, Instruction
from gtddp_compile.lowering.lowered import Written, compares


def forget(written: Written) -> Written:
    """The same sweeps with the contractions of such values split in two."""
    if written.plan.segments is not None:
        return written
    sweeps = written.sweeps
    reads = Counter(name for part in sweeps.forward.values() for one in part for name in one.reads)
    contracts = [one for part in sweeps.forward.values() for one in part if compares(one)]
    compared = Counter(one.args[2].name for one in contracts)
    alone = {name for name, count in compared.items() if reads[name] == count}
    defined = {
        name: t for t, part in sweeps.pulled.items() for one in part for name in one.written
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
    return replace(written, sweeps=replace(sweeps, pulled=pulled, gains=gains, forward=forward))


def _kept(contract: Instruction) -> str:
    return f"before_{contract.written[0]}"


def _split(part: tuple[Instruction, ...], alone: set[str]) -> Iterator[Instruction]:
    for one in part:
        if compares(one) and one.args[2].name in alone:
            g, after, _ = one.args
            text = f"contract_value({g.name}, {after.name}) - {_kept(one)}"
            yield replace(one, function="=", args=(Code(text),))
        else:
            yield one
