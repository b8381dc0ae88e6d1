"""Parameters hold an average of what is trained, in which the newest counts for p / k in the k-th step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, Terms, compile_optimizer
from gtddp_compile.options import SUGGESTED
from support import networks
from support.against_primal import regression
from support.compared import assert_equal, assert_exported, assert_union, batches, flat, optimizer, train
from support.exported import named
from support.networks import Case

SETUPS: dict[str, dict[str, Any]] = {
    "foof": {},
    "sgd, decay, groups": {"curvature": "sgd", "lr": 0.3, "weight_decay": 0.05, "coupling": 2, "inertia": 0.9},
    "kfac": {"curvature": "kfac", "lr": 0.1, "damping": 1e-2, "inertia": 0.9},
    "adam, no first moment": {"curvature": "adam", "lr": 0.01, "betas": (0.0, 0.999), "inertia": 0.9},
    "foof, decay": {"weight_decay": 0.1, "lookahead": 0.0},
    "foof, momentum inside": {"inertia": 0.5, "lookahead": 0.3, "terminal": "ggn"},
}
CASES = {"classes": networks.residual, "numbers": lambda: regression("residual"), "images": networks.conv_residual}
P = 1.5


def by_hand(case: Case, steps: int, size: int, p: float = P, **options: Any) -> tuple[Tensor, list[float]]:
    """The average of what a program without one makes."""
    model, opt = optimizer(case, averaging=0, **options)
    found, losses = flat(model), []
    for k, (x, y) in enumerate(batches(case, steps, size), 1):
        losses.append(float(opt.step(x, y)))
        found = torch.lerp(found, flat(model), min(1.0, p / k))
    assert (found - flat(model)).abs().max() > 1e-4
    return found, losses


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_is_the_average_of_what_is_trained(setup: str, backend: Any) -> None:
    case = networks.mlp() if "groups" in setup else regression("residual")
    run = train(case, 5, 6, averaging=P, backend=backend, **SETUPS[setup])
    found, losses = by_hand(case, 5, 6, backend=backend, **SETUPS[setup])
    torch.testing.assert_close(run.parameters, found, rtol=0, atol=1e-12)
    torch.testing.assert_close(run.losses, losses, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("setup", ["foof", "sgd, decay, groups"])
def test_fast_equals_dense_and_what_is_exported(case: str, setup: str, tmp_path: Path) -> None:
    run = assert_equal(CASES[case](), steps=4, averaging=P, **SETUPS[setup])
    assert_exported(CASES[case](), run, tmp_path)


def test_of_an_exported_graph(tmp_path: Path) -> None:
    case = regression("mlp")
    run = train(case, 4, 6, averaging=P, curvature="sgd", lr=0.3, inertia=0.9)
    run.optimizer.program.export(tmp_path / "step.pt2", targets=case.batch(0, 6)[1])
    program = torch.export.load(tmp_path / "step.pt2")
    params, buffers = named(case.model)
    state, arguments = program.example_inputs[0][2], [(params, buffers)]
    for x, y in batches(case, 4, 6):
        params, buffers, state, _ = program.module()(*arguments[-1], state, (x,), y)
        arguments.append((params, buffers))
    torch.testing.assert_close(torch.cat([v.flatten() for v in params.values()]), run.parameters, rtol=0, atol=1e-12)


def test_micro_batches_are_groups() -> None:
    assert_union(regression("mlp"), 3, averaging=P)


@pytest.mark.parametrize("options", [{}, {"memory": "recompute"}], ids=str)
def test_through_torch_compile_and_recomputed(options: dict[str, Any]) -> None:
    case = regression("mlp")
    how = {"curvature": "sgd", "lr": 0.3, "inertia": 0.9, "lookahead": 0.7, "averaging": P}
    found = [train(case, 5, 6, **how, **own).parameters for own in (options or {"compile": {"backend": "eager"}}, {})]
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def test_in_bfloat16_nothing_is_lost_to_rounding() -> None:
    """What is trained, ``u``, is the parameter and what it is behind: steps too small for the one are in the other."""
    case, model = regression("mlp"), networks.mlp().model.bfloat16()
    x, y = case.batch(0, 6)
    opt = compile_optimizer(model, x.bfloat16(), loss=nn.MSELoss(), averaging=1.0)
    for _ in range(30):
        opt.step(x.bfloat16(), y.bfloat16())
    before = [p.float() + opt.state[p]["behind"] for p in model.parameters()]
    opt.step(x.bfloat16(), y.bfloat16())
    for p, u in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.float() + opt.state[p]["behind"], u + opt.state[p]["last_step"])


def test_what_is_written_into_the_parameters_is_taken_along() -> None:
    case = regression("mlp")
    model, opt = optimizer(case, averaging=P)
    for x, y in batches(case, 4, 6):
        opt.step(x, y)
    trained = [p.detach() + opt.state[p]["behind"] * (1 - P / 4) for p in model.parameters()]
    plain, other = optimizer(case, averaging=0)
    other.load_state_dict({**copy.deepcopy(opt.state_dict()), "param_groups": other.state_dict()["param_groups"]})
    with torch.no_grad():
        for p, twin, u in zip(model.parameters(), plain.parameters(), trained, strict=True):
            p.add_(0.1), twin.copy_(u + 0.1)
            del other.state[twin]["behind"]
    x, y = case.batch(9, 6)
    torch.testing.assert_close(opt.step(x, y), other.step(x, y), rtol=1e-12, atol=0)


def test_turned_off_the_newest_is_taken() -> None:
    case = regression("mlp")
    model, opt = optimizer(case, averaging=P)
    plain, other = optimizer(case, averaging=0)
    for k, (x, y) in enumerate(batches(case, 5, 6)):
        for group in opt.param_groups if k == 4 else ():
            group["averaging"] = 0
        opt.step(x, y), other.step(x, y)
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-12)


def test_a_group_at_rate_0_rests() -> None:
    case = regression("mlp")
    _, opt = optimizer(case, averaging=P)
    for x, y in batches(case, 4, 6):
        opt.step(x, y)
    opt.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in opt.param_groups[0]["params"]]
    opt.step(*case.batch(5, 6))
    assert all(map(torch.equal, before, opt.param_groups[0]["params"]))


def test_saved_and_loaded_it_goes_on() -> None:
    case = regression("mlp")
    model, opt = optimizer(case, averaging=P)
    for x, y in batches(case, 4, 6):
        opt.step(x, y)
    twin = copy.deepcopy(model)
    other = compile_optimizer(twin, case.batch(0, 6)[0], loss=case.loss, averaging=P)
    other.load_state_dict(copy.deepcopy(opt.state_dict()))
    for run in (opt, other):
        run.step(*case.batch(7, 6))
    assert torch.equal(flat(model), flat(twin))


def groups(**options: Any) -> dict[str, Any]:
    case = regression("mlp")
    return compile_optimizer(case.model, case.batch(0, 4)[0], loss=nn.MSELoss(), **options).param_groups[0]


def test_by_default_where_steps_are_taken_as_they_are() -> None:
    assert groups()["averaging"] == groups(inertia=0.5)["averaging"] == SUGGESTED["foof"]["averaging"] > 0
    for options in ({"rollout": "nonlinear"}, {"line_search": (1.0,)}, {"curvature": "sgd", "inertia": 0.9}):
        assert groups(**options)["averaging"] == 0
    assert "averaging" not in groups(inertia=0.0)
    terms = Terms(nn.Linear(2, 1).double(), {"inside": lambda net, x: net(x).squeeze(1)})
    points = {"inside": (torch.randn(5, 2).double(), 1.0)}
    assert compile_optimizer(terms, points).param_groups[0]["averaging"] == 0


def test_refused_of_a_program_that_takes_no_average() -> None:
    case = regression("mlp")
    _, opt = optimizer(case, rollout="nonlinear")
    opt.param_groups[0]["averaging"] = 10
    with pytest.raises(CompileError, match="averaging=10, and these steps are not averaged"):
        opt.step(*case.batch(0, 6))
