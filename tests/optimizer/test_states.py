"""Parameter groups and state: whose they are, and what happens when parameters are trained later or replaced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from support import networks
from support.noisy import LOSS, Noisy, batch


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
        adam.zero_grad()
        LOSS(plain(x), y).backward()
        adam.step()
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
        adamw.zero_grad()
        LOSS(plain(x), y).backward()
        adamw.step()
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


METHODS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01, "centered": True}),
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
}


@pytest.mark.parametrize("given", ["parameters", "named_parameters", "trained", "two groups"])
@pytest.mark.parametrize("curvature", METHODS)
def test_states_of_torch_go_on_here_and_ours_there(curvature: str, given: str) -> None:
    case, (kind, options) = networks.mlp(), METHODS[curvature]
    plain, model = copy.deepcopy(case.model), copy.deepcopy(case.model)
    for one in (plain, model):
        next(one.parameters()).requires_grad_(given != "trained")
    named = list(plain.named_parameters())
    groups: Any = {
        "parameters": plain.parameters(),
        "named_parameters": reversed(named),
        "trained": [p for p in plain.parameters() if p.requires_grad],
        "two groups": [{"params": named[2:]}, {"params": named[:2], "lr": 0.02}],
    }[given]
    theirs = kind(groups, **options)

    def step(optimizer: torch.optim.Optimizer, index: int) -> None:
        x, y = case.batch(index)
        optimizer.zero_grad()
        LOSS(plain(x), y).backward()
        optimizer.step()

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


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"curvature": "sgd", "momentum": 0.9}, "another base method than adam: it has no amsgrad, betas"),
        ({}, "exp_avg has shape"),
    ],
)
def test_state_of_something_else_is_refused(theirs: dict[str, Any], said: str) -> None:
    model = Noisy()
    other = compile_optimizer(model, batch()[0], loss=LOSS, **{"curvature": "adam", **theirs})
    other.step(*batch())
    model.out = nn.Linear(6, 5)
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="adam")
    with pytest.raises(CompileError, match=said):
        opt.load_state_dict(other.state_dict())
    halves = [{"params": [p]} for p in model.parameters()]
    with pytest.raises(CompileError, match="6 parameter groups of 6 parameters without names"):
        opt.load_state_dict(torch.optim.Adam(halves).state_dict())
    named = list(model.named_parameters())
    halves = [{"params": named[::2]}, {"params": named[1::2], "lr": 0.5}]
    with pytest.raises(CompileError, match="other options for some parameters of module 'fc'"):
        opt.load_state_dict(torch.optim.Adam(halves).state_dict())
    with pytest.raises(CompileError, match="another base method than adam: it has no amsgrad"):
        opt.load_state_dict(torch.optim.SGD(model.parameters()).state_dict())
    assert torch.isfinite(opt.step(*batch()))


def test_a_loss_that_reads_parameters_is_refused() -> None:
    model = Noisy()

    def penalised(outputs: Tensor, targets: Tensor) -> Tensor:
        losses: Tensor = nn.functional.cross_entropy(outputs, targets, reduction="none") + model.fc.weight.abs().sum()
        return losses

    opt = compile_optimizer(model, batch()[0], loss=penalised, curvature="sgd")
    with pytest.raises(CompileError, match=r"reads trained parameters itself, fc\.weight"):
        opt.step(*batch())
    model.fc.weight.requires_grad_(False)
    assert torch.isfinite(opt.step(*batch()))
