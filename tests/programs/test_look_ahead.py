"""Look-ahead: of samples with several numbers the step before is taken first, and the batch is looked at from there."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, Geometric, Terms, compile_optimizer
from gtddp_compile.options import SUGGESTED
from support import networks
from support.against_primal import assert_primal, regression, squares
from support.compared import assert_equal, assert_exported, assert_union, flat, optimizer, train

SQUARES = nn.MSELoss()
SETUPS: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.3},
    "decay, groups": {"curvature": "sgd", "lr": 0.3, "weight_decay": 0.05, "coupling": 2, "terminal": Geometric(0.3)},
    "ggn": {"curvature": "sgd", "lr": 0.3, "terminal": "ggn"},
    "rmsprop, capped": {"curvature": "rmsprop", "lr": 0.02, "max_step": 0.1},
    "reach": {"curvature": "sgd", "lr": 0.06, "terminal": Geometric(0.7, reach=0.2)},
}
AHEAD = {"inertia": 0.9, "lookahead": 0.7}
CURVATURES: dict[str, dict[str, Any]] = {
    "foof": {"curvature": "foof"},
    "kfac": {"curvature": "kfac", "lr": 0.1, "damping": 1e-2},
    "ekfac, block by block": {"curvature": "ekfac", "lr": 0.05, "damping": 5e-2, "refresh": 1, "weight_decay": 0.1},
    "adam, nonlinear": {"curvature": "adam", "lr": 0.01, "betas": (0.0, 0.999), "rollout": "nonlinear"},
    "recomputed": {"curvature": "sgd", "lr": 0.1, "memory": "recompute"},
}


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_is_the_primal_step_from_there(setup: str, backend: Any) -> None:
    assert_primal(regression("projection"), SQUARES, 3, backend, squares, **SETUPS[setup], **AHEAD)


@pytest.mark.parametrize("setup", CURVATURES)
def test_fast_equals_dense(setup: str, tmp_path: Path) -> None:
    case, options = regression("residual"), CURVATURES[setup] | AHEAD
    if options.pop("memory", None):
        kept, again = (train(case, 3, memory=memory, **options) for memory in ("keep", "recompute"))
        torch.testing.assert_close(again.parameters, kept.parameters, rtol=0, atol=1e-12)
        return
    run = assert_equal(case, steps=3, **options)
    assert_exported(case, run, tmp_path)


def test_a_convolution_s_sketch_and_kept_rows() -> None:
    """Kernels that make a layer's Γ and its drift at once have no drift to make."""
    case = regression("conv_residual")
    at_rest = train(case, 3, curvature="foof", inertia=0.9, lookahead=0.0)
    ahead = assert_equal(case, steps=3, curvature="foof", gram="auto", **AHEAD)
    assert (at_rest.parameters - ahead.parameters).abs().max() > 1e-4


def test_one_number_a_sample_stays_where_it_is() -> None:
    case = networks.mlp()
    found = [train(case, 3, curvature="sgd", lr=0.3, inertia=0.9, lookahead=ahead).parameters for ahead in (0.0, 0.7)]
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"curvature": "sgd", "lr": 0.3, **AHEAD}, {}])
def test_micro_batches_are_groups(options: dict[str, Any]) -> None:
    assert_union(regression("mlp"), 3, **options)


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets.reshape(len(targets), -1)).square().mean(1)


class Tied(nn.Module):
    """One weight at both ends."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.inner = nn.Parameter(torch.randn(4, 6).double() * 0.4), nn.Linear(4, 4).double()

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(torch.tanh(x @ self.weight.T))) @ self.weight


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_by_hand(rollout: Any, backend: Any) -> None:
    """Parameters moved to ``u + μ v``, a step without inertia there, and all of it is the step; of tied ones too."""
    torch.manual_seed(0)
    x, model = torch.randn(7, 6).double(), Tied()
    twin, given = copy.deepcopy(model), {"loss": SQUARES, "curvature": "sgd", "lr": 0.3, "rollout": rollout}
    opt = compile_optimizer(model, x, backend=backend, **given, **AHEAD)
    plain = compile_optimizer(twin, x, backend=backend, **given, inertia=0.0)
    last = torch.zeros_like(flat(twin))
    for step in range(3):
        before, mu = flat(twin), min(0.7, step / (step + 3))
        nn.utils.vector_to_parameters(before + mu * last, twin.parameters())
        opt.step(x, x), plain.step(x, x)
        last = flat(twin) - before
        torch.testing.assert_close(flat(model), flat(twin), rtol=0, atol=1e-12)


@pytest.mark.parametrize("lookahead", [0.0, 0.7])
def test_a_bias_that_is_trained_later(lookahead: float) -> None:
    """It has no last step yet, and its layer's weight has."""
    case, found = regression("mlp"), []
    for backend in ("fast", "dense"):
        model, opt = optimizer(case, curvature="foof", inertia=0.9, lookahead=lookahead, backend=backend)
        bias = next(p for p in model.parameters() if p.dim() == 1).requires_grad_(False)
        for step in range(4):
            bias.requires_grad_(step >= 2)
            opt.step(*case.batch(step, 6))
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_through_torch_compile() -> None:
    """From a state, and from none where a step was made before: the first is not compiled."""
    case, found = regression("mlp"), []
    for how in (False, {"backend": "eager"}):
        options = {"curvature": "sgd", "lr": 0.3, "terminal": Geometric(reach=0.2, early=1.0), **AHEAD}
        model, opt = optimizer(case, compile=how, **options)
        for step in range(5):
            opt.step(*case.batch(step, 6))
            if step == 2:
                opt.state.clear()
        found.append(flat(model))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-12)


def test_ahead_of_a_step_that_no_group_puts_down() -> None:
    case = regression("mlp")
    _, opt = optimizer(case, curvature="sgd", lr=0.3, **AHEAD)
    opt.step(*case.batch(0, 6))
    del opt.param_groups[0]["inertia"]
    with pytest.raises(CompileError, match=r"lookahead=0\.7, and no inertia"):
        opt.step(*case.batch(1, 6))


def test_terms_are_equations_of_one_number() -> None:
    terms = Terms(nn.Linear(2, 1).double(), {"inside": lambda net, x: net(x).squeeze(1)})
    points = {"inside": (torch.randn(5, 2).double(), 1.0)}
    assert compile_optimizer(terms, points, curvature="foof").param_groups[0]["lookahead"] == 0


OWN: dict[str, Callable[[Tensor], dict[str, Any]]] = {
    "lookahead": lambda p: {"lookahead": 0.35 * p.dim()},
    "a momentum for biases": lambda p: {"inertia": 0.0, "lookahead": 0.0, "momentum": 0.5} if p.dim() == 1 else {},
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("curvature", ["foof", "kfac", "sgd"])
def test_a_layer_s_parameters_in_groups_of_their_own(curvature: str, own: str) -> None:
    """Each carries on what its own group says."""
    case, found = regression("mlp"), []
    for backend in ("fast", "dense"):
        model, opt = optimizer(case, curvature=curvature, lr=0.1, backend=backend, **AHEAD)
        groups = [{**g, "params": [p], "name": f"{g['name']} {p.dim()}", **OWN[own](p)}
                  for g in opt.param_groups for p in g["params"]]  # fmt: skip
        opt.param_groups[:] = groups
        for step in range(4):
            opt.step(*case.batch(step, 6))
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
    assert (found[0] - train(case, 4, 6, curvature=curvature, lr=0.1, **AHEAD).parameters).abs().max() > 1e-4


def test_micro_batches_look_from_one_place() -> None:
    case = regression("mlp")
    model, opt = optimizer(case, loss=per_sample, curvature="sgd", lr=0.3, **AHEAD)
    x, y = case.batch(0, 6)
    opt.step(x, y)
    opt.accumulate(x, y)
    before = flat(model)
    with pytest.raises(CompileError, match="targets of one number a sample beside targets of several"):
        opt.accumulate(x, y[:, 0])
    assert torch.is_grad_enabled()
    opt.step(x, y)  # what was accumulated before is still there
    assert (flat(model) - before).abs().max() > 1e-4


def test_a_step_that_fails_leaves_the_parameters_where_they_were() -> None:
    case = regression("mlp")
    model, opt = optimizer(case, curvature="sgd", lr=0.3, on_nonfinite="skip", **AHEAD)
    x, y = case.batch(0, 6)
    opt.step(x, y)
    before, state = flat(model), copy.deepcopy(opt.state_dict())
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(x, y * float("nan"))
    assert torch.equal(flat(model), before)
    torch.testing.assert_close(opt.state_dict()["state"], state["state"], rtol=0, atol=0)


def test_the_loss_is_of_the_place_it_is_looked_at_from() -> None:
    case = regression("mlp")
    model, opt = optimizer(case, curvature="sgd", lr=0.3, **AHEAD)
    x, y = case.batch(0, 6)
    first = float(opt.step(x, y))
    assert first == pytest.approx(float(SQUARES(case.model(x), y).detach()), rel=1e-12)
    last = {p: opt.state[p]["last_step"].clone() for p in model.parameters()}
    found, there = float(opt.step(x, y)), copy.deepcopy(case.model)
    model_again, again = optimizer(case, curvature="sgd", lr=0.3, **AHEAD)
    again.step(x, y)
    with torch.no_grad():
        for p, own, step in zip(there.parameters(), model_again.parameters(), last.values(), strict=True):
            p.copy_(own + 0.25 * step)  # 1 / (1 + 3), of 0.7 at most
    assert found == pytest.approx(float(SQUARES(there(x), y).detach()), rel=1e-12)


def test_a_step_s_length_is_compared_with_no_step() -> None:
    """Not with the place that the batch was looked at from."""
    case = regression("mlp")
    x, y = case.batch(0, 6)
    losses, chosen = [], []
    model, opt = optimizer(case, curvature="sgd", lr=1.0, inertia=0.9, lookahead=0.95, line_search=(0.3, 1.0, 3.0))
    for _ in range(12):
        opt.step(x, y)
        losses.append(float(SQUARES(model(x), y).detach()))
        chosen.append(opt.diagnostics["step_length"])
    assert losses == sorted(losses, reverse=True) and 0.0 in chosen


def test_by_default_only_beside_the_suggested_inertia() -> None:
    case = regression("mlp")

    def groups(**options: Any) -> dict[str, Any]:
        return compile_optimizer(case.model, case.batch(0, 4)[0], loss=SQUARES, **options).param_groups[0]

    assert groups()["lookahead"] == SUGGESTED["foof"]["lookahead"] > 0
    assert groups(inertia=0.5)["lookahead"] == groups(curvature="sgd", inertia=0.9)["lookahead"] == 0
    assert "lookahead" not in groups(inertia=0.0)
    assert groups(inertia=0.5, lookahead=0.3)["lookahead"] == 0.3
    with pytest.raises(CompileError, match=r"lookahead=0.5 without inertia"):
        groups(curvature="sgd", lookahead=0.5)
