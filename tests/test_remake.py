"""Parts of stages that are made again in the forward sweep: the same step, and less held."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from gtddp_compile.kernels import sweep
from gtddp_compile.lowering import costs
from gtddp_compile.passes import p10_remake as remake


class Joined(nn.Module):
    """Convolutions with batch-norms, an identity shortcut and one with a mapping, and a perceptron behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3)
        self.a, self.a_norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.b, self.b_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.mapped, self.mapped_norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 4, 1)
        self.norm, self.up, self.down = nn.LayerNorm(4), nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first_norm(self.first(x)))
        x = F.relu(x + self.a_norm(self.a(x)))
        x = F.relu(self.b_norm(self.b(x)) + self.mapped_norm(self.mapped(x)))
        tokens = self.norm(self.last(x).flatten(2).mT)
        return self.down(F.gelu(self.up(tokens))).mean(1)


def step(backend: str, training: bool = True) -> tuple[list[Tensor], str]:
    """New parameters after two steps, and the program's text."""
    torch.manual_seed(0)
    model = Joined().double().train(training)
    x, y = torch.randn(5, 2, 3, 3, dtype=torch.float64), torch.randint(3, (5,))
    options = {"curvature": "sgd", "lr": 0.3, "backend": backend, "rollout": "nonlinear"}
    optimizer = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options)
    for _ in range(2):
        optimizer.step(x, y)
    return [p.detach() for p in model.parameters()], optimizer.program.code


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever holds a byte less is made again, and layers keep what they read, not their per-sample gradients."""
    monkeypatch.setattr(costs, "KEEP", 0.0)
    monkeypatch.setattr(remake, "LEAST", 1)
    monkeypatch.setattr(remake, "WORTH", 0.0)
    monkeypatch.setattr(remake, "AIM", 0.0)
    monkeypatch.setattr(remake, "MOVING", 0)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("size", [1, 2**19], ids=["by sample", "at once"])
def test_step_is_the_derived_one(eager: None, training: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "AGAIN", size)
    for limit in ("FEW", "SMALL"):  # and batch-norms find their moments as they do in large networks
        monkeypatch.setattr(importlib.import_module("gtddp_compile.kernels.batch_norm"), limit, 1)
    found, code = step("fast", training)
    expected, _ = step("dense", training)
    made = [line.partition(" = remake(")[0].strip() for line in code.splitlines() if " = remake(" in line]
    assert len(made) == 5, "first, a, b and what joins the mapping to it, the perceptron's activation"
    assert any("gh_up_again" in line for line in made)
    assert code.count("by_entry=True") == len(made)
    assert code.count(" = batch_known(") == (4 if training else 0)
    for ours, derived in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, derived, rtol=0, atol=1e-9)


def test_small_networks_make_nothing_again() -> None:
    assert " = remake(" not in step("fast")[1]


def network(depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for index in range(depth):
        layers += [nn.Conv2d(16 if index else 3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4))


def test_no_more_is_made_again_than_the_aim_asks_for(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for aim in (0.0, 1.0, 1.1, 1.2, 1.3, 10.0):
        monkeypatch.setattr(remake, "AIM", aim)
        options = {"curvature": "sgd", "lr": 0.1, "gram": "coarse", "rollout": "nonlinear"}
        optimizer = compile_optimizer(network(5), torch.randn(4, 3, 8, 8), loss=nn.CrossEntropyLoss(), **options)
        counts.append(optimizer.program.code.count(" = remake("))
    assert counts == sorted(counts, reverse=True) and counts[-1] == 0 and len(set(counts)) > 2, counts


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_some_samples_at_a_time_give_what_all_give(
    memory: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the values' precisions and layout are."""
    torch.manual_seed(0)
    x, y, g = (torch.randn(5, 3, 4, 2).to(memory_format=memory) for _ in range(3))

    def made() -> tuple[Tensor | None, ...]:
        values, read = (x.bfloat16(), y), (True, False, True)
        return sweep.remake(lambda p, b, *v: (v[0] + v[1].sin(),), {}, {}, values, (g,), (True, True), read, True)

    expected = made()
    monkeypatch.setattr(sweep, "AGAIN", 1)
    for ours, whole in zip(made(), expected, strict=True):
        assert (ours is None) == (whole is None)
        if ours is not None and whole is not None:
            assert ours.dtype == whole.dtype
            torch.testing.assert_close(ours, whole, rtol=0, atol=0)
