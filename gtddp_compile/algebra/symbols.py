"""Matrix symbols for value functions, and the exact rewriting that proves two expressions equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, reduce
from typing import Any

from sympy import (
    Expr,
    Identity,
    Integer,
    MatAdd,
    MatMul,
    MatrixExpr,
    MatrixSymbol,
    Transpose,
    ZeroMatrix,
    sympify,
)
from sympy.matrices.expressions.blockmatrix import BlockMatrix, block_collapse

Rule = tuple[tuple[MatrixExpr, ...], MatrixExpr]
"""``(factors, result)``: the product of adjacent ``factors`` is ``result``."""


class SymmetricSymbol(MatrixSymbol):  # type: ignore[misc]  # sympy ships no types
    """A square matrix symbol that is its own transpose (a Hessian, a curvature, a covariance)."""

    def _eval_transpose(self) -> MatrixExpr:
        return self


def block_entries(expression: MatrixExpr, rows: Sequence[Expr], columns: Sequence[Expr]) -> list[list[MatrixExpr]]:
    """The blocks of a block matrix expression after sympy has collapsed it, zero and identity blocks resolved.

    ``rows`` and ``columns`` are the sizes of the blocks: sympy forgets them where the whole matrix is zero.
    """
    collapsed = block_collapse(expression)
    if isinstance(collapsed, BlockMatrix):
        return [[collapsed.blocks[i, j].doit() for j in range(len(columns))] for i in range(len(rows))]
    if isinstance(collapsed, ZeroMatrix):
        return [[ZeroMatrix(row, column) for column in columns] for row in rows]
    return [[collapsed.doit()]]


def terms(expression: MatrixExpr) -> list[tuple[Expr, tuple[MatrixExpr, ...]]]:
    """The expanded sum as (scalar coefficient, matrix factors) pairs; a zero matrix has none."""
    expanded = expression.doit().expand().doit()
    found = []
    for term in expanded.args if isinstance(expanded, MatAdd) else (expanded,):
        if isinstance(term, ZeroMatrix):
            continue
        coefficient, factors = term.as_coeff_matrices() if isinstance(term, MatMul) else (Integer(1), (term,))
        found.append((sympify(coefficient), tuple(factors)))
    return found


def rewrite(expression: MatrixExpr, rules: Iterable[Rule]) -> MatrixExpr:
    """Apply the product rules until none matches, expanding in between: a normal form for terminating rules."""
    rules = tuple(rules)
    pending, done = [expression], []
    while pending:
        for coefficient, factors in terms(pending.pop()):
            replaced = _first_match(factors, rules)
            if replaced is None:
                done.append(coefficient * MatMul(*factors))
            else:
                pending.append(coefficient * replaced)
    return MatAdd(*done, ZeroMatrix(*expression.shape)).doit()


def _first_match(factors: tuple[MatrixExpr, ...], rules: tuple[Rule, ...]) -> MatrixExpr | None:
    for pattern, result in rules:
        width = len(pattern)
        for start in range(len(factors) - width + 1):
            if factors[start : start + width] == pattern:
                return MatMul(*factors[:start], result, *factors[start + width :])
    return None


def is_equal(left: MatrixExpr, right: MatrixExpr, rules: Iterable[Rule] = ()) -> bool:
    """Whether two matrix expressions are equal as polynomials in their noncommuting symbols, modulo ``rules``."""
    rules = tuple(rules)
    return (not rules and products(left) == products(right)) or not terms(rewrite(left - right, rules))


Products = dict[tuple[MatrixExpr, ...], Any]
"""A polynomial in noncommuting symbols: the coefficient of every product of them."""


def products(expression: MatrixExpr) -> Products:
    """The expanded sum as a polynomial, without simplification: inverses do not cancel.

    Two expressions with the same polynomial are equal; the converse holds but for products with an inverse.
    """
    if isinstance(expression, ZeroMatrix):
        return {}
    if isinstance(expression, Identity):
        return {(): 1}
    if isinstance(expression, MatAdd):
        found: Products = {}
        for part in expression.args:
            for factors, coefficient in products(part).items():
                found[factors] = found.get(factors, 0) + coefficient
        return {factors: coefficient for factors, coefficient in found.items() if coefficient != 0}
    if isinstance(expression, MatMul):
        return reduce(_times, (products(part) if part.is_Matrix else {(): _number(part)} for part in expression.args))
    if isinstance(expression, Transpose) and not isinstance(expression.arg, MatrixSymbol):
        inside = products(expression.arg)
        return {tuple(map(_transposed, reversed(factors))): coefficient for factors, coefficient in inside.items()}
    return {(expression,): 1}


def _times(left: Products, right: Products) -> Products:
    found: Products = {}
    for first, one in left.items():
        for second, other in right.items():
            factors = first + second
            found[factors] = found.get(factors, 0) + one * other
    return found


def _number(scalar: Expr) -> Any:
    return int(scalar) if scalar.is_Integer else scalar


@cache
def _transposed(symbol: MatrixExpr) -> MatrixExpr:
    return symbol.T.doit()
