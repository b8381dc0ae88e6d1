"""Collapse: rewrite the derived recursion into one B×B matrix a stage, after proving that it may be.

Takes the derivations; guarantees a :class:`CollapsedForm`. The claim (docs/theory.md#collapse): with an outer-product
terminal factor the value function stays in the span of the back-propagated gradients: ``V_x = G α``, ``V_xx = G P Gᵀ``
with ``G_i = Σ_o f̂_xᵀ G_o`` (ordinary back-propagation). It is proved here on the derived expressions of every
pattern by exact noncommutative rewriting: substitute the ansatz at t+1, and find it again at t. Then

    α = α' + P' Cᵀ k         P = P' - P' Cᵀ Q_uu⁻¹ C P'         δu = k - Q_uu⁻¹ C P' c,      C = γᵀ,  c = Σ_i G_iᵀ δx_i

and, where ``Q_uu = M + C P' Cᵀ``, the Woodbury identity turns it into information form. Which further form applies
depends on the coupling: without projection ``Λ = P⁻¹`` and ``y = Λ α`` recur by themselves; with the paper's
block-diagonal projection only the diagonal of ``P`` survives a stage.

Rolled out on the linearised dynamics, ``c' = c + Cᵀ δu = c - Γ w - s``, and with it ``Λ' w' = y' + c' = Λ' w``: the
weights of a stage are those of the stage before, hence of the first, where ``c = 0``. That ``w`` does not depend on
the stage is proved too (``prove_rolled_out`` on every pattern, ``_same_weights`` in ``algebra/forms.py``).

Richer terminal factors (r columns a sample) do not contain the linear term in their span: it is kept apart,
``V_x = A + G α`` with ``A`` pulled back like a gradient, ``α`` zero at the end, and ``b = f_uᵀ A``. The same proof
gives the same recursions with ``ℓ_u`` replaced by ``b + ℓ_u`` and B by B r columns; gradients are the case ``A = 0``.

With coupled weight decay (``ℓ_u ≠ 0``) ``y`` drifts: ``y = y' - s``, ``s = γ M⁻¹ ℓ_u`` (docs/theory.md#weight-decay).
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from sympy import Identity, Inverse, MatAdd, MatMul, MatrixExpr, MatrixSymbol, Transpose, ZeroMatrix

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra.collapsed import Claim, CollapsedForm, FormName
from gtddp_compile.algebra.derivation import Equation, Recursion, StageDerivation
from gtddp_compile.algebra.forms import Coupling, Equations, Law, Rollout, build
from gtddp_compile.algebra.symbols import Rule, SymmetricSymbol, is_equal
from gtddp_compile.errors import CompileError
from gtddp_compile.passes.p06_derive import Derived


def collapse(
    derived: Derived,
    coupling: Coupling = "full",
    *,
    feedback: bool = True,
    factored: bool = False,
    rollout: Rollout = "nonlinear",
    inertia: bool = False,
) -> CollapsedForm:
    """Prove the ansatz on every pattern, then choose the form for this recursion, coupling and rollout.

    ``factored``: the terminal Hessian has factors of its own, so that the linear term is kept apart. ``inertia``: the
    curvature regularises towards ``μ`` times the last step, ``½ (δu - μ v)ᵀ M (δu - μ v)``: ``ℓ_u`` has ``-μ M v``.

    Raises:
        CompileError: the combination has no collapsed form, or the ansatz does not reproduce itself.
    """
    name = form_name(derived.recursion, coupling, feedback=feedback, rollout=rollout)
    factored = factored and name != "base"
    claims: dict[str, Claim] = {}
    for stage in derived.stages:
        claims.update((claim.statement, claim) for claim in prove_span(stage.derivation, factored))
        if name == "joint":
            claims.update((claim.statement, claim) for claim in prove_rolled_out(stage.derivation))
    backward, forward, proved = form_equations(name, derived.recursion, coupling, factored, inertia)
    claims.update((claim.statement, claim) for claim in proved)
    return CollapsedForm(name, backward, forward, tuple(claims.values()), factored)


@cache
def form_equations(
    name: FormName, recursion: Recursion, coupling: Coupling, factored: bool, inertia: bool = False
) -> tuple[Equations, Equations, tuple[Claim, ...]]:
    """The form's equations of both sweeps from the law, with the claims about both; the same for every network."""
    # Without feedback V_xx = 0, so that Q_uu = M whatever the recursion.
    law, claims = prove_law("substituted" if name == "base" else recursion, factored)
    backward, forward, proved = build(name, law, coupling, factored=factored, inertia=inertia)
    return backward, forward, (*claims, *proved)


def form_name(recursion: Recursion, coupling: Coupling, *, feedback: bool, rollout: Rollout = "nonlinear") -> FormName:
    """Which collapsed form serves an allowed combination of options."""
    if recursion != "levenberg" and coupling != "block":
        raise CompileError(
            f"recursion {recursion!r} is the paper's per-sample form and has no meaning with coupling {coupling!r}",
            "Use coupling='block' with it, or recursion='levenberg'",
        )
    if not feedback:
        return "base"
    if coupling == "block":
        return "block" if recursion == "levenberg" else recursion
    return "joint" if rollout == "linear" else "information"


# --- the proofs -------------------------------------------------------------------------------------------------------


@cache
def prove_span(d: StageDerivation, factored: bool = False) -> tuple[Claim, ...]:
    """``V_x = A + G α`` and ``V_xx = G P Gᵀ`` at t+1 imply the same at t: proved for this pattern.

    ``A = 0`` unless ``factored``: gradients are in their own span.
    """
    outputs, inputs, controls = d.pattern.outputs, d.pattern.inputs, d.pattern.controls
    g_after = {o: MatrixSymbol(f"G'_{o}", d.value_x[o].shape[0], a.BATCH) for o in outputs}
    apart_after = {o: _apart("A'", o, d.value_x[o].shape[0], factored) for o in outputs}
    ansatz: dict[MatrixExpr, MatrixExpr] = {
        d.value_x[o]: MatAdd(apart_after[o], MatMul(g_after[o], a.ALPHA_NEXT)) for o in outputs
    }
    for n, o in enumerate(outputs):
        ansatz.update((d.value_xx[o, p], _between(g_after[o], g_after[p])) for p in outputs[n:])
    g = {i: _pull_back(d.state, outputs, i, g_after) for i in inputs}
    c = {p: _pull_back(d.control, outputs, p, g_after) for p in controls}
    apart = {i: _pull_back(d.state, outputs, i, apart_after) for i in inputs}
    base = {p: _pull_back(d.control, outputs, p, apart_after) for p in controls}
    also_x, also_u = ("A_{0} + ", "b_{0} + ") if factored else ("", "")
    claims = [
        _claim(f"Q_{i} = {also_x.format(i)}G_{i} alpha'", d.q_x[i], ansatz,
               MatAdd(apart[i], MatMul(g[i], a.ALPHA_NEXT)))
        for i in inputs
    ]  # fmt: skip
    claims += [
        _claim(f"Q_{p} = {also_u.format(p)}C_{p} alpha' + l_{p}", d.q_u[p], ansatz,
               MatAdd(base[p], MatMul(c[p], a.ALPHA_NEXT), d.linear[p]))
        for p in controls
    ]  # fmt: skip
    claims += [
        _claim(f"Q_{p}{i} = C_{p} P' G_{i}^T", d.q_ux[p, i], ansatz, _between(c[p], g[i]))
        for p in controls
        for i in inputs
    ]
    claims += [
        _claim(f"Q_{i}{j} = G_{i} P' G_{j}^T", equation, ansatz, _between(g[i], g[j]))
        for (i, j), equation in d.q_xx.items()
    ]
    for p, q in d.q_uu:
        expected, said = d.curvature.get((p, q), ZeroMatrix(*d.q_uu[p, q].symbol.shape)), "M"
        if d.recursion == "levenberg":
            expected, said = MatAdd(_between(c[p], c[q]), expected), "C P' C^T + M"
        claims.append(_claim(f"Q_{p}{q} = {said}", d.q_uu[p, q], ansatz, expected))
    return (*claims, *_prove_recursion(d, factored))


@cache
def prove_rolled_out(d: StageDerivation) -> tuple[Claim, ...]:
    """``c' = c + Cᵀ δu`` on the linearised dynamics, ``c = Σ_i G_iᵀ δx_i``: proved for this pattern."""
    outputs = d.pattern.outputs
    g_after = {o: MatrixSymbol(f"G'_{o}", d.value_x[o].shape[0], a.BATCH) for o in outputs}
    g = {i: _pull_back(d.state, outputs, i, g_after) for i in d.pattern.inputs}
    c = {p: _pull_back(d.control, outputs, p, g_after) for p in d.pattern.controls}
    after = MatAdd(*(MatMul(Transpose(g_after[o]), d.rolled[o].expression) for o in outputs))
    before = (MatMul(Transpose(g[i]), d.change[i]) for i in g)
    pushed = (MatMul(Transpose(c[p]), d.moved[p]) for p in c)
    said = f"c' = c + sum_p C_p^T delta_p ({', '.join(d.pattern.controls)}; linearised dynamics)"
    return (_identity(said, after, MatAdd(*before, *pushed)),)


def _apart(letter: str, name: str, size: MatrixExpr, factored: bool) -> MatrixExpr:
    """The part of ``V_x`` outside the span, or zero."""
    return MatrixSymbol(f"{letter}_{name}", size, 1) if factored else ZeroMatrix(size, 1)


def in_span(
    columns: MatrixExpr, inverse: MatrixExpr, outside: MatrixExpr, sign: int
) -> tuple[MatrixExpr, MatrixExpr, MatrixExpr, MatrixExpr]:
    """``k``, ``α``, ``P`` and ``δu`` of a stage: what the derivation is in the span of the gradients.

    Args:
        columns: ``C``, the gradients of the stage's controls.
        inverse: ``Q_uu⁻¹``.
        outside: the part of ``Q_u`` outside their span.
        sign: -1 where Eq. 21-23 are read as printed.
    """
    alpha, variance = a.ALPHA_NEXT, a.VARIANCE_NEXT
    k = MatMul(-1, inverse, MatAdd(MatMul(columns, alpha), outside))
    return (
        k,
        MatAdd(alpha, MatMul(variance, columns.T, k)),
        MatAdd(variance, MatMul(-sign, variance, columns.T, inverse, columns, variance)),
        MatAdd(k, MatMul(-1, inverse, columns, variance, a.CHANGE)),
    )


def _sign(recursion: Recursion) -> int:
    return -1 if recursion == "printed" else 1


def _prove_recursion(d: StageDerivation, factored: bool) -> list[Claim]:
    """``k``, ``α``, ``P`` and ``δu``, the coalition's controls side by side: ``Q_ûi = C P' G_iᵀ``, any ``Q_ûû``."""
    size = d.joint_u.symbol.shape[0]
    joint, rest = MatrixSymbol("C", size, a.BATCH), MatrixSymbol("L", size, 1)
    g = {i: MatrixSymbol(f"G_{i}", d.q_x[i].symbol.shape[0], a.BATCH) for i in d.pattern.inputs}
    change = {i: MatrixSymbol(f"delta_{i}", g[i].shape[0], 1) for i in g}
    apart = {i: _apart("A", i, g[i].shape[0], factored) for i in g}
    known: dict[MatrixExpr, MatrixExpr] = {d.q_x[i].symbol: MatAdd(apart[i], MatMul(g[i], a.ALPHA_NEXT)) for i in g}
    known[d.joint_u.symbol] = MatAdd(MatMul(joint, a.ALPHA_NEXT), rest)
    known.update((d.joint_ux[i].symbol, _between(joint, g[i])) for i in g)
    known.update((d.q_xx[i, j].symbol, _between(g[i], g[j])) for i, j in d.q_xx)
    gains = {d.gains[i].symbol: d.gains[i].expression for i in g} | {d.k.symbol: d.k.expression}
    k, alpha, variance, step = in_span(joint, Inverse(d.joint_uu.symbol), rest, _sign(d.recursion))
    caused = MatAdd(*(MatMul(Transpose(g[i]), change[i]) for i in g))
    moved = MatAdd(d.k.symbol, *(MatMul(d.gains[i].symbol, change[i]) for i in g))

    def opened(equation: Equation) -> Equation:
        return replace(equation, expression=equation.expression.xreplace(gains))

    claims = [
        _claim("k = -Q_uu^-1 (C alpha' + L)", d.k, known, k),
        _claim("delta_u = k + sum_i K_i delta_i = k - Q_uu^-1 C P' c, c = sum_i G_i^T delta_i",
               opened(Equation(a.UPDATE, moved)), known, step.xreplace({a.CHANGE: caused})),
    ]  # fmt: skip
    claims += [
        _claim(f"V_{i} = {f'A_{i} + ' if factored else ''}G_{i} (alpha' + P' C^T k)", opened(equation), known,
               MatAdd(apart[i], MatMul(g[i], alpha)))
        for i, equation in d.new_value_x.items()
    ]  # fmt: skip
    return claims + [
        _claim(f"V_{i}{j} = G_{i} P G_{j}^T", opened(equation), known, MatMul(g[i], variance, Transpose(g[j])))
        for (i, j), equation in d.new_value_xx.items()
    ]


@cache
def prove_law(recursion: Recursion, factored: bool) -> tuple[Law, tuple[Claim, ...]]:
    """The closed form of gains and recursion, by push-through; ``W = (P'⁻¹ + Γ)⁻¹`` where ``Q_uu = M + C P' Cᵀ``."""
    c, m, variance, alpha = a.GRADIENTS, a.CURVATURE, a.VARIANCE_NEXT, a.ALPHA_NEXT
    m_inverse, information, identity = Inverse(m), Inverse(variance), Identity(a.BATCH)
    outside = a.BASE + a.DECAY if factored else a.DECAY
    drift, update = c.T * m_inverse * outside, -m_inverse * (c * a.WEIGHTS + outside)
    gram: Rule = ((c.T, m_inverse, c), a.GRAM)
    if recursion != "levenberg":
        k, *found = in_span(c, m_inverse, outside, _sign(recursion))
        shrunk = variance * (identity - _sign(recursion) * a.GRAM * variance)
        weights = alpha + variance * a.CHANGE
        law = Law(k.doit(), alpha + variance * c.T * a.OPEN_GAIN, shrunk, weights, drift, update)
        return _proved(law, found, (gram,))
    w = SymmetricSymbol("W", a.BATCH, a.BATCH)
    rules = (
        gram,
        ((w, a.GRAM), MatAdd(identity, MatMul(-1, w, information))),
        ((a.GRAM, w), MatAdd(identity, MatMul(-1, information, w))),
    )
    inverse = m_inverse - m_inverse * c * w * c.T * m_inverse
    k, *found = in_span(c, inverse, outside, 1)
    target = information * alpha - a.DRIFT
    law, claims = _proved(Law(k.doit(), w * target, w, w * (target + a.CHANGE), drift, update), found, rules)
    q_uu = MatMul(MatAdd(m, MatMul(c, variance, c.T)), inverse)
    whole = _identity("Q_uu (M^-1 - M^-1 C W C^T M^-1) = I", q_uu, Identity(a.CONTROLS), rules)
    return law.put({w: Inverse(information + a.GRAM)}), (whole, *claims)


def _proved(law: Law, found: list[MatrixExpr], rules: tuple[Rule, ...]) -> tuple[Law, tuple[Claim, ...]]:
    """The law, once it is ``found``: ``α``, ``P`` and ``δu`` in the span of the gradients."""
    named = {a.OPEN_GAIN: law.gain, a.DRIFT: law.drift, a.WEIGHTS: law.weights}
    closed = [law.alpha, law.variance, law.update.xreplace(named)]
    shown, symbols = (law.alpha, law.variance, law.update), (a.ALPHA, a.VARIANCE, a.UPDATE)
    return law, tuple(
        _identity(f"{symbol} = {said}", left, right.xreplace(named), rules)
        for symbol, said, left, right in zip(symbols, shown, found, closed, strict=True)
    )


def _pull_back(
    jacobian: dict[tuple[str, str], MatrixExpr], outputs: tuple[str, ...], column: str, g: dict[str, MatrixExpr]
) -> MatrixExpr:
    return MatAdd(*(MatMul(Transpose(jacobian[o, column]), g[o]) for o in outputs))


def _between(left: MatrixExpr, right: MatrixExpr) -> MatrixExpr:
    """``left P' rightᵀ``. What is only compared is written as it stands: simplifying it takes longer than the proof."""
    return MatMul(left, a.VARIANCE_NEXT, Transpose(right))


def _claim(statement: str, equation: Equation, known: dict[MatrixExpr, MatrixExpr], expected: MatrixExpr) -> Claim:
    return _identity(statement, equation.expression.xreplace(known), expected)  # what is put in holds no key


def _identity(statement: str, left: MatrixExpr, right: MatrixExpr, rules: tuple[Rule, ...] = ()) -> Claim:
    if not is_equal(left, right, rules):
        raise CompileError(
            f"the collapse is not applicable: {statement} does not follow from the derivation",
            "Use backend='dense', which runs the derivation itself, and report the network",
        )
    return Claim(statement, left, right, rules)
