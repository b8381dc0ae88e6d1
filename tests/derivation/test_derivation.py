"""The derived gains and recursions are the paper's: Eq. 9-12 and 26-31, proved by sympy on the pass's own output."""

from __future__ import annotations

import pytest
import torch
from sympy import Identity, Inverse, MatrixExpr, MatrixSymbol, Symbol
from torch import nn

from gtddp_compile.algebra.derivation import equation_text
from gtddp_compile.algebra.symbols import is_equal
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import DerivedStage, derive
from gtddp_compile.passes.p07_collapse import collapse
from gtddp_compile.runtime.compiler import build_graph
from support.derived import Residual, opened, residual_stages

N, M = Symbol("n", integer=True, positive=True), Symbol("m", integer=True, positive=True)


def square(e: MatrixExpr, stage: int) -> MatrixExpr:
    """All states of one size; every stage's own symbols marked with its index (next stage's for primed ones)."""
    sizes = {s: (M if str(s).startswith("m_") else N) for s in e.free_symbols if not isinstance(s, MatrixSymbol)}
    e = e.subs(sizes)
    renamed = {}
    for s in e.free_symbols:
        if isinstance(s, MatrixSymbol):
            name = str(s).replace("'", "")
            renamed[s] = type(s)(f"{name}@{stage + 1 if chr(39) in str(s) else stage}", *s.shape)
    return e.subs(renamed)


def symbol(name: str, stage: int, *shape: Symbol) -> MatrixSymbol:
    return MatrixSymbol(f"{name}@{stage}", *shape)


def test_residual_gain_is_equation_9() -> None:
    d = residual_stages(3)[1].derivation
    v_xr = d.value_xx["x", "r"]
    f_u = d.control["x", "u"]
    assert d.gains["r"].symbol.name == "G"
    assert is_equal(opened(d, d.gains["r"].expression), -Inverse(d.q_uu["u", "u"].symbol) * f_u.T * v_xr)


def test_gains_without_shortcut_are_unchanged() -> None:
    """Eq. 9: "k and K are the same open and feedback gains computed in the absence of shortcut"."""
    graph = build_graph(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 2)), (torch.zeros(2, 3),), Options()
    )
    plain = derive(graph).stages[1].derivation
    beside = residual_stages(3)[1].derivation
    for name in ("k", "K"):
        a = plain.k if name == "k" else plain.gains["x"]
        c = beside.k if name == "k" else beside.gains["x"]
        assert is_equal(square(opened(plain, a.expression), 1), square(opened(beside, c.expression), 1))


@pytest.mark.parametrize("position", [1, 2])
def test_recursion_beside_the_shortcut_is_equation_10(position: int) -> None:
    d = residual_stages(4)[position].derivation
    q_uu, gain, residual = d.q_uu["u", "u"].symbol, d.gains["x"].expression, d.gains["r"].expression
    v_xr, v_rr, f_x = d.value_xx["x", "r"], d.value_xx["r", "r"], d.state["x", "x"]
    found_xr = opened(d, d.new_value_xx["x", "r"].expression)
    found_rr = opened(d, d.new_value_xx["r", "r"].expression)
    assert is_equal(found_xr, f_x.T * v_xr - opened(d, gain.T * q_uu * residual))
    assert is_equal(found_rr, v_rr - opened(d, residual.T * q_uu * residual))


def test_terminal_conditions_of_equation_10() -> None:
    """At tf the merge makes ``V_xxr`` and ``V_xrxr`` start from ``V_xx`` at tf+1: the Jacobian in ``x_r`` is
    ``I`` (26a).
    """
    d = residual_stages(3)[-1].derivation
    assert d.state["x", "r"] == Identity(d.value_x["x"].shape[0])
    v_xx = d.value_xx["x", "x"]
    f_x, f_u, q_uu = d.state["x", "x"], d.control["x", "u"], d.q_uu["u", "u"].symbol
    assert is_equal(d.q_xx["x", "r"].expression, f_x.T * v_xx)
    assert is_equal(d.q_xx["r", "r"].expression, v_xx)
    found = opened(d, d.new_value_xx["r", "r"].expression)
    assert is_equal(found, v_xx - v_xx * f_u * Inverse(q_uu) * f_u.T * v_xx)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_value_at_the_fork_is_equations_11_and_12(depth: int) -> None:
    """Proposition 2, for any number of layers beside the shortcut (with one, fork and merge are one stage)."""
    stages = residual_stages(depth)
    v_r, v_rr, sum_x, sum_xx = _along_the_shortcut(stages)
    fork = stages[0].derivation
    q_uu = square(fork.q_uu["u", "u"].symbol, 0)
    k = Inverse(q_uu) * square(fork.q_u["u"].expression, 0) * -1
    f_x, f_u = square(fork.state["x", "x"], 0), square(fork.control["x", "u"], 0)
    v_x, v_xx, v_xr = (square(e, 0) for e in (fork.value_x["x"], fork.value_xx["x", "x"], fork.value_xx["x", "r"]))
    gain, residual = -Inverse(q_uu) * f_u.T * v_xx * f_x, -Inverse(q_uu) * f_u.T * v_xr
    feedforward_x = f_x.T * v_x - gain.T * q_uu * k
    feedforward_xx = f_x.T * v_xx * f_x - gain.T * q_uu * gain
    mixed = f_x.T * v_xr - gain.T * q_uu * residual
    known = {square(fork.value_x["r"], 0): v_r, square(fork.value_xx["r", "r"], 0): v_rr}
    found_x = square(opened(fork, fork.new_value_x["x"].expression), 0).subs(known).doit()
    found_xx = square(opened(fork, fork.new_value_xx["x", "x"].expression), 0).subs(known).doit()
    end = len(stages)
    v_end_xx = square(stages[-1].derivation.value_xx["x", "x"], end - 1)
    v_end = square(stages[-1].derivation.value_x["x"], end - 1)
    assert is_equal(found_x, feedforward_x + v_end - sum_x - residual.T * q_uu * k)
    assert is_equal(found_xx, feedforward_xx + v_end_xx - sum_xx - residual.T * q_uu * residual + mixed + mixed.T)


def _along_the_shortcut(stages: list[DerivedStage]) -> tuple[MatrixExpr, MatrixExpr, MatrixExpr, MatrixExpr]:
    """``V_r`` and ``V_rr`` after the fork by chaining the derived recursions, and the sums of Eq. 11 and 12
    over (ts, tf].
    """
    v_r = v_rr = None
    total_x, total_xx = [], []
    for index in range(len(stages) - 1, 0, -1):
        d = stages[index].derivation
        new_r = square(opened(d, d.new_value_x["r"].expression), index)
        new_rr = square(opened(d, d.new_value_xx["r", "r"].expression), index)
        if v_r is not None:
            known = {square(d.value_x["r"], index): v_r, square(d.value_xx["r", "r"], index): v_rr}
            new_r, new_rr = new_r.subs(known).doit(), new_rr.subs(known).doit()
        v_r, v_rr = new_r, new_rr
        q_uu, k = d.q_uu["u", "u"].symbol, d.k.expression
        gain = d.gains["r"].expression
        total_x.append(square(opened(d, gain.T * q_uu * k), index))
        total_xx.append(square(opened(d, gain.T * q_uu * gain), index))
    sum_x, sum_xx = total_x[0], total_xx[0]
    for e_x, e_xx in zip(total_x[1:], total_xx[1:], strict=True):
        sum_x, sum_xx = sum_x + e_x, sum_xx + e_xx
    return v_r, v_rr, sum_x, sum_xx


def test_patterns_are_shared_between_layers() -> None:
    """Deriving costs the same for many layers: the number of patterns does not grow."""
    counts = []
    for depth in (4, 9):
        graph = build_graph(Residual(depth), (torch.zeros(2, 3),), Options())
        counts.append(len(derive(graph).patterns))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("recursion", ["levenberg", "substituted", "printed"])
def test_collapse_is_proved_on_every_pattern(recursion: str) -> None:
    """Each claim is an exact identity; a wrong one must not pass."""
    graph = build_graph(Residual(3), (torch.zeros(2, 3),), Options())
    derived = derive(graph, recursion)  # type: ignore[arg-type]
    form = collapse(derived, "full" if recursion == "levenberg" else "block")
    assert all(is_equal(c.left, c.right, c.rules) for c in form.claims)
    assert not is_equal(form.claims[0].left, 2 * form.claims[0].right)


def test_printed_recursion_of_one_player() -> None:
    """Eq. 21-23's plus with the one ``Q_uu`` there is (``K = -Q_uu⁻¹ Q_ux``). The own curvatures of Eq. 23 are for
    players that the metric couples.
    """
    graph = build_graph(Residual(2), (torch.zeros(2, 3),), Options(coupling="block", recursion="printed"))
    stages = [stage.derivation for stage in derive(graph, "printed").stages]
    assert not any(d.own for d in stages)
    last = stages[-1].new_value_xx["x", "x"]
    assert (equation_text(last), last.source) == ("V_xx = Q_xx - Q_ux.T*K", "21-23, sign as printed")


class Dense(nn.Module):
    """Dense blocks of ``layers`` layers, each of which reads every feature of its block; a transition after each."""

    def __init__(self, blocks: int, layers: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleList(nn.Sequential(nn.Linear(3 + 2 * n, 4), nn.Tanh(), nn.Linear(4, 2)) for n in range(layers))
            for _ in range(blocks)
        )
        self.transitions = nn.ModuleList(nn.Linear(3 + 2 * layers, 3) for _ in range(blocks))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scores, (batch, 3)."""
        for block, transition in zip(self.blocks, self.transitions, strict=True):
            features = [x]
            for layer in block:
                features.append(layer(torch.cat(features, 1)))
            x = torch.tanh(transition(torch.cat(features, 1)))
        return x


def test_features_of_a_dense_block_are_one_bundle() -> None:
    """Patterns repeat from layer to layer and from block to block: more of either derives nothing new."""
    small, large = (
        derive(build_graph(Dense(blocks, layers), (torch.zeros(2, 3),), Options()))
        for blocks, layers in ((2, 4), (3, 16))
    )
    assert set(small.patterns) == set(large.patterns) and len(large.stages) == 3 * (2 * 16 + 1)
    assert max(len(pattern.inputs) for pattern in large.patterns) == 2
    widest = max(large.stages, key=lambda stage: max(map(len, stage.inputs.values())))
    (bundle,) = (bundle for bundle in widest.inputs.values() if len(bundle) > 1)
    assert len(bundle) == 16 and bundle in widest.outputs.values()
    collapse(large, coupling="full", feedback=True)


def test_equal_as_polynomials_whatever_the_order_of_terms() -> None:
    n = Symbol("n", integer=True, positive=True)
    a, b = (MatrixSymbol(name, n, n) for name in "AB")
    assert is_equal((a + b) * (a - b), a * a - b * b + b * a - a * b)
    assert not is_equal(a * b, b * a)
    assert not is_equal(2 * a * b, a * b)
    assert is_equal(a * b * a, b, [((a, b, a), b)])
