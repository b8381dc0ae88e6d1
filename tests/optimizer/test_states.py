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
    with pytest.raises(CompileError, match="1 parameter groups of 6 parameters, this optimizer 3 of 6"):
        opt.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
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
