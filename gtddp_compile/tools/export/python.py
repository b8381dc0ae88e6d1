"""``.py``: the program as a module that needs torch alone, to be read beside the paper and edited.

The lines of ``step`` are the lowered instructions; kernels and base method come along as the text that runs here
(``carry``), as far as this program uses them.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from gtddp_compile import kernels
from gtddp_compile.algebra.derivation import Equation
from gtddp_compile.errors import CompileError
from gtddp_compile.lowering.instructions import Code, Instruction, render_instruction
from gtddp_compile.lowering.printing import Printer
from gtddp_compile.methods.curvature import BlockUpdates, Kronecker, ParameterUpdates
from gtddp_compile.passes.p11_emit import Style, body, draws, function_text
from gtddp_compile.tools.export.carry import Luggage, attributes_of, names_in
from gtddp_compile.tools.export.layout import INDENT, WIDTH, double_quoted, lay_out
from gtddp_compile.tools.export.losses import as_returned, loss_text
from gtddp_compile.tools.export.parts import Parts
from gtddp_compile.tools.export.values import tensor_text, value_text

RULE = "# " + "-" * (WIDTH - 2)
LOSS_CALLS = {"m.losses": 0, "m.factors": 1}
"""What the loss's section defines, and which argument is the model's output."""
RUNTIME = frozenset({"keep", "losses", "factors", "terminal", "mark", "rewind", "settle"})
"""Methods of ``m`` that serve diagnostics, stand for the loss or keep random numbers; every other one is carried."""

RECEIVERS = ("self._curvature", "self._kronecker")
"""What the base method is called in the class of ``m``."""


def to_python(parts: Parts, *, guarded: bool = True) -> str:
    """Source text of the module.

    Args:
        parts: the program.
        guarded: nothing changes where the loss is not finite; without, the caller sees to it.

    Raises:
        CompileError: the loss or a constant is Python code that needs more than torch.
    """
    return _Module(parts, guarded).text()


class _Module:
    """Collects the sections of one exported module."""

    def __init__(self, parts: Parts, guarded: bool) -> None:
        self.parts, self.guarded = parts, guarded
        self.lowered, self.graph, self.setting = parts.lowered, parts.graph, parts.setting
        self.luggage = Luggage()
        self.luggage.imports |= {"import torch", "import torch.nn.functional as F"}
        self.random = draws(self.lowered)
        self.constants: dict[str, Any] = {}

    def text(self) -> str:
        low = {info.dtype for info in self.graph.ops.parameter_info.values()} & {torch.bfloat16, torch.float16}
        if low:
            raise CompileError(
                f"parameters are {', '.join(map(str, low))}, and an exported module has no kernels of two precisions",
                "Export the program of the model in float32, or as .json",
            )
        loss = loss_text(self.parts, self.luggage)
        step = self._step()
        stages = self._stages()
        carried = self._carried(f"{stages}\n{step}\n{loss}")
        constants = self._constants()
        head = self._options()
        method, kernel_text = carried
        whole = "".join([method, kernel_text, constants, head, loss, stages, step])
        sections = [
            (None, self._imports(whole)),
            ("what a researcher may want to change", head + constants),
            ("the network, cut into stages: x' = f_t(x, u)", stages),
            ("one step", step),
            ("the loss, one number a sample", loss),
            (f"the base method, {self.parts.curvature}: curvature M (Table 1), and how it takes a gradient", method),
            ("kernels: the arithmetic of the sweeps and of each kind of layer", kernel_text),
        ]
        written = [f"{RULE}\n# {title}\n{RULE}\n\n{body}" if title else body for title, body in sections]
        return f"{self._documentation()}\n\n" + "\n\n\n".join(part.strip("\n") for part in written) + "\n"

    # --- head ---------------------------------------------------------------------------------------------------------

    def _documentation(self) -> str:
        parts, graph = self.parts, self.graph
        stages = [f"  {stage.index:>3}  {', '.join(stage.players)}" for stage in graph.stages]
        cuts = [f"       cut before it: {', '.join(stage.live)}" for stage in graph.stages]
        rows = [line for pair in zip(stages, cuts, strict=True) for line in pair]
        equations = [_equation(equation) for equation in parts.equations]
        lines = [
            f'"""Update program of {graph.name}: {parts.curvature}, {parts.form.name} form, '
            f"coupling {parts.options.coupling}.",
            "",
            f"Written by gtddp_compile {parts.version}; needs torch alone. Both functions are pure:",
            "",
            "    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())",
            "    state = init_state(params)",
            "    params, buffers, state, loss = step(params, buffers, state, inputs, targets)",
            "",
            "Back-propagate once, then make one B x B Gram matrix and one Cholesky factor a stage, then sweep forward:",
            "every stage takes one weighted parameter gradient, preconditioned by the base method, and runs again.",
            "Numbers in parentheses are the paper's equations, 4a and 4b its collapsed forms. A prime means t+1 in the",
            "recursions and the new trajectory in the forward sweep.",
            "",
            *(f"    {line}" for line in equations),
            "",
            "with C the per-sample parameter gradients of a stage (one column a sample), M the curvature of the base",
            "method, Gamma = C^T M^-1 C and c the change of each sample's loss that the stages before have caused.",
            "",
            "Stages:",
            *rows,
            '"""',
        ]
        return "\n".join(_wrapped(line) for line in lines)

    def _imports(self, text: str) -> str:
        wanted = set(self.luggage.imports)
        for name, line in (("operator", "import operator"), ("math", "import math"), ("base64", "import base64"),
                           ("nn", "from torch import nn")):  # fmt: skip
            if f"{name}." in text:
                wanted.add(line)
        torch_lines = sorted(line for line in wanted if line.split()[1].startswith("torch"))
        plain = sorted(line for line in wanted if line not in torch_lines)
        own = [line for line in _merged(plain) if line.startswith("import ")]
        own += [line for line in _merged(plain) if not line.startswith("import ")]
        theirs = [line for line in _merged(torch_lines) if line.startswith("import ")]
        theirs += [line for line in _merged(torch_lines) if not line.startswith("import ")]
        return "\n".join(["from __future__ import annotations", "", *own, *([""] if own else []), *theirs])

    def _options(self) -> str:
        shared = self.setting.shared
        lines = ["OPTIONS = {"]
        lines += [f"    {name!r}: {value_text(value)}," for name, value in shared.items()]
        lines += ["}", f'"""Options of every parameter: those of torch.optim\'s {self.parts.curvature}."""', ""]
        lines += ["GROUPS = {"]
        for group in self.setting.groups:
            own = {name: value for name, value in group.options.items() if name not in shared}
            lines += lay_out(f"{group.name!r}: ({value_text(group.parameters)}, {value_text(own)}),", INDENT)
        lines += ["}", '"""Parameters of every module, and the options in which it differs."""', ""]
        plan = self.lowered.plan
        if any(i.function in ("clip", "clip_factors") for i in self.lowered.instructions):
            lines += [f"FEEDBACK_CLIP = {value_text(plan.clip)}"]
            lines += [
                '"""Predicted changes of a sample\'s loss are believed up to here (4a); None: without bound."""',
                "",
            ]
        if any(i.function == "rows_of" for i in self.lowered.instructions):
            size = plan.coupling if isinstance(plan.coupling, int) else None
            lines += [f"GROUP_SIZE = {size}", '"""Samples that are coupled with each other; None: the whole batch."""']
        return double_quoted("\n".join(lines)) + "\n"

    def _constants(self) -> str:
        lines = []
        for name, value in self.constants.items():
            if not isinstance(value, torch.Tensor):
                raise CompileError(
                    f"the network calls {getattr(value, '__qualname__', value)!r}, which is not torch's",
                    "Export as .json or .pt2, or write that operation in terms of torch",
                )
            lines += [*lay_out(f"{name} = {tensor_text(value)}"), ""]
        if self.setting.constants:
            lines += ["CONSTANTS = {"]
            for name, tensor in self.setting.constants.items():
                lines += lay_out(f'"{name}": {tensor_text(tensor)},', INDENT)
            lines += ["}", '"""Tensors that the model keeps as plain attributes, not as buffers."""']
        return "\n" + "\n".join(lines)

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
        unknown = sorted(name for name in names if not hasattr(updates, name))
        if unknown:
            raise CompileError(
                f"the program calls m.{unknown[0]} ({self.parts.curvature}), whose text no module carries",
                "Export as .json, or use one of the package's own base methods",
            )
        for name in sorted(names_in(text) & set(kernels.KERNELS)):
            luggage.take(kernels.__name__, name)
        luggage.aliases = {"Curvature": method.__name__, "Kronecker": method.__name__}
        luggage.take_class(updates.__module__, updates.__name__, names)
        luggage.aliases = {}
        classes = [kind.__name__ for kind in updates.__mro__ if kind.__name__ in luggage.pieces]
        asked = [attributes_of(luggage.pieces[kind], receiver) for kind in classes for receiver in RECEIVERS]
        luggage.take_class(method.__module__, method.__name__, frozenset({"init_state"}).union(*asked))
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
        advancing = tuple(dict.fromkeys(name for op in self.graph.ops.ops for name in op.advances))
        constants = "**CONSTANTS, " if self.setting.constants else ""
        lines = [*_INIT.format(method=type(self.setting.curvature).__name__).splitlines(), "", ""]
        lines += _HEAD.splitlines()
        if advancing:
            lines += lay_out(double_quoted(f"advancing = {value_text(advancing)}"), INDENT)
            lines += [f"    b = {{{constants}**buffers, **{{name: buffers[name].clone() for name in advancing}}}}"]
            lines += ["    b_again = {**b, **dict.fromkeys(advancing)}  # statistics advance once, in the first sweep"]
        else:
            lines += [f"    b = {{{constants}**buffers}}", "    b_again = b"]
        lines += [f"    m = {self._updates.__name__}({self._method()}, p, q, state, options)"]
        lines += ["    drawn = random_state()"] if self.random else []
        lines += ["    with torch.no_grad():"]
        lines += [f"{INDENT * 2}{line}" if line else "" for line in _spaced(body(self.lowered, style))]
        returned = "{name: b[name] for name in buffers}" if constants else "b"
        lines += [f"    return q, {returned}, m.states, loss"]
        return "\n".join(lines)

    def _method(self) -> str:
        return f"{type(self.setting.curvature).__name__}()"

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
            return replace(instruction, args=(args[0], Code("FEEDBACK_CLIP"), *args[2:]))
        if function == "rows_of":
            columns = args[1].text.partition(" * ")[2] if isinstance(args[1], Code) else ""
            return replace(instruction, args=(args[0], Code(_group_size(columns))))
        if function in LOSS_CALLS:
            at = LOSS_CALLS[function]
            given = as_returned(self.graph.ops.output, args[at])
            return replace(instruction, function=function[2:], args=(*args[:at], given, *args[at + 1 :]))
        if function == "m.terminal":
            return replace(instruction, function="terminal", args=(args[0], self.setting.loss.reduction, *args[1:]))
        return instruction


_INIT = '''
def options_by_parameter():
    """OPTIONS and what each module has of its own, by parameter."""
    return {{name: {{**OPTIONS, **own}} for names, own in GROUPS.values() for name in names}}


def init_state(params):
    """State of the base method before the first step, by parameter, with torch.optim's keys."""
    options = options_by_parameter()
    return {{name: {method}().init_state(params[name].detach(), options[name]) for name in options}}
'''.strip("\n")

_HEAD = '''
def step(params, buffers, state, inputs, targets):
    """One update; nothing that is passed in is changed.

    Args:
        params, buffers: tensors by torch's own names.
        state: from init_state, or from the step before.
        inputs: a tensor or a tuple of them, batch on the leading axis.
        targets: what the loss takes.

    Returns:
        params, buffers, state after the step, and the loss before it. If that is not finite, everything else comes
        back as it was given.
    """
    inputs = tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,)
    options = options_by_parameter()
    p = {name: value.detach() for name, value in params.items()}
    q = dict(p)  # the new parameters
'''.strip("\n")


def _group_size(columns: str) -> str:
    """Rows of a group in a Gram matrix, with so many columns a sample."""
    return f"GROUP_SIZE and GROUP_SIZE * {columns}" if columns else "GROUP_SIZE"


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


def _wrapped(line: str) -> str:
    if len(line) <= WIDTH:
        return line
    indent = line[: len(line) - len(line.lstrip())] + INDENT
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_long_words=False))


def _merged(lines: list[str]) -> list[str]:
    """Imports from one module on one line."""
    groups: dict[str, list[str]] = {}
    plain = []
    for line in lines:
        if line.startswith("from "):
            origin, _, names = line.partition(" import ")
            groups.setdefault(origin, []).append(names)
        else:
            plain.append(line)
    return plain + [f"{origin} import {', '.join(names)}" for origin, names in groups.items()]
