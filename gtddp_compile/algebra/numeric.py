"""Evaluate derived matrix expressions with torch: what the dense backend runs."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce

import torch
from sympy import BlockMatrix, Identity, Inverse, MatAdd, MatMul, MatrixExpr, Transpose, ZeroMatrix
from torch import Tensor


def evaluate(expression: MatrixExpr, values: Mapping[MatrixExpr, Tensor], size: Mapping[object, int]) -> Tensor:
    """The expression's value; ``values`` of its symbols, ``size`` of its symbolic dimensions."""
    like = next(iter(values.values()))

    def length(dimension: object) -> int:
        return int(dimension.subs(size)) if hasattr(dimension, "subs") else int(dimension)  # type: ignore[call-overload]

    def value(e: MatrixExpr) -> Tensor:
        if e in values:
            return values[e]
        if isinstance(e, MatAdd):
            total: Tensor = reduce(torch.add, [value(term) for term in e.args])
            return total
        if isinstance(e, MatMul):
            coefficient, matrices = e.as_coeff_matrices()
            scaled: Tensor = float(coefficient) * product(matrices)
            return scaled
        if isinstance(e, Transpose):
            return value(e.arg).T
        if isinstance(e, Inverse):
            inverse: Tensor = torch.linalg.inv(value(e.arg))
            return inverse
        if isinstance(e, BlockMatrix):
            rows, columns = e.blockshape
            return torch.cat([torch.cat([value(e.blocks[i, j]) for j in range(columns)], 1) for i in range(rows)])
        if isinstance(e, Identity):
            return torch.eye(length(e.shape[0]), dtype=like.dtype)
        if isinstance(e, ZeroMatrix):
            return torch.zeros(length(e.shape[0]), length(e.shape[1]), dtype=like.dtype)
        raise TypeError(f"no numeric meaning for {type(e).__name__}: {e}")

    def product(matrices: list[MatrixExpr]) -> Tensor:
        head = matrices[0]
        if len(matrices) == 1:
            return value(head)
        # A solve is more accurate than a product with the inverse.
        if isinstance(head, Inverse):
            solved: Tensor = torch.linalg.solve(value(head.arg), product(matrices[1:]))
            return solved
        return value(head) @ product(matrices[1:])

    return value(expression)
