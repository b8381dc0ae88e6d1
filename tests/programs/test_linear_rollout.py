"""The linear rollout: one joint step, equal to a dense solve over all parameters (`primal.py`) to 1e-9 in float64."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gtddp_compile import FOOF, CompileError, Geometric, compile_optimizer
from gtddp_compile.lowering.write import adjoints
from gtddp_compile.methods.terminal import Terminal
from gtddp_compile.options import SUGGESTED, Options
from support import networks
from support.against_primal import SIZE, assert_primal, classified, oracle, regression, squares
from support.cases import of_both, tied, two_outputs
from support.compared import LOSS, SUM, TORCH, assert_exported, flat, optimizer, train, trained
from support.random_networks import Plan, loss, plans

NETWORKS = {
    "chain": networks.mlp, "residual": networks.residual, "nested": networks.nested, "projection": networks.projection,
    "gated": networks.gated, "tied": tied, "two outputs": two_outputs,
}  # fmt: skip
# Of compile_optimizer; what the oracle calls otherwise is translated in `oracle`.
SETUPS: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.5},
    "inertia, groups": {"curvature": "sgd", "lr": 0.3, "weight_decay": 0.05, "inertia": 0.9, "coupling": 2,
                        "terminal": Geometric(0.3, own=2.0, early=0.5)},
    "rmsprop": {"curvature": "rmsprop", "lr": 0.02, "terminal": "gradient", "inertia": 0.5},
    "adam, ggn": {"curvature": "adam", "lr": 0.02, "terminal": "ggn", "weight_decay": 0.1},
    "ggn, groups": {"curvature": "sgd", "lr": 0.5, "terminal": "ggn", "coupling": 3, "inertia": 0.8},
    "capped": {"curvature": "rmsprop", "lr": 0.02, "max_step": 0.1, "inertia": 0.7, "weight_decay": 0.1, "coupling": 3},
}  # fmt: skip


REACHES: dict[str, dict[str, Any]] = {
    "in between": {"curvature": "sgd", "lr": 0.06, "terminal": Geometric(0.7, reach=0.2), "inertia": 0.9,
                   "max_step": 1.0},
    "first steps": {"curvature": "sgd", "lr": 0.06, "terminal": Geometric(0.7, reach=0.1, early=0.3), "inertia": 0.9},
    "groups": {"curvature": "adam", "lr": 5e-4, "terminal": Geometric(0.5, reach=0.1), "coupling": 3},
    "as many as there are": {"curvature": "sgd", "lr": 1e-3, "terminal": Geometric(reach=1.0)},
    "none beside decay": {"curvature": "sgd", "lr": 0.06, "weight_decay": 0.05, "terminal": Geometric(0.7, reach=0.2)},
    "far enough": {"curvature": "sgd", "lr": 100.0, "terminal": Geometric(reach=1e-6)},
}  # fmt: skip


@pytest.mark.parametrize("backend", ["fast", "dense"])
@pytest.mark.parametrize("setup", REACHES)
def test_reach(setup: str, backend: Any) -> None:
    """A mean over several outputs is undone, as far as the target has any."""
    assert_primal(regression("projection"), nn.MSELoss(), 3, backend, squares, **REACHES[setup])


def test_reach_acts_where_it_should() -> None:
    """The oracle of :func:`test_reach` itself: how often each of its losses counts in the first step."""
    found = {}
    for setup, options in REACHES.items():
        expected = oracle(regression("projection").model, squares, **options)
        x, y = regression("projection").batch(0, SIZE)
        expected.step((x,), y)
        found[setup] = expected.counted
    most = y.shape[1]
    assert 1 < found["in between"][0] < most and all(1 < c < most for c in found["groups"])
    assert found["as many as there are"] == [most] and found["far enough"] == [1.0]


def loss_of(network: str) -> Any:
    return of_both if network == "two outputs" else LOSS


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("network", NETWORKS)
def test_is_the_primal_step(network: str, setup: str) -> None:
    per_sample = of_both if network == "two outputs" else classified
    assert_primal(NETWORKS[network](), loss_of(network), 3, "fast", per_sample, **SETUPS[setup])


@pytest.mark.parametrize(
    ("network", "setup"),
    [*((one, "inertia, groups") for one in NETWORKS),
     *(("projection", one) for one in SETUPS if one != "inertia, groups")],
)  # fmt: skip
def test_the_rolled_out_policy_is_the_primal_step(network: str, setup: str) -> None:
    """The dense backend: gains stage by stage, the policy on the linearised dynamics, which the program never does."""
    per_sample = of_both if network == "two outputs" else classified
    assert_primal(NETWORKS[network](), loss_of(network), 2, "dense", per_sample, **SETUPS[setup])


@pytest.mark.parametrize("backend", ["fast", "dense"])
@pytest.mark.parametrize("curvature", ["kfac", "foof"])
def test_kronecker_factors(curvature: str, backend: Any) -> None:
    """Explicit ``(A + π √λ I) ⊗ (B + √λ/π I)`` or ``(A + λ ā I) ⊗ I`` a layer, from the ordinary gradients."""
    options: dict[str, Any] = {"curvature": curvature, "lr": 0.1, "damping": 1e-2, "inertia": 0.9, "weight_decay": 0.05,
                               "terminal": "geometric"}  # fmt: skip
    assert_primal(networks.mlp(), LOSS, 3, backend, refresh=1, coupling=3, **options)


def test_the_defaults() -> None:
    """Nothing said: FOOF with the inertia and the aim that it suggests, coupled as a whole."""
    options = {"curvature": "foof", "lr": FOOF.lr, "damping": FOOF.damping, **SUGGESTED["foof"]}
    assert options["inertia"] > 0 and options["terminal"].half > 0
    aim = SUGGESTED["foof"]["terminal"].aim * (4 / 6) ** 0.5  # six layers in a row, over shortcuts
    options["terminal"] = replace(options["terminal"], aim=aim)
    opt = assert_primal(networks.nested(), LOSS, 3, "fast", said={}, **options)  # statistics are taken in each step
    assert opt.program.form.name == "joint"


@pytest.mark.parametrize("backend", ["fast", "dense"])
@pytest.mark.parametrize("coupling", ["full", 2, 4])
def test_losses_that_may_be_negative(coupling: Any, backend: Any) -> None:
    """The aim goes by a sample's distance from the least of its group, where that is negative."""

    def below(outputs: Any, targets: Any) -> Any:
        return classified(outputs, targets) - 1.0

    options = {
        "curvature": "sgd",
        "lr": 0.1,
        "inertia": 0.9,
        "coupling": coupling,
        "terminal": Geometric(0.7, 0.1, 2.0),
    }
    assert_primal(networks.projection(), below, 3, backend, below, **options)


@pytest.mark.parametrize("inertia", [0.0, 0.9])
def test_a_likelihood_is_fitted(inertia: float) -> None:
    """A variance that is learned too: no step asks for more than samples show to be in reach."""

    def surprise(outputs: Any, targets: Any) -> Any:
        return outputs[:, 1] + 0.5 * ((targets - outputs[:, 0]) * torch.exp(-outputs[:, 1])) ** 2

    torch.manual_seed(0)
    x = torch.randn(256, 4)
    y = x[:, 0].sin() + 0.3 * torch.randn(256) * x[:, 1].abs()
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    opt = compile_optimizer(model, loss=surprise, inertia=inertia)
    losses = [float(opt.step(x[rows], y[rows])) for _ in range(20) for rows in torch.randperm(256).split(64)]
    assert max(losses[40:]) < 0.0


def test_a_batch_of_one_with_a_negative_loss_is_fitted() -> None:
    model = nn.Sequential(nn.Linear(2, 3))
    opt = compile_optimizer(model, loss=lambda outputs, targets: classified(outputs, targets) - 3.0)
    x, y = torch.randn(1, 2), torch.tensor([1])
    losses = [float(opt.step(x, y)) for _ in range(30)]
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("inertia", [0.0, 0.9])
def test_a_decay_takes_off_no_more_than_there_is(inertia: float) -> None:
    """However little a layer's inputs vary: its M would be next to nothing without the decay's own curvature."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    opt = compile_optimizer(model, loss=nn.CrossEntropyLoss(), inertia=inertia, weight_decay=1.0)
    x, y = 1e-3 * torch.randn(6, 4).double(), torch.arange(6) % 3
    sizes = []
    for _ in range(40):
        opt.step(x, y)
        sizes.append(float(nn.utils.parameters_to_vector(model.parameters()).norm()))
    assert max(sizes[-10:]) < 0.1 * sizes[0] and max(sizes) < 1.5 * sizes[0]


@pytest.mark.parametrize("terminal", ["geometric", "ggn"])
def test_a_loss_that_is_a_sum(terminal: str) -> None:
    assert_primal(networks.residual(), SUM, 2, "fast", terminal=terminal, curvature="sgd", lr=0.1, coupling=2)


def test_the_predicted_decrease_is_of_the_loss_itself() -> None:
    """However often it counts (``reach``): of a short step half of what the loss falls by."""
    case, lr = regression("projection"), 1e-5
    x, y = case.batch(0, 6)
    terminal = Geometric(reach=1.0)
    model, opt = optimizer(case, loss=nn.MSELoss(), curvature="sgd", lr=lr, terminal=terminal)
    before = float(opt.step(x, y))
    after = float(nn.functional.mse_loss(model(x), y).detach())
    assert opt.diagnostics["predicted_decrease"] * 2 == pytest.approx(before - after, rel=100 * lr)


few = settings(max_examples=16, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)


@few
@given(plan=plans(), inertia=st.sampled_from([0.0, 0.9]), schedule=st.sampled_from(["asap", "alap"]))
def test_random_networks(plan: Plan, inertia: float, schedule: str) -> None:
    options = {"curvature": "sgd", "lr": 0.1, "inertia": inertia, "terminal": "gradient"}
    expected = oracle(plan.case().model, loss, **options)
    for step in range(2):
        expected.step(*plan.batch(step))
    assert_near(plan, trained(plan.case(), schedule=schedule, **options), expected.u)


def assert_near(plan: Plan, found: Tensor, expected: Tensor) -> None:
    """``x - x`` teaches nothing; too many such examples fail the test."""
    scale = max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * scale)
    assume((found - flat(plan.case().model)).abs().max() > 1e-6)


BASES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05}, "rmsprop": {"lr": 0.01, "momentum": 0.5},
    "adam": {"lr": 0.01, "weight_decay": 0.1},
}  # fmt: skip


@pytest.mark.parametrize("bound", [0.2, 100.0])
@pytest.mark.parametrize("name", BASES)
def test_gradients_are_clipped_as_torch_clips_them(name: str, bound: float) -> None:
    case, theirs = networks.projection(), networks.projection().model
    ours, opt = optimizer(case, curvature=name, feedback=False, max_grad_norm=bound, **BASES[name])
    reference = TORCH[name](theirs.parameters(), **BASES[name])
    clipped = []
    for step in range(3):
        x, y = case.batch(step, 6)
        opt.step(x, y)
        reference.zero_grad()
        LOSS(theirs(x), y).backward()
        clipped.append(float(nn.utils.clip_grad_norm_(theirs.parameters(), bound)) > bound)
        reference.step()
        torch.testing.assert_close(flat(ours), flat(theirs), rtol=0, atol=1e-12)
    assert all(clipped) == any(clipped) == (bound < 1)


@pytest.mark.parametrize("inertia", [0.0, 0.9])
def test_the_weighted_gradient_is_clipped(inertia: float) -> None:
    """Of the joint step ``-lr C w`` all parameters together are shortened; inertia is none of it."""
    case, lr, bound = networks.gated(), 0.5, 0.05
    expected = oracle(case.model, curvature="sgd", lr=lr, inertia=inertia)
    model, opt = optimizer(case, curvature="sgd", lr=lr, inertia=inertia, max_grad_norm=bound)
    for step in range(2):
        x, y = case.batch(step, 6)
        before, last, mu = expected.u, expected.last, expected.mu
        opt.step(x, y), expected.step((x,), y)
        asked = expected.last - mu * last
        assert asked.norm() / lr > bound
        expected.last = mu * last + asked * (bound / (asked.norm() / lr + 1e-6))
        expected.u = before + expected.last
        torch.testing.assert_close(flat(model), expected.u, rtol=0, atol=1e-9)


def test_without_inertia_there_is_no_last_step() -> None:
    _, opt = optimizer(networks.mlp(), curvature="sgd", lr=0.1)
    assert "inertia" not in opt.param_groups[0]
    model, opt = optimizer(networks.mlp(), curvature="sgd", lr=0.1, inertia=0.9)
    before = flat(model)
    opt.step(*networks.mlp().batch(0, 6))
    assert opt.param_groups[0]["inertia"] == 0.9
    last = torch.cat([opt.state[p]["last_step"].flatten() for p in model.parameters()])
    torch.testing.assert_close(last, flat(model) - before, rtol=0, atol=1e-15)


@pytest.mark.parametrize("taken", [0, 2])
def test_groups_without_inertia_have_no_first_steps(taken: int) -> None:
    """Where it is taken away nothing counts steps."""
    case, found = networks.mlp(), []
    for early in (0.0, 1.0):
        model, opt = optimizer(case, curvature="sgd", lr=0.1, inertia=0.9, terminal=Geometric(early=early))
        for step in range(taken):
            opt.step(*case.batch(step, 6))
        model.load_state_dict(case.model.state_dict())
        for group in opt.param_groups:
            del group["inertia"]
        opt.step(*case.batch(0, 6))
        found.append(flat(model))
    assert torch.equal(*found)


# --- random networks ---


OPTIONS = (
    {"curvature": "sgd", "lr": 0.1, "weight_decay": 0.05},
    {"curvature": "rmsprop", "lr": 1e-2},
    {"curvature": "sgd", "lr": 0.1, "coupling": 2, "inertia": 0.9},
    {"curvature": "sgd", "lr": 0.1, "coupling": 2, "feedback_clip": 0.05, "rollout": "nonlinear"},
    {"curvature": "sgd", "lr": 0.05, "coupling": "block"},
    {"curvature": "adam", "lr": 1e-2, "coupling": "block", "recursion": "substituted"},
)


@few
@given(plan=plans(), options=st.sampled_from(OPTIONS), schedule=st.sampled_from(["asap", "alap", "sequential"]))
def test_fast_equals_dense(plan: Plan, options: dict[str, object], schedule: str) -> None:
    found = (trained(plan.case(), schedule=schedule, backend=backend, **options) for backend in ("fast", "dense"))
    assert_near(plan, *found)


# --- the program of the linear rollout: the theorem it rests on, its files, micro-batches, figures and options ---


CLIPPED: dict[str, dict[str, Any]] = {
    "clipped": {"curvature": "kfac", "lr": 0.2, "refresh": 1, "inertia": 0.5, "max_grad_norm": 0.2},
    "clipped alone": {"curvature": "adam", "lr": 0.02, "feedback": False, "max_grad_norm": 0.2},
}


@pytest.mark.parametrize("feedback", [True, False])
def test_micro_batches_cannot_clip_the_gradient_of_their_union(feedback: bool) -> None:
    case = networks.mlp()
    model, opt = optimizer(case, curvature="sgd", lr=0.1, max_grad_norm=0.1, feedback=feedback)
    before = flat(model)
    with pytest.raises(CompileError, match=r"accumulate\(\) with max_grad_norm=0.1.*the union's gradients"):
        opt.accumulate(*case.batch(0, 6))
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_gradient_is_exported(name: str, tmp_path: Path) -> None:
    case = networks.residual()
    assert_exported(case, train(case, **CLIPPED[name]), tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"coupling": 3}, {"terminal": "ggn"}, {"terminal": "ggn", "coupling": 3}], ids=str
)
def test_diagnostics_mean_what_they_mean_in_the_nonlinear_rollout(options: dict[str, Any]) -> None:
    """Open gains and the predicted decrease do not depend on the rollout; the first stage has no feedback in either."""
    case, found = networks.projection(), []
    for rollout in ("linear", "nonlinear"):
        _, opt = optimizer(case, curvature="sgd", lr=0.5, weight_decay=0.05, rollout=rollout, **options)
        opt.step(*case.batch(0, 6))
        found.append(opt.diagnostics)
    linear, nonlinear = found
    for name in ("open_norm", "predicted_decrease"):
        assert linear[name] == pytest.approx(nonlinear[name], rel=1e-9)
    assert linear["predicted_decrease"] > 0
    assert linear["feedback_norm"].keys() == nonlinear["feedback_norm"].keys()
    assert linear["feedback_norm"]["stem"] < 1e-12 < 1e-4 < linear["feedback_norm"]["head"]
    assert linear["lifted_grams"] == 0 and linear["clipped_changes"] == 0


# --- the theorem and the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["full", 3])
@pytest.mark.parametrize("terminal", ["geometric", "ggn"])
def test_the_weights_are_the_same_at_every_stage(terminal: Terminal, coupling: Any) -> None:
    """One factor, no stage run twice, and the claim it rests on."""
    case = networks.projection()
    _, opt = optimizer(case, curvature="rmsprop", terminal=terminal, coupling=coupling, inertia=0.9)
    program = opt.program
    claims = [claim for claim in program.form.claims if "the weights are the same at every stage" in claim.statement]
    assert len(claims) == 1 and program.form.name == "joint"
    called = [one.function for one in program.lowered.instructions]
    assert called.count("factor") == 1
    functions = [function.name for function in program.lowered.functions]
    assert len(functions) >= len(opt.graph.stages)
    assert all(called.count(name) == 1 for name in functions)
    assert not any(one.phase == "forward" for one in program.lowered.instructions)


def test_what_is_decided_for_all_stages_stands_at_the_first() -> None:
    _, opt = optimizer(networks.mlp(), curvature="sgd", lr=0.5, max_step=0.1)
    stages = {one.function: one.stage for one in opt.program.lowered.instructions if one.phase == "joint"}
    assert stages["factor"] == stages["cap_step"] == 0


def test_where_it_is_the_default() -> None:
    assert Options().rollout_kind == Options(coupling=4).rollout_kind == "linear"
    for other in ({"feedback": "open"}, {"feedback": False}, {"coupling": "block"}, {"rollout": "nonlinear"},
                  {"coupling": "block", "recursion": "printed"}):  # fmt: skip
        assert Options(**other).rollout_kind == "nonlinear"  # type: ignore[arg-type]


def test_one_reverse_pass_of_several_stages_is_that_of_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages that torch differentiates are one pass while what it leaves is small; else each has its own."""
    runs = []
    for held in (adjoints.HELD, 0):
        monkeypatch.setattr(adjoints, "HELD", held)
        runs.append(train(networks.conv_residual()))
    passes = [run.optimizer.program.code.count("= pull_back(") for run in runs]
    assert 0 < passes[0] < passes[1]
    torch.testing.assert_close(*(run.parameters for run in runs), rtol=0, atol=1e-12)
