"""A schedule: a step is as long as its learning rate is of the one that it began with, whatever the aim asks for."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import CompiledOptimizer, Geometric, compile_optimizer
from support import networks
from support.against_primal import regression
from support.compared import assert_exported, batches, flat, followed, optimizer
from support.networks import Case

OWN = Geometric(0.5, own=2.0, half=4.0)
SETUPS: dict[str, dict[str, Any]] = {
    "default": {},
    "sgd, far beyond the aim": {"curvature": "sgd", "lr": 30.0, "inertia": 0.9},
    "adam, groups": {"curvature": "adam", "lr": 0.01, "coupling": 2},
    "kfac": {"curvature": "kfac", "lr": 0.1, "damping": 1e-2},
    "soap, own": {"curvature": "soap", "lr": 0.01, "weight_decay": 0.0, "terminal": OWN},
    "nonlinear, recomputed": {"curvature": "sgd", "lr": 0.3, "rollout": "nonlinear", "memory": "recompute"},
    "dense": {"backend": "dense"},
    "dense, nonlinear": {"curvature": "sgd", "lr": 0.3, "backend": "dense", "rollout": "nonlinear"},
}


def step(case: Case, share: Any, *, kept: bool = True, **options: Any) -> torch.Tensor:
    """What one step at a share of the rate adds to the parameters; ``kept=False``: nothing knows of the full one."""
    model, opt = optimizer(case, **options)
    for group in opt.param_groups:
        group["lr"] = group["lr"] * share
        if not kept:
            del group["peak_lr"]
    x, y = case.batch(0, 6)
    opt.step(x, y)
    return flat(model) - flat(case.model)


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("case", ["residual", "regression"])
def test_is_the_share_of_a_step(setup: str, case: str) -> None:
    given, options = regression("residual") if case == "regression" else networks.residual(), SETUPS[setup]
    full = step(given, 1.0, **options)
    assert full.abs().max() > 1e-4
    if options.get("rollout") == "nonlinear":  # to first order: stages answer to what has moved
        small, smaller = (step(given, share, **options) / share for share in (1e-3, 1e-4))
        torch.testing.assert_close(smaller, small, rtol=0, atol=1e-3 * float(small.abs().max()))
        return
    torch.testing.assert_close(step(given, 0.3, **options), 0.3 * full, rtol=0, atol=1e-10)


@pytest.mark.parametrize("setup", ["default", "adam, groups", "soap, own"])
def test_of_a_rate_that_is_a_tensor(setup: str) -> None:
    given, share = networks.residual(), torch.tensor(0.3, dtype=torch.float64)
    found, wanted = (step(given, own, **SETUPS[setup]) for own in (share, 0.3))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [0.3, 0.0])
@pytest.mark.parametrize("setup", ["default", "sgd, far beyond the aim", "kfac", "dense"])
def test_what_is_carried_on_is_in_proportion_too(setup: str, share: float) -> None:
    """After steps at the full rate: a step at a share of it is that share of a full one, and at 0 there is none."""
    found, case, options = [], networks.residual(), {"lookahead": 0.0, "inertia": 0.9, **SETUPS[setup]}
    for own in (share, 1.0):
        model, opt = optimizer(case, **options)
        for x, y in batches(case, 3, 6):
            opt.step(x, y)
        before = flat(model)
        for group in opt.param_groups:
            group["lr"] *= own
        opt.step(*case.batch(3, 6))
        found.append(flat(model) - before)
    torch.testing.assert_close(found[0], share * found[1], rtol=0, atol=1e-10)
    for group in opt.param_groups[:1]:
        group["lr"] = 0.0
    opt.step(*case.batch(4, 6))
    stays = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    opt.step(*case.batch(5, 6))
    assert all(torch.equal(p, was) for p, was in zip(opt.param_groups[0]["params"], stays, strict=True))


def test_resumed_between_rates_it_goes_on_the_same() -> None:
    case, found = networks.residual(), []
    for resumes in (False, True):
        model, opt = optimizer(case)
        for step_taken, (x, y) in enumerate(batches(case, 6, 6)):
            for group in opt.param_groups:
                group["lr"] = group["peak_lr"] * (1.0 - 0.13 * step_taken)
            if resumes and step_taken == 4:
                saved = copy.deepcopy(opt.state_dict())
                model = copy.deepcopy(model)
                opt = compile_optimizer(model, x, loss=case.loss)
                opt.load_state_dict(saved)
            opt.step(x, y)
        found.append(flat(model))
    assert torch.equal(*found)


def test_without_it_the_aim_makes_up_for_the_rate() -> None:
    """What the share is for: beyond the aim a rate of a tenth is hardly a shorter step."""
    case, options = networks.residual(), SETUPS["sgd, far beyond the aim"]
    full, tenth = (step(case, share, kept=False, **options).norm() for share in (1.0, 0.1))
    assert tenth > 0.3 * full


def test_more_than_the_first_rate_is_no_greater_aim() -> None:
    case = networks.residual()
    torch.testing.assert_close(step(case, 3.0), step(case, 3.0, kept=False), rtol=0, atol=0)
    assert not step(case, 0.0).any()


def test_a_rate_that_rises_carries_no_more() -> None:
    """Where the model bounds steps at any rate, a hundred times the rate is no reason to carry on a hundred times."""
    case, lengths = networks.residual(), []
    model, opt = optimizer(case, curvature="sgd", terminal="gradient", inertia=0.9, lr=100.0)
    for k, (x, y) in enumerate(batches(case, 6, 6)):
        for group in opt.param_groups:
            group["lr"] = 100.0 if k < 3 else 1e4
        before = flat(model)
        opt.step(x, y)
        lengths.append(float((flat(model) - before).norm()))
    assert lengths[3] < 3 * max(lengths[:3])


def test_a_state_without_a_rate_was_at_the_peak() -> None:
    """As states of before were saved, where the rate was the first one."""
    case, found = networks.residual(), []
    for kept in (True, False):
        model, opt = optimizer(case)
        for x, y in batches(case, 3, 6):
            opt.step(x, y)
        for group in opt.param_groups:
            group["lr"] *= 0.1
        for state in () if kept else opt.state.values():
            del state["rate"]
        opt.step(*case.batch(7, 6))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_a_group_that_rests_leaves_the_others_alone() -> None:
    case, found = networks.residual(), []
    for kept in (True, False):
        model, opt = optimizer(case)
        opt.param_groups[0]["lr"] = 0.0
        for group in () if kept else opt.param_groups:
            del group["peak_lr"]
        opt.step(*case.batch(0, 6))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=0)
    assert (found[0] != flat(case.model)).any()


def scheduled(case: Case, steps: int, **options: Any) -> torch.Tensor:
    """The parameters after a rate that fell to nothing."""
    model, opt = optimizer(case, **options)
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.1, total_iters=steps)
    for x, y in batches(case, steps, 5):
        opt.step(x, y)
        schedule.step()
    return flat(model)


@pytest.mark.parametrize("setup", ["default", "adam, groups"])
def test_fast_equals_dense(setup: str) -> None:
    case = regression("conv_residual")
    fast, dense = (scheduled(case, 4, backend=backend, **SETUPS[setup]) for backend in ("fast", "dense"))
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)


def test_exported_and_resumed(tmp_path: Path) -> None:
    """A module that is exported late in a run goes on at the same pace, and so does an optimizer that is loaded."""
    case = networks.residual()
    opt: CompiledOptimizer
    model, opt = optimizer(case)
    for group in opt.param_groups:
        group["lr"] *= 0.2
    state = opt.state_dict()
    run = followed(case, model, opt, 2, 5)
    assert_exported(case, run, tmp_path)
    again, other = optimizer(case, lr=7.0)
    other.load_state_dict(state)
    assert run.losses == followed(case, again, other, 2, 5).losses
    torch.testing.assert_close(flat(again), flat(model), rtol=0, atol=0)


@pytest.mark.parametrize(("options", "paced"), [
    ({}, True), ({"curvature": "adam"}, True), ({"terminal": "ggn"}, False), ({"feedback": False}, False),
    ({"curvature": "sgd", "terminal": "gradient"}, False), ({"loss": nn.MSELoss(), "curvature": "soap"}, True),
])  # fmt: skip
def test_where_there_is_an_aim(options: dict[str, Any], paced: bool) -> None:
    case = networks.residual()
    opt = optimizer(case, **options)[1]
    assert all(("peak_lr" in group) is paced for group in opt.param_groups)
    assert ("m.pace" in {i.function for i in opt.program.lowered.instructions}) is paced


@pytest.mark.parametrize("rests", [("weight", "bias"), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("curvature", ["foof", "sgd"])
def test_a_layer_used_twice_at_a_rate_of_zero(curvature: str, rests: tuple[str, ...]) -> None:
    """Where a warm-up begins: its bias is in units of its weight's metric, which has none there."""
    net = networks.make(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.b(x))))), b=(4, 4), c=(4, 3))
    x, y, found = torch.randn(6, 4).double(), torch.arange(6) % 3, []
    for backend in ("fast", "dense"):
        model = copy.deepcopy(net)
        opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature=curvature, lr=0.5, backend=backend)
        named = dict(model.named_parameters())
        groups = [{**g, "params": [p], "name": name} for g in opt.param_groups for name, p in named.items()
                  if any(p is own for own in g["params"])]  # fmt: skip
        opt.param_groups[:] = groups
        for group in groups:
            group["lr"] = 0.0 if group["name"] in [f"b.{kind}" for kind in rests] else 0.5
        opt.step(x, y)
        assert all(torch.equal(getattr(model.b, kind), getattr(net.b, kind)) for kind in rests)
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    assert (found[0] - flat(net)).abs().max() > 1e-4
