"""The coalition's gains by block elimination: Eq. 14, 15 and 40 for any number of players.

``Q_ûû δû = -(Q_û + Q_ûx δx)`` is solved for one player at a time by eliminating the others in turn (Schur complements,
Eq. 38). For two players the result is Eq. 40: ``k̃, K̃, G̃`` of the one, ``Ĩ, H̃, L̃`` of the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from sympy import Inverse, MatrixExpr, MatrixSymbol

from gtddp_compile.algebra.derivation import Equation, StageDerivation
from gtddp_compile.algebra.symbols import SymmetricSymbol

FIRST = {"k": "k", "x": "K", "r": "G"}
SECOND = {"k": "I", "x": "H", "r": "L"}


@cache
def cooperative_gains(d: StageDerivation) -> tuple[Equation, ...]:
    """Gains of every player of a coalition, each with the complements it rests on; empty for a stage of one player.

    Symbols: ``Q~_u`` the last complement of player u (Eq. 14's ``Q̃_uu``), ``Q_vw.u`` a block once ``u`` is gone,
    gains ``k~_u``, ``K~_u``, ``G~_u`` (for the second of two players the paper's ``I~``, ``H~``, ``L~``).
    """
    players = d.pattern.controls
    if len(players) < 2:
        return ()
    found: list[Equation] = []
    for target in players:
        matrix = {pair: equation.symbol for pair, equation in d.q_uu.items() if not equation.expression.is_ZeroMatrix}
        sides: dict[str, dict[str, MatrixExpr]] = {"k": {p: d.q_u[p].symbol for p in players}}
        for i in d.pattern.inputs:
            sides[i] = {p: d.q_ux[p, i].symbol for p in players}
        gone: tuple[str, ...] = ()
        for pivot in players:
            if pivot != target:
                gone = (*gone, pivot)
                left = tuple(p for p in players if p not in gone)
                matrix, sides, equations = _eliminate(matrix, sides, pivot, left, ".".join(gone))
                found += equations
        found += _solved(matrix[target, target], sides, target, players)
    return tuple({str(equation.symbol): equation for equation in found}.values())


def _eliminate(
    matrix: Mapping[tuple[str, str], MatrixExpr],
    sides: Mapping[str, Mapping[str, MatrixExpr]],
    pivot: str,
    left: tuple[str, ...],
    mark: str,
) -> tuple[dict[tuple[str, str], MatrixExpr], dict[str, dict[str, MatrixExpr]], list[Equation]]:
    """``Q_ab ← Q_ab - Q_ap Q_pp⁻¹ Q_pb`` and the same for the right-hand sides; a block that is zero stays out."""
    inverse, equations = Inverse(matrix[pivot, pivot]), []
    new: dict[tuple[str, str], MatrixExpr] = {}
    for p in left:
        for q in left:
            if (p, pivot) not in matrix or (pivot, q) not in matrix:
                if (p, q) in matrix:
                    new[p, q] = matrix[p, q]
                continue
            removed = matrix[p, pivot] * inverse * matrix[pivot, q]
            shape = (matrix[p, pivot].shape[0], matrix[pivot, q].shape[1])
            kind = SymmetricSymbol if p == q else MatrixSymbol
            new[p, q] = kind(f"Q_{p}{q}.{mark}", *shape)
            before = matrix.get((p, q))
            equations.append(Equation(new[p, q], -removed if before is None else before - removed, "38"))
    reduced: dict[str, dict[str, MatrixExpr]] = {}
    for name, side in sides.items():
        reduced[name] = {}
        for p in left:
            reduced[name][p] = side[p]
            if (p, pivot) in matrix:
                reduced[name][p] = side[p] - matrix[p, pivot] * inverse * side[pivot]
    return new, reduced, equations


def _solved(
    last: MatrixExpr, sides: Mapping[str, Mapping[str, MatrixExpr]], target: str, players: tuple[str, ...]
) -> list[Equation]:
    """``-Q̃⁻¹`` times what the right-hand sides have become."""
    complement = SymmetricSymbol(f"Q~_{target}", *last.shape)
    letters = SECOND if len(players) == 2 and target == players[1] else FIRST
    found = [Equation(complement, last, "14, 15")]
    for name, side in sides.items():
        symbol = MatrixSymbol(f"{letters.get(name, f'K_{name}')}~_{target}", *side[target].shape)
        found.append(Equation(symbol, -Inverse(complement) * side[target], "40"))
    return found
