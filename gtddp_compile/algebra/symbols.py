"""Matrix symbols for value functions, and the exact rewriting that proves two expressions equal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache, reduce
from typing import Any

from sympy import Expr, Identity, Inverse, MatAdd, MatMul, MatPow, MatrixExpr, MatrixSymbol, Transpose, ZeroMatrix

Rule = tuple[tuple[MatrixExpr, ...], MatrixExpr]
"""``(factors, result)``: the product of adjacent ``factors`` is ``result``."""


class SymmetricSymbol(MatrixSymbol):  # type: ignore[misc]  # sympy ships no types
    """A square matrix symbol that is its own transpose (a Hessian, a curvature, a covariance)."""

    def _eval_transpose(self) -> MatrixExpr:
        return self


Blocks = Sequence[Sequence[MatrixExpr]]


def block_product(left: Blocks, right: Blocks) -> list[list[MatrixExpr]]:
    """The product of two block matrices, zero and identity blocks resolved."""
    columns = list(zip(*right, strict=True))
    return [[MatAdd(*map(MatMul, row, column)).doit() for column in columns] for row in left]


Products = dict[tuple[MatrixExpr, ...], Any]
"""A polynomial in noncommuting symbols: the coefficient of every product of them."""


def is_equal(left: MatrixExpr, right: MatrixExpr, rules: Iterable[Rule] = ()) -> bool:
    """Whether two matrix expressions are equal as polynomials in their noncommuting symbols, modulo ``rules``."""
    return not _rewritten(_sum([(1, products(left)), (-1, products(right))]), rules)


def rewrite(expression: MatrixExpr, rules: Iterable[Rule]) -> MatrixExpr:
    """Apply the product rules until none matches: a normal form for terminating rules."""
    found = _rewritten(products(expression), rules)
    done = [coefficient * MatMul(*factors) for factors, coefficient in found.items()]
    return MatAdd(*done, ZeroMatrix(*expression.shape)).doit()


def _rewritten(polynomial: Products, rules: Iterable[Rule]) -> Products:
    known = [(factors, products(result)) for factors, result in rules]
    pending, done = list(polynomial.items()), []
    while pending:
        factors, coefficient = pending.pop()
        replaced = next((found for rule in known if (found := _replaced(factors, *rule)) is not None), None)
        if replaced is None:
            done.append((coefficient, {factors: 1}))
        else:
            pending += [(product, coefficient * scale) for product, scale in replaced.items()]
    return _sum(done)


def _replaced(factors: tuple[MatrixExpr, ...], pattern: tuple[MatrixExpr, ...], result: Products) -> Products | None:
    """A product with the first occurrence of ``pattern`` replaced."""
    width = len(pattern)
    for start in range(len(factors) - width + 1):
        if factors[start : start + width] == pattern:
            return _times(_times({factors[:start]: 1}, result), {factors[start + width :]: 1})
    return None


def products(expression: MatrixExpr) -> Products:
    """The expanded sum as a polynomial; a matrix beside its inverse is gone."""
    if isinstance(expression, ZeroMatrix):
        return {}
    if isinstance(expression, Identity):
        return {(): 1}
    if isinstance(expression, MatAdd):
        return _sum((1, products(part)) for part in expression.args)
    if isinstance(expression, MatMul):
        return reduce(_times, (products(part) if part.is_Matrix else {(): _number(part)} for part in expression.args))
    if isinstance(expression, MatPow) and expression.exp.is_Integer and expression.exp > 0:
        return reduce(_times, [products(expression.base)] * int(expression.exp))
    if isinstance(expression, Transpose):
        inside = products(expression.arg)
        return {tuple(map(_transposed, reversed(factors))): coefficient for factors, coefficient in inside.items()}
    return {(expression,): 1}


def _sum(parts: Iterable[tuple[Any, Products]]) -> Products:
    found: Products = {}
    for scale, part in parts:
        for factors, coefficient in part.items():
            found[factors] = found.get(factors, 0) + scale * coefficient
    return {factors: coefficient for factors, coefficient in found.items() if coefficient != 0}


def _times(left: Products, right: Products) -> Products:
    found: Products = {}
    for first, one in left.items():
        for second, other in right.items():
            factors = _joined(first, second)
            found[factors] = found.get(factors, 0) + one * other
    return found


def _joined(first: tuple[MatrixExpr, ...], second: tuple[MatrixExpr, ...]) -> tuple[MatrixExpr, ...]:
    while first and second and (_inverts(first[-1], second[0]) or _inverts(second[0], first[-1])):
        first, second = first[:-1], second[1:]
    return first + second


def _inverts(one: MatrixExpr, other: MatrixExpr) -> bool:
    return isinstance(one, Inverse) and one.arg == other


def _number(scalar: Expr) -> Any:
    return int(scalar) if scalar.is_Integer else scalar


@cache
def _transposed(symbol: MatrixExpr) -> MatrixExpr:
    return symbol.T.doit()
