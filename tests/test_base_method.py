"""Proposition 4: with feedback off every curvature is torch.optim's own optimizer."""

from __future__ import annotations

import copy
from typing import Any

import networks
import pytest
import torch
from torch import nn

from gtddp_compile import compile_optimizer

OPTIONS: list[tuple[str, type[torch.optim.Optimizer], dict[str, Any]]] = [
    ("sgd", torch.optim.SGD, {"lr": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1}),
    ("sgd", torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
    ("rmsprop", torch.optim.RMSprop, {"lr": 0.01}),
    ("rmsprop", torch.optim.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
    ("adam", torch.optim.Adam, {"lr": 0.01}),
    ("adam", torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.95)}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01}),
    ("adamw", torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.2}),
]


@pytest.mark.parametrize(("name", "base", "options"), OPTIONS)
@pytest.mark.parametrize("network", ["projection", "conv_residual"])
def test_equals_torch(network: str, name: str, base: type[torch.optim.Optimizer], options: dict[str, Any]) -> None:
    case = getattr(networks, network)()
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.model)
    loss = nn.CrossEntropyLoss()
    opt = compile_optimizer(ours, case.batch(0)[0], loss=loss, curvature=name, feedback=False, **options)
    reference = base(theirs.parameters(), **options)
    for step in range(20):
        x, y = case.batch(step)
        found = opt.step(x, y)
        reference.zero_grad()
        value = loss(theirs(x), y)
        value.backward()
        reference.step()
        torch.testing.assert_close(found, value.detach(), rtol=1e-12, atol=1e-12)
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for group in opt.param_groups:
        for p in group["params"]:
            q = dict(theirs.named_parameters())[_name(ours, p)]
            assert set(opt.state[p]) == set(reference.state[q])


def _name(model: nn.Module, parameter: nn.Parameter) -> str:
    return next(name for name, p in model.named_parameters() if p is parameter)
