"""Layers over positions under a diagonal metric: statistics and ``Γ`` from per-sample gradients that are made once."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer
from gtddp_compile.kernels import linear
from support.exported import largest, load_module, named

LOSS = nn.CrossEntropyLoss()
BATCH, POSITIONS, INPUTS, WIDTH = 4, 2, 9, 10
CURVATURES: dict[str, dict[str, Any]] = {
    "rmsprop": {"curvature": "rmsprop", "lr": 5e-3, "momentum": 0.5, "centered": True},
    "adam": {"curvature": "adam", "lr": torch.tensor(1e-2, dtype=torch.float64), "amsgrad": True},
    "adamw": {"curvature": "adamw", "lr": 1e-2},
}


class Tokens(nn.Module):
    """Two layers over positions, one of them without a bias, and one whose weight is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.frozen, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        self.frozen.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        h = h + torch.tanh(self.inner(h))
        return self.head(torch.tanh(self.frozen(h)).mean(1))


def made() -> nn.Module:
    torch.manual_seed(0)
    return Tokens().double()


def batch(step: int, samples: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(samples, POSITIONS, INPUTS, generator=generator, dtype=torch.float64)
    return x, torch.arange(samples) % 3


def optimizer(model: nn.Module, **options: Any) -> CompiledOptimizer:
    return compile_optimizer(model, batch(0)[0], loss=LOSS, **options)


def trained(steps: int = 4, **options: Any) -> tuple[nn.Module, CompiledOptimizer]:
    model = made()
    opt = optimizer(model, **options)
    for step in range(steps):
        opt.step(*batch(step))
    return model, opt


@pytest.fixture(params=[1, 80, 2**20], ids="chunk {}".format)
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Per-sample gradients one row, some rows, and all rows at a time."""
    monkeypatch.setattr(linear, "CHUNK", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("coupling", ["full", 3])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_equals_the_dense_backend(curvature: str, coupling: str | int) -> None:
    ours, opt = trained(**CURVATURES[curvature], coupling=coupling)
    theirs, dense = trained(**CURVATURES[curvature], coupling=coupling, backend="dense")
    assert opt.program.code.count("m.observe_gram") == 2
    assert largest(dict(ours.named_parameters()), dict(made().named_parameters())) > 1e-3
    assert largest(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-9
    assert largest(opt.state_dict()["state"], dense.state_dict()["state"]) < 1e-9


def test_a_failed_step_leaves_the_states() -> None:
    model = made()
    opt = optimizer(model, curvature="adam", lr=1e-2)
    opt.step(*batch(0))
    before = copy.deepcopy(opt.state_dict()["state"])
    parameters = copy.deepcopy(model.state_dict())
    x, y = batch(1)
    x[0, 0, 0] = torch.nan
    opt.step(x, y)
    assert opt.diagnostics["skipped"]
    assert largest(model.state_dict(), parameters) == 0
    assert largest(opt.state_dict()["state"], before) == 0


def test_micro_batches() -> None:
    parts, whole = made(), made()
    ours, theirs = optimizer(parts, curvature="adam", lr=1e-2), optimizer(whole, curvature="adam", lr=1e-2, coupling=4)
    for step in range(3):
        x, y = batch(step, 8)
        ours.accumulate(x[:4], y[:4])
        ours.step(x[4:], y[4:])
        theirs.step(x, y)
    assert largest(dict(parts.named_parameters()), dict(whole.named_parameters())) < 1e-9


def test_compiled() -> None:
    torch._dynamo.reset()
    ours, _ = trained(1, curvature="rmsprop")
    theirs, _ = trained(1, curvature="rmsprop", compile={"backend": "eager", "fullgraph": True})
    assert largest(dict(ours.named_parameters()), dict(theirs.named_parameters())) < 1e-9


@pytest.mark.parametrize("suffix", [".py", ".json"])
def test_exported(suffix: str, tmp_path: Path) -> None:
    ours, opt = trained(2, curvature="adam", lr=1e-2)
    path, theirs = tmp_path / f"step{suffix}", made()
    opt.program.export(path)
    if suffix == ".py":
        module, (params, buffers) = load_module(path), named(theirs)
        state = module.init_state(params)
        for step in range(2):
            params, buffers, state, _ = module.step(params, buffers, state, *batch(step))
    else:
        other = optimizer(theirs, curvature="adam", lr=1e-2)
        other.adopt(type(opt.program).load(path))
        for step in range(2):
            other.step(*batch(step))
        params = {name: value.detach() for name, value in theirs.named_parameters()}
    assert largest(dict(ours.named_parameters()), params) < 1e-9
