"""A stage's derived gains and value recursion, as sympy expressions (paper: Eq. 4-6, 25, 27-31)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sympy import BlockMatrix, MatrixExpr, MatrixSymbol

from gtddp_compile.algebra.pattern import StagePattern

Recursion = Literal["levenberg", "substituted", "printed"]
RECURSIONS: tuple[Recursion, ...] = ("levenberg", "substituted", "printed")


@dataclass(frozen=True)
class Equation:
    """``symbol = expression``; ``source``: the paper's equation that it is, or a section of docs/theory.md."""

    symbol: MatrixExpr
    expression: MatrixExpr
    source: str = ""

    @property
    def tag(self) -> str:
        """The source as LaTeX puts it beside the equation: a section without its document."""
        return self.source.rpartition("#")[2]


def equation_text(equation: Equation) -> str:
    """``"Q_u = l_u + f_u.T*V'_x"``; block matrices as lists of rows."""
    expression = equation.expression
    text = str(expression.blocks.tolist()) if isinstance(expression, BlockMatrix) else str(expression)
    return f"{equation.symbol} = {text}"


@dataclass(frozen=True, eq=False)
class StageDerivation:
    """Everything derived for one stage pattern.

    Blocks are named after the bundles of :class:`StagePattern`: ``value_x["x"]`` is ``V_x`` at t+1 (a symbol),
    ``q_x["x"]`` the equation of ``Q_x``; ``new_value_xx["x", "r"]`` that of ``V_xr`` at t.

    Attributes:
        pattern: the stage's structure.
        recursion: which stage Hessian and which sign (docs/theory.md#block).
        state: symbols (or 0, I) of ``f̂_x``, by (output, input).
        control: symbols (or 0, I) of ``f̂_u``, by (output, control).
        value_x, value_xx: symbols of the value function's derivatives at t+1, by output(s).
        linear: symbols ``ℓ_u`` by control.
        curvature: symbols of ``M`` by pair of controls; a pair without cross terms is not in it.
        q_x, q_u, q_uu, q_ux, q_xx: the stage's expansion.
        joint_u, joint_uu, joint_ux: the same for the coalition's controls side by side (one block if there is one
        player).
        k: the open gain. gains: the feedback gains by input: ``K``, ``G`` (Eq. 9), …
        new_value_x, new_value_xx: the recursion (Eq. 6, 10, 29, 30).
        change, moved: symbols of ``δx̂`` by input, of ``δu`` by control.
        rolled: the policy rolled out on the linearised dynamics: ``δû``, and ``δx̂`` after the stage by output.
    """

    pattern: StagePattern
    recursion: Recursion
    state: dict[tuple[str, str], MatrixExpr]
    control: dict[tuple[str, str], MatrixExpr]
    value_x: dict[str, MatrixSymbol]
    value_xx: dict[tuple[str, str], MatrixExpr]
    linear: dict[str, MatrixSymbol]
    curvature: dict[tuple[str, str], MatrixExpr]
    q_x: dict[str, Equation]
    q_u: dict[str, Equation]
    q_uu: dict[tuple[str, str], Equation]
    q_ux: dict[tuple[str, str], Equation]
    q_xx: dict[tuple[str, str], Equation]
    joint_u: Equation
    joint_uu: Equation
    joint_ux: dict[str, Equation]
    k: Equation
    gains: dict[str, Equation]
    new_value_x: dict[str, Equation]
    new_value_xx: dict[tuple[str, str], Equation]
    change: dict[str, MatrixSymbol] = field(default_factory=dict)
    moved: dict[str, MatrixSymbol] = field(default_factory=dict)
    rolled: dict[str, Equation] = field(default_factory=dict)

    def equations(self) -> list[Equation]:
        """All equations in the order in which they can be evaluated."""
        joint = [] if len(self.pattern.controls) == 1 else [self.joint_u, self.joint_uu, *self.joint_ux.values()]
        return [
            *self.q_x.values(), *self.q_u.values(), *self.q_uu.values(), *self.q_ux.values(), *self.q_xx.values(),
            *joint, self.k, *self.gains.values(), *self.new_value_x.values(), *self.new_value_xx.values(),
        ]  # fmt: skip
