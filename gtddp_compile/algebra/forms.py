"""The equations that run, built from the proved law of a stage: nothing is typed in but what each form keeps.

A form says by which symbols it carries the value function from stage to stage: ``P = Λ⁻¹`` and ``α = Λ⁻¹ y``, or
``P = diag(ρ)``, a projection of which a stage leaves only the diagonal. Put into the :class:`Law`, that gives the
form's equations. Put back into one another, the equations have to give the law: proved before they are returned.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from sympy import (
    DiagMatrix,
    HadamardProduct,
    Identity,
    Integer,
    Inverse,
    MatAdd,
    MatMul,
    MatrixExpr,
    OneMatrix,
    ZeroMatrix,
)

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra.collapsed import Claim, FormName
from gtddp_compile.algebra.derivation import Equation
from gtddp_compile.algebra.symbols import SymmetricSymbol, is_equal, rewrite
from gtddp_compile.errors import CompileError

COLLAPSE, LINEAR, COLUMNS, BLOCK, DECAY, INERTIA = (
    f"docs/theory.md#{section}"
    for section in ("collapse", "linear-rollout", "columns", "block", "weight-decay", "inertia")
)
"""What the printed equations refer to where the paper has none."""

Coupling = Literal["full", "groups", "block"]
Rollout = Literal["linear", "nonlinear"]
Equations = dict[str, Equation]

NEXT: dict[MatrixExpr, MatrixExpr] = {
    a.INFORMATION: a.INFORMATION_NEXT, a.RHO: a.RHO_NEXT, a.OWN: a.OWN_NEXT,
}  # fmt: skip
"""Symbols of what is kept, with those of the same at t+1."""


@dataclass(frozen=True)
class Law:
    """A stage in the span of the gradients: right-hand sides of what was proved.

    Attributes:
        gain: ``k`` in ``α'``.
        alpha: ``α`` in ``α'``, ``P'`` and ``s`` (or ``k``).
        variance: ``P`` in ``P'`` and ``Γ``.
        weights: ``w`` in the same, and ``c``.
        drift: ``s``.
        update: ``δu`` in ``w``.
    """

    gain: MatrixExpr
    alpha: MatrixExpr
    variance: MatrixExpr
    weights: MatrixExpr
    drift: MatrixExpr
    update: MatrixExpr

    def put(self, known: Mapping[MatrixExpr, MatrixExpr]) -> Law:
        """The law with symbols replaced."""
        found = {name: value.xreplace(dict(known)) for name, value in vars(self).items()}
        return replace(self, **{name: new.doit() for name, new in found.items() if new is not getattr(self, name)})


@dataclass(frozen=True)
class Form:
    """What a form keeps of the value function.

    Attributes:
        variance, alpha: ``P'`` and ``α'`` by the symbols that are kept.
        system: the symbol of ``P⁻¹``, before it is projected, where the law is solved for that; else ``None``.
        state: the symbol of the projection of ``P``, where there is one.
        sources: section of docs/theory.md or equation of the paper of each symbol, ``""`` for the others'.
    """

    variance: MatrixExpr
    alpha: MatrixExpr
    system: MatrixExpr | None
    state: MatrixExpr | None
    sources: Mapping[str, str]


def form_of(name: FormName, *, factored: bool) -> Form:
    """What each form keeps; ``factored``: a block of ``P`` a sample in place of a number."""
    state, projected = (a.OWN, a.OWN_NEXT) if factored else (a.RHO, DiagMatrix(a.RHO_NEXT))
    if name == "joint":
        sources = {"": COLLAPSE, "y": LINEAR, "w": LINEAR} | ({"s": COLUMNS} if factored else {})
        kept = Inverse(a.INFORMATION_NEXT)
        return Form(kept, kept * a.TARGET_NEXT, a.INFORMATION, None, sources)
    if name == "information":
        sources = {"": COLLAPSE, "y": DECAY} | ({"s": COLUMNS, "w": COLUMNS} if factored else {})
        kept = Inverse(a.INFORMATION_NEXT)
        return Form(kept, kept * a.TARGET_NEXT, a.INFORMATION, None, sources)
    if name == "block":
        return Form(projected, a.ALPHA_NEXT, a.SYSTEM, state, {"": COLUMNS if factored else BLOCK})
    if name == "base":  # the value function is the loss itself
        return Form(ZeroMatrix(a.BATCH, a.BATCH), a.ALPHA_NEXT, None, None, {"": "Prop. 4"})
    printed = "21-23 as printed, any rank" if factored else "21-23 as printed"
    source = printed if name == "printed" else COLUMNS if factored else BLOCK
    return Form(projected, a.ALPHA_NEXT, None, state, {"": source, "k": "4"})


def build(
    name: FormName, law: Law, coupling: Coupling, *, factored: bool, inertia: bool = False
) -> tuple[Equations, Equations, tuple[Claim, ...]]:
    """Equations of the backward and of the forward sweep, and what was proved of them.

    ``s`` is among them where it is ``factored``: else it is the weight decay's alone, the same in a group as outside.
    """
    form, claims = form_of(name, factored=factored), []
    update = law.update
    if coupling == "groups" and name in a.COUPLED:
        batch, (law, claim) = law, _in_a_group(law)
        update = _share(update)
        claims.append(claim)
        if not factored:
            claims.append(_proof("s of a group is the batch's", law.drift, batch.drift))
    there = law.put({a.VARIANCE_NEXT: form.variance, a.ALPHA_NEXT: form.alpha})
    equations = tuple(_equations(form, law, there, factored=factored))
    claims += _proved(name, form, there, equations)
    if name == "joint":
        claims.append(_same_weights(there, update))
        equations = tuple(_joint(equations))
    sweeps: tuple[Equations, Equations] = ({}, {})
    if inertia:
        linear = a.WEIGHT_DECAY - a.INERTIA * a.CURVATURE * a.MOMENTUM
        sweeps[0]["l"] = Equation(a.DECAY, linear, INERTIA)
        alone = Inverse(a.CURVATURE) * a.WEIGHT_DECAY - a.INERTIA * a.MOMENTUM
        claims.append(_proof("M^-1 l = M^-1 d - mu v", MatMul(Inverse(a.CURVATURE), linear), alone))
    for equation in equations:
        sweeps[equation.symbol in (a.WEIGHTS, a.UPDATE)][str(equation.symbol)] = equation
    return *sweeps, tuple(claims)


def _equations(form: Form, law: Law, there: Law, *, factored: bool) -> Iterator[Equation]:
    """The law in what the form keeps (``there``), each symbol in those before it."""

    def said(symbol: MatrixExpr, expression: MatrixExpr) -> Equation:
        return Equation(symbol, expression, form.sources.get(str(symbol), form.sources[""]))

    if form.system is None:
        if form.state is not None:
            yield said(a.OPEN_GAIN, there.gain)
            yield said(a.ALPHA, _by_sample(there.alpha))
            yield said(form.state, projection(there.variance, form.state))
        yield said(a.WEIGHTS, _by_sample(there.weights))
    else:
        system, target = _system(there)
        if factored:
            yield said(a.DRIFT, law.drift.expand())
        yield said(a.TARGET, target)
        yield said(form.system, system)
        # Solved for what was before: P'⁻¹ is the system less what the stage added, P'⁻¹ α' the target likewise.
        before = Inverse(form.system - (system - Inverse(form.variance)).expand().doit())
        moved = a.TARGET - (target - Inverse(form.variance) * form.alpha).expand().doit()
        here = law.put({a.VARIANCE_NEXT: before, a.ALPHA_NEXT: before * moved})
        yield said(a.ALPHA, here.alpha)
        if form.state is not None:
            yield said(form.state, projection(here.variance, form.state))
        yield said(a.WEIGHTS, here.weights)
    yield Equation(a.UPDATE, law.update, "4, 28")


def _joint(equations: tuple[Equation, ...]) -> Iterator[Equation]:
    """The equations of the linear rollout: ``w`` of the first stage, where nothing has moved, is every stage's."""
    for equation in equations:
        if equation.symbol == a.WEIGHTS:
            yield replace(equation, expression=equation.expression.xreplace({a.CHANGE: 0 * a.CHANGE}).doit())
        elif equation.symbol != a.ALPHA:  # statistics are taken from α_T: P' is not known before the last of them
            yield equation


def _same_weights(there: Law, update: MatrixExpr) -> Claim:
    """``Λ' w' = Λ' w``: on the linearised dynamics the weights do not depend on the stage.

    ``update``: ``δu`` as it is rolled out: the batch's, or that of a group which stands for it. What it changes, ``c' =
    c + Cᵀ δu``, is what the next stage answers to, ``Λ' w' = y' + c'`` (the equation of ``w`` one stage on).
    """
    product = (a.GRADIENTS.T, Inverse(a.CURVATURE), a.GRADIENTS)
    system = SymmetricSymbol("W", a.BATCH, a.BATCH)
    inverse, _ = _system(there)  # Λ = Λ' + τ Γ
    weights = there.weights.xreplace({Inverse(inverse): system, a.DRIFT: there.drift})
    added = (inverse - a.INFORMATION_NEXT).expand().doit()
    scale = added.as_coeff_matrices()[0] if isinstance(added, MatMul) else Integer(1)
    pushed = MatMul(a.GRADIENTS.T, update).xreplace({a.WEIGHTS: weights})
    answer, expected = MatAdd(a.TARGET_NEXT, a.CHANGE, pushed), MatMul(a.INFORMATION_NEXT, weights)
    rules = ((product, a.GRAM), ((a.GRAM, system), (Identity(a.BATCH) - a.INFORMATION_NEXT * system) / scale))
    statement = "Lambda' w' = Lambda' w: the weights are the same at every stage (linear rollout)"
    if not is_equal(answer, expected, rules):
        raise CompileError(
            f"{statement} does not follow from what was proved of a stage",
            "This is an error of gtddp_compile: report it. rollout='nonlinear' does not rest on it",
        )
    return Claim(statement, answer, expected, rules)


def _system(law: Law) -> tuple[MatrixExpr, MatrixExpr]:
    """``P⁻¹`` and ``P⁻¹ α``."""
    inverse = Inverse(law.variance).doit()
    return inverse, (inverse * law.alpha).doit()


def _proved(name: FormName, form: Form, there: Law, equations: tuple[Equation, ...]) -> Iterator[Claim]:
    """The symbols mean what is kept; with the system and the target put in, every equation is the law."""
    if form.state is not None:
        yield _proof(f"{name} form: {form.state} is of P", projection(form.variance, form.state), NEXT[form.state])
    elif form.system is not None:
        yield _proof(f"{name} form: {form.system} = P^-1", Inverse(form.variance).doit(), NEXT[form.system])
        yield _proof(f"{name} form: y = P^-1 alpha", (Inverse(form.variance) * form.alpha).doit(), a.TARGET_NEXT)
    meaning: dict[MatrixExpr, MatrixExpr] = {
        a.OPEN_GAIN: there.gain, a.ALPHA: _by_sample(there.alpha), a.WEIGHTS: _by_sample(there.weights),
        a.DRIFT: there.drift, a.UPDATE: there.update,
    }  # fmt: skip
    if form.system is not None:
        meaning[form.system], meaning[a.TARGET] = _system(there)
    if form.state is not None:
        meaning[form.state] = projection(there.variance, form.state)
    known: dict[MatrixExpr, MatrixExpr] = {}
    for equation in equations:
        left = equation.expression.xreplace(known)
        yield _proof(f"{name} form: {equation.symbol} = {equation.expression}", left, meaning[equation.symbol])
        if equation.symbol in (form.system, a.TARGET):
            known[equation.symbol] = equation.expression


def _proof(statement: str, left: MatrixExpr, right: MatrixExpr) -> Claim:
    if not is_equal(left, right):
        raise CompileError(
            f"{statement} is not what was proved of a stage: {left} is not {right}",
            "This is an error of gtddp_compile: report it. backend='dense' runs the derivation itself",
        )
    return Claim(statement, left, right)


# --- groups -----------------------------------------------------------------------------------------------------------


def _share(expression: MatrixExpr) -> MatrixExpr:
    """Inside a group, which stands for the batch: ``M`` and ``ℓ_u`` are its share ``1/τ`` of the batch's."""
    part = {a.CURVATURE: a.CURVATURE / a.GROUP_SCALE, a.DECAY: a.DECAY / a.GROUP_SCALE}
    return expression.xreplace(part).doit().expand().doit()


def _in_a_group(law: Law) -> tuple[Law, Claim]:
    """The law with a group's share, and that the groups' shares of ``δu`` add up to it.

    A group counts ``1/τ``. Columns side by side, ``C w`` and ``b`` add up over the groups; so does ``1/τ``, to 1.
    """
    product = (a.GRADIENTS.T, Inverse(a.CURVATURE), a.GRADIENTS)
    gram = rewrite(_share(MatMul(*product)), [(product, a.GRAM)])
    counted = (_share(law.update) / a.GROUP_SCALE).expand().doit()
    total = counted.xreplace({1 / a.GROUP_SCALE: Integer(1)}).doit()
    claim = _proof("delta_u of the batch = sum over the groups of delta_u / tau", total, law.update)
    return replace(law.put({a.GRAM: gram}), drift=_share(law.drift)), claim


# --- the projection ---------------------------------------------------------------------------------------------------


def projection(matrix: MatrixExpr, state: MatrixExpr) -> MatrixExpr:
    """``diag(A)`` as a vector, or the blocks of ``A`` a sample: factors that have no other entries come out of it."""
    if state == a.RHO:
        return _diagonal(matrix)
    return _blocks(matrix).expand().doit()


def _diagonal(matrix: MatrixExpr) -> MatrixExpr:
    ones = OneMatrix(a.BATCH, 1)
    if isinstance(matrix, MatAdd):
        return MatAdd(*map(_diagonal, matrix.args))
    if isinstance(matrix, Identity):
        return ones
    if isinstance(matrix, DiagMatrix):
        return matrix.args[0]
    coefficient, factors = matrix.as_coeff_matrices() if isinstance(matrix, MatMul) else (1, [matrix])
    for outer, inner in ((factors[0], factors[1:]), (factors[-1], factors[:-1])):
        if inner and isinstance(outer, DiagMatrix):
            return coefficient * HadamardProduct(outer.args[0], _diagonal(MatMul(*inner).doit()))
    return coefficient * HadamardProduct(MatMul(*factors).doit(), Identity(a.BATCH)) * ones


def _blocks(matrix: MatrixExpr) -> MatrixExpr:
    if isinstance(matrix, MatAdd):
        return MatAdd(*map(_blocks, matrix.args))
    if isinstance(matrix, Identity) or matrix == a.OWN_NEXT:
        return matrix
    coefficient, factors = matrix.as_coeff_matrices() if isinstance(matrix, MatMul) else (1, [matrix])
    if len(factors) > 1 and factors[0] == a.OWN_NEXT:
        return coefficient * factors[0] * _blocks(MatMul(*factors[1:]).doit())
    if len(factors) > 1 and factors[-1] == a.OWN_NEXT:
        return coefficient * _blocks(MatMul(*factors[:-1]).doit()) * factors[-1]
    return coefficient * HadamardProduct(MatMul(*factors).doit(), a.SAMPLES)


def _by_sample(vector: MatrixExpr) -> MatrixExpr:
    """``diag(ρ) v = ρ ∘ v``."""
    if isinstance(vector, MatAdd):
        return MatAdd(*map(_by_sample, vector.args)).doit()
    if isinstance(vector, MatMul) and isinstance(vector.args[0], DiagMatrix):
        return HadamardProduct(vector.args[0].args[0], MatMul(*vector.args[1:]).doit())
    return vector
