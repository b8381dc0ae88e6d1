"""Derived B-vector and B×B formulas as calls of the sweep kernels. Symbols end here; the hot loop sees none."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sympy import (
    DiagMatrix,
    Expr,
    HadamardProduct,
    Identity,
    Integer,
    Inverse,
    MatAdd,
    MatMul,
    MatrixExpr,
    Mul,
    OneMatrix,
    Pow,
    ZeroMatrix,
)  # fmt: skip

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.errors import CompileError
from gtddp_compile.lowering.instructions import Apply, Var, total


def formula(
    expression: Expr,
    names: Mapping[Expr, Var],
    factors: Mapping[MatrixExpr, Var] | None = None,
    samples: Mapping[MatrixExpr, Var] | None = None,
    last: MatrixExpr | None = None,
) -> Any:
    """A derived formula as operands: variables, and the kernels of the sweeps applied to them.

    Args:
        expression: over scalars, B-vectors (column matrices) and B×B matrices.
        names: variable of every symbol, and of every subexpression that already has one.
        factors: variable of the Cholesky factors of every matrix whose inverse may occur.
        samples: variable of every matrix that is held as one block a sample, shape (B, r, r).
        last: a matrix that nobody reads again: what is added to it is added in place.
    """
    found = _Formula(names, factors or {}, samples or {}, last)
    if not isinstance(expression, MatrixExpr):
        return found.scalar(expression)
    return found.vector(expression) if expression.shape[1] == 1 else found.matrix(expression)


@dataclass(frozen=True)
class _Formula:
    """What is known of the symbols."""

    names: Mapping[Expr, Var]
    factors: Mapping[MatrixExpr, Var]
    samples: Mapping[MatrixExpr, Var]
    last: MatrixExpr | None

    def scalar(self, e: Expr) -> Any:
        if e in self.names:
            return self.names[e]
        if isinstance(e, Integer):
            return int(e)
        numerator, denominator = e.as_numer_denom()
        if denominator != 1:
            return Apply("/", (self.scalar(numerator), self.scalar(denominator)))
        if isinstance(e, Pow):
            return Apply("**", tuple(map(self.scalar, e.args)))
        raise _unprintable(e)

    def vector(self, e: MatrixExpr) -> Any:
        if e in self.names:
            return self.names[e]
        if isinstance(e, OneMatrix | ZeroMatrix):
            return int(isinstance(e, OneMatrix))
        if isinstance(e, MatAdd):
            return total([self.vector(term) for term in self._ordered(e)])
        if isinstance(e, HadamardProduct):
            first, *others = map(self.vector, e.args)
            return functools.reduce(lambda left, right: Apply("*", (left, right)), others, first)
        if isinstance(e, MatMul):
            return self._product(e)
        raise _unprintable(e)

    def _product(self, e: MatMul) -> Any:
        coefficient, matrices = e.as_coeff_matrices()
        if coefficient == -1:
            return Apply("neg", (self.vector(MatMul(*matrices).doit()),))
        if coefficient != 1 or not matrices:
            raise _unprintable(e)
        head, tail = matrices[0], MatMul(*matrices[1:]).doit()
        if isinstance(head, Inverse) and head.arg in self.factors:
            return Apply("solve", (self.factors[head.arg], self.vector(tail)))
        if head in self.samples:
            return Apply("samples_apply", (self.samples[head], self.vector(tail)))
        if isinstance(head, Inverse) and head.arg in self.samples:
            return Apply("samples_solve", (self.samples[head.arg], self.vector(tail)))
        if isinstance(head, Inverse) and isinstance(head.arg, DiagMatrix):
            return Apply("/", (self.vector(tail), self.vector(head.arg.args[0])))
        if isinstance(head, HadamardProduct) and isinstance(tail, OneMatrix):
            (inner,) = (arg for arg in head.args if not isinstance(arg, Identity))
            if isinstance(inner, Inverse) and inner.arg in self.factors:
                return Apply("inverse_diagonal", (self.factors[inner.arg],))
        raise _unprintable(e)

    def matrix(self, e: MatrixExpr) -> Any:
        if e in self.names:
            return self.names[e]
        if isinstance(e, MatAdd) and self.last in e.args:
            rest = [self.matrix(term) for term in self._ordered(e) if term != self.last]
            return Apply("blocks_into", (self.names[self.last], *rest))
        if isinstance(e, MatAdd):
            return Apply("blocks_add", tuple(self.matrix(term) for term in self._ordered(e)))
        if isinstance(e, Inverse) and isinstance(e.arg, DiagMatrix):
            return Apply("blocks_diagonal", (Apply("/", (1, self.vector(e.arg.args[0]))),))
        if isinstance(e, Inverse) and e.arg in self.samples:
            return Apply("samples_inverse", (self.samples[e.arg],))
        if isinstance(e, HadamardProduct):
            (inner,) = (arg for arg in e.args if arg != a.SAMPLES)
            if a.SAMPLES in e.args and isinstance(inner, Inverse) and inner.arg in self.factors:
                return Apply("samples_of_inverse", (self.factors[inner.arg], Var("rank")))
        if isinstance(e, Mul | MatMul):
            coefficient, matrices = e.as_coeff_matrices()
            return Apply("blocks_scale", (self.names[coefficient], self.matrix(MatMul(*matrices).doit())))
        raise _unprintable(e)

    def _ordered(self, e: MatAdd) -> list[MatrixExpr]:
        """Positive terms first, what is named first: the order people write."""
        return sorted(e.args, key=lambda term: (term.could_extract_minus_sign(), term not in self.names, str(term)))


def check_update(form: CollapsedForm, *, linear: bool) -> None:
    """The instructions for ``δu`` and ``k`` are right only if they are ``-M⁻¹ (C w + ℓ)`` and ``-M⁻¹ (C α' + ℓ)``."""
    outside = (a.DECAY if linear else 0 * a.DECAY) + (a.BASE if form.factored else 0 * a.BASE)
    for equation in (*form.backward.values(), *form.forward.values()):
        weights = {a.UPDATE: a.WEIGHTS, a.OPEN_GAIN: a.ALPHA_NEXT}.get(equation.symbol)
        if (
            weights is not None
            and equation.expression != (-Inverse(a.CURVATURE) * (a.GRADIENTS * weights + outside)).doit()
        ):
            raise _unprintable(equation.expression)


def _unprintable(e: Expr) -> CompileError:
    return CompileError(
        f"the derived formula {e} has no instruction", "Use backend='dense' and report the options that led here"
    )
