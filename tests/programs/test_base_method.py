"""Proposition 4: with feedback off every curvature is torch.optim's own optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from support import networks

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


class TwoBranches(nn.Module):
    """The second branch draws after the first one but depends on no player of it, as a decoder does on its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.other, self.head = (nn.Linear(3, 3) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the branches, (batch, 3)."""
        encoded = F.dropout(self.second(F.dropout(torch.tanh(self.first(x)), 0.4)), 0.3)
        return self.head(F.dropout(torch.tanh(self.other(F.dropout(x, 0.5))) + encoded, 0.2))


BY_HAND = {"first": 0, "second": 1, "other": 3, "head": 5}


@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential", BY_HAND], ids=str)
def test_random_numbers_are_drawn_in_the_model_s_order(schedule: str | dict[str, int]) -> None:
    torch.manual_seed(0)
    ours = TwoBranches().double().train()
    theirs = copy.deepcopy(ours)
    x, y, loss = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1]), nn.CrossEntropyLoss()
    opt = compile_optimizer(ours, x, loss=loss, curvature="sgd", lr=0.1, feedback=False, schedule=schedule)
    draws = [opt.graph.stage_of[op.name] for op in opt.graph.ops.ops if op.random]
    assert len(draws) == 4 and draws == sorted(draws)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    for seed in range(3):
        torch.manual_seed(seed)
        opt.step(x, y)
        torch.manual_seed(seed)
        reference.zero_grad()
        loss(theirs(x), y).backward()
        reference.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-14)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("schedule", ["asap", "alap"])
def test_feedback_with_draws_in_later_stages_equals_the_dense_derivation(schedule: str, rollout: Any) -> None:
    """A dropout of the input runs beside a player: its value never moves, whichever stage computes it."""
    torch.manual_seed(0)
    model = TwoBranches().double().train()
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0, 1, 2, 0, 1])
    found = []
    for backend in ("fast", "dense"):
        ours = copy.deepcopy(model)
        options = {"curvature": "sgd", "lr": 0.5, "schedule": schedule, "backend": backend, "rollout": rollout}
        opt = compile_optimizer(ours, x, loss=nn.CrossEntropyLoss(), **options)
        torch.manual_seed(1)
        for _ in range(3):
            opt.step(x, y)
        found.append(torch.cat([p.detach().flatten() for p in ours.parameters()]))
    assert (found[0] - torch.cat([p.detach().flatten() for p in model.parameters()])).abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_a_schedule_against_the_model_s_draws_is_refused() -> None:
    together = {"first": 0, "second": 1, "other": 1, "head": 2}
    with pytest.raises(CompileError, match="order of random draws"):
        compile_optimizer(
            TwoBranches().train(), torch.randn(5, 3), loss=nn.CrossEntropyLoss(), curvature="sgd", schedule=together
        )
