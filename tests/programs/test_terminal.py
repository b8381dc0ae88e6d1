"""Richer terminal Hessians: the generated program equals the derivation executed with explicit ``H_i``, to 1e-9."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import CompileError, Geometric, MonteCarlo, compile_optimizer
from support import networks
from support.compared import assert_equal, optimizer, trained
from support.compared import flat as parameters_of
from support.matrix import FORMS
from support.networks import Case
from support.oracle import flat, pack, sample_gradients, terminal_gradient, trajectory, unpack


def with_classes(size: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes of `residual`'s batches as rows of ones and zeros."""
    x, y = networks.residual().batch(seed, size)
    return x, nn.functional.one_hot(y, 3).double()


@pytest.mark.parametrize(("coupling", "share"), [("full", 6), (2, 2)])
def test_the_aim_is_a_multiple_of_the_loss(coupling: Any, share: int) -> None:
    """One layer and sgd: ``δu = -η γᵀ w``, ``w = (B κ diag(φ) + (B/b) Γ)⁻¹ κ φ`` in groups of b, by autograd."""
    model = networks.make(lambda net, x: net.a(x), a=(4, 3))
    x, y = networks.mlp().batch(0, 6)
    parameters, lr, kappa, start = list(model.parameters()), 0.7, 1.5 + 2.0 / share, parameters_of(model)
    phi = nn.functional.cross_entropy(model(x), y, reduction="none")
    gamma = torch.stack(
        [torch.cat([g.flatten() for g in torch.autograd.grad(one, parameters, retain_graph=True)]) for one in phi]
    )
    change = torch.zeros(len(gamma[0])).double()
    for rows in torch.arange(6).split(share):
        aim, mine = kappa * phi.detach()[rows], gamma[rows]
        change -= lr * mine.T @ torch.linalg.solve(torch.diag(6 * aim) + 6 / share * lr * mine @ mine.T, aim)
    options: dict[str, Any] = {"curvature": "sgd", "lr": lr, "coupling": coupling, "terminal": Geometric(1.5, 2.0)}
    compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options).step(x, y)
    torch.testing.assert_close(parameters_of(model) - start, change, rtol=0, atol=1e-12)


def test_geometric_by_name_and_aims_that_are_refused() -> None:
    found = [trained(networks.residual(), curvature="sgd", lr=0.5, terminal=t)
             for t in ("geometric", Geometric(), Geometric(2.0))]  # fmt: skip
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    for options in ({"aim": 0.0}, {"aim": float("inf")}, {"own": -1.0}, {"aim": float("nan")}, {"half": -1.0}):
        with pytest.raises(CompileError, match="Give aim > 0, the others >= 0, all finite"):
            Geometric(**options)


@pytest.mark.parametrize("form", ["joint", "joint groups", "substituted"])
@pytest.mark.parametrize(
    "loss", [nn.MSELoss(), nn.BCEWithLogitsLoss(reduction="sum"), nn.HuberLoss(delta=0.3)], ids=["mse", "bce", "huber"]
)
def test_losses(loss: nn.Module, form: str) -> None:
    case = replace(networks.residual(), loss=loss, draw=lambda seed, size: with_classes(size, seed))
    assert_equal(case, terminal="ggn", curvature="sgd", lr=0.1, **FORMS[form])


def test_radicands_are_clipped_by_eigenvalues_and_counted() -> None:
    """Large steps with ``Q_uu = M``: some, not all, eigenvalues of a sample's radicand are negative."""
    options = {"terminal": "ggn", "curvature": "sgd", "lr": 5.0, **FORMS["substituted"]}
    run = assert_equal(networks.residual(), steps=1, size=4, **options)  # type: ignore[arg-type]
    assert 0 < run.optimizer.diagnostics["clipped_radicands"] < 3 * 4 * 3  # stages after the first × samples × columns


def test_sampling_follows_torchs_random_state() -> None:
    """The same seed, the same steps; every step draws anew."""
    case = networks.residual()

    def updates(seed: int) -> list[torch.Tensor]:
        model, opt = optimizer(case, curvature="sgd", lr=0.5, terminal=MonteCarlo(1))
        torch.manual_seed(seed)
        found = []
        for _ in range(2):
            opt.step(*case.batch(0))
            found.append(parameters_of(model))
            model.load_state_dict(case.model.state_dict())
        return found

    first, again, other = updates(0), updates(0), updates(1)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0]) and not torch.equal(first[0], first[1])


def test_samples_mixed_by_batch_norm_are_read_column_by_column() -> None:
    """Batch-norm in training pulls column a of sample i back to ``Σ_j (∂x_j'/∂x_i)ᵀ z_ja`` (docs/theory.md#mixing)."""
    case = networks.conv_residual(training=True)
    stages, params = case.stages["asap"], {n: p.detach().clone() for n, p in case.model.named_parameters()}
    x, y = case.batch(0, 4)
    states = trajectory(stages, params, (x,))
    _, g = terminal_gradient(lambda out, t: nn.functional.cross_entropy(out, t, reduction="none"), states[-1], y)
    p = states[-1][0].softmax(1)
    s = torch.diag_embed(p.sqrt()) - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    base = sample_gradients(stages, params, states, g)[1]
    columns = [sample_gradients(stages, params, states, s[:, :, a]) for a in range(3)]
    z = {t: torch.stack([found[t] for found, _ in columns], 1) for t in columns[0][0]}
    psi = {t: torch.stack([found[t] for _, found in columns], 1).flatten(0, 1) for t in base}
    variance, beta, gains, lr = torch.eye(12).double() / 4, torch.zeros(12).double(), {}, 0.5
    for t in reversed(range(len(stages))):
        q_u = base[t].sum(0) / 4 + psi[t].T @ beta
        q_uu = torch.eye(len(q_u)).double() / lr + psi[t].T @ variance @ psi[t]
        gains[t] = (-torch.linalg.solve(q_uu, q_u), -torch.linalg.solve(q_uu, psi[t].T @ variance))
        beta = beta + variance @ psi[t] @ gains[t][0]
        variance = variance + variance @ psi[t] @ gains[t][1]
    new, moved = dict(params), (x,)
    for t, stage in enumerate(stages):
        k, feedback = gains[t]
        change = torch.einsum("ban,bn->ba", z[t], flat(moved) - flat(states[t])).flatten()
        u = pack(params, stage.names) + k + feedback @ change
        new |= unpack(u, params, stage.names)
        moved = stage.step(moved, new)
    model = copy.deepcopy(case.model)
    options: dict[str, Any] = {"terminal": "ggn", "feedback_clip": None, "rollout": "nonlinear"}
    compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=lr, **options).step(x, y)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), new[name], rtol=0, atol=1e-12)


@torch.library.custom_op("gtddp_compile_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x**3


@cube.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def _cube_backward(context: Any, g: torch.Tensor) -> torch.Tensor:
    assert bool(g.isfinite().all())  # depends on data, which vmap refuses
    return 3 * context.saved_tensors[0] ** 2 * g


cube.register_autograd(_cube_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def test_what_vmap_does_not_support_is_pulled_back_column_by_column() -> None:
    found = []
    for power in (cube, lambda x: x**3):
        model = networks.make(lambda net, x, power=power: net.b(power(net.a(x))), a=(4, 5), b=(5, 3))
        x, y = networks.mlp().batch(0)
        opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.5, terminal="ggn")
        assert ("column at a" in opt.program.cost()) == (power is cube)
        opt.step(x, y)
        found.append(parameters_of(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


def test_cost_and_diagnostics_say_what_runs() -> None:
    case = networks.residual()
    x, y = case.batch(0, 4)
    options: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "curvature": "sgd", "lr": 0.1}
    for terminal, form, said in (
        ("ggn", "joint", "matrices of size B*3"),
        (MonteCarlo(2), "joint groups", "matrices of size 3*2"),
        ("ggn", "substituted", "3 x 3 a sample"),
        ("gradient", "joint", "1 column a sample"),
    ):
        opt = compile_optimizer(case.model, x, terminal=terminal, **options, **FORMS[form])
        assert said in " ".join(opt.program.cost().split())
    for lr in (1e-4, 1e-5):
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, x, terminal="ggn", **{**options, "lr": lr})
        before = float(opt.step(x, y))
        after = float(nn.functional.cross_entropy(model(x), y).detach())
        # ½ Q_uᵀ Q_uu⁻¹ Q_u summed over the stages: half of what the loss falls by, but for a share that falls with lr.
        assert opt.diagnostics["predicted_decrease"] * 2 == pytest.approx(before - after, rel=10 * lr)


@pytest.mark.parametrize(("options", "said"), [
    ({"terminal": "ggn", "loss": nn.L1Loss()}, "L1Loss is .piecewise. linear"),
    ({"terminal": MonteCarlo(1), "loss": nn.NLLLoss()}, "Use CrossEntropyLoss on the logits"),
    ({"terminal": "ggn", "coupling": "full", "recursion": "substituted"}, "has no meaning with coupling 'full'"),
])  # fmt: skip
@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_refused_by_name(options: dict[str, Any], said: str, backend: Any) -> None:
    case = networks.residual()
    with pytest.raises(CompileError, match=said):
        optimizer(case, curvature="sgd", backend=backend, **options)


def test_refused_ranks_losses_and_mixing() -> None:
    for rank in (0, -1, True, 1.5):
        with pytest.raises(CompileError, match="not a positive integer"):
            MonteCarlo(rank)  # type: ignore[arg-type]
    case = networks.residual()
    x, y = case.batch(0)
    start = copy.deepcopy(case.model.state_dict())
    for backend in ("fast", "dense"):
        opt = compile_optimizer(case.model, loss=saddle, curvature="sgd", terminal="ggn", backend=backend)  # type: ignore[arg-type]
        with pytest.raises(CompileError, match="saddle is not convex in the network's outputs here"):
            opt.step(x, y)
    assert all(torch.equal(value, start[name]) for name, value in case.model.state_dict().items())
    with pytest.raises(CompileError, match="mixes samples with terminal='ggn'"):
        optimizer(networks.conv_residual(training=True), curvature="sgd", terminal="ggn", backend="dense")


def saddle(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return outputs[:, 0] ** 2 - outputs[:, 1] ** 2 + outputs[:, 2]


@pytest.mark.parametrize("terminal", ["ggn", MonteCarlo(2)])
def test_refused_where_samples_of_the_output_do_not_lead(terminal: Any) -> None:
    """Columns are taken a sample at a time along the leading axis: another one would be wrong, not slow."""

    def loss(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return (outputs.transpose(0, 1) - targets).square().mean((1, 2))

    case = Case(networks.make(lambda net, x: torch.tanh(net.a(x)).transpose(0, 1), a=(4, 3)), (2, 4), loss=loss)
    with pytest.raises(CompileError, match=r"operation transpose.*samples along axis 1.*Move the samples"):
        optimizer(case, curvature="sgd", lr=0.1, terminal=terminal)
