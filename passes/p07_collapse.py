"""Collapse: rewrite the derived recursion into one B×B matrix a stage, after proving that it may be.

Takes the derivations; guarantees a :class:`CollapsedForm`. The claim (theory: section 4) is that with an outer-product
terminal factor the value function stays in the span of the back-propagated gradients: ``V_x = G α``, ``V_xx = G P Gᵀ``
with ``G_i = Σ_o f̂_xᵀ G_o`` (ordinary back-propagation). It is proved here on the derived expressions of every
pattern by exact noncommutative rewriting: substitute the ansatz at t+1, and find it again at t. Then

    α = α' + P' Cᵀ k         P = P' - P' Cᵀ Q_uu⁻¹ C P'         δu = k - Q_uu⁻¹ C P' c,      C = γᵀ,  c = Σ_i G_iᵀ δx_i

and, where ``Q_uu = M + C P' Cᵀ``, the Woodbury identity turns it into information form. Which further form applies
depends on the coupling: without projection ``Λ = P⁻¹`` and ``y = Λ α`` recur by themselves; with the paper's
block-diagonal projection only the diagonal of ``P`` survives a stage.

Richer terminal factors (r columns a sample) do not contain the linear term in their span: it is kept apart,
``V_x = A + G α`` with ``A`` pulled back like a gradient, ``α`` zero at the end, and ``b = f_uᵀ A``. The same proof
gives the same recursions with ``ℓ_u`` replaced by ``b + ℓ_u`` and B by B r columns; gradients are the case ``A = 0``.

Departure from theory.md 4a, found by this proof and confirmed by the dense solver: with coupled weight decay
(``ℓ_u ≠ 0``) the vector of ones becomes ``y = y' - s``, ``s = γ M⁻¹ ℓ_u``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Literal

from sympy import DiagMatrix, HadamardProduct, Identity, Inverse, MatrixExpr, MatrixSymbol, OneMatrix, ZeroMatrix

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra.collapsed import Claim, CollapsedForm, FormName
from gtddp_compile.algebra.derivation import Equation, Recursion, StageDerivation
from gtddp_compile.algebra.symbols import SymmetricSymbol, is_equal
from gtddp_compile.errors import CompileError
from gtddp_compile.passes.p06_derive import Derived

Coupling = Literal["full", "groups", "block"]


def collapse(
    derived: Derived, coupling: Coupling = "full", *, feedback: bool = True, factored: bool = False
) -> CollapsedForm:
    """Prove the ansatz on every pattern, then choose the form for this recursion and coupling.

    ``factored``: the terminal Hessian has factors of its own, so that the linear term is kept apart.

    Raises:
        CompileError: the combination has no collapsed form, or the ansatz does not reproduce itself.
    """
    claims: dict[str, Claim] = {}
    name = form_name(derived.recursion, coupling, feedback=feedback)
    factored = factored and name != "base"
    for stage in derived.stages:
        claims.update((claim.statement, claim) for claim in prove_span(stage.derivation, factored))
    claims.update((claim.statement, claim) for claim in prove_update(derived.recursion, factored))
    backward, forward = _form(name, coupling, factored)
    return CollapsedForm(name, backward, forward, tuple(claims.values()), factored)


@cache
def _form(name: FormName, coupling: Coupling, factored: bool) -> Equations:
    return (FACTORED_FORMS if factored else FORMS)[name](coupling)


def form_name(recursion: Recursion, coupling: Coupling, *, feedback: bool) -> FormName:
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
    return "information"


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
        d.value_x[o]: (apart_after[o] + g_after[o] * a.ALPHA_NEXT).doit() for o in outputs
    }
    for n, o in enumerate(outputs):
        ansatz.update((d.value_xx[o, p], g_after[o] * a.VARIANCE_NEXT * g_after[p].T) for p in outputs[n:])
    g = {i: _pull_back(d.state, outputs, i, g_after) for i in inputs}
    c = {p: _pull_back(d.control, outputs, p, g_after) for p in controls}
    variance = a.VARIANCE_NEXT
    apart = {i: _pull_back(d.state, outputs, i, apart_after) for i in inputs}
    base = {p: _pull_back(d.control, outputs, p, apart_after) for p in controls}
    also_x, also_u = ("A_{0} + ", "b_{0} + ") if factored else ("", "")
    claims = [
        _claim(f"Q_{i} = {also_x.format(i)}G_{i} alpha'", d.q_x[i], ansatz, apart[i] + g[i] * a.ALPHA_NEXT)
        for i in inputs
    ]
    claims += [
        _claim(f"Q_{p} = {also_u.format(p)}C_{p} alpha' + l_{p}", d.q_u[p], ansatz,
               base[p] + c[p] * a.ALPHA_NEXT + d.linear[p])
        for p in controls
    ]  # fmt: skip
    claims += [
        _claim(f"Q_{p}{i} = C_{p} P' G_{i}^T", d.q_ux[p, i], ansatz, c[p] * variance * g[i].T)
        for p in controls
        for i in inputs
    ]
    claims += [
        _claim(f"Q_{i}{j} = G_{i} P' G_{j}^T", equation, ansatz, g[i] * variance * g[j].T)
        for (i, j), equation in d.q_xx.items()
    ]
    if d.recursion == "levenberg":
        for p, q in d.q_uu:
            own = d.curvature.get((p, q), 0 * c[p] * c[q].T)
            claims.append(_claim(f"Q_{p}{q} = C P' C^T + M", d.q_uu[p, q], ansatz, c[p] * variance * c[q].T + own))
    return (*claims, *_prove_recursion(d, factored))


def _apart(letter: str, name: str, size: MatrixExpr, factored: bool) -> MatrixExpr:
    """The part of ``V_x`` outside the span, or zero."""
    return MatrixSymbol(f"{letter}_{name}", size, 1) if factored else ZeroMatrix(size, 1)


def _prove_recursion(d: StageDerivation, factored: bool) -> list[Claim]:
    """``α`` and ``P`` recur, with the coalition's controls side by side: ``Q_ûi = C P' G_iᵀ`` whatever ``Q_ûû``."""
    size = d.joint_u.symbol.shape[0]
    joint = MatrixSymbol("C", size, a.BATCH)
    g = {i: MatrixSymbol(f"G_{i}", d.q_x[i].symbol.shape[0], a.BATCH) for i in d.pattern.inputs}
    variance, inverse = a.VARIANCE_NEXT, Inverse(d.joint_uu.symbol)
    apart = {i: _apart("A", i, g[i].shape[0], factored) for i in g}
    known: dict[MatrixExpr, MatrixExpr] = {d.q_x[i].symbol: (apart[i] + g[i] * a.ALPHA_NEXT).doit() for i in g}
    known.update((d.joint_ux[i].symbol, joint * variance * g[i].T) for i in g)
    known.update((d.q_xx[i, j].symbol, g[i] * variance * g[j].T) for i, j in d.q_xx)
    gains = {d.gains[i].symbol: d.gains[i].expression for i in g}
    sign = -1 if d.recursion == "printed" else 1
    shrunk = variance - sign * variance * joint.T * inverse * joint * variance
    claims = [
        _claim(f"V_{i} = {f'A_{i} + ' if factored else ''}G_{i} (alpha' + P' C^T k)", equation, known,
               apart[i] + g[i] * (a.ALPHA_NEXT + variance * joint.T * d.k.symbol))
        for i, equation in d.new_value_x.items()
    ]  # fmt: skip
    if d.own:
        return claims + _prove_printed_coalition(d, g)
    for (i, j), equation in d.new_value_xx.items():
        opened = Equation(equation.symbol, equation.expression.xreplace(gains).doit())
        claims.append(_claim(f"V_{i}{j} = G_{i} P G_{j}^T", opened, known, g[i] * shrunk * g[j].T))
    return claims


def _prove_printed_coalition(d: StageDerivation, g: dict[str, MatrixExpr]) -> list[Claim]:
    """Eq. 23 as printed with cross terms: the same with ``Σ_p C_pᵀ N_p⁻¹ C_p`` in place of ``Γ``."""
    variance = a.VARIANCE_NEXT
    c = {p: MatrixSymbol(f"C_{p}", own.shape[0], a.BATCH) for p, own in d.own.items()}
    known: dict[MatrixExpr, MatrixExpr] = {d.q_ux[p, i].symbol: c[p] * variance * g[i].T for p in c for i in g}
    known.update((d.q_xx[i, j].symbol, g[i] * variance * g[j].T) for i, j in d.q_xx)
    grown: MatrixExpr = variance
    for p, own in d.own.items():
        grown = grown + variance * c[p].T * Inverse(own) * c[p] * variance
    return [
        _claim(
            f"V_{i}{j} = G_{i} P G_{j}^T, P = P' + P' sum_p C_p^T N_p^-1 C_p P'", equation, known, g[i] * grown * g[j].T
        )
        for (i, j), equation in d.new_value_xx.items()
    ]


@cache
def prove_update(recursion: Recursion, factored: bool = False) -> tuple[Claim, ...]:
    """The closed form of gains and recursion, by push-through; ``W = (P'⁻¹ + Γ)⁻¹`` where ``Q_uu = M + C P' Cᵀ``."""
    linear = outside(factored)
    shown = "b + l" if factored else "l"
    c, m, variance = a.GRADIENTS, a.CURVATURE, a.VARIANCE_NEXT
    m_inverse, information = Inverse(m), Inverse(variance)
    if recursion != "levenberg":
        k = -m_inverse * (c * a.ALPHA_NEXT + linear)
        update = k - m_inverse * c * variance * a.CHANGE
        weights = a.ALPHA_NEXT + variance * a.CHANGE
        return (
            _identity(f"delta_u = -M^-1 (C w + {shown}), w = alpha' + P' c", update,
                      -m_inverse * (c * weights + linear)),
        )  # fmt: skip
    identity = Identity(a.BATCH)
    w = SymmetricSymbol("W", a.BATCH, a.BATCH)
    rules = (
        ((c.T, m_inverse, c), a.GRAM),
        ((w, a.GRAM), identity - w * information),
        ((a.GRAM, w), identity - information * w),
    )
    q_uu = m + c * variance * c.T
    inverse = m_inverse - m_inverse * c * w * c.T * m_inverse
    pulled = MatrixSymbol("a", a.BATCH, 1)  # P'⁻¹ α'
    drift = c.T * m_inverse * linear
    k = -inverse * (c * variance * pulled + linear)
    update = k - inverse * c * variance * a.CHANGE
    return (
        _identity("Q_uu (M^-1 - M^-1 C W C^T M^-1) = I", q_uu * inverse, Identity(a.CONTROLS), rules),
        _identity("P = P' - P' C^T Q_uu^-1 C P' = W",
                  variance - variance * c.T * inverse * c * variance, w, rules),
        _identity("alpha = alpha' + P' C^T k = W (P'^-1 alpha' - s)",
                  variance * pulled + variance * c.T * k, w * (pulled - drift), rules),
        _identity(f"delta_u = -M^-1 (C W (P'^-1 alpha' - s + c) + {shown})",
                  update, -m_inverse * (c * w * (pulled - drift + a.CHANGE) + linear), rules),
    )  # fmt: skip


def outside(factored: bool) -> MatrixExpr:
    """The part of ``Q_u`` outside the span of the columns: ``ℓ_u``, and ``b`` where the linear term is kept apart."""
    return a.BASE + a.DECAY if factored else a.DECAY


def _pull_back(
    jacobian: dict[tuple[str, str], MatrixExpr], outputs: tuple[str, ...], column: str, g: dict[str, MatrixExpr]
) -> MatrixExpr:
    total = jacobian[outputs[0], column].T * g[outputs[0]]
    for o in outputs[1:]:
        total = total + jacobian[o, column].T * g[o]
    return total.doit()


def _claim(statement: str, equation: Equation, known: dict[MatrixExpr, MatrixExpr], expected: MatrixExpr) -> Claim:
    return _identity(statement, equation.expression.xreplace(known).doit(), expected)  # what is put in holds no key


def _identity(
    statement: str,
    left: MatrixExpr,
    right: MatrixExpr,
    rules: tuple[tuple[tuple[MatrixExpr, ...], MatrixExpr], ...] = (),
) -> Claim:
    if not is_equal(left, right, rules):
        raise CompileError(
            f"the collapse is not applicable: {statement} does not follow from the derivation",
            "Use backend='dense', which runs the derivation itself, and report the network",
        )
    return Claim(statement, left, right)


# --- the forms --------------------------------------------------------------------------------------------------------

Equations = tuple[dict[str, Equation], dict[str, Equation]]


def _information_form(coupling: Coupling) -> Equations:
    """No projection: ``Λ = P⁻¹`` and ``y = Λ α`` recur (4a); groups count ``B/b`` times."""
    gram = a.GROUP_SCALE * a.GRAM if coupling == "groups" else a.GRAM
    backward = _define(
        (a.TARGET, a.TARGET_NEXT - a.DRIFT, "4a, weight decay"),
        (a.INFORMATION, a.INFORMATION_NEXT + gram, "4a"),
        (a.ALPHA, Inverse(a.INFORMATION) * a.TARGET, "4a"),
    )
    return backward, _define((a.WEIGHTS, Inverse(a.INFORMATION) * (a.TARGET + a.CHANGE), "4a"), _UPDATE)


def _block_form(coupling: Coupling) -> Equations:
    """The projection keeps the diagonal of ``P`` a stage: ``ρ = diag(X⁻¹)``, ``X = diag(ρ')⁻¹ + Γ``."""
    known = Inverse(DiagMatrix(a.RHO_NEXT))
    backward = _define(
        (a.SYSTEM, known + a.GRAM, "4b, Levenberg"),
        (a.TARGET, known * a.ALPHA_NEXT - a.DRIFT, "4b, Levenberg"),
        (a.ALPHA, Inverse(a.SYSTEM) * a.TARGET, "4b, Levenberg"),
        (a.RHO, _diagonal(Inverse(a.SYSTEM)), "4b, Levenberg"),
    )
    return backward, _define((a.WEIGHTS, Inverse(a.SYSTEM) * (a.TARGET + a.CHANGE), "4b, Levenberg"), _UPDATE)


def _paper_form(coupling: Coupling, sign: int, source: str) -> Equations:
    """``Q_uu = M``: one scalar pair a sample and stage (4b)."""
    ones = OneMatrix(a.BATCH, 1)
    shrink = ones - sign * HadamardProduct(a.RHO_NEXT, _diagonal(a.GRAM))
    backward = _define(
        (a.OPEN_GAIN, -Inverse(a.CURVATURE) * (a.GRADIENTS * a.ALPHA_NEXT + a.DECAY), "4, 4b"),
        (a.ALPHA, a.ALPHA_NEXT + HadamardProduct(a.RHO_NEXT, a.GRADIENTS.T * a.OPEN_GAIN), source),
        (a.RHO, HadamardProduct(a.RHO_NEXT, shrink), source),
    )
    weights = a.ALPHA_NEXT + HadamardProduct(a.RHO_NEXT, a.CHANGE)
    return backward, _define((a.WEIGHTS, weights, source), _UPDATE)


def _base_form(coupling: Coupling) -> Equations:
    """Feedback off: the value function is the loss itself, ``α`` stays what it is at the end (Proposition 4)."""
    return {}, _define((a.WEIGHTS, a.ALPHA_NEXT, "Prop. 4"), _UPDATE)


def _diagonal(matrix: MatrixExpr) -> MatrixExpr:
    """The diagonal as a vector: ``(A ∘ I) 1``."""
    return HadamardProduct(matrix, Identity(a.BATCH)) * OneMatrix(a.BATCH, 1)


def _factored_information_form(coupling: Coupling) -> Equations:
    """The same with B r columns: only ``s`` has more in it, since the ordinary gradient is outside their span (4c).

    Inside a group of b samples, ``M`` and ``ℓ_u`` are its share ``1/τ`` of the batch's and ``b`` is its own, so that
    ``b`` alone counts ``τ`` times in ``s``.
    """
    backward, _ = _information_form(coupling)
    scale = a.GROUP_SCALE if coupling == "groups" else 1
    base = scale * a.GRADIENTS.T * Inverse(a.CURVATURE) * a.BASE
    drift = _define((a.DRIFT, base + a.GRADIENTS.T * Inverse(a.CURVATURE) * a.DECAY, "4c"))
    return {**drift, **backward}, _define(
        (a.WEIGHTS, Inverse(a.INFORMATION) * (a.TARGET + a.CHANGE), "4c"), _FACTORED_UPDATE
    )


def _factored_block_form(coupling: Coupling) -> Equations:
    """The projection keeps a block of rank × rank a sample."""
    known = Inverse(a.OWN_NEXT)
    drift = a.GRADIENTS.T * Inverse(a.CURVATURE) * (a.BASE + a.DECAY)
    backward = _define(
        (a.DRIFT, drift.expand(), "4c, Levenberg"),
        (a.SYSTEM, known + a.GRAM, "4c, Levenberg"),
        (a.TARGET, known * a.ALPHA_NEXT - a.DRIFT, "4c, Levenberg"),
        (a.ALPHA, Inverse(a.SYSTEM) * a.TARGET, "4c, Levenberg"),
        (a.OWN, HadamardProduct(Inverse(a.SYSTEM), a.SAMPLES), "4c, Levenberg"),
    )
    weights = Inverse(a.SYSTEM) * (a.TARGET + a.CHANGE)
    return backward, _define((a.WEIGHTS, weights, "4c, Levenberg"), _FACTORED_UPDATE)


def _factored_paper_form(coupling: Coupling, sign: int, source: str) -> Equations:
    """``Q_uu = M``: one block a sample and stage, ``Z ← q_x R`` with ``R Rᵀ = I - q_uᵀ M⁻¹ q_u`` (section 3)."""
    own = HadamardProduct(a.GRAM, a.SAMPLES)
    backward = _define(
        (a.OPEN_GAIN, -Inverse(a.CURVATURE) * (a.GRADIENTS * a.ALPHA_NEXT + a.BASE + a.DECAY), "4, 3"),
        (a.ALPHA, a.ALPHA_NEXT + a.OWN_NEXT * a.GRADIENTS.T * a.OPEN_GAIN, source),
        (a.OWN, a.OWN_NEXT - sign * a.OWN_NEXT * own * a.OWN_NEXT, source),
    )
    return backward, _define((a.WEIGHTS, a.ALPHA_NEXT + a.OWN_NEXT * a.CHANGE, source), _FACTORED_UPDATE)


_UPDATE = (a.UPDATE, -Inverse(a.CURVATURE) * (a.GRADIENTS * a.WEIGHTS + a.DECAY), "4, 28")
_FACTORED_UPDATE = (a.UPDATE, -Inverse(a.CURVATURE) * (a.GRADIENTS * a.WEIGHTS + a.BASE + a.DECAY), "4, 28")


def _define(*equations: tuple[MatrixExpr, MatrixExpr, str]) -> dict[str, Equation]:
    return {str(symbol): Equation(symbol, expression, source) for symbol, expression, source in equations}


Form = Callable[[Coupling], Equations]
FORMS: dict[FormName, Form] = {
    "information": _information_form,
    "block": _block_form,
    "substituted": lambda coupling: _paper_form(coupling, 1, "4b"),
    "printed": lambda coupling: _paper_form(coupling, -1, "21-23 as printed"),
    "base": _base_form,
}
FACTORED_FORMS: dict[FormName, Form] = {
    "information": _factored_information_form,
    "block": _factored_block_form,
    "substituted": lambda coupling: _factored_paper_form(coupling, 1, "section 3"),
    "printed": lambda coupling: _factored_paper_form(coupling, -1, "21-23 as printed, any rank"),
}
