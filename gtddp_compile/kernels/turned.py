"""Metrics of one parameter seen as a matrix: diagonal in coordinates turned on both of its sides.

Shampoo's, SOAP's and Muon's (docs/theory.md#curvatures). A parameter is the matrix ``(m, n)`` of its first axis by all
others, a vector ``(m, 1)``.
"""

from typing import Any, NamedTuple

from torch import Tensor

from gtddp_compile.kernels.bundle import wide


class Turned(NamedTuple):
    """``M⁻¹ V = Y (s ∘ (Yᵀ V X)) Xᵀ``.

    ``x`` is ``X`` ``(n, N)`` and ``g`` ``Y`` ``(m, M)``, ``None``: the identity; ``scale`` ``s`` is a number or
    ``(M, N)``.
    """

    x: Tensor | None
    g: Tensor | None
    scale: Tensor | float


def as_matrix(value: Tensor) -> Tensor:
    """A parameter as ``(m, n)``."""
    return value.reshape(value.shape[0] if value.dim() else 1, -1)


def turned_rows(rows: Tensor, inverse: Any) -> tuple[Tensor, Any]:
    """Per-sample gradients ``(B, *shape)`` of one parameter where its metric is a number or diagonal, and that."""
    if not isinstance(inverse, Turned):
        return rows, inverse
    rows = wide(rows.reshape(rows.shape[0], rows.shape[1] if rows.dim() > 1 else 1, -1))
    return _turn(rows, inverse), inverse.scale


def inverse_times(inverse: Any, value: Tensor) -> Tensor:
    """``M⁻¹ V`` of one parameter, of its shape."""
    if not isinstance(inverse, Turned):
        scaled: Tensor = inverse * value
        return scaled
    found = _turn(wide(as_matrix(value)), inverse) * inverse.scale
    found = found if inverse.g is None else inverse.g @ found
    return (found if inverse.x is None else found @ inverse.x.mT).reshape(value.shape).to(value.dtype)


def _turn(matrix: Tensor, inverse: Turned) -> Tensor:
    """``Yᵀ V X``."""
    found = matrix if inverse.g is None else inverse.g.mT @ matrix
    return found if inverse.x is None else found @ inverse.x
