"""A loss of several terms over several sets of points: residuals of equations, boundary and initial values, data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError

Term = Callable[[Any, Tensor], Tensor]
"""``(net, points (n, D)) -> (n,)`` or ``(n, m)``: the left-hand sides of m equations at every point."""
Sets = Mapping[str, tuple[Tensor, Tensor | float]]
"""By the name of a term: its points ``(n, D)`` and the right-hand sides, of the term's shape or a number."""


class Terms(nn.Module):
    """``Σ_k w_k mean_k ½ ‖term_k(net, x) - y‖²``, every mean over the term's own set of points.

    A sample of the compiled program is one equation at one point, whichever term it belongs to, so that all of them are
    rows of one Gram matrix, and the joint step with ``curvature="sgd"`` is Gauss-Newton over all of them. Every term is
    evaluated at the points of all terms, and what is not its own is masked: what terms share (the network itself) is
    computed once. Do not use it where a term is undefined at another's points (a logarithm, a table that is looked up).

    Args:
        net: what the terms are made of: a network, or a module with trained coefficients beside it.
        terms: by name.
        weights: of terms; 1 where none is given.

    Raises:
        CompileError: no term, a weight that is negative, or of no term.
    """

    def __init__(self, net: nn.Module, terms: Mapping[str, Term], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.net, self.terms = net, dict(terms)
        self.weights = {name: 1.0 for name in self.terms} | dict(weights or {})
        wrong = sorted(name for name, w in self.weights.items() if name not in self.terms or not 0 <= w < float("inf"))
        if wrong or not self.terms:
            said = ", ".join(wrong) or "none"
            raise CompileError(f"there is no such term, or its weight is no number from 0 on: {said}",
                               "Name the terms, and give weights to those alone")  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Left-hand sides of all equations at all points, ``(N, M)``."""
        values = [term(self.net, x) for term in self.terms.values()]
        return torch.cat([value.reshape(len(x), -1) for value in values], 1)

    def loss(self, values: Tensor, targets: Tensor) -> Tensor:
        """``(N,)``, of what :meth:`batch` makes of the sets; its mean is the sum of the terms' own weighted means."""
        right, scale = targets.unbind(-1)
        return 0.5 * torch.where(scale > 0, scale * (values - right), 0.0).sum(1) ** 2

    def batch(self, sets: Sets) -> tuple[Tensor, Tensor]:
        """Points ``(N, D)``, and right-hand sides with their scales ``(N, M, 2)``; one row an equation and point.

        Raises:
            CompileError: a set is missing, unknown or empty, does not fit its term, or holds what is no number.
        """
        if set(sets) != set(self.terms):
            raise _wrong(", ".join(sorted(set(sets) ^ set(self.terms))), "has points and no term, or no points")
        widths = {name: self._width(name, sets[name][0]) for name in self.terms}
        rows = sum(len(points) * widths[name] for name, (points, _) in sets.items())
        found, targets, first, total = [], [], 0, sum(widths.values())
        for name, width in widths.items():
            points, right = sets[name][0], self._right(name, *sets[name], width)
            own = points.new_zeros(len(points), width, total, 2)
            own[:, range(width), range(first, first + width), 0] = right
            own[:, range(width), range(first, first + width), 1] = (self.weights[name] * rows / len(points)) ** 0.5
            found.append(points.repeat_interleave(width, 0))
            targets.append(own.flatten(0, 1))
            first += width
        return torch.cat(found), torch.cat(targets)

    def _width(self, name: str, points: Tensor) -> int:
        if points.dim() != 2 or not len(points):
            raise _wrong(name, f"has points of shape {tuple(points.shape)}, not (n, D)")
        if bad := _not_finite(points):
            raise _wrong(name, f"has points that are no numbers: {bad}")
        return self.terms[name](self.net, points[:1].clone()).numel()

    def _right(self, name: str, points: Tensor, right: Tensor | float, width: int) -> Tensor:
        right = right if isinstance(right, Tensor) else points.new_full((len(points), width), right)
        if right.numel() != len(points) * width:
            shape = tuple(right.shape)
            raise _wrong(name, f"has {width} equations at {len(points)} points, and right-hand sides {shape}")
        right = right.reshape(len(points), width)
        if bad := _not_finite(right):
            raise _wrong(name, f"has right-hand sides that are no numbers, at the points {bad}")
        return right

    def refuse_points(self, sets: Sets) -> None:
        """Name the points at which a term has no value, after a step that was given up."""
        for name, term in self.terms.items():
            for where, (points, _) in sets.items():
                if bad := _not_finite(term(self.net, points.clone()).reshape(len(points), -1)):
                    of = "" if where == name else f" of {where!r}, where all terms are evaluated"
                    raise _wrong(
                        name, f"is not finite at the points {bad}{of}", "Leave them out, or mend the term there"
                    )


def _not_finite(rows: Tensor) -> list[int]:
    """The first rows that hold NaN or inf, five at most."""
    found: list[int] = (~rows.isfinite()).any(1).nonzero().flatten()[:5].tolist()
    return found


def _wrong(
    name: str, why: str, remedy: str = 'Pass {"name": (points, right-hand sides)} with a set for every term'
) -> CompileError:
    return CompileError(f"the term {name!r} {why}", remedy)
