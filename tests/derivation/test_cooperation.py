"""Coalitions: Theorem 3, Eq. 14, 15 and 40, Corollary 7, each against a computation of its own."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sympy import Inverse
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.algebra.elimination import cooperative_gains
from gtddp_compile.algebra.numeric import evaluate
from gtddp_compile.algebra.symbols import SymmetricSymbol, is_equal
from gtddp_compile.lowering import cooperation
from gtddp_compile.options import Options
from gtddp_compile.passes.p01_normalise import FRONT_ENDS, normalise
from gtddp_compile.passes.p06_derive import derive
from gtddp_compile.runtime.compiler import build_graph
from support.cases import gates, sums
from support.compared import LOSS, optimizer, trained
from support.matrix import CURVATURES
from support.networks import Case, make


def rows(model: nn.Module, names: list[str], x: Tensor, y: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Homogeneous inputs and per-sample output gradients of linear layers, by hooks."""
    xs: dict[str, Tensor] = {}
    gs: dict[str, Tensor] = {}
    handles = []
    for name in names:
        layer = model.get_submodule(name)

        def hook(module: nn.Module, inputs: Any, output: Tensor, name: str = name) -> None:
            value = inputs[0].detach()
            xs[name] = value if module.bias is None else torch.cat([value, torch.ones_like(value[:, :1])], 1)
            output.register_hook(lambda g: gs.__setitem__(name, g.detach() * len(g)))

        handles.append(layer.register_forward_hook(hook))
    F.cross_entropy(model(x), y).backward()
    for handle in handles:
        handle.remove()
    return [xs[name] for name in names], [gs[name] for name in names]


def moved(case: Case, names: list[str], curvature: str, **options: Any) -> list[Tensor]:
    """``[δW, δb]`` of every named layer after one step of the cooperative base method (no feedback)."""
    model = copy.deepcopy(case.model)
    x, y = case.batch(0, 9)
    opt = compile_optimizer(model, x, loss=LOSS, curvature=curvature, feedback=False, cooperative=True, **options)
    opt.step(x, y)
    found = []
    for name in names:
        new, old = model.get_submodule(name), case.model.get_submodule(name)
        parts = [new.weight.detach() - old.weight.detach()]  # type: ignore[operator]
        if new.bias is not None:
            parts.append((new.bias.detach() - old.bias.detach()).unsqueeze(1))  # type: ignore[operator]
        found.append(torch.cat(parts, 1))
    return found


# --- Theorem 3 --------------------------------------------------------------------------------------------------------


def test_theorem_3_equations_16_to_18() -> None:
    """Two players, as the paper writes it: ``k̃ = -vec(B̃⁻¹ (Q_u + B_uv B_vv⁻¹ Q_v A_vv⁻ᵀ A_uvᵀ) Ã⁻ᵀ)``, and Eq. 53."""
    case, damping, lr = gates(2), 0.04, 0.3
    (xu, xv), (gu, gv) = rows(case.model, ["p0", "p1"], *case.batch(0, 9))
    count = len(xu)
    root = damping**0.5

    def damped(matrix: Tensor) -> Tensor:
        return matrix + root * torch.eye(len(matrix), dtype=matrix.dtype)

    auu, avv, auv = damped(xu.T @ xu / count), damped(xv.T @ xv / count), xu.T @ xv / count
    buu, bvv, buv = damped(gu.T @ gu / count), damped(gv.T @ gv / count), gu.T @ gv / count
    qu, qv = gu.T @ xu / count, gv.T @ xv / count
    inv = torch.linalg.inv
    a_u, b_u = inv(auu - auv @ inv(avv) @ auv.T), inv(buu - buv @ inv(bvv) @ buv.T)
    a_v, b_v = inv(avv - auv.T @ inv(auu) @ auv), inv(bvv - buv.T @ inv(buu) @ buv)
    k_u = -b_u @ (qu + buv @ inv(bvv) @ qv @ inv(avv).T @ auv.T) @ a_u.T
    k_v = -(b_v @ qv @ a_v.T + b_v @ buv.T @ inv(buu) @ qu @ (a_v @ auv.T @ inv(auu)).T)
    found = moved(case, ["p0", "p1"], "kfac", lr=lr, damping=damping, pi=False)
    torch.testing.assert_close(found, [lr * k_u, lr * k_v], rtol=0, atol=1e-10)
    assert (found[0] + lr * inv(buu) @ qu @ inv(auu)).abs().max() > 1e-4  # the cross terms matter here


@pytest.mark.parametrize("players", [2, 3, 4])
def test_theorem_3_for_any_number_of_players(players: int) -> None:
    """``M⁻¹_uv = [A⁻¹]_uv ⊗ [B⁻¹]_uv`` of the joint factors (Eq. 50, 52), built as one dense matrix."""
    case, damping, lr = gates(players), 0.04, 0.3
    names = [f"p{k}" for k in range(players)]
    xs, gs = rows(case.model, names, *case.batch(0, 9))
    joint_x, joint_g = torch.cat(xs, 1), torch.cat(gs, 1)
    count, eye = len(joint_x), torch.eye
    a = torch.linalg.inv(joint_x.T @ joint_x / count + damping**0.5 * eye(joint_x.shape[1]).double())
    b = torch.linalg.inv(joint_g.T @ joint_g / count + damping**0.5 * eye(joint_g.shape[1]).double())
    widths, heights = [x.shape[1] for x in xs], [g.shape[1] for g in gs]
    a_blocks = [row.split(widths, 1) for row in a.split(widths)]
    b_blocks = [row.split(heights, 1) for row in b.split(heights)]
    matrix = torch.cat([torch.cat([torch.kron(b_blocks[p][q], a_blocks[p][q]) for q in range(players)], 1)
                        for p in range(players)])  # fmt: skip
    gradient = torch.cat([(g.T @ x / count).flatten() for g, x in zip(gs, xs, strict=True)])
    expected = (-lr * matrix @ gradient).split([w * h for w, h in zip(widths, heights, strict=True)])
    found = moved(case, names, "kfac", lr=lr, damping=damping, pi=False)
    torch.testing.assert_close([part.flatten() for part in found], list(expected), rtol=0, atol=1e-10)
    assert torch.linalg.eigvalsh(matrix).min() > 0


def test_ekfac_rescales_in_the_joint_eigenbasis() -> None:
    case, damping, lr, names = gates(3), 0.04, 0.3, ["p0", "p1", "p2"]
    xs, gs = rows(case.model, names, *case.batch(0, 9))
    joint_x, joint_g = torch.cat(xs, 1), torch.cat(gs, 1)
    count = len(joint_x)
    basis = torch.kron(*(torch.linalg.eigh(f.T @ f / count)[1] for f in (joint_g, joint_x)))
    gamma = torch.einsum("bm,bn->bmn", joint_g, joint_x).flatten(1)
    inverse = basis @ torch.diag(1 / ((gamma @ basis).square().mean(0) + damping)) @ basis.T
    gradient = torch.block_diag(*(g.T @ x / count for g, x in zip(gs, xs, strict=True)))
    whole = (-lr * inverse @ gradient.flatten()).reshape(gradient.shape)
    heights, widths = [g.shape[1] for g in gs], [x.shape[1] for x in xs]
    expected = [row.split(widths, 1)[k] for k, row in enumerate(whole.split(heights))]
    torch.testing.assert_close(moved(case, names, "ekfac", lr=lr, damping=damping), expected, rtol=0, atol=1e-9)


# --- Eq. 14, 15, 40 ---------------------------------------------------------------------------------------------------


def coalition(players: int) -> Any:
    graph = build_graph(gates(players).model.float(), (torch.zeros(2, 4),), Options())
    (stage,) = (stage for stage in derive(graph).stages if len(stage.controls) == players)
    return stage.derivation


def test_equations_14_15_and_40() -> None:
    """Two players: the derived elimination is the paper's ``k̃, K̃, Ĩ, H̃``, symbol by symbol."""
    d = coalition(2)
    gains = {str(e.symbol): e.expression for e in cooperative_gains(d)}
    q = {pair: e.symbol for pair, e in d.q_uu.items()}
    for (u, v), letters in {("u", "v"): ("k", "K"), ("v", "u"): ("I", "H")}.items():
        schur = q[u, u] - q[u, v] * Inverse(q[v, v]) * q[v, u]
        complement = SymmetricSymbol(f"Q~_{u}", *q[u, u].shape)
        assert is_equal(gains[str(gains[f"Q~_{u}"])], schur)
        for letter, own, other in (
            (letters[0], d.q_u[u].symbol, d.q_u[v].symbol),
            (letters[1], d.q_ux[u, "x"].symbol, d.q_ux[v, "x"].symbol),
        ):
            expected = -Inverse(complement) * (own - q[u, v] * Inverse(q[v, v]) * other)
            assert is_equal(gains[f"{letter}~_{u}"], expected)


@pytest.mark.parametrize("players", [2, 3, 4])
def test_elimination_equals_the_joint_solve(players: int) -> None:
    """Numbers for every symbol: the gains player by player are the rows of ``-Q_ûû⁻¹ [Q_û Q_ûx]``."""
    d = coalition(players)
    source, us = torch.Generator().manual_seed(0), d.pattern.controls

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=source)

    size = {p: 2 + k for k, p in enumerate(us)}
    total = sum(size.values())
    half = normal(total, total)
    whole = half @ half.T + torch.eye(total)
    blocks = [row.split(list(size.values()), 1) for row in whole.split(list(size.values()))]
    values: dict[Any, Tensor] = {d.q_uu[p, q].symbol: blocks[i][j] for i, p in enumerate(us) for j, q in enumerate(us)}
    values |= {d.q_u[p].symbol: normal(size[p], 1) for p in us}
    values |= {d.q_ux[p, i].symbol: normal(size[p], 3) for p in us for i in d.pattern.inputs}
    dimensions: dict[object, int] = {d.q_u[p].symbol.shape[0]: size[p] for p in us}
    for equation in cooperative_gains(d):
        values[equation.symbol] = evaluate(equation.expression, values, dimensions)
    named = {str(symbol): value for symbol, value in values.items()}
    right = torch.cat([values[d.q_u[p].symbol] for p in us])
    expected = -torch.linalg.solve(whole, right)
    found = torch.cat([named[f"{'I' if players == 2 and p == us[1] else 'k'}~_{p}"] for p in us])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    right = torch.cat([values[d.q_ux[p, "x"].symbol] for p in us])
    found = torch.cat([named[f"{'H' if players == 2 and p == us[1] else 'K'}~_{p}"] for p in us])
    torch.testing.assert_close(found, -torch.linalg.solve(whole, right), rtol=0, atol=1e-9)


# --- Corollary 7 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("players", [2, 3, 4])
def test_corollary_7(players: int) -> None:
    """Eq. 24, 56-58: the joint matrix of players with the same rows, direction by direction, inverted densely.

    ``Q̃_uu`` is the Schur complement of ``γ I + λ 1 1ᵀ``; for two players ``λ̃ = γ λ / (γ + λ)`` and the gain is the
    paper's ``-Q̃⁻¹ (Q_u - Q_uv Q_vv⁻¹ Q_v)`` with ``Q_uv = -U Λ Uᵀ``.
    """
    case, damping, lr = sums(players), 0.04, 0.3
    names = [f"p{k}" for k in range(players)]
    (x, *_), (g, *_) = rows(case.model, names, *case.batch(0, 9))
    count = len(x)
    basis = torch.kron(*(torch.linalg.eigh(f.T @ f / count)[1] for f in (g, x)))
    values = (torch.einsum("bm,bn->bmn", g, x).flatten(1) @ basis).square().mean(0)
    gradient = basis.T @ (g.T @ x / count).flatten()
    ones = torch.ones(players, players, dtype=torch.float64)
    change = torch.empty_like(values)
    for i, value in enumerate(values):
        joint = torch.linalg.inv(damping * torch.eye(players).double() + value * ones)
        if players == 2:
            shrunk = damping * value / (damping + value)
            torch.testing.assert_close(1 / joint[0, 0], damping + shrunk)
        # two negative off-diagonal factors multiply (docs/theory.md#contradictions, item 3)
        change[i] = (joint.abs() @ gradient[i].expand(players, 1).double())[0, 0]
    if players == 2:
        q_uu, q_uv = values + damping, -values
        paper = (gradient - q_uv / q_uu * gradient) / (damping + damping * values / (damping + values))
        torch.testing.assert_close(change, paper, rtol=1e-12, atol=1e-12)
    expected = (-lr * basis @ change).reshape(g.shape[1], x.shape[1])
    found = moved(case, names, "ekfac", lr=lr, damping=damping)
    for part in found:
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("damping", [1e-3, 0.1])
def test_corollary_7_with_the_gain_of_equation_16_is_gradient_descent(damping: float) -> None:
    """Two players have one gradient, so the ``λ`` of each cancels that of the other: ``k̃ = -∇/γ`` in every direction.

    ``(q + λ/(γ+λ) q) / (γ + λ̃) = q/γ``. A rescaling alone, ``Q̃⁻¹ q``, is within a factor of two of it.
    """
    case, lr = sums(2), 0.3
    model, (x, y) = copy.deepcopy(case.model), case.batch(0, 9)
    F.cross_entropy(model(x), y).backward()
    for name, found in zip(("p0", "p1"), moved(case, ["p0", "p1"], "ekfac", lr=lr, damping=damping), strict=True):
        layer = model.get_submodule(name)
        gradient = torch.cat([layer.weight.grad, layer.bias.grad.unsqueeze(1)], 1)  # type: ignore[operator,union-attr]
        torch.testing.assert_close(found, -lr / damping * gradient, rtol=1e-9, atol=1e-9)
    q, value = torch.tensor(1.0).double(), torch.logspace(-6, 6, 25).double()
    rescaled = q / (damping + damping * value / (damping + value))
    assert (rescaled <= q / damping).all() and (rescaled >= q / (2 * damping)).all()


def test_the_compiler_recognises_corollary_7() -> None:
    def blocks(case: Case, curvature: str = "ekfac", **options: Any) -> list[tuple[str, int]]:
        opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature=curvature, **options)
        return [(block.kind, len(block.players)) for stage in opt.program.derived.stages for block in stage.blocks]

    assert ("shared", 3) in blocks(sums(3)) and ("shared", 2) in blocks(sums(2, "conv"))
    assert ("kronecker", 3) in blocks(sums(3), "kfac")
    assert ("kronecker", 2) in blocks(gates(2))
    off: list[dict[str, Any]] = [{"cooperative": False}, {"feedback": False}, {"schedule": "sequential"}]
    for options in off:
        case = sums(2)
        assert all(count == 1 for _, count in blocks(case, **options))
    opt = compile_optimizer(sums(2).model, sums(2).batch(0)[0], loss=LOSS, curvature="ekfac")
    assert "Corollary 7" in opt.program.cost() and "cooperative gains" in opt.program.derivation()


# --- what is not allowed ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("curvature", ["kfac", "ekfac", "foof"])
@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_equation_23_as_printed_has_no_cross_terms(backend: str, curvature: str) -> None:
    """It adds up the players' own curvatures: a coalition that the curvature couples is refused, others run."""
    case = sums(2)
    options: dict[str, Any] = {"curvature": curvature, "backend": backend, "coupling": "block", "recursion": "printed"}
    with pytest.raises(CompileError, match=r"module 'p0', operation linear, at .*p0, p1.*recursion='substituted'"):
        trained(case, **options)
    trained(case, **options, cooperative=False)


def test_joint_factors_are_bounded_and_their_size_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three layers of three inputs, two of them with a bias, and three outputs each."""
    case = gates(3)
    opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature="kfac")
    opt.step(*case.batch(0))
    state = opt.state[case.model.get_parameter("p0.weight")]
    assert [state[name].shape[-1] for name in ("factor_x", "factor_g")] == [11, 9]
    notes = " ".join(line.split("│")[-2].strip() for line in opt.program.cost().splitlines() if "│" in line)
    assert "joint factors 11 x 11 and 9 x 9" in notes
    monkeypatch.setattr(cooperation, "LARGEST_JOINT", 10)
    with pytest.raises(CompileError, match=r"module 'p0', operation linear, at .*p0, p1, p2.*11 x 11.*cooperative=Fal"):
        compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature="kfac")
    compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature="kfac", cooperative=False)


# --- sums are what they are, whatever they are written as: Corollary 7's players are found by their derivative ---


SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nested": lambda a, b, c: a + (b + c),
    "torch.add": lambda a, b, c: torch.add(torch.add(input=a, other=b, alpha=1), c),
    "method": lambda a, b, c: c.add(b).add(other=a),
    "in place": lambda a, b, c: a.add_(b).add_(c),
    "of a list": lambda a, b, c: sum([a, b, c]),
    "beside a constant": lambda a, b, c: 1.0 + a + torch.zeros_like(b) + (b + c) - 1,
    "differences": lambda a, b, c: -(0 - a - torch.add(b, c)),
    "reshaped": lambda a, b, c: a.view(a.size(0), -1) + b.flatten(1) + c,
}


def added(add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
    """Three layers of one input."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        return net.head(torch.tanh(add(net.p0(x), net.p1(x), net.p2(x))))

    return Case(make(forward, stem=(4, 3), head=(4, 3), **{f"p{k}": (3, 4) for k in range(3)}), (4,))


@pytest.mark.parametrize("spelling", SUMS)
def test_corollary_7_whatever_the_sum_is_written_as(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = trained(added(lambda a, b, c: a + b + c), steps=2, **CURVATURES["ekfac"])
    for front_end in FRONT_ENDS[:2]:
        monkeypatch.setattr(normalise, "__defaults__", ((front_end,),))
        found = trained(added(SUMS[spelling]), steps=2, **CURVATURES["ekfac"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_corollary_7_for_other_derivatives_or_readers() -> None:
    """A difference, a player counted twice, and one whose output is read elsewhere too."""
    others: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda a, b, c: a + b - c, lambda a, b, c: a + b + c + c, lambda a, b, c: (a + b + c) * c,
    ]  # fmt: skip
    for add in others:
        _, opt = optimizer(added(add), curvature="ekfac")
        kinds = [(block.kind, len(block.players)) for block in opt.program.derived.stages[1].blocks]
        assert kinds == [("shared", 2), ("kronecker", 1)]
