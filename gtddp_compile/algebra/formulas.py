"""Print derived B-vector and B×B formulas as calls of the sweep kernels. Symbols end here; the hot loop sees none."""

from __future__ import annotations

from collections.abc import Mapping

from sympy import DiagMatrix, HadamardProduct, Identity, Inverse, MatAdd, MatMul, MatrixExpr, Mul, OneMatrix, ZeroMatrix

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.errors import CompileError


def print_formula(
    expression: MatrixExpr,
    names: Mapping[MatrixExpr, str],
    factors: Mapping[MatrixExpr, str],
    samples: Mapping[MatrixExpr, str] | None = None,
    total: MatrixExpr | None = None,
) -> str:
    """Python source of a formula.

    Args:
        expression: over B-vectors (column matrices) and B×B matrices.
        names: variable of every symbol, and of every subexpression that already has one.
        factors: variable of the Cholesky factors of every matrix whose inverse may occur.
        samples: variable of every matrix that is held as one block a sample, shape (B, r, r).
        total: a matrix that nobody reads again: what is added to it is added in place.
    """
    samples = samples or {}

    def vector(e: MatrixExpr) -> str:
        if e in names:
            return names[e]
        if isinstance(e, OneMatrix):
            return "1"
        if isinstance(e, ZeroMatrix):
            return "0"
        if isinstance(e, MatAdd):
            return _sum([vector(term) for term in _ordered(e, names)])
        if isinstance(e, HadamardProduct):
            return " * ".join(f"({vector(arg)})" if isinstance(arg, MatAdd) else vector(arg) for arg in e.args)
        if isinstance(e, MatMul):
            return product(e)
        raise _unprintable(e)

    def product(e: MatMul) -> str:
        coefficient, matrices = e.as_coeff_matrices()
        if coefficient == -1:
            return f"-{_parenthesised(vector(MatMul(*matrices).doit()))}"
        if coefficient != 1 or not matrices:
            raise _unprintable(e)
        head, tail = matrices[0], MatMul(*matrices[1:]).doit()
        if isinstance(head, Inverse) and head.arg in factors:
            return f"solve({factors[head.arg]}, {vector(tail)})"
        if head in samples:
            return f"samples_apply({samples[head]}, {vector(tail)})"
        if isinstance(head, Inverse) and head.arg in samples:
            return f"samples_solve({samples[head.arg]}, {vector(tail)})"
        if isinstance(head, Inverse) and isinstance(head.arg, DiagMatrix):
            return f"{_parenthesised(vector(tail))} / {vector(head.arg.args[0])}"
        if isinstance(head, HadamardProduct) and isinstance(tail, OneMatrix):
            return diagonal(head)
        raise _unprintable(e)

    def diagonal(e: HadamardProduct) -> str:
        (inner,) = (arg for arg in e.args if not isinstance(arg, Identity))
        if isinstance(inner, Inverse) and inner.arg in factors:
            return f"inverse_diagonal({factors[inner.arg]})"
        raise _unprintable(e)

    def own_blocks(e: HadamardProduct) -> str:
        (inner,) = (arg for arg in e.args if arg != a.SAMPLES)
        if a.SAMPLES in e.args and isinstance(inner, Inverse) and inner.arg in factors:
            return f"samples_of_inverse({factors[inner.arg]}, rank)"
        raise _unprintable(e)

    def matrix(e: MatrixExpr) -> str:
        if e in names:
            return names[e]
        if isinstance(e, MatAdd) and total in e.args:
            rest = [matrix(term) for term in _ordered(e, names) if term != total]
            return f"blocks_into({names[total]}, {', '.join(rest)})"
        if isinstance(e, MatAdd):
            return f"blocks_add({', '.join(matrix(term) for term in _ordered(e, names))})"
        if isinstance(e, Inverse) and isinstance(e.arg, DiagMatrix):
            return f"blocks_diagonal(1 / {vector(e.arg.args[0])})"
        if isinstance(e, Inverse) and e.arg in samples:
            return f"samples_inverse({samples[e.arg]})"
        if isinstance(e, HadamardProduct):
            return own_blocks(e)
        if isinstance(e, Mul | MatMul):
            coefficient, matrices = e.as_coeff_matrices()
            return f"blocks_scale({names[coefficient]}, {matrix(MatMul(*matrices).doit())})"
        raise _unprintable(e)

    return vector(expression) if expression.shape[1] == 1 else matrix(expression)


def check_update(form: CollapsedForm, *, linear: bool) -> None:
    """The instructions for ``δu`` and ``k`` are right only if they are ``-M⁻¹ (C w + ℓ)`` and ``-M⁻¹ (C α' + ℓ)``.

    Raises:
        CompileError: they are not; nothing else computes them.
    """
    outside = (a.DECAY if linear else 0 * a.DECAY) + (a.BASE if form.factored else 0 * a.BASE)
    for equation in (*form.backward.values(), *form.forward.values()):
        weights = {a.UPDATE: a.WEIGHTS, a.OPEN_GAIN: a.ALPHA_NEXT}.get(equation.symbol)
        if (
            weights is not None
            and equation.expression != (-Inverse(a.CURVATURE) * (a.GRADIENTS * weights + outside)).doit()
        ):
            raise _unprintable(equation.expression)


def _ordered(e: MatAdd, names: Mapping[MatrixExpr, str]) -> list[MatrixExpr]:
    """Positive terms first, what is named first: the order people write."""
    return sorted(e.args, key=lambda term: (term.could_extract_minus_sign(), term not in names, str(term)))


def _sum(terms: list[str]) -> str:
    text = terms[0]
    for term in terms[1:]:
        text += f" - {term[1:]}" if term.startswith("-") else f" + {term}"
    return text


def _parenthesised(text: str) -> str:
    return f"({text})" if (" + " in text or " - " in text) else text


def _unprintable(e: MatrixExpr) -> CompileError:
    return CompileError(
        f"the derived formula {e} has no instruction", "Use backend='dense' and report the options that led here"
    )
