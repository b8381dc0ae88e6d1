"""What the export back ends are given: the parts of an update program."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import metadata
from typing import Any

from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.algebra.derivation import Equation
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.lowering.lowered import Lowered
from gtddp_compile.methods.setting import Setting
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import Derived
from gtddp_compile.runtime.program import UpdateProgram

VERSION = metadata.version("gtddp-compile")


@dataclass(frozen=True)
class Parts:
    """An update program as its back ends see it.

    Attributes:
        graph, derived, form, lowered, options: what the passes made.
        setting: base method, options by parameter, loss.
        version: of the package.
        targets: example targets, for a back end that traces the step; ``None``: made up for the loss.
    """

    graph: ControlGraph
    derived: Derived
    form: CollapsedForm
    lowered: Lowered
    options: Options
    setting: Setting
    version: str = VERSION
    targets: Any = None

    @classmethod
    def of(cls, program: UpdateProgram, targets: Any = None) -> Parts:
        """The parts of a program.

        Raises:
            CompileError: it belongs to no optimizer.
        """
        if program.setting is None:
            raise CompileError(
                "the program has no base method with its options: it was built outside an optimizer",
                "Export opt.program of a compiled optimizer",
            )
        return cls(
            program.graph, program.derived, program.form, program.lowered, program.options, program.setting,
            targets=targets,
        )  # fmt: skip

    @property
    def curvature(self) -> str:
        """Name of the base method."""
        return self.setting.curvature.name

    @property
    def equations(self) -> list[Equation]:
        """The collapsed equations, those that say nothing (``y = y'``) left out."""
        found = [*self.form.backward.values(), *self.form.forward.values()]
        return [equation for equation in found if str(equation.expression) != f"{equation.symbol}'"]
