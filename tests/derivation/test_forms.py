"""The equations that run are those that were proved: whatever is altered between the two fails the compilation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from sympy import Inverse, MatAdd, MatrixExpr
from torch import nn

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra import forms
from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.algebra.derivation import RECURSIONS, Equation
from gtddp_compile.algebra.forms import Form, Law, build
from gtddp_compile.algebra.formulas import check_update
from gtddp_compile.options import Options
from gtddp_compile.passes import p07_collapse
from gtddp_compile.passes.p06_derive import derive
from gtddp_compile.passes.p07_collapse import form_equations, prove_law, prove_span
from gtddp_compile.runtime.compiler import build_graph
from support import networks

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


def test_a_form_typed_in_does_not_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    """The information form with ``s`` and ``c`` turned."""

    def typed(*_: Any, **__: Any) -> list[Equation]:
        return [
            Equation(a.TARGET, a.TARGET_NEXT + a.DRIFT), Equation(a.INFORMATION, a.INFORMATION_NEXT + a.GRAM),
            Equation(a.ALPHA, Inverse(a.INFORMATION) * a.TARGET),
            Equation(a.WEIGHTS, Inverse(a.INFORMATION) * (a.TARGET - a.CHANGE)),
            Equation(a.UPDATE, -Inverse(a.CURVATURE) * (a.GRADIENTS * a.WEIGHTS + a.DECAY)),
        ]  # fmt: skip

    monkeypatch.setattr(forms, "_equations", typed)
    form_equations.cache_clear()
    with pytest.raises(CompileError, match="y = s \\+ y' is not what was proved"):
        compile_optimizer(
            networks.mlp().model, networks.mlp().batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1
        )
    form_equations.cache_clear()


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
