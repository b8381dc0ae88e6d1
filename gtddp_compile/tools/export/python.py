"""``.py``: the program as a module that needs torch and what torch brings, to be read beside the paper and edited.

The lines of ``step`` are the lowered instructions; kernels and base method come along as the text that runs here
(``carry``), as far as this program uses them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from gtddp_compile import kernels
from gtddp_compile.algebra.derivation import Equation
from gtddp_compile.errors import CompileError
from gtddp_compile.lowering.instructions import Apply, Instruction, Var, render_instruction
from gtddp_compile.lowering.printing import Printer
from gtddp_compile.methods.curvature import BlockUpdates, Kronecker, ParameterUpdates
from gtddp_compile.passes.p12_emit import Style, body, draws, function_text
from gtddp_compile.runtime.program import VERSION, UpdateProgram
from gtddp_compile.tools.export.carry import Luggage, attributes_of, names_in
from gtddp_compile.tools.export.head import summary, symbols
from gtddp_compile.tools.export.layout import INDENT, WIDTH, double_quoted, lay_out
from gtddp_compile.tools.export.losses import as_returned, loss_text
from gtddp_compile.tools.export.values import tensor_text, value_text
from gtddp_compile.tools.page import page

LOSS_CALLS = {"m.losses": 0, "m.factors": 1, "m.above": 1}
"""What the loss's section defines, and which argument is the model's output."""
RUNTIME = frozenset({"keep", "losses", "factors", "above", "terminal", "mark", "rewind", "settle"})
"""Methods of ``m`` that serve diagnostics, stand for the loss or keep random numbers; every other one is carried."""

RECEIVERS = ("self._curvature", "self._kronecker")
"""What the base method is called in the class of ``m``."""


def to_python(program: UpdateProgram, *, guarded: bool = True) -> str:
    """Source text of the module; ``guarded``: nothing changes where the loss is not finite, else the caller sees to it.

    Raises:
        CompileError: the loss or a constant is Python code that needs more than torch.
    """
    return _Module(program, guarded).text()


class _Module:
    """Collects the sections of one exported module."""

    def __init__(self, program: UpdateProgram, guarded: bool) -> None:
        self.program, self.guarded = program, guarded
        self.lowered, self.graph, self.setting = program.lowered, program.graph, program.compiled_for
        self.luggage = Luggage()
        self.luggage.needs("torch", "torch")
        self.luggage.needs("F", "torch.nn.functional")
        self.random = draws(self.lowered)
        self.constants: dict[str, Any] = {}

    def text(self) -> str:
        program, graph = self.program, self.graph
        low = {info.dtype for info in graph.ops.parameter_info.values()} & {torch.bfloat16, torch.float16}
        if low:
            raise CompileError(
                f"parameters are {', '.join(map(str, low))}, and an exported module has no kernels of two precisions",
                "Export the program of the model in float32, or as .json",
            )
        loss = loss_text(program, self.luggage)
        step = self._step()
        stages = self._stages()
        method, kernel_text = self._carried(f"{stages}\n{step}\n{loss}")
        sections = [
            ("what a researcher may want to change", self._options()),
            ("the network, cut into stages: x' = f_t(x, u)", stages),
            ("one step", step),
            ("the loss, one number a sample", loss),
            (f"the base method, {program.curvature}: curvature M (Table 1), and how it takes a gradient", method),
            ("kernels: the arithmetic of the sweeps and of each kind of layer", kernel_text),
        ]
        for name in ("operator", "math", "base64", "nn"):
            if any(f"{name}." in text for _, text in sections):
                self.luggage.needs(name, *(("torch", "nn") if name == "nn" else (name,)))
        rows = [
            text
            for stage in graph.stages
            for text in (
                f"  {stage.index:>3}  {', '.join(stage.players)}",
                f"       cut before it: {', '.join(stage.live)}",
            )
        ]
        return page(
            "export/module.py.j2",
            graph=graph,
            curvature=program.curvature,
            form=program.form.name,
            coupling=program.options.coupling,
            version=VERSION,
            summary=textwrap.fill(summary(program), WIDTH - 4),
            symbols=_symbols(program),
            equations=[_wrapped(f"    {_equation(equation)}") for equation in program.form.said],
            stages=map(_wrapped, rows),
            imports=self.luggage.import_lines,
            sections=sections,
            width=WIDTH,
        )

    # --- head ---------------------------------------------------------------------------------------------------------

    def _options(self) -> str:
        """Options of the base method and of the program, and constants."""
        setting, plan = self.setting, self.lowered.plan
        shared, called = setting.shared, {instruction.function for instruction in self.lowered.instructions}
        groups, tensors, constants = [], [], []
        for group in setting.groups:
            own = {name: value for name, value in group.options.items() if name not in shared}
            line = f"{group.name!r}: ({value_text(group.parameters)}, {value_text(own)}),"
            groups += [double_quoted(part) for part in lay_out(line, INDENT)]
        for name, value in self.constants.items():
            if not isinstance(value, torch.Tensor):
                raise CompileError(
                    f"the network calls {getattr(value, '__qualname__', value)!r}, which is not torch's",
                    "Export as .json or .pt2, or write that operation in terms of torch",
                )
            tensors += [*lay_out(f"{name} = {tensor_text(value)}"), ""]
        for name, tensor in setting.constants.items():
            constants += lay_out(f'"{name}": {tensor_text(tensor)},', INDENT)
        return page(
            "export/options.py.j2",
            shared=[(f'"{name}"', double_quoted(value_text(value))) for name, value in shared.items()],
            curvature=self.program.curvature,
            groups=groups,
            clip=value_text(plan.clip) if called & {"clip", "clip_factors"} else "",
            size=plan.coupling if isinstance(plan.coupling, int) else "",
            tensors=tensors,
            constants=constants,
        )

    # --- carried text -------------------------------------------------------------------------------------------------

    @property
    def _updates(self) -> type[ParameterUpdates]:
        """The class of ``m``."""
        return BlockUpdates if isinstance(self.setting.curvature, Kronecker) else ParameterUpdates

    def _carried(self, text: str) -> tuple[str, str]:
        """The base method's text and the kernels'."""
        called = {instruction.function for instruction in self.lowered.instructions}
        names = frozenset(name[2:] for name in called if name.startswith("m.")) - RUNTIME
        method, updates, luggage = type(self.setting.curvature), self._updates, self.luggage
        if not method.__module__.startswith(luggage.package):
            raise CompileError(
                f"the base method {method.__name__} is none of the package's own, whose text alone a module carries",
                "Train by compile_optimizer(…, curvature=…), or export as .tex",
            )
        unknown = sorted(name for name in names if not hasattr(updates, name))
        if unknown:
            raise CompileError(
                f"the program calls m.{unknown[0]} ({self.program.curvature}), whose text no module carries",
                "Export as .json, or use one of the package's own base methods",
            )
        for name in sorted(names_in(text) & set(kernels.KERNELS)):
            luggage.take(kernels.__name__, name)
        luggage.aliases = {"Curvature": method.__name__, "Kronecker": method.__name__}
        luggage.take_class(updates, names)
        luggage.aliases = {}
        classes = [kind.__name__ for kind in updates.__mro__ if kind.__name__ in luggage.pieces]
        asked = [attributes_of(luggage.pieces[kind], receiver) for kind in classes for receiver in RECEIVERS]
        luggage.take_class(method, frozenset({"init_state"}).union(*asked))
        last = {kind: luggage.pieces.pop(kind) for kind in reversed(classes)}
        luggage.pieces.update(last)
        theirs = [name for name, origin in luggage.origins.items() if origin.startswith(kernels.__name__)]
        own = [name for name in luggage.pieces if name not in theirs]
        return self._joined(own), self._joined([name for name in luggage.pieces if name in theirs])

    def _joined(self, names: Sequence[str]) -> str:
        return "\n\n\n".join(self.luggage.pieces[name].strip("\n") for name in names)

    # --- stages and step ----------------------------------------------------------------------------------------------

    def _stages(self) -> str:
        names = self.lowered.names
        printer = Printer(lambda name: names[name])
        written = []
        for function in self.lowered.functions:
            lines = function_text(self.lowered, function, printer).splitlines()
            lines = [double_quoted(line) for line in lines]
            spread = [part for line in lines for part in lay_out(line.lstrip(), line[: len(line) - len(line.lstrip())])]
            written.append("\n".join(spread))
        self.constants = printer.constants
        return "\n\n\n".join(written)

    def _step(self) -> str:
        style = Style(
            self._show,
            self._heading,
            mark=("first = random_state()",),
            rewind=("after = random_state()  # the same random numbers in both sweeps", "restore_random_state(first)"),
            settle=("restore_random_state(after)",),
        )
        names = tuple(dict.fromkeys(name for op in self.graph.ops.ops for name in op.advances))
        return page(
            "export/step.py.j2",
            method=type(self.setting.curvature).__name__,
            updates=self._updates.__name__,
            advancing=lay_out(double_quoted(f"advancing = {value_text(names)}"), INDENT) if names else (),
            constants=bool(self.setting.constants),
            random=self.random,
            lines=_spaced(body(self.lowered, style)),
        )

    def _heading(self, instruction: Instruction) -> Sequence[str]:
        index, end = instruction.stage, len(self.graph.stages)
        if index < 0:
            return ("# before the first stage",)
        if index == end:
            return ("# the loss",)
        players = ", ".join(self.graph.stages[index].players)
        return (
            ("", f"# stage {index}: {players}")
            if instruction.phase not in ("trajectory", "checkpoint", "recompute")
            else (f"# stage {index}: {players}",)
        )

    def _show(self, instruction: Instruction) -> Sequence[str]:
        if instruction.function == "m.keep":
            return ()
        if instruction.function in ("m.mark", "m.rewind", "m.settle"):
            return self._random_state(instruction)
        shown = self._translated(instruction)
        lines = lay_out(double_quoted(render_instruction(shown)), "", shown.note, WIDTH - 3 * len(INDENT))
        if instruction.function == "m.losses":
            total = "mean" if self.setting.loss.reduction == "mean" else "sum"
            lines += [f"loss = phi.detach().{total}()"]
            lines += self._guard() if self.guarded else ()
        return lines

    def _guard(self) -> Sequence[str]:
        restored = ("    restore_random_state(drawn)",) if self.random else ()
        head = "if not torch.isfinite(loss):  # nothing changes"
        return (head, *restored, "    return params, buffers, state, loss")

    def _random_state(self, instruction: Instruction) -> Sequence[str]:
        """What ``m`` does about random numbers where segments are run again."""
        if instruction.function == "m.settle":
            return ("restore_random_state(after)",)
        (segment,) = instruction.args
        if instruction.function == "m.mark":
            return (f"first_{segment} = random_state()",)
        first = ("after = random_state()  # the same random numbers every time",) if instruction.note else ()
        return (*first, f"restore_random_state(first_{segment})")

    def _translated(self, instruction: Instruction) -> Instruction:
        """Options by name, and the loss's own functions for what is asked of ``m``."""
        function, args = instruction.function, instruction.args
        if function in ("clip", "clip_factors") and len(args) > 1:
            return replace(instruction, args=(args[0], Var("FEEDBACK_CLIP"), *args[2:]))
        if function == "rows_of":
            return replace(instruction, args=(args[0], _with_group_size(args[1])))
        if function == "m.above" and self.setting.loss.excess is None:
            return replace(instruction, function="=", args=args[:1], note="the least is 0")
        if function in LOSS_CALLS:
            at = LOSS_CALLS[function]
            given = as_returned(self.graph.ops.output, args[at])
            return replace(instruction, function=function[2:], args=(*args[:at], given, *args[at + 1 :]))
        if function == "m.terminal":
            return replace(instruction, function="terminal", args=(args[0], self.setting.loss.reduction, *args[1:]))
        return instruction


def _with_group_size(rows: Any) -> Any:
    """Rows of a group in a Gram matrix by the group's size, a constant of the module."""
    if isinstance(rows, Apply):
        return replace(rows, args=(Var("GROUP_SIZE"), *rows.args[1:]))
    return rows if rows is None else Var("GROUP_SIZE")


@cache
def _equation(equation: Equation) -> str:
    said = f"{equation.symbol} = {equation.expression}".replace("**(-1)", "^-1").replace("*", " ")
    return f"{said:<48}({equation.source})"


def _spaced(lines: list[str]) -> list[str]:
    """A blank line before the title of a sweep, none behind it."""
    found: list[str] = []
    for line in lines:
        title = line.startswith("# ----")
        if not line and found and found[-1].startswith("# ----"):
            continue
        found += ["", line] if title and found else [line]
    return found


def _symbols(program: UpdateProgram) -> str:
    """In lines that end in no definition."""
    said = f"with {', '.join(symbols(program))}.".replace(" = ", "\xa0=\xa0")
    return textwrap.fill(said, WIDTH - 4).replace("\xa0", " ")


def _wrapped(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    indent = line[: len(line) - len(line.lstrip())] + INDENT
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False))
