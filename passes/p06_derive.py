"""Derive: every gain and value recursion of a stage, by sympy, once per stage pattern.

Takes the control graph; guarantees a :class:`StageDerivation` for every stage. Nothing here knows a residual network:
the augmented dynamics' block Jacobians are read off the graph (which blocks are zero or identity *by construction*),
and Eq. 5, 6 and 25 are applied to them as block matrices. The residual gain ``G`` (Eq. 9), its recursions (Eq. 10),
the fork (Eq. 11, 12) and Eq. 26-31 are what comes out.

Departure from the paper: bundles. Values of the same role at a stage (all that wait, say) are one block symbol, so that
a DenseNet stage with 40 waiting values has the pattern, and the derivation, of a residual stage.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from sympy import Identity, Inverse, MatAdd, MatMul, MatrixExpr, MatrixSymbol, Symbol, ZeroMatrix
from sympy.matrices.expressions.blockmatrix import BlockMatrix

from gtddp_compile.algebra.derivation import Equation, Recursion, StageDerivation
from gtddp_compile.algebra.paths import StageEntries, stage_entries
from gtddp_compile.algebra.pattern import IDENTITY, Entry, StagePattern
from gtddp_compile.algebra.symbols import SymmetricSymbol, block_product
from gtddp_compile.graph import ControlGraph, Stage, grouped
from gtddp_compile.lowering.cooperation import BY_PARAMETER, MetricRules, metric_blocks
from gtddp_compile.lowering.plan import MetricBlock

STATE_LETTERS, WAITING_LETTERS, CONTROL_LETTERS = ("x", "y", "z"), ("r", "s"), ("u", "v", "w")


@dataclass(frozen=True)
class DerivedStage:
    """A stage with its pattern, which values each symbol stands for, and the derivation."""

    index: int
    inputs: dict[str, tuple[str, ...]]
    outputs: dict[str, tuple[str, ...]]
    controls: dict[str, str]
    blocks: tuple[MetricBlock, ...]
    derivation: StageDerivation

    @property
    def legend(self) -> list[tuple[str, tuple[str, ...]]]:
        """Symbols, a prime for outputs, and what they stand for."""
        outputs = [(f"{name}'", values) for name, values in self.outputs.items()]
        return [*self.inputs.items(), *outputs, *((name, (player,)) for name, player in self.controls.items())]


@dataclass(frozen=True)
class Derived:
    """The control graph with the derivation of every stage."""

    graph: ControlGraph
    recursion: Recursion
    stages: tuple[DerivedStage, ...]

    @property
    def patterns(self) -> tuple[StagePattern, ...]:
        """The distinct patterns, in order of first appearance."""
        return tuple(dict.fromkeys(stage.derivation.pattern for stage in self.stages))


def derive(graph: ControlGraph, recursion: Recursion = "levenberg", rules: MetricRules = BY_PARAMETER) -> Derived:
    """Find each stage's pattern and derive it (cached over all networks of the process).

    ``rules`` says which players of a stage are coupled by the curvature itself.
    """
    return Derived(graph, recursion, tuple(_derive_stage(graph, stage, recursion, rules) for stage in graph.stages))


def _derive_stage(graph: ControlGraph, stage: Stage, recursion: Recursion, rules: MetricRules) -> DerivedStage:
    live_after = cut_after(graph, stage)
    entries = stage_entries(graph, stage, live_after)
    inputs, outputs = _bundles(stage, entries, live_after)
    inputs, outputs = _merge_waiting(stage, inputs), _merge_waiting(stage, outputs)
    in_names = _names(inputs, lambda bundle: any(value in entries.read_by_players for value in bundle))
    in_names = in_names or {STATE_LETTERS[0]: ()}  # nothing differentiable waits (word indices): a state of size zero
    out_names = _names(outputs, lambda bundle: any(entries.control[value] for value in bundle))
    controls = dict(zip(_letters(CONTROL_LETTERS, len(stage.players)), stage.players, strict=True))
    after = out_names.values()
    pattern = StagePattern(
        inputs=tuple(in_names),
        outputs=tuple(out_names),
        controls=tuple(controls),
        state=tuple(tuple(_block(entries.state, outs, ins) for ins in in_names.values()) for outs in after),
        control=tuple(tuple(_block(entries.control, outs, (p,)) for p in controls.values()) for outs in after),
    )
    blocks = metric_blocks(graph, stage, rules)
    letter = {player: name for name, player in controls.items()}
    coupled = frozenset(
        (letter[a.name], letter[b.name]) for block in blocks for a in block.players for b in block.players if a != b
    )
    derivation = derive_pattern(pattern, recursion, coupled)
    return DerivedStage(stage.index, in_names, out_names, controls, blocks, derivation)


def cut_after(graph: ControlGraph, stage: Stage) -> tuple[str, ...]:
    """The cut after a stage: the next stage's, or the network's outputs."""
    if stage.index + 1 < len(graph.stages):
        return graph.stages[stage.index + 1].live
    return tuple(value.name for value in graph.values if value.dies == len(graph.stages))


def _bundles(
    stage: Stage, entries: StageEntries, live_after: tuple[str, ...]
) -> tuple[list[tuple[str, ...]], list[tuple[str, ...]]]:
    """Values of the cuts before and after a stage, by role.

    New values are alike if their rows are. Values before the stage are alike if the new ones read them alike and they
    go on alike, or end alike; those that go on are the same bundle on both sides, so that its block is the identity
    (all features of a dense block, however many). One that reaches a new value by an identity block is alone.
    """
    on = {v for v in stage.live if entries.state.get(v) == {v: IDENTITY} and not entries.control[v]}
    fresh = (o for o in live_after if o not in on)
    alike = grouped(fresh, lambda o: (tuple(entries.state[o].items()), tuple(entries.control[o].items())))
    new = [tuple(names) for names in alike.values()]
    readers = [(n, o) for n, bundle in enumerate(new) for o in bundle]

    def role(name: str) -> Hashable:
        column = tuple((n, entries.state[o][name]) for n, o in readers if name in entries.state[o])
        alone = name if any(entry.identity for _, entry in column) else ""
        return (name in on, name in entries.read_by_players, column, alone)

    inputs = [tuple(names) for names in grouped(stage.live, role).values()]
    first = {bundle[0]: bundle for bundle in (*new, *(bundle for bundle in inputs if bundle[0] in on))}
    return inputs, [first[name] for name in live_after if name in first]


def _merge_waiting(stage: Stage, bundles: list[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """One bundle for all values that merely wait; its block in the Jacobian is the identity."""
    waiting = set(stage.carried) - set(stage.consumed)
    waits = tuple(name for bundle in bundles for name in bundle if name in waiting)
    rest = [tuple(name for name in bundle if name not in waiting) for bundle in bundles]
    return [bundle for bundle in rest if bundle] + ([waits] if waits else [])


def _letters(letters: tuple[str, ...], count: int) -> tuple[str, ...]:
    if count <= len(letters):
        return letters[:count]
    return tuple(f"{letters[0]}{i + 1}" for i in range(count))


def _names(bundles: list[tuple[str, ...]], acted: Callable[[tuple[str, ...]], bool]) -> dict[str, tuple[str, ...]]:
    """``x`` for what players read or write, ``r`` for the rest (Eq. 8's names)."""
    states = [bundle for bundle in bundles if acted(bundle)]
    others = [bundle for bundle in bundles if not acted(bundle)]
    named = dict(zip(_letters(STATE_LETTERS, len(states)), states, strict=True))
    named.update(zip(_letters(WAITING_LETTERS, len(others)), others, strict=True))
    return named


def _block(entries: dict[str, dict[str, Entry]], outs: tuple[str, ...], ins: tuple[str, ...]) -> Entry:
    """The block of two bundles: exact if it is zero or one entry or an identity between equals, else dense."""
    if outs == ins and all(entries[o] == {o: Entry(identity=1)} for o in outs):
        return Entry(identity=1)
    found = [entries[o].get(i, Entry()) for o in outs for i in ins]
    if all(entry.is_zero for entry in found):
        return Entry()
    return found[0] if len(found) == 1 else Entry(dense=True)


# --- the algebra ------------------------------------------------------------------------------------------------------


class _Symbols(NamedTuple):
    """What a stage's algebra is written in: sizes, block Jacobians, the value function after it, ``ℓ_u`` and ``M``."""

    size: dict[str, Symbol]
    dimension: dict[str, Symbol]
    state: dict[tuple[str, str], MatrixExpr]
    control: dict[tuple[str, str], MatrixExpr]
    value_x: dict[str, MatrixSymbol]
    value_xx: dict[tuple[str, str], MatrixExpr]
    linear: dict[str, MatrixSymbol]
    curvature: dict[tuple[str, str], MatrixExpr]


class _Expansion(NamedTuple):
    """The stage's expansion to second order (Eq. 5, 27)."""

    x: dict[str, Equation]
    u: dict[str, Equation]
    uu: dict[tuple[str, str], Equation]
    ux: dict[tuple[str, str], Equation]
    xx: dict[tuple[str, str], Equation]


class _Joint(NamedTuple):
    """The coalition's controls side by side (Eq. 13)."""

    u: Equation
    uu: Equation
    ux: dict[str, Equation]


@cache
def derive_pattern(
    pattern: StagePattern, recursion: Recursion = "levenberg", coupled: frozenset[tuple[str, str]] = frozenset()
) -> StageDerivation:
    """Eq. 5, 6 and 25 applied to a stage's block Jacobians.

    ``recursion`` decides ``Q_uu``: ``f_uᵀ V_xx f_u + M`` ("levenberg"), or ``M`` alone (Table 1 read literally), and,
    for "printed", the sign with which ``Q_xu Q_uu⁻¹ Q_ux`` enters the value Hessian (Eq. 21-23 print a plus).
    ``coupled`` are the pairs of controls that ``M`` itself couples (Theorem 3).
    """
    known = _symbols(pattern, coupled)
    q = _expansion(pattern, recursion, known)
    joint = _joint(pattern, q, known.size)
    k, gains = _gains(pattern, joint)
    new_x, new_xx = _recursion(pattern, recursion, q, joint, k, gains)
    change = {i: MatrixSymbol(f"delta_{i}", known.size[i], 1) for i in pattern.inputs}
    moved = {p: MatrixSymbol(f"delta_{p}", known.dimension[p], 1) for p in pattern.controls}
    rolled = _rolled_out(pattern, known, change, moved, k, gains)
    return StageDerivation(pattern, recursion, *known[2:], *q, *joint, k, gains, new_x, new_xx, change, moved, rolled)


def _symbols(pattern: StagePattern, coupled: frozenset[tuple[str, str]]) -> _Symbols:
    size = {name: Symbol(f"n_{name}", integer=True, positive=True) for name in pattern.inputs}
    size_after = {name: Symbol(f"n'_{name}", integer=True, positive=True) for name in pattern.outputs}
    dimension = {name: Symbol(f"m_{name}", integer=True, positive=True) for name in pattern.controls}
    _unify_identities(pattern, size, size_after)
    return _Symbols(
        size,
        dimension,
        state=_jacobian(pattern.state, pattern.outputs, pattern.inputs, size_after, size, "f"),
        control=_jacobian(pattern.control, pattern.outputs, pattern.controls, size_after, dimension, "f"),
        value_x={o: MatrixSymbol(f"V'_{o}", size_after[o], 1) for o in pattern.outputs},
        value_xx=_hessian_symbols("V'", pattern.outputs, size_after),
        linear={p: MatrixSymbol(f"l_{p}", dimension[p], 1) for p in pattern.controls},
        curvature=_curvature(pattern.controls, dimension, coupled),
    )


def _expansion(pattern: StagePattern, recursion: Recursion, known: _Symbols) -> _Expansion:
    ins, us, outs, size, dimension = pattern.inputs, pattern.controls, pattern.outputs, known.size, known.dimension
    f_x, f_u = (
        [[f[o, name] for name in names] for o in outs] for f, names in ((known.state, ins), (known.control, us))
    )
    f_xt, f_ut = ([[block.T for block in column] for column in zip(*f, strict=True)] for f in (f_x, f_u))
    v_x, v_xx = [[known.value_x[o]] for o in outs], [[known.value_xx[a, b] for b in outs] for a in outs]
    q_x, q_u = block_product(f_xt, v_x), block_product(f_ut, v_x)
    through_u = block_product(f_ut, v_xx)
    q_uu, q_ux = block_product(through_u, f_u), block_product(through_u, f_x)
    q_xx = block_product(block_product(f_xt, v_xx), f_x)

    def stage_hessian(a: int, b: int) -> MatrixExpr:
        nothing = ZeroMatrix(dimension[us[a]], dimension[us[b]])
        through = q_uu[a][b] if recursion == "levenberg" else nothing
        return (through + known.curvature.get((us[a], us[b]), nothing)).doit()

    def square(p: str, q: str, sizes: dict[str, Symbol]) -> MatrixSymbol:
        return (SymmetricSymbol if p == q else MatrixSymbol)(f"Q_{p}{q}", sizes[p], sizes[q])

    pairs = [(a, p, b, q) for a, p in enumerate(us) for b, q in enumerate(us)]
    return _Expansion(
        x={i: Equation(MatrixSymbol(f"Q_{i}", size[i], 1), q_x[n][0], "5, 27a") for n, i in enumerate(ins)},
        u={
            p: Equation(MatrixSymbol(f"Q_{p}", dimension[p], 1), (q_u[n][0] + known.linear[p]).doit(), "5, 27b")
            for n, p in enumerate(us)
        },
        uu={(p, q): Equation(square(p, q, dimension), stage_hessian(a, b), "5, 27c") for a, p, b, q in pairs},
        ux={
            (p, i): Equation(MatrixSymbol(f"Q_{p}{i}", dimension[p], size[i]), q_ux[a][b], "5, 27d")
            for a, p in enumerate(us)
            for b, i in enumerate(ins)
        },
        xx={
            (i, j): Equation(square(i, j, size), q_xx[a][b].expand().doit(), "5, 27e")
            for a, i in enumerate(ins)
            for b, j in enumerate(ins[a:], start=a)
        },
    )


def _rolled_out(
    pattern: StagePattern,
    known: _Symbols,
    change: dict[str, MatrixSymbol],
    moved: dict[str, MatrixSymbol],
    k: Equation,
    gains: dict[str, Equation],
) -> dict[str, Equation]:
    """The policy on the linearised dynamics: ``δû = k + K̂ δx̂`` and ``δx̂' = f̂_x δx̂ + f̂_u δû`` (Eq. 28; Eq. 3 for one
    trajectory). ``"u"``: the coalition's controls side by side.
    """
    us = pattern.controls
    symbol = moved[us[0]] if len(us) == 1 else MatrixSymbol("delta_û", *k.symbol.shape)
    policy = MatAdd(k.symbol, *(MatMul(gains[i].symbol, change[i]) for i in pattern.inputs)).doit()
    found = {"u": Equation(symbol, policy, "4, 28")}
    for o in pattern.outputs:
        parts = [MatMul(known.state[o, i], change[i]) for i in pattern.inputs]
        parts += [MatMul(known.control[o, p], moved[p]) for p in us]
        total = MatAdd(*parts).doit()
        found[o] = Equation(
            MatrixSymbol(f"delta'_{o}", known.state[o, pattern.inputs[0]].shape[0], 1), total, "linearised"
        )
    return found


def _curvature(
    controls: tuple[str, ...], dimension: dict[str, Symbol], coupled: frozenset[tuple[str, str]]
) -> dict[tuple[str, str], MatrixExpr]:
    """Symbols of ``M``: ``M_u`` on the diagonal, ``M_uv`` where the curvature has cross terms."""
    found: dict[tuple[str, str], MatrixExpr] = {}
    for n, p in enumerate(controls):
        found[p, p] = SymmetricSymbol(f"M_{p}", dimension[p], dimension[p])
        for q in controls[n + 1 :]:
            if (p, q) in coupled:
                found[p, q] = MatrixSymbol(f"M_{p}{q}", dimension[p], dimension[q])
                found[q, p] = found[p, q].T
    return found


def _unify_identities(pattern: StagePattern, size: dict[str, Symbol], size_after: dict[str, Symbol]) -> None:
    """An identity block makes two sizes one."""
    for o, row in zip(pattern.outputs, pattern.state, strict=True):
        for i, entry in zip(pattern.inputs, row, strict=True):
            if entry.identity:
                old, new = size[i], size_after[o]
                for name in size:
                    size[name] = new if size[name] == old else size[name]
                for name in size_after:
                    size_after[name] = new if size_after[name] == old else size_after[name]


def _jacobian(
    entries: tuple[tuple[Entry, ...], ...],
    rows: tuple[str, ...],
    columns: tuple[str, ...],
    row_size: dict[str, Symbol],
    column_size: dict[str, Symbol],
    letter: str,
) -> dict[tuple[str, str], MatrixExpr]:
    blocks = {}
    for o, row in zip(rows, entries, strict=True):
        for i, entry in zip(columns, row, strict=True):
            shape = (row_size[o], column_size[i])
            block: MatrixExpr = ZeroMatrix(*shape)
            if entry.identity:
                block = block + entry.identity * Identity(shape[0])
            if entry.dense:
                # f_x is what the paper calls the block of the state itself; others say whose Jacobian they are.
                name = f"{letter}_{i}" if o == rows[0] else f"{letter}^{o}_{i}"
                block = block + MatrixSymbol(name, *shape)
            blocks[o, i] = block.doit()
    return blocks


def _hessian_symbols(letter: str, names: tuple[str, ...], size: dict[str, Symbol]) -> dict[tuple[str, str], MatrixExpr]:
    found: dict[tuple[str, str], MatrixExpr] = {}
    for a, first in enumerate(names):
        for second in names[a:]:
            kind = SymmetricSymbol if first == second else MatrixSymbol
            found[first, second] = kind(f"{letter}_{first}{second}", size[first], size[second])
            if first != second:
                found[second, first] = found[first, second].T
    return found


def _joint(pattern: StagePattern, q: _Expansion, size: dict[str, Symbol]) -> _Joint:
    """The coalition's controls side by side: they minimise jointly (Eq. 13)."""
    us = pattern.controls
    if len(us) == 1:
        return _Joint(q.u[us[0]], q.uu[us[0], us[0]], {i: q.ux[us[0], i] for i in pattern.inputs})
    total = sum(q.u[p].symbol.shape[0] for p in us)
    hessian = BlockMatrix([[q.uu[p, other].symbol for other in us] for p in us])
    return _Joint(
        Equation(MatrixSymbol("Q_û", total, 1), BlockMatrix([[q.u[p].symbol] for p in us]), "13"),
        Equation(SymmetricSymbol("Q_ûû", total, total), hessian, "13"),
        {
            i: Equation(MatrixSymbol(f"Q_û{i}", total, size[i]), BlockMatrix([[q.ux[p, i].symbol] for p in us]), "13")
            for i in pattern.inputs
        },
    )


def _gains(pattern: StagePattern, joint: _Joint) -> tuple[Equation, dict[str, Equation]]:
    """``k = -Q_uu⁻¹ Q_u`` and one feedback gain a value: ``K`` on the state, ``G`` on what waits (Eq. 4, 9, 28)."""
    inverse = Inverse(joint.uu.symbol)
    k = Equation(MatrixSymbol("k", *joint.u.symbol.shape), MatMul(-1, inverse, joint.u.symbol).doit(), "4")
    names = {"x": ("K", "4"), "r": ("G", "9, 28")}
    gains = {}
    for i in pattern.inputs:
        name, source = names.get(i, (f"K_{i}", "28"))
        gain = MatMul(-1, inverse, joint.ux[i].symbol).doit()
        gains[i] = Equation(MatrixSymbol(name, *joint.ux[i].symbol.shape), gain, source)
    return k, gains


def _recursion(
    pattern: StagePattern, recursion: Recursion, q: _Expansion, joint: _Joint, k: Equation, gains: dict[str, Equation]
) -> tuple[dict[str, Equation], dict[tuple[str, str], Equation]]:
    """``V_x = Q_x + Q_xu k``, ``V_xx = Q_xx + Q_xu K`` (Eq. 6, 29, 30)."""
    sign = -1 if recursion == "printed" else 1
    q_xu = {i: joint.ux[i].symbol.T for i in pattern.inputs}
    new_x, new_xx = {}, {}
    for i in pattern.inputs:
        value = MatAdd(q.x[i].symbol, MatMul(q_xu[i], k.symbol)).doit()
        new_x[i] = Equation(MatrixSymbol(f"V_{i}", *q.x[i].symbol.shape), value, "6, 29")
    for a, i in enumerate(pattern.inputs):
        for j in pattern.inputs[a:]:
            kind = SymmetricSymbol if i == j else MatrixSymbol
            new_xx[i, j] = Equation(
                kind(f"V_{i}{j}", *q.xx[i, j].symbol.shape),
                MatAdd(q.xx[i, j].symbol, MatMul(sign, q_xu[i], gains[j].symbol)).doit(),
                "21-23, sign as printed" if recursion == "printed" else "6, 10, 30",
            )
    return new_x, new_xx
