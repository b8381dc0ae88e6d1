"""The paper's propositions, each against an independent computation: explicit matrices, ``torch.func``, sympy.

Explicit matrices here are those of `oracle.jacobians`: ``torch.func.jacrev`` of stages written by hand. Proposition 2's
equations 11 and 12, and Eq. 9 and 10 with them, are proved symbolically in test_derivation.py; here is their meaning.
"""

from typing import Any

import pytest
import torch
from sympy import Identity, Inverse, MatrixSymbol, ZeroMatrix
from torch import Tensor, nn

from gtddp_compile.algebra.numeric import evaluate
from gtddp_compile.algebra.symbols import is_equal
from support import networks
from support.compared import optimizer
from support.derived import opened, residual_stages
from support.networks import Case
from support.oracle import Stage, State, flat, jacobians, pack, trajectory, unpack
from support.oracle_cases import parameters

Params = dict[str, Tensor]


def one_sample(case: Case) -> tuple[list[Stage], Params, Tensor, Tensor]:
    """Stages, parameters and a batch of one: the propositions are about one trajectory."""
    x, y = case.batch(2, 1)
    return case.stages["asap"], parameters(case.model), x, y


def gradient_at_the_end(states: list[State], y: Tensor) -> Tensor:
    return torch.func.grad(lambda out: nn.functional.cross_entropy(out, y))(states[-1][0]).flatten()


def compiled(case: Case, x: Tensor, y: Tensor, **options: Any) -> Params:
    """Parameters after one step of the compiled optimizer."""
    options = {"curvature": "sgd", "rollout": "nonlinear", "feedback_clip": None, **options}
    model, opt = optimizer(case, len(x), **options)
    opt.step(x, y)
    return parameters(model)


def ddp(
    stages: list[Stage], params: Params, x: Tensor, v_x: Tensor, v_xx: Tensor, lr: float, sign: float
) -> tuple[Params, list[Tensor], list[Tensor]]:
    """One step by explicit matrices with ``Q_uu = I/η``; ``sign`` of ``Q_xu Q_uu⁻¹ Q_ux`` in the recursion (Eq. 6: -1).

    Returns the new parameters, ``V_xx`` and ``q_uᵀ Q_uu⁻¹ q_u`` (with ``V_xx' = z zᵀ``) of every stage.
    """
    states = trajectory(stages, params, (x,))
    gains: list[tuple[Tensor, Tensor]] = []
    hessians, inner = [v_xx], []
    for t in reversed(range(len(stages))):
        f_x, f_u = jacobians(stages[t], states[t], params)
        q_ux = f_u.T @ v_xx @ f_x
        inner.insert(0, lr * torch.einsum("um,mn,un->", f_u.T, v_xx, f_u.T))
        k, feedback = -lr * f_u.T @ v_x, -lr * q_ux
        gains.insert(0, (k, feedback))
        v_x, v_xx = f_x.T @ v_x + q_ux.T @ k, f_x.T @ v_xx @ f_x + sign * lr * q_ux.T @ q_ux
        hessians.insert(0, v_xx)
    new, moved = dict(params), (x,)
    for t, stage in enumerate(stages):
        k, feedback = gains[t]
        u = pack(params, stage.names) + k + feedback @ (flat(moved) - flat(states[t])).flatten()
        new |= unpack(u, params, stage.names)
        moved = stage.step(moved, new)
    return new, hessians, inner


def assert_same(found: Params, expected: Params) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-10)


# --- Proposition 1 ----------------------------------------------------------------------------------------------------


def test_proposition_1_symbolically() -> None:
    """``Q_ux = 0``: ``V_x`` is back-propagation's, the gain stage-wise Newton's."""
    d = residual_stages(1)[0].derivation  # fork and merge at one stage; the state is one value
    gone = {e.symbol: ZeroMatrix(*e.symbol.shape) for e in d.joint_ux.values()}
    for name, equation in d.new_value_x.items():
        assert is_equal(equation.expression.subs(gone).doit(), d.q_x[name].symbol)
    for pair, equation in d.new_value_xx.items():
        gains = {e.symbol: e.expression for e in d.gains.values()}
        assert is_equal(equation.expression.subs(gains).doit().subs(gone).doit(), d.q_xx[pair].symbol)
    expected = -Inverse(d.joint_uu.symbol) * d.control["x", "u"].T * d.value_x["x"]
    decayless = opened(d, d.k.expression).subs({d.linear["u"]: 0 * d.linear["u"]}).doit()
    assert is_equal(decayless, expected)
    assert is_equal(d.state["x", "x"].T * d.value_x["x"], d.q_x["x"].expression)


def test_proposition_1_is_gradient_descent() -> None:
    """``Q_uu = I/η``, ``Q_ux = 0``: the update is ``-η ∂J/∂u`` by ``torch.func.grad`` on the module itself."""
    case = networks.mlp()
    x, y = case.batch(0)
    u = parameters(case.model)

    def loss(u: Params) -> Tensor:
        return nn.functional.cross_entropy(torch.func.functional_call(case.model, u, (x,)), y)

    gradient = torch.func.grad(loss)(u)
    found = compiled(case, x, y, curvature="sgd", lr=0.3, feedback=False)
    assert_same(found, {name: u[name] - 0.3 * gradient[name] for name in u})


# --- Proposition 2 ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_proposition_2_is_the_minimum_over_all_layers_beside_the_shortcut(depth: int) -> None:
    """``V_x`` and ``V_xx`` at the fork are those of one joint minimisation over every control beside the shortcut.

    Independent of any recursion: a Schur complement of the Hessian in (state at the fork, all controls).
    """
    torch.manual_seed(depth)
    n, controls = 3, 2
    a = [torch.randn(n, n).double() for _ in range(depth)]
    b = [torch.randn(n, controls).double() for _ in range(depth)]
    weights = [torch.eye(controls).double() * (1 + t) for t in range(depth)]
    root = torch.randn(n, n).double()
    v_x, v_xx = torch.randn(n, 1).double(), root @ root.T

    def after(x: Tensor, u: Tensor) -> Tensor:
        """``x_{tf+1} = x_r + f(…)``, linear dynamics beside an identity shortcut."""
        y = x
        for t in range(depth):
            y = a[t] @ y + b[t] @ u[t]
        return x + y

    def value(both: Tensor) -> Tensor:
        x, u = both[:n], both[n:].reshape(depth, controls)
        end = after(x, u)
        own = sum(u[t] @ weights[t] @ u[t] for t in range(depth)) / 2
        return v_x[:, 0] @ end + end @ v_xx @ end / 2 + own

    zero = torch.zeros(n + depth * controls).double()
    g, h = torch.func.grad(value)(zero), torch.func.hessian(value)(zero)
    schur = h[:n, n:] @ torch.linalg.inv(h[n:, n:])
    expected_x, expected_xx = g[:n] - schur @ g[n:], h[:n, :n] - schur @ h[n:, :n]
    found_x, found_xx = swept(residual_stages(depth), a, b, weights, v_x, v_xx)
    torch.testing.assert_close(found_x[:, 0], expected_x, rtol=0, atol=1e-10)
    torch.testing.assert_close(found_xx, expected_xx, rtol=0, atol=1e-10)


def swept(
    stages: list[Any], a: list[Tensor], b: list[Tensor], weights: list[Tensor], v_x: Tensor, v_xx: Tensor
) -> tuple[Tensor, Tensor]:
    """The derived equations of the stages ts … tf, evaluated with explicit matrices."""
    value_x: dict[str, Tensor] = {"x": v_x}
    value_xx: dict[tuple[str, str], Tensor] = {("x", "x"): v_xx}
    for t in reversed(range(len(stages))):
        d, values = stages[t].derivation, {}
        size = {s: a[t].shape[0] for e in d.q_x.values() for s in e.symbol.shape[:1]}
        size |= {e.symbol.shape[0]: b[t].shape[1] for e in d.q_u.values()}
        for o in d.pattern.outputs:
            values[d.value_x[o]] = value_x[o]
            values |= {d.value_xx[o, p]: value_xx.get((o, p), value_xx.get((p, o))) for p in d.pattern.outputs}
        (layer,) = d.state["x", "x"].atoms(MatrixSymbol)  # with one layer beside the shortcut, a term beside I
        values[layer] = a[t]
        values[d.control["x", "u"]] = b[t]
        values |= dict.fromkeys(d.curvature.values(), weights[t])  # one player, one block
        values[d.linear["u"]] = torch.zeros(b[t].shape[1], 1).double()
        for equation in d.equations():
            values[equation.symbol] = evaluate(equation.expression, values, size)
        value_x = {i: values[e.symbol] for i, e in d.new_value_x.items()}
        value_xx = {pair: values[e.symbol] for pair, e in d.new_value_xx.items()}
        value_xx |= {(j, i): block.T for (i, j), block in value_xx.items() if i != j}
    return value_x["x"], value_xx["x", "x"]


# --- Propositions 5 and 6 ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recursion", ["substituted", "printed"])
def test_proposition_5(recursion: str) -> None:
    """Rank one at the end is rank one everywhere, and the factor's radicand is ``1 - q_uᵀ Q_uu⁻¹ q_u``.

    The program's update with that factor is the one by explicit ``V_xx``; "printed" is the same with Eq. 21's plus.
    """
    case, lr = networks.mlp(), 0.4
    sign = {"substituted": -1.0, "printed": 1.0}[recursion]
    stages, params, x, y = one_sample(case)
    states = trajectory(stages, params, (x,))
    g = gradient_at_the_end(states, y)
    new, hessians, inner = ddp(stages, params, x, g, torch.outer(g, g), lr, sign)
    z = g
    for t in reversed(range(len(stages))):
        f_x, f_u = jacobians(stages[t], states[t], params)
        torch.testing.assert_close(inner[t], lr * (f_u.T @ z).square().sum())
        assert float(inner[t]) < 1
        z = f_x.T @ z * (1 + sign * lr * (f_u.T @ z).square().sum()).sqrt()
        torch.testing.assert_close(hessians[t], torch.outer(z, z), rtol=0, atol=1e-12)
    assert_same(compiled(case, x, y, lr=lr, coupling="block", recursion=recursion, terminal="gradient"), new)


def test_equation_21_prints_the_wrong_sign() -> None:
    """A Schur complement shrinks: with Eq. 6 ``V_xx ≤ Q_xx``; the printed factor gives more than ``Q_xx``."""
    case, lr = networks.mlp(), 0.4
    stages, params, x, y = one_sample(case)
    g = gradient_at_the_end(trajectory(stages, params, (x,)), y)
    derived, printed = (ddp(stages, params, x, g, torch.outer(g, g), lr, sign)[1] for sign in (-1.0, 1.0))
    for t in range(len(stages) - 1, -1, -1):
        f_x = jacobians(stages[t], trajectory(stages, params, (x,))[t], params)[0]
        assert torch.linalg.eigvalsh(f_x.T @ derived[t + 1] @ f_x - derived[t]).min() > -1e-12
        assert torch.linalg.eigvalsh(f_x.T @ printed[t + 1] @ f_x - printed[t]).max() < 1e-12
    assert (derived[1] - printed[1]).abs().max() > 1e-4


@pytest.mark.parametrize("network", ["residual", "projection"])
def test_proposition_6(network: str) -> None:
    """Beside a shortcut of either kind the blocks of ``V_xx`` are outer products, with one radicand for all of them.

    At the projection's coalition the joint ``Q_uu`` is block-diagonal, so that the radicand is Eq. 23's with a minus.
    """
    case, lr = networks.CASES[network](), 0.4
    stages, params, x, y = one_sample(case)
    states = trajectory(stages, params, (x,))
    g = gradient_at_the_end(states, y)
    new, hessians, _ = ddp(stages, params, x, g, torch.outer(g, g), lr, -1.0)
    z: State = (g[None],)
    for t in reversed(range(len(stages))):
        f_x, f_u = jacobians(stages[t], states[t], params)
        players = [f_u[:, part].T @ flat(z)[0] for part in columns_of_players(stages[t], params)]
        radicand = 1 - sum(lr * q.square().sum() for q in players)
        pulled = f_x.T @ flat(z)[0] * radicand.sqrt()
        z = tuple(part[None] for part in pulled.split([value[0].numel() for value in states[t]]))
        ends = torch.tensor([0] + [value[0].numel() for value in states[t]]).cumsum(0).tolist()
        for i, first in enumerate(z):
            for j, second in enumerate(z):
                block = hessians[t][ends[i] : ends[i + 1], ends[j] : ends[j + 1]]
                torch.testing.assert_close(block, torch.outer(first[0], second[0]), rtol=0, atol=1e-12)
    assert any(len(state) == 2 for state in states)  # there is a waiting value
    assert_same(compiled(case, x, y, lr=lr, coupling="block", recursion="substituted", terminal="gradient"), new)


def columns_of_players(stage: Stage, params: Params) -> list[slice]:
    """Columns of ``f_u`` that belong to each player of the stage."""
    found: dict[str, list[int]] = {}
    offset = 0
    for name in stage.names:
        found.setdefault(name.rpartition(".")[0], []).extend(range(offset, offset + params[name].numel()))
        offset += params[name].numel()
    return [slice(index[0], index[-1] + 1) for index in found.values()]


def test_proposition_6_beside_an_identity_shortcut_the_waiting_factor_only_shrinks() -> None:
    """Eq. 22: ``z_xr = √radicand z_xr'``: its block of the Jacobian is the identity (proved: the derived blocks)."""
    d = residual_stages(3)[1].derivation
    size = d.state["r", "r"].shape[0]
    assert d.state["r", "r"] == Identity(size) and d.control["r", "u"] == ZeroMatrix(*d.control["r", "u"].shape)


def test_equation_23_needs_the_joint_inverse() -> None:
    """``q_ûᵀ Q_ûû⁻¹ q_û`` is the sum over players only where ``Q_uv = 0``; the exact mode has ``Q_uv ≠ 0``."""
    case, lr = networks.projection(), 0.4
    stages, params, x, y = one_sample(case)
    states = trajectory(stages, params, (x,))
    z = gradient_at_the_end(states, y)
    for t in (3, 2):
        z = jacobians(stages[t], states[t], params)[0].T @ z
    f_u = jacobians(stages[1], states[1], params)[1]
    parts = columns_of_players(stages[1], params)
    q = f_u.T @ z
    own = torch.eye(len(q)).double() / lr
    for coupled in (False, True):
        q_uu = own + (torch.outer(q, q) if coupled else 0)
        joint = q @ torch.linalg.solve(q_uu, q)
        separate = sum(q[p] @ torch.linalg.solve(q_uu[p, p], q[p]) for p in parts)
        assert (abs(float(joint - separate)) < 1e-12) == (not coupled)


@pytest.mark.parametrize("rank", [2, 3])
def test_propositions_5_and_6_at_any_rank(rank: int) -> None:
    """``V_xx' = Z Zᵀ`` with r columns: ``Z = q_x R``, ``R Rᵀ = I - q_uᵀ Q_uu⁻¹ q_u``, through a coalition too."""
    torch.manual_seed(rank)
    stages, params, x, _ = one_sample(networks.projection())
    states = trajectory(stages, params, (x,))
    z = 0.5 * torch.randn(states[-1][0].numel(), rank).double()
    _, hessians, _ = ddp(stages, params, x, torch.zeros(len(z)).double(), z @ z.T, 0.4, -1.0)
    for t in reversed(range(len(stages))):
        f_x, f_u = jacobians(stages[t], states[t], params)
        q_u = f_u.T @ z
        z = f_x.T @ z @ torch.linalg.cholesky(torch.eye(rank).double() - 0.4 * q_u.T @ q_u)
        torch.testing.assert_close(hessians[t], z @ z.T, rtol=0, atol=1e-12)


def test_the_second_jacobian_before_section_5_is_of_the_controls() -> None:
    """The list prints ``f_xᵀ V`` twice; the second, for the parameters, is ``f_uᵀ V``: gradients by ``torch.func``."""
    case = networks.mlp()
    stages, params, x, y = one_sample(case)
    states = trajectory(stages, params, (x,))
    v_x = gradient_at_the_end(states, y)
    f_x, f_u = jacobians(stages[-1], states[-2], params)
    u = pack(params, stages[-1].names)

    def loss(u: Tensor) -> Tensor:
        return nn.functional.cross_entropy(stages[-1].step(states[-2], unpack(u, params, stages[-1].names))[0], y)

    torch.testing.assert_close(torch.func.grad(loss)(u), f_u.T @ v_x)
    assert (f_x.T @ v_x).shape != u.shape


# --- the Kronecker statements: what the printed equations say of block matrices ---------------------------------------


def kronecker_pair() -> tuple[Tensor, Tensor, slice, slice]:
    """Second moments of two players' inputs and output gradients, over 12 samples, and where each player's part is."""
    torch.manual_seed(0)
    x, g = torch.randn(12, 4).double(), torch.randn(12, 4).double()
    return x.T @ x / 12, g.T @ g / 12, slice(0, 2), slice(2, 4)


def test_theorem_3_is_not_the_inverse_of_the_blockwise_matrix() -> None:
    """Eq. 16 is the block of ``A⁻¹ ⊗ B⁻¹``; the blocks of the inverse of ``(± A_pq ⊗ B_pq)`` are different ones."""
    a, b, u, v = kronecker_pair()
    tilde_a, tilde_b = torch.linalg.inv(a)[u, u], torch.linalg.inv(b)[u, u]
    schur = [m[u, u] - m[u, v] @ torch.linalg.inv(m[v, v]) @ m[v, u] for m in (a, b)]
    torch.testing.assert_close(torch.linalg.inv(tilde_a), schur[0])
    torch.testing.assert_close(torch.linalg.inv(tilde_b), schur[1])
    theorem = torch.kron(tilde_a, tilde_b)
    for sign in (1, -1):
        rows = [torch.cat([torch.kron(a[p, q], b[p, q]) * (1 if p == q else sign) for q in (u, v)], 1) for p in (u, v)]
        exact = torch.linalg.inv(torch.cat(rows))[:4, :4]
        assert (exact - theorem).abs().max() > 1e-2


def test_theorem_3_needs_the_minus_sign() -> None:
    """Eq. 53 is Eq. 54's last line only with ``Q_uv = -A_uv ⊗ B_uv``: two negative off-diagonals multiply."""
    a, b, u, v = kronecker_pair()
    q_u, q_v = torch.randn(2, 2).double(), torch.randn(2, 2).double()  # gradients, outputs × inputs
    a_i, b_i = torch.linalg.inv(a), torch.linalg.inv(b)
    from_52 = -(b_i[u, u] @ q_u @ a_i[u, u].T + b_i[u, v] @ q_v @ a_i[u, v].T)

    def vec(m: Tensor) -> Tensor:
        return m.T.reshape(-1)

    own_v = torch.linalg.solve(torch.kron(a[v, v], b[v, v]), vec(q_v))
    found = [-torch.kron(a_i[u, u], b_i[u, u]) @ (vec(q_u) - sign * torch.kron(a[u, v], b[u, v]) @ own_v)
             for sign in (-1.0, 1.0)]  # fmt: skip
    torch.testing.assert_close(found[0], vec(from_52), rtol=0, atol=1e-10)
    assert (found[1] - vec(from_52)).abs().max() > 1e-2


def test_equation_51_repeats_a_schur_complement() -> None:
    """The vv block of ``A⁻¹`` is the inverse of ``A_vv - A_vu A_uu⁻¹ A_uv`` (Eq. 17), not of Eq. 51's last line."""
    a, _, u, v = kronecker_pair()
    right = a[v, v] - a[v, u] @ torch.linalg.inv(a[u, u]) @ a[u, v]
    printed = a[v, v] - a[u, v] @ torch.linalg.inv(a[v, v]) @ a[v, u]
    torch.testing.assert_close(torch.linalg.inv(a)[v, v], torch.linalg.inv(right))
    assert (torch.linalg.inv(a)[v, v] - torch.linalg.inv(printed)).abs().max() > 1e-2


def test_corollary_7_bounds_the_step() -> None:
    """``λ̃ = γλ/(γ+λ) < γ``, so that ``Q̃_uu`` lies between γ and 2γ however large λ is; Eq. 57 by explicit matrices."""
    a, b, u, _ = kronecker_pair()
    damping = 0.1
    q = torch.kron(100 * a[u, u], b[u, u])
    identity = torch.eye(len(q)).double()
    eigenvalues, vectors = torch.linalg.eigh(q)
    by_57 = damping * identity + q - q @ torch.linalg.inv(q + damping * identity) @ q
    by_24 = vectors @ torch.diag(damping * eigenvalues / (damping + eigenvalues) + damping) @ vectors.T
    torch.testing.assert_close(by_57, by_24, rtol=0, atol=1e-10)
    found = torch.linalg.eigvalsh(by_57)
    assert eigenvalues.max() > 10 * damping and found.min() > damping and found.max() < 2 * damping
