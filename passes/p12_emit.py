"""Emit: print the instructions as Python source.

Takes the lowered program; guarantees source text whose functions are straight lines of calls: one function a stage (its
dynamics, run in both sweeps), one a player that goes through a generic kernel, and ``step``. Decided here is what
is of the text alone: where a ReLU may write into what it reads, and after which line a variable is let go of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from gtddp_compile.lowering.instructions import Apply, Instruction, StageFunction, render_instruction
from gtddp_compile.lowering.lowered import Lowered
from gtddp_compile.lowering.operations import is_shared
from gtddp_compile.lowering.printing import Printer
from gtddp_compile.lowering.shared import divided

TITLES = {
    "trajectory": "sweep 1: the trajectory, cut before every stage",
    "loss": "the end of the trajectory: losses and the terminal value function",
    "backward": "backward sweep: gradients and gains",
    "forward": "sweep 2: every stage decides and moves on",
    "joint": "the joint step: one factor, and the same weights for every player",
    "checkpoint": "sweep 1: the trajectory, of which only the beginning of every segment is kept",
    "recompute": "a segment again, from its beginning",
    "gradients": "its gradients again",
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
    parts = [function_text(lowered, function, printer) for function in lowered.functions]
    return Emitted("\n\n".join([*parts, _step(lowered)]) + "\n", printer.constants)


def function_text(lowered: Lowered, function: StageFunction, printer: Printer) -> str:
    """The dynamics of a stage, or of a player's own operation, as a function."""
    graph, names = lowered.plan.graph, lowered.names
    inputs = [names[name] for name in function.inputs]
    if function.params is None:
        arguments, renamed = [*filter(None, function.moments.values()), "p", "b", *inputs], None
    else:
        extras = [names[name] for name in function.extras]
        rest = [name for name in inputs if name not in extras]
        arguments = [*extras, "params", *rest]
        renamed = {name: f"params[{index}]" for index, name in enumerate(function.params)}
        renamed.update(function.buffers)
    lines = []
    for name in function.ops:
        more = {}
        if name in function.moments:
            x, kwargs = names[graph.op(name).operands[0]], graph.op(name).kwargs
            together = lowered.plan.ranks > 1 and kwargs.get("sync")
            found = f"joined_moments({x}, ranks)" if together else f"quick_moments({x})"
            more["moments"] = function.moments[name] or found
        text = printer.operation(graph.op(name), params=renamed, more=more)
        if _overwrites(lowered, function, name):
            text = f"F.relu({names[graph.op(name).operands[0]]}, inplace=True)"
        lines.append(f"{names[name]} = tap({text})" if name in function.taps else f"{names[name]} = {text}")
    returned = [f"edge({names[name]})" if name in function.edges else names[name] for name in function.returns]
    if function.params is not None:
        lines.append(f"return {returned[0]}")
    else:
        lines.append(f"return ({', '.join(returned)}{',' if len(returned) == 1 else ''})")
    body = "\n    ".join([f'"""{function.doc}."""', *lines])
    return f"def {function.name}({', '.join(arguments)}):\n    {body}"


def _overwrites(lowered: Lowered, function: StageFunction, name: str) -> bool:
    """Whether a ReLU may write where it reads: a layer's output that neither autograd nor anybody else reads."""
    ops = lowered.plan.graph.ops
    op = ops.by_name[name]
    if op.kind != "relu" or len(op.leaves) != 1 or len(op.operands) != 1:
        return False
    (before,) = op.operands
    inner = before in function.ops and before not in (*function.returns, *function.taps)
    return inner and ops.by_name[before].kind in ("linear", "conv") and ops.users[before] == (name,)


@dataclass(frozen=True)
class Style:
    """How a back end shows the program: everything but the order of the lines."""

    show: Callable[[Instruction], Sequence[str]]
    heading: Callable[[Instruction], Sequence[str]]
    mark: tuple[str, ...] = ("m.mark()",)
    rewind: tuple[str, ...] = ("m.rewind()",)
    settle: tuple[str, ...] = ("m.settle()",)
    left: bool = False
    """Whether the program may be left standing for good: it has nothing to put back then, and so no ``with``."""


def draws(lowered: Lowered) -> bool:
    """Whether the network draws random numbers: the second sweep has to draw them again."""
    return any(op.random for op in lowered.plan.graph.ops.ops)


def _rewinds(lowered: Lowered) -> bool:
    """Whether the random state is handled here: programs that run segments again say themselves when they rewind."""
    found = lowered.instructions
    return (
        draws(lowered)
        and any(one.phase == "forward" for one in found)
        and all(one.function != "m.mark" for one in found)
    )


def body(lowered: Lowered, style: Style) -> list[str]:
    """Lines of ``step``: both sweeps, first with gradients of values, never of parameters."""
    random = _rewinds(lowered)
    lines: list[str] = []
    for phase, group in groupby(lowered.instructions, key=lambda instruction: instruction.phase):
        lines.append(f"# ---- {TITLES[phase]}")
        again = random and phase == "forward"
        lines += style.rewind if again else ()
        inner = list(_lines(group, style, mark=random and phase == "trajectory"))
        if phase in ("trajectory", "loss", "recompute"):
            if style.left:
                inner = ["torch.set_grad_enabled(True)", *inner, "torch.set_grad_enabled(False)"]
            else:
                inner = ["with torch.enable_grad():", *(f"    {line}" if line else "" for line in inner)]
        lines += inner + list(style.settle if again else ())
    return lines


def _step(lowered: Lowered) -> str:
    """``step(m, p, b, q, b_again, inputs, targets)``, one line an instruction."""
    text = "\n    ".join([*body(lowered, Style(_show_and_free(lowered), _heading)), "return phi.detach()"])
    doc = '"""One step: m is the base method, p and q the old and the new parameters."""'
    return f"def step(m, p, b, q, b_again, inputs, targets):\n    {doc}\n    {text}"


def emit_micro(lowered: Lowered) -> str:
    """The same steps for one micro-batch of an update, as a generator.

    What belongs to the whole update is asked for by ``yield name, arguments``, the method of ``m`` and what this
    micro-batch would call it with; the answer comes back by ``send``.
    """
    text = "\n    ".join([*body(lowered, Style(_show_and_free(lowered, _asked), _heading, left=True)), "return phi"])
    doc = '"""One micro-batch of a step."""'
    return f"def micro_step(m, p, b, q, b_again, inputs, targets):\n    {doc}\n    {text}\n"


def _asked(one: Instruction) -> tuple[Instruction, ...]:
    """What a micro-batch does in an instruction's place."""
    return tuple(
        replace(part, function="=", args=(Apply("yield", (part.function.removeprefix("m."), part.args)),), kwargs=None)
        if is_shared(part.function)
        else part
        for part in divided(one)
    )


def _show_and_free(
    lowered: Lowered, asked: Callable[[Instruction], tuple[Instruction, ...]] = lambda instruction: (instruction,)
) -> Callable[[Instruction], Sequence[str]]:
    """One line an instruction, and one that lets go of what nobody reads after it."""
    last: dict[str, int] = {}
    for instruction in lowered.instructions:
        for name in (*instruction.written, *instruction.reads):
            last[name] = id(instruction)
    free: dict[int, list[str]] = {}
    for name in dict.fromkeys(name for instruction in lowered.instructions for name in instruction.written):
        if name not in ("phi", "inputs", "targets", "p", "_"):  # parameters are read by the names of their own
            free.setdefault(last[name], []).append(name)
    for instruction in lowered.instructions:
        if "_" in instruction.written:
            free.setdefault(id(instruction), []).append("_")

    def show(instruction: Instruction) -> Sequence[str]:
        lines = [render_instruction(one) for one in asked(instruction)]
        lines[-1] += f"  # {instruction.note}" if instruction.note else ""
        if id(instruction) in free:
            lines.append(f"del {', '.join(free[id(instruction)])}")
        return lines

    return show


def _heading(instruction: Instruction) -> Sequence[str]:
    return (f"# stage {instruction.stage}" if instruction.stage >= 0 else "# before the first stage",)


def _lines(instructions: Iterator[Instruction], style: Style, *, mark: bool) -> Iterator[str]:
    """The random state is marked where the first stage begins."""
    stage: int | None = None
    for instruction in instructions:
        if instruction.stage != stage:
            if mark and instruction.stage >= 0 and (stage is None or stage < 0):
                yield from style.mark
            stage = instruction.stage
            yield from style.heading(instruction)
        yield from style.show(instruction)
