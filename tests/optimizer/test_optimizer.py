"""A compiled optimizer behaves as a torch.optim.Optimizer, and a step is a transaction."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from support import networks
from support.compared import TORCH, torch_step
from support.noisy import LOSS, Noisy, batch


def test_buffers_advance_once_and_random_numbers_are_drawn_once() -> None:
    model = Noisy()
    plain = copy.deepcopy(model)
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd", lr=0.1)
    torch.manual_seed(3)
    opt.step(*batch())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    plain(batch()[0])
    assert torch.equal(after, torch.get_rng_state())
    assert all(map(torch.equal, model.buffers(), plain.buffers()))


def test_a_function_as_loss_may_do_without_targets() -> None:
    case = networks.mlp()
    x = case.batch(0)[0]
    opt = compile_optimizer(copy.deepcopy(case.model), x, loss=lambda y, _: y.square().mean(1), curvature="sgd", lr=0.1)
    assert opt.accumulate(x, None) == opt.step(x)


def test_layers_that_are_trained_later() -> None:
    """As in torch.optim, a frozen backbone has its options and its scheduler from the beginning."""
    case = networks.mlp()
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for one in (model, plain):
        next(one.children()).requires_grad_(False)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="adam", lr=0.1, feedback=False)
    adam = torch.optim.Adam(plain.parameters(), lr=0.1)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(one, 0.5) for one in (opt, adam)]
    assert [group.name for group in opt.program.setting.groups] == [p.name for p in opt.graph.players]  # type: ignore[union-attr]
    for index in range(4):
        if index == 2:
            for one in (model, plain):
                one.requires_grad_(True)
        x, y = case.batch(index)
        opt.step(x, y)
        torch_step(adam, LOSS(plain(x), y))
        for scheduler in schedulers:
            scheduler.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def test_groups_can_be_divided() -> None:
    """No weight decay for biases: options are taken parameter by parameter."""
    case = networks.mlp()
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.3}
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="adamw", feedback=False, **options)
    for group in list(opt.param_groups):
        biases = [p for p in group["params"] if p.ndim < 2]
        group["params"] = [p for p in group["params"] if p.ndim >= 2]
        opt.param_groups.append({**group, "params": biases, "weight_decay": 0.0, "name": group["name"] + ".bias"})
    halves = [{"params": [p for p in plain.parameters() if (p.ndim < 2) == low]} for low in (False, True)]
    halves[1]["weight_decay"] = 0.0  # type: ignore[assignment]
    adamw = torch.optim.AdamW(halves, **options)
    opt.load_state_dict(opt.state_dict())
    for index in range(3):
        x, y = case.batch(index)
        opt.step(x, y)
        torch_step(adamw, LOSS(plain(x), y))
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [
    {}, {"inertia": 0.9, "max_step": 0.1}, {"curvature": "kfac", "coupling": 3}, {"curvature": "muon"},
    {"terminal": "ggn"}, {"curvature": "adam", "feedback": False},
], ids=str)  # fmt: skip
def test_rates_of_zero(options: dict[str, Any]) -> None:
    """No step, in either backend; of one layer, or later, nothing but what inertia carries on."""
    found = []
    for backend in ("fast", "dense"):
        still, case = networks.mlp(), networks.mlp()
        opt = compile_optimizer(still.model, still.batch(0)[0], loss=LOSS, backend=backend, **options)
        for group in opt.param_groups:
            group["lr"] = 0.0
        before = copy.deepcopy(still.model.state_dict())
        for index in range(2):
            opt.step(*still.batch(index))
        assert all(map(torch.equal, before.values(), still.model.state_dict().values()))
        opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, backend=backend, **options)
        opt.param_groups[1]["lr"] = 0.0
        for index in range(4):
            if index == 2:
                for group in opt.param_groups:
                    group["lr"] = 0.0
            opt.step(*case.batch(index))
        found.append(case.model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_groups_of_something_else_are_refused() -> None:
    """States of something else: tests/docs/test_errors_page.py."""
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="adam")
    halves = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(CompileError, match="6 parameter groups of 6 parameters without names"):
        opt.load_state_dict(torch.optim.Adam(halves).state_dict())
    named = list(model.named_parameters())
    halves = [{"params": named[::2]}, {"params": named[1::2], "lr": 0.5}]
    with pytest.raises(CompileError, match="other options for some parameters of module 'fc'"):
        opt.load_state_dict(torch.optim.Adam(halves).state_dict())
    assert torch.isfinite(opt.step(*batch()))


def test_a_loss_that_reads_parameters_is_refused() -> None:
    model = Noisy()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none") + model.fc.weight.abs().sum()

    opt = compile_optimizer(model, batch()[0], loss=penalised, curvature="sgd")
    with pytest.raises(CompileError, match=r"reads trained parameters itself, fc\.weight"):
        opt.step(*batch())
    model.fc.weight.requires_grad_(False)
    assert torch.isfinite(opt.step(*batch()))


METHODS: dict[str, dict[str, Any]] = {
    "adam": {"lr": 0.01, "amsgrad": True}, "adamw": {"lr": 0.01}, "rmsprop": {"lr": 0.01, "centered": True},
    "sgd": {"lr": 0.1, "momentum": 0.9},
}  # fmt: skip


@pytest.mark.parametrize("given", ["parameters", "named_parameters", "trained", "two groups"])
@pytest.mark.parametrize("curvature", METHODS)
def test_states_of_torch_go_on_here_and_ours_there(curvature: str, given: str) -> None:
    case, kind = networks.mlp(), TORCH[curvature]
    plain, model = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for one in (plain, model):
        next(one.parameters()).requires_grad_(given != "trained")
    named = list(plain.named_parameters())
    groups: Any = {
        "parameters": plain.parameters(), "named_parameters": reversed(named),
        "trained": [p for p in plain.parameters() if p.requires_grad],
        "two groups": [{"params": named[2:]}, {"params": named[:2], "lr": 0.02}],
    }[given]  # fmt: skip
    theirs = kind(groups, **METHODS[curvature])

    def step(optimizer: torch.optim.Optimizer, index: int) -> None:
        x, y = case.batch(index)
        torch_step(optimizer, LOSS(plain(x), y))

    step(theirs, 0)
    model.load_state_dict(plain.state_dict())
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature=curvature, feedback=False, lr=0.3)
    opt.load_state_dict(copy.deepcopy(theirs.state_dict()))  # as torch's, it takes tensors as they are
    for index in (1, 2):
        opt.step(*case.batch(index))
        step(theirs, index)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
    names = {id(p): name for name, p in model.named_parameters()}
    own = dict(plain.named_parameters())
    back = kind([{"params": [own[names[id(p)]] for p in group["params"]]} for group in opt.param_groups], lr=0.5)
    back.load_state_dict(copy.deepcopy(opt.state_dict()))
    opt.step(*case.batch(3))
    step(back, 3)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
