"""The derived gains and recursions are the paper's: Eq. 9-12 and 26-31, proved by sympy on the pass's own output."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from sympy import Identity, Inverse, MatAdd, MatrixExpr, MatrixSymbol, Symbol, ZeroMatrix
from torch import nn

from gtddp_compile import CompileError
from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra import forms
from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.algebra.derivation import RECURSIONS, equation_text
from gtddp_compile.algebra.forms import Form, Law, build
from gtddp_compile.algebra.numeric import evaluate
from gtddp_compile.algebra.symbols import SymmetricSymbol, is_equal
from gtddp_compile.lowering.formulas import check_update
from gtddp_compile.options import Options
from gtddp_compile.passes import p07_collapse
from gtddp_compile.passes.p06_derive import DerivedStage, derive
from gtddp_compile.passes.p07_collapse import collapse, form_equations, prove_law, prove_span
from gtddp_compile.runtime.compiler import build_graph
from support import networks
from support.derived import opened, residual, residual_stages

N, M = Symbol("n", integer=True, positive=True), Symbol("m", integer=True, positive=True)


def square(e: MatrixExpr, stage: int) -> MatrixExpr:
    """All states of one size; every stage's own symbols marked with its index (next stage's for primed ones)."""
    sizes = {s: (M if str(s).startswith("m_") else N) for s in e.free_symbols if not isinstance(s, MatrixSymbol)}
    e = e.subs(sizes)
    renamed = {}
    for s in e.free_symbols:
        if isinstance(s, MatrixSymbol):
            name = str(s).replace("'", "")
            renamed[s] = type(s)(f"{name}@{stage + 1 if chr(39) in str(s) else stage}", *s.shape)
    return e.subs(renamed)


def test_residual_gain_is_equation_9() -> None:
    d = residual_stages(3)[1].derivation
    v_xr = d.value_xx["x", "r"]
    f_u = d.control["x", "u"]
    assert d.gains["r"].symbol.name == "G"
    assert is_equal(opened(d, d.gains["r"].expression), -Inverse(d.q_uu["u", "u"].symbol) * f_u.T * v_xr)


def test_gains_without_shortcut_are_unchanged() -> None:
    """Eq. 9: "k and K are the same open and feedback gains computed in the absence of shortcut"."""
    graph = build_graph(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)), (torch.zeros(2, 3),), Options()
    )
    plain = derive(graph).stages[1].derivation
    beside = residual_stages(3)[1].derivation
    for name in ("k", "K"):
        a = plain.k if name == "k" else plain.gains["x"]
        c = beside.k if name == "k" else beside.gains["x"]
        assert is_equal(square(opened(plain, a.expression), 1), square(opened(beside, c.expression), 1))


@pytest.mark.parametrize("position", [1, 2])
def test_recursion_beside_the_shortcut_is_equation_10(position: int) -> None:
    d = residual_stages(4)[position].derivation
    q_uu, gain, residual = d.q_uu["u", "u"].symbol, d.gains["x"].expression, d.gains["r"].expression
    v_xr, v_rr, f_x = d.value_xx["x", "r"], d.value_xx["r", "r"], d.state["x", "x"]
    found_xr = opened(d, d.new_value_xx["x", "r"].expression)
    found_rr = opened(d, d.new_value_xx["r", "r"].expression)
    assert is_equal(found_xr, f_x.T * v_xr - opened(d, gain.T * q_uu * residual))
    assert is_equal(found_rr, v_rr - opened(d, residual.T * q_uu * residual))


def test_terminal_conditions_of_equation_10() -> None:
    """At tf the merge makes ``V_xxr`` and ``V_xrxr`` start from ``V_xx`` at tf+1: the Jacobian in ``x_r`` is
    ``I`` (26a).
    """
    d = residual_stages(3)[-1].derivation
    assert d.state["x", "r"] == Identity(d.value_x["x"].shape[0])
    v_xx = d.value_xx["x", "x"]
    f_x, f_u, q_uu = d.state["x", "x"], d.control["x", "u"], d.q_uu["u", "u"].symbol
    assert is_equal(d.q_xx["x", "r"].expression, f_x.T * v_xx)
    assert is_equal(d.q_xx["r", "r"].expression, v_xx)
    found = opened(d, d.new_value_xx["r", "r"].expression)
    assert is_equal(found, v_xx - v_xx * f_u * Inverse(q_uu) * f_u.T * v_xx)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_value_at_the_fork_is_equations_11_and_12(depth: int) -> None:
    """Proposition 2, for any number of layers beside the shortcut (with one, fork and merge are one stage)."""
    stages = residual_stages(depth)
    v_r, v_rr, sum_x, sum_xx = _along_the_shortcut(stages)
    fork = stages[0].derivation
    q_uu = square(fork.q_uu["u", "u"].symbol, 0)
    k = Inverse(q_uu) * square(fork.q_u["u"].expression, 0) * -1
    f_x, f_u = square(fork.state["x", "x"], 0), square(fork.control["x", "u"], 0)
    v_x, v_xx, v_xr = (square(e, 0) for e in (fork.value_x["x"], fork.value_xx["x", "x"], fork.value_xx["x", "r"]))
    gain, residual = -Inverse(q_uu) * f_u.T * v_xx * f_x, -Inverse(q_uu) * f_u.T * v_xr
    feedforward_x = f_x.T * v_x - gain.T * q_uu * k
    feedforward_xx = f_x.T * v_xx * f_x - gain.T * q_uu * gain
    mixed = f_x.T * v_xr - gain.T * q_uu * residual
    known = {square(fork.value_x["r"], 0): v_r, square(fork.value_xx["r", "r"], 0): v_rr}
    found_x = square(opened(fork, fork.new_value_x["x"].expression), 0).subs(known).doit()
    found_xx = square(opened(fork, fork.new_value_xx["x", "x"].expression), 0).subs(known).doit()
    end = len(stages)
    v_end_xx = square(stages[-1].derivation.value_xx["x", "x"], end - 1)
    v_end = square(stages[-1].derivation.value_x["x"], end - 1)
    assert is_equal(found_x, feedforward_x + v_end - sum_x - residual.T * q_uu * k)
    assert is_equal(found_xx, feedforward_xx + v_end_xx - sum_xx - residual.T * q_uu * residual + mixed + mixed.T)


def _along_the_shortcut(stages: list[DerivedStage]) -> tuple[MatrixExpr, MatrixExpr, MatrixExpr, MatrixExpr]:
    """``V_r`` and ``V_rr`` after the fork by chaining the derived recursions, and the sums of Eq. 11 and 12
    over (ts, tf].
    """
    v_r = v_rr = None
    total_x, total_xx = [], []
    for index in range(len(stages) - 1, 0, -1):
        d = stages[index].derivation
        new_r = square(opened(d, d.new_value_x["r"].expression), index)
        new_rr = square(opened(d, d.new_value_xx["r", "r"].expression), index)
        if v_r is not None:
            known = {square(d.value_x["r"], index): v_r, square(d.value_xx["r", "r"], index): v_rr}
            new_r, new_rr = new_r.subs(known).doit(), new_rr.subs(known).doit()
        v_r, v_rr = new_r, new_rr
        q_uu, k = d.q_uu["u", "u"].symbol, d.k.expression
        gain = d.gains["r"].expression
        total_x.append(square(opened(d, gain.T * q_uu * k), index))
        total_xx.append(square(opened(d, gain.T * q_uu * gain), index))
    sum_x, sum_xx = total_x[0], total_xx[0]
    for e_x, e_xx in zip(total_x[1:], total_xx[1:], strict=True):
        sum_x, sum_xx = sum_x + e_x, sum_xx + e_xx
    return v_r, v_rr, sum_x, sum_xx


@pytest.mark.parametrize("recursion", ["levenberg", "substituted", "printed"])
def test_collapse_is_proved_on_every_pattern(recursion: str) -> None:
    """Each claim is an exact identity; a wrong one must not pass."""
    derived = derive(residual(3), recursion)  # type: ignore[arg-type]
    form = collapse(derived, "full" if recursion == "levenberg" else "block")
    assert all(is_equal(c.left, c.right, c.rules) for c in form.claims)
    assert not is_equal(form.claims[0].left, 2 * form.claims[0].right)
    by_sympy = [(c.left - c.right).doit().expand().doit() for c in form.claims if not c.rules]
    assert len(by_sympy) > 20
    assert all(isinstance(difference, ZeroMatrix) for difference in by_sympy)


@pytest.mark.parametrize("factored", [False, True])
@pytest.mark.parametrize("recursion", RECURSIONS)
def test_the_law_holds_for_numbers(recursion: Any, factored: bool) -> None:
    """Both sides of what was proved by rules, evaluated where their symbols are what the rules say."""
    draw = torch.Generator().manual_seed(0)
    size = {a.BATCH: 3, a.CONTROLS: 5}
    shapes = {symbol: [size.get(n, 1) for n in symbol.shape] for symbol in
              (a.GRADIENTS, a.ALPHA_NEXT, a.DECAY, a.BASE, a.CHANGE, a.CURVATURE, a.VARIANCE_NEXT)}  # fmt: skip
    values = {s: torch.randn(*shape, generator=draw, dtype=torch.float64) for s, shape in shapes.items()}
    for symmetric in (a.CURVATURE, a.VARIANCE_NEXT):
        values[symmetric] = values[symmetric] @ values[symmetric].T + torch.eye(len(values[symmetric]))
    values[a.GRAM] = values[a.GRADIENTS].T @ values[a.CURVATURE].inverse() @ values[a.GRADIENTS]
    values[SymmetricSymbol("W", a.BATCH, a.BATCH)] = (values[a.VARIANCE_NEXT].inverse() + values[a.GRAM]).inverse()
    _, claims = prove_law(recursion, factored)
    for claim in claims:
        left, right = (evaluate(side, values, size) for side in (claim.left, claim.right))
        torch.testing.assert_close(left, right, rtol=0, atol=1e-9)


def test_printed_recursion_of_one_player() -> None:
    """Eq. 21-23's plus with the one ``Q_uu`` there is (``K = -Q_uu⁻¹ Q_ux``)."""
    graph = residual(2, coupling="block", recursion="printed")
    last = derive(graph, "printed").stages[-1].derivation.new_value_xx["x", "x"]
    assert (equation_text(last), last.source) == ("V_xx = Q_xx - Q_ux.T*K", "21-23, sign as printed")


def test_equal_as_polynomials_whatever_the_order_of_terms() -> None:
    n = Symbol("n", integer=True, positive=True)
    a, b = (MatrixSymbol(name, n, n) for name in "AB")
    assert is_equal((a + b) * (a - b), a * a - b * b + b * a - a * b)
    assert not is_equal(a * b, b * a)
    assert not is_equal(2 * a * b, a * b)
    assert is_equal(a * b * a, b, [((a, b, a), b)])


# name, recursion, coupling, whether the factors are richer than gradients
CASES: list[tuple[Any, Any, Any, bool]] = [
    ("base", "levenberg", "full", False),
    *(
        (name, recursion, coupling, factored)
        for name, recursion, coupling in (
            ("joint", "levenberg", "full"), ("joint", "levenberg", "groups"),
            ("information", "levenberg", "full"), ("information", "levenberg", "groups"),
            ("block", "levenberg", "block"), ("substituted", "substituted", "block"), ("printed", "printed", "block"),
        )
        for factored in (False, True)
    ),
]  # fmt: skip


def alterations(expression: MatrixExpr) -> Iterator[MatrixExpr]:
    """The expression with one sign turned, or one term left out, wherever it has a sum; and its negative."""
    yield -expression
    for node in expression.atoms(MatAdd):
        for term in node.args:
            rest = MatAdd(*(t for t in node.args if t != term)).doit()
            yield from (expression.xreplace({node: rest}), expression.xreplace({node: rest - term}))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_altered_equation_is_refused(case: tuple[Any, Any, Any, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    name, recursion, coupling, factored = case
    law, _ = prove_law("substituted" if name == "base" else recursion, factored)
    proved, seen = forms._proved, []
    monkeypatch.setattr(forms, "_proved", lambda *args: seen.append(args) or proved(*args))
    backward, forward, claims = build(name, law, coupling, factored=factored)
    (name, form, law, equations), count = seen.pop(), 0
    run = forms._joint(equations) if name == "joint" else equations  # w of the first stage, where nothing has moved
    assert claims and list(run) == [*backward.values(), *forward.values()]
    for position, equation in enumerate(equations):
        named = [e for e in equations[:position] if e.symbol in (form.system, a.TARGET)]  # what others are read with
        for altered in alterations(equation.expression):
            with pytest.raises(CompileError, match="is not what was proved"):
                list(proved(name, form, law, (*named, replace(equation, expression=altered))))
            count += 1
    assert count >= len(equations)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_an_altered_law_is_refused(recursion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = p07_collapse._proved
    read = {"levenberg": ("alpha", "variance", "weights", "drift", "update")}.get(
        recursion, ("gain", "alpha", "variance", "weights", "update")
    )
    for field in read:
        for factored in (False, True):

            def wrong(law: Law, *rest: Any, field: str = field) -> Any:
                return original(replace(law, **{field: -getattr(law, field)}), *rest)

            monkeypatch.setattr(p07_collapse, "_proved", wrong)
            with pytest.raises(CompileError, match="does not follow from the derivation"):
                prove_law.__wrapped__(recursion, factored)


@pytest.mark.parametrize("recursion", RECURSIONS)
def test_the_law_is_that_of_every_pattern(recursion: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of ``k``, ``α``, ``P``, ``δu`` is compared with the derivation of the stage itself."""
    case = networks.projection()
    stage = derive(build_graph(case.model, case.batch(0)[:1], Options()), recursion).stages[1].derivation
    original = p07_collapse.in_span
    assert prove_span.__wrapped__(stage)
    for altered in range(4):

        def wrong(*args: Any, altered: int = altered) -> Any:
            return tuple(-e if n == altered else e for n, e in enumerate(original(*args)))

        monkeypatch.setattr(p07_collapse, "in_span", wrong)
        with pytest.raises(CompileError, match="does not follow from the derivation"):
            prove_span.__wrapped__(stage)


@pytest.mark.parametrize("name", ["joint", "information", "block", "printed"])
def test_symbols_mean_what_is_kept(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    law, _ = prove_law("printed" if name == "printed" else "levenberg", False)
    form = forms.form_of(name, factored=False)
    wrong = [replace(form, variance=2 * form.variance)]
    wrong += [replace(form, alpha=-Inverse(a.INFORMATION_NEXT) * a.TARGET_NEXT)] if name in a.COUPLED else []
    for kept in wrong:

        def said(*_: Any, kept: Form = kept, **__: Any) -> Form:
            return kept

        monkeypatch.setattr(forms, "form_of", said)
        with pytest.raises(CompileError, match="is not what was proved"):
            build(name, law, "block", factored=False)


@pytest.mark.parametrize("symbol", ["k", "delta_u"])
def test_an_update_that_no_instruction_computes_is_refused(symbol: str) -> None:
    backward, forward, claims = form_equations("printed", "printed", "block", False)
    form = CollapsedForm("printed", backward, forward, claims)
    check_update(form, linear=True)
    sweep = backward if symbol == "k" else forward
    changed = sweep | {symbol: replace(sweep[symbol], expression=2 * sweep[symbol].expression)}
    with pytest.raises(CompileError, match="has no instruction"):
        check_update(replace(form, **{"backward" if symbol == "k" else "forward": changed}), linear=True)
