"""Emit: print the instructions as Python source.

Takes the lowered program; guarantees source text whose functions are straight lines of calls: one function a stage (its
dynamics, run in both sweeps), one a player that goes through a generic kernel, and ``step``. Nothing is decided here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from gtddp_compile.instructions import Instruction, StageFunction, render_instruction
from gtddp_compile.passes.p09_lower import Lowered
from gtddp_compile.printing import Printer

TITLES = {
    "trajectory": "sweep 1: the trajectory, cut before every stage",
    "loss": "the end of the trajectory: losses and the terminal value function",
    "backward": "backward sweep: gradients and gains",
    "forward": "sweep 2: every stage decides and moves on",
}


@dataclass(frozen=True)
class Emitted:
    """Source text, and the objects it refers to that have no name in torch (modules kept whole)."""

    code: str
    constants: dict[str, Any]


def emit(lowered: Lowered) -> Emitted:
    """Print the program."""
    names = lowered.names
    printer = Printer(lambda name: names[name])
    parts = [_function(lowered, function, printer) for function in lowered.functions]
    return Emitted("\n\n".join([*parts, _step(lowered)]) + "\n", printer.constants)


def _function(lowered: Lowered, function: StageFunction, printer: Printer) -> str:
    graph, names = lowered.plan.graph, lowered.names
    inputs = [names[name] for name in function.inputs]
    if function.params is None:
        arguments, renamed = ["p", "b", *inputs], None
    else:
        extras = [
            names[e] for use in lowered.uses.values() for u in use if u.op == function.returns[0] for e in u.extras
        ]
        rest = [name for name in inputs if name not in extras]
        arguments = [*extras, "params", *rest]
        renamed = {name: f"params[{index}]" for index, name in enumerate(function.params)}
    lines = []
    for name in function.ops:
        text = printer.operation(graph.op(name), params=renamed)
        lines.append(f"{names[name]} = tap({text})" if name in function.taps else f"{names[name]} = {text}")
    returned = [names[name] for name in function.returns]
    if function.params is not None:
        lines.append(f"return {returned[0]}")
    else:
        lines.append(f"return ({', '.join(returned)}{',' if len(returned) == 1 else ''})")
    body = "\n    ".join([f'"""{function.doc}."""', *lines])
    return f"def {function.name}({', '.join(arguments)}):\n    {body}"


def _step(lowered: Lowered) -> str:
    """``step(m, p, b, q, b_again, inputs, targets)``: both sweeps, first with gradients of values, never of
    parameters.
    """
    random = any(op.random for op in lowered.plan.graph.ops.ops)
    lines: list[str] = []
    for phase, group in groupby(lowered.instructions, key=lambda instruction: instruction.phase):
        lines.append(f"# ---- {TITLES[phase]}")
        again = random and phase == "forward"
        lines += ["m.rewind()"] if again else []
        body = list(_lines(group, mark=random and phase == "trajectory"))
        if phase in ("trajectory", "loss"):
            lines.append("with torch.enable_grad():")
            body = [f"    {line}" for line in body]
        lines += body + (["m.settle()"] if again else [])
    lines.append("return phi")
    text = "\n    ".join(lines)
    doc = '"""One step: m is the base method, p and q the old and the new parameters."""'
    return f"def step(m, p, b, q, b_again, inputs, targets):\n    {doc}\n    {text}"


def _lines(instructions: Iterator[Instruction], *, mark: bool) -> Iterator[str]:
    """One line an instruction; ``m.mark()`` remembers the random state at which the first stage begins."""
    stage: int | None = None
    for instruction in instructions:
        if instruction.stage != stage:
            if mark and instruction.stage >= 0 and (stage is None or stage < 0):
                yield "m.mark()"
            stage = instruction.stage
            yield f"# stage {stage}" if stage >= 0 else "# before the first stage"
        text = render_instruction(instruction)
        yield f"{text}  # {instruction.note}" if instruction.note else text
