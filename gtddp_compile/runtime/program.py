"""The compiled program: what was derived, the instructions, and the generated code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Protocol

from sympy import latex

from gtddp_compile.algebra.collapsed import COUPLED, CollapsedForm
from gtddp_compile.algebra.derivation import Equation, StageDerivation, equation_text
from gtddp_compile.algebra.elimination import cooperative_gains
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph, tool
from gtddp_compile.lowering.decide import rollout_units
from gtddp_compile.lowering.lowered import Lowered
from gtddp_compile.lowering.plan import LayerPlan, Plan
from gtddp_compile.lowering.segments import describe_memory
from gtddp_compile.lowering.traffic import traffic
from gtddp_compile.lowering.write.columns import describe_terminal, vectorises
from gtddp_compile.methods.setting import Setting
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import Derived, DerivedStage
from gtddp_compile.passes.p12_emit import Emitted
from gtddp_compile.wording import few, rendered

Format = Literal["text", "latex", "sympy"]
VERSION = metadata.version("gtddp-compile")


class Difference(Protocol):
    """What :meth:`UpdateProgram.diff` returns (``gtddp_compile.tools.difference.ProgramDiff``)."""

    def to_html(self) -> str:
        """The differences as one page."""

    def save(self, path: str | Path) -> None:
        """Write them as text or as a page, by suffix."""


@dataclass(frozen=True)
class UpdateProgram:
    """The optimizer that was derived for one architecture (immutable).

    ``str()`` shows the instructions stage by stage, ``code`` the Python that runs, :meth:`derivation` the mathematics
    it was lowered from, :meth:`cost` what each player costs and in which form.
    """

    graph: ControlGraph
    derived: Derived
    form: CollapsedForm
    lowered: Lowered
    emitted: Emitted
    options: Options
    curvature: str
    setting: Setting | None = None

    @property
    def compiled_for(self) -> Setting:
        """Base method, options by parameter and loss, for what writes the program down.

        Raises:
            CompileError: it belongs to no optimizer.
        """
        if self.setting is None:
            raise CompileError(
                "the program has no base method with its options: it was built outside an optimizer",
                "Export opt.program of a compiled optimizer",
            )
        return self.setting

    @property
    def code(self) -> str:
        """The generated Python source."""
        return self.emitted.code

    def export(self, path: str | Path, *, targets: Any = None) -> None:
        """Write the program to a file, in the format of its suffix.

        ``.py``: a module that needs torch and what torch brings, ``init_state(params)`` and ``step(params, buffers,
        state, inputs, targets) -> (params, buffers, state, loss)``. ``.json``: the program as data, for :meth:`load`.
        ``.tex``: the derivation as a document. ``.pt2``: the step as one graph, for ``torch.export.load``.

        Args:
            path: the file.
            targets: for ``.pt2`` with a loss of one's own, targets of the batch size that the program was compiled for.

        Raises:
            CompileError: the suffix is none of these, or the program holds what the format cannot.
        """
        tool("export").write(self, Path(path), targets)

    @classmethod
    def load(cls, path: str | Path) -> UpdateProgram:
        """A program from the ``.json`` that :meth:`export` wrote; nothing that is read is executed.

        It is compiled again from the stored network and options. Use it by ``compile_optimizer(model,
        program=program)``.

        Raises:
            CompileError: the file is no program, was changed, cut off or written by a newer version, or these versions
                of gtddp_compile and torch make another program of it.
            OSError: the file cannot be read.
        """
        found: UpdateProgram = tool("export").read(Path(path))
        return found

    def diff(self, other: UpdateProgram) -> Difference:
        """What differs between this program and another, a network with one shortcut more, say.

        Operations and stages that correspond are found by what they are, so that names and stage numbers that merely
        moved on are no differences. ``str()`` of the result is text, ``to_html()`` a page, ``save(path)`` either.
        """
        found: Difference = tool("difference").compare(self, other)
        return found

    @cached_property
    def drawn(self) -> ControlGraph:
        """The control graph with every stage's derivation as its note, made when the page asks for it."""
        return replace(self.graph, notes=StageNotes(self))

    def __repr__(self) -> str:
        return f"<UpdateProgram of {self.graph.name}: {self.curvature}, {len(self.lowered.instructions)} instructions>"

    def __str__(self) -> str:
        lines = [f"# {self.graph.name}: {self.curvature}, form {self.form.name}, coupling {self.options.coupling}"]
        heading: tuple[str, int] | None = None
        for instruction in self.lowered.instructions:
            if (instruction.phase, instruction.stage) != heading:
                heading = (instruction.phase, instruction.stage)
                lines.append(f"\n{instruction.phase}, {self._stage_title(instruction.stage)}")
            note = f"    # {instruction.note}" if instruction.note else ""
            lines.append(f"  {instruction}{note}")
        return "\n".join(lines)

    def _stage_title(self, index: int) -> str:
        if index < 0:
            return "before the first stage"
        if index == len(self.graph.stages):
            return "terminal"
        return f"stage {index}: {', '.join(self.graph.stages[index].players)}"

    # --- derivation ---------------------------------------------------------------------------------------------------

    def derivation(self, stage: int | None = None, format: Format = "text") -> Any:
        """The symbolic derivation the code was lowered from.

        Args:
            stage: one stage's; ``None`` for all of them.
            format: ``"text"``, ``"latex"`` (both str), or ``"sympy"``: a list of (symbol, expression) equations.

        Raises:
            CompileError: no such stage or format.
        """
        if format not in ("text", "latex", "sympy"):
            raise CompileError(f"derivation format {format!r} is not known", "Choose 'text', 'latex' or 'sympy'")
        if stage is None:
            found = [self.derivation(index, format) for index in range(len(self.derived.stages))]
            return [equation for part in found for equation in part] if format == "sympy" else "\n\n".join(found)
        if not 0 <= stage < len(self.derived.stages):
            raise CompileError(f"there is no stage {stage}", f"Stages run from 0 to {len(self.derived.stages) - 1}")
        derived = self.derived.stages[stage]
        rolled = derived.derivation.rolled.values() if self.form.name == "joint" else ()
        collapsed = (*self.form.backward.values(), *self.form.forward.values())
        equations = [*derived.derivation.equations(), *rolled, *collapsed]
        if format == "sympy":
            return [(equation.symbol, equation.expression) for equation in equations]
        return self._latex(derived) if format == "latex" else self._text(derived)

    def _text(self, stage: DerivedStage) -> str:
        lines = [f"stage {stage.index}: {', '.join(stage.controls.values())}"]
        still = {name for name, values in stage.inputs.items() if set(values) <= set(self.graph.ops.inputs)}
        lines += [
            f"  {name:<4} = {', '.join(values)}{'  (an input: its change is 0)' * (name in still)}"
            for name, values in stage.legend
        ]
        lines += ["  augmented dynamics (0, I, J dense; F in the controls):"]
        lines += [f"    {line}" for line in str(stage.derivation.pattern).splitlines()[1:]]
        lines.append("  gains and value recursion (numbers: equations of the paper; symbols: docs/theory.md#symbols):")
        lines += _equation_lines(stage.derivation)
        if self.form.name == "joint":
            lines.append("  the policy on the linearised dynamics: c' = c + C^T delta_u, and so Lambda' w' = Lambda' w")
            lines += [_line(equation) for equation in stage.derivation.rolled.values()]
        if len(stage.controls) > 1:
            lines.append("  the same gains player by player (the others eliminated; cooperative gains):")
            lines += [_line(equation) for equation in cooperative_gains(stage.derivation)]
        return "\n".join((*lines, *self._form_lines))

    @cached_property
    def _form_lines(self) -> list[str]:
        head = f"  collapsed, V_x = G alpha, V_xx = G P G^T ({self.form.name} form):"
        return [head, *(_line(equation) for equation in self.form.said)]

    def _latex(self, stage: DerivedStage) -> str:
        rows = [_latex_row(equation) for equation in stage.derivation.equations()]
        if self.form.name == "joint":
            rows += [_latex_row(equation) for equation in stage.derivation.rolled.values()]
        rows += [_latex_row(equation) for equation in self.form.said]
        body = " \\\\\n".join(rows)
        return f"% stage {stage.index}\n\\begin{{align}}\n{body}\n\\end{{align}}"

    # --- cost ---------------------------------------------------------------------------------------------------------

    def cost(self) -> str:
        """A table: every player's rule, the kernels' form, how its Gram matrix is made, and what is kept of a step."""
        from rich.table import Table  # only where something is shown

        shown = describe_terminal(self.graph, self.form, self.options)
        table = Table(
            title=f"{self.form.name} form, coupling {self.options.coupling}, {shown}",
            caption="\n".join(filter(None, self._captions())),
        )
        for column in ("stage", "player", "kind", "rule", "parameters", "gram", "notes"):
            table.add_column(column, overflow="fold")
        for player in self.graph.players:
            layer = self.lowered.plan.layers[player.name]
            rules = ", ".join(dict.fromkeys(use.rule.name for use in layer.uses))
            size = sum(math.prod(self.graph.ops.parameter_info[name].shape) for name in player.parameters)
            table.add_row(
                str(player.stage), player.name, player.kind, rules, str(size), str(layer.gram),
                "; ".join(dict.fromkeys(self._remarks(layer))),
            )  # fmt: skip
        return rendered(table) + "\n"

    def _captions(self) -> Iterator[str]:
        """Both rollouts beside each other; what is kept; which operations are read approximately
        (docs/theory.md#mixing): without feedback none is.
        """
        plan, base, mixing = self.lowered.plan, self.form.name == "base", self.graph.ops.mixing
        found = rollout_units(plan) if self.form.name in COUPLED and not self.form.factored else None
        if found is not None:
            linear, again = (f"{units:.2f}" for units in found)
            said = "times the multiplications of a plain training step (layers of known shape)"
            joint = self.form.name == "joint"
            mine, rollout, other = (linear, "nonlinear", again) if joint else (again, "linear", linear)
            yield f"a step needs about {mine} {said}; with rollout='{rollout}' {other}"
        yield describe_memory(self.graph, plan.segments, gradients=not base)
        if plan.ranks > 1 and self.setting is not None:
            yield self._sent(plan, self.setting)
        if mixing and not base and self.options.mixing != "exact":
            yield f"read sample by sample, an approximation: {few(mixing)}, which mix samples"

    def _sent(self, plan: Plan, setting: Setting) -> str:
        """What a rank sends beside what gradients are, which DistributedDataParallel sends too."""
        found = list(traffic(plan, setting, plan.graph.ops.batch or 1))
        update = next(one.moved(plan.ranks) for one in found if one.what == "update")
        shares = (
            f"{one.what} {one.moved(plan.ranks) / update:.3g}{'' if one.every_step else ' where they are made'}"
            for one in found
        )
        return f"sent by a rank of {plan.ranks}, in gradients' all-reduces: {', '.join(shares)}"

    def _remarks(self, layer: LayerPlan) -> Iterator[str]:
        """What is unusual about a player's layer, and which block of a Kronecker-factored curvature it is in."""
        if len(layer.uses) > 1:
            yield f"used {len(layer.uses)} times"
        for use in (use for use in layer.uses if use.rule.name == "generic"):
            slow = [name for name in ("vectorised", "forward_mode") if not use.options.get(name, True)]
            yield f"automatic differentiation{', slow: no ' + ', '.join(slow) if slow else ''}"
        if self.form.factored and not vectorises(self.graph, layer.player.stage):
            yield "pulled back a column at a time: code that is not torch's own"
        if layer.block.kind != "parameters":
            together = ", ".join(other.name for other in layer.block.players if other != layer.player)
            yield f"{layer.block.kind} metric" + (f" with {together} ({layer.block.why})" if together else "")
        if layer.alike:
            yield f"one product with {len(layer.alike) - 1} alike"


class StageNotes(Mapping[int, str]):
    """The derivation of every stage of a program as text, by the stage's index, each made when it is asked for."""

    def __init__(self, program: UpdateProgram) -> None:
        self._program = program

    def __getitem__(self, stage: int) -> str:
        if not 0 <= stage < len(self):
            raise KeyError(stage)
        return str(self._program.derivation(stage))

    def __iter__(self) -> Iterator[int]:
        return iter(range(len(self)))

    def __len__(self) -> int:
        return len(self._program.derived.stages)


@lru_cache(maxsize=256)
def _equation_lines(derivation: StageDerivation) -> tuple[str, ...]:
    """Printed once a pattern, which deep networks share among all their stages."""
    return tuple(_line(equation) for equation in derivation.equations())


def _line(equation: Equation) -> str:
    source = f"({equation.source})" if equation.source else ""
    return f"    {equation_text(equation):<76} {source}".rstrip()


def _latex_row(equation: Equation) -> str:
    tag = f" \\tag{{{equation.tag}}}" if equation.tag else ""
    return f"{latex(equation.symbol)} &= {latex(equation.expression)}{tag}"
