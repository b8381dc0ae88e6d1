"""The collapsed recursion as instructions: the derived equations, with the program's variables for their symbols."""

from __future__ import annotations

from typing import Any

from sympy import HadamardProduct, Identity, MatrixExpr, OneMatrix

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.formulas import formula
from gtddp_compile.lowering.instructions import Var, mapped
from gtddp_compile.lowering.write.columns import environment, sample_matrices

GRAM_DIAGONAL = HadamardProduct(a.GRAM, Identity(a.BATCH)) * OneMatrix(a.BATCH, 1)
MOVED = a.GRADIENTS.T * a.OPEN_GAIN
VARIABLES = {"s": "s", "Lambda": "lambda", "X": "system", "y": "y", "alpha": "alpha", "rho": "rho", "R": "own"}
"""Variables of the collapsed equations of the backward sweep, in the order of evaluation."""


def _environment(b: Builder) -> dict[MatrixExpr, Var]:
    """Variables of the derived symbols; ``{t}`` and ``{after}`` stand for the stage and the next."""
    last, drifts = f"y_{len(b.plan.stages)}", b.drifts
    names = {
        a.TARGET_NEXT: "y_{after}" if drifts else last,
        a.TARGET: "y_{t}" if drifts or b.plan.form.name == "block" else last,
        a.DRIFT: "s_{t}",
        a.INFORMATION_NEXT: "lambda_{after}",
        a.GRAM: "gamma_{t}",
        a.GROUP_SCALE: "tau",
        a.ALPHA_NEXT: "alpha_{after}",
        a.RHO_NEXT: "rho_{after}",
        a.CHANGE: "c_{t}",
        MOVED: "moved_{t}",
        GRAM_DIAGONAL: "diagonal_{t}",
        **(environment() if b.factored else {}),
    }
    return {symbol: Var(name) for symbol, name in names.items()}


def recursion_formula(b: Builder, t: int | str, expression: MatrixExpr) -> Any:
    """A derived formula at stage ``t``; made once, whatever the number of stages."""
    if expression not in b.formulas:
        factors = {symbol: Var("factor_{t}") for symbol in (a.INFORMATION, a.SYSTEM)}
        held = {symbol: Var(name) for symbol, name in sample_matrices().items()}
        last = a.INFORMATION_NEXT if b.plan.form.name == "joint" else None
        b.formulas[expression] = formula(expression, _environment(b), factors, held, last)
    after = b.after(t)
    return mapped(b.formulas[expression], lambda variable: Var(variable.name.format(t=t, after=after)))


def stage_recursion(b: Builder, t: int | str) -> None:
    """The information form and its per-sample projection, equation by equation as derived."""
    if b.plan.form.name not in a.LEVENBERG or t not in b.counting:
        return
    block, joint = b.plan.form.name == "block", b.plan.form.name == "joint"
    at = t if isinstance(t, int) else 0
    wanted = {"alpha": at > 0 and (block or b.plan.stages[at - 1].statistics), "y": block or b.drifts, "rho": at > 0,
              "R": at > 0, "Lambda": b.plan.gram != "nystrom"}  # fmt: skip
    for symbol, variable in VARIABLES.items():
        equation = b.plan.form.backward.get(symbol)
        if equation is None or not wanted.get(symbol, True):
            continue
        code = recursion_formula(b, t, equation.expression)
        b.emit("backward", at, f"{variable}_{t}", "=", code, note=f"{symbol} ({equation.source})")
        if symbol in ("Lambda", "X") and not joint:
            b.emit("backward", at, (f"factor_{t}", f"lifted_{t}"), "factor", Var(f"{variable}_{t}"), note="Cholesky")
    if t == "alike":
        return
    figures: dict[str, Any] = {} if joint else {name: Var(f"{name}_{t}") for name in ("factor", "lifted")}
    figures["target"] = recursion_formula(b, t, a.TARGET)
    if b.drifts:
        figures["drift"] = Var(f"s_{t}")
    if "alpha" in b.plan.form.backward and block and at > 0:
        figures["alpha"] = Var(f"alpha_{t}")
    b.emit("backward", at, (), "m.keep", at, **figures)
