"""Layers whose input has not moved: their new output comes from the Gram matrix of their inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from support.exported import largest, load_module, named, targets_for

LOSS = nn.CrossEntropyLoss()
BATCH, WIDE = 4, 7


class Attends(nn.Module):
    """Three layers read the input, two of them as they are, one of them further on."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(WIDE, 5), nn.Linear(WIDE, 5, bias=False), nn.Linear(WIDE, 5)
        self.inner, self.head = nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) * self.k(x), 1)
        return self.head(self.inner(scores) * torch.tanh(self.v(x)))


class Late(nn.Module):
    """The input is read again by a layer that decides last but one, and its output is the state itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(WIDE, 5), nn.Linear(WIDE, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)) + self.again(x))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDE, 5), nn.ReLU(), nn.Linear(5, 5), nn.Dropout(0.3), nn.Linear(5, 3))


def frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(WIDE, 5), nn.ReLU(), nn.Linear(5, 3))
    model[0].bias.requires_grad_(False)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {"plain": plain, "frozen": frozen, "attends": Attends, "late": Late}


def made(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    return model, torch.randn(BATCH, WIDE, dtype=dtype), targets_for(3, BATCH)


def trained(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    model, x, y = made(name, dtype)
    opt = compile_optimizer(model, x, loss=LOSS, **{"curvature": "sgd", "rollout": "nonlinear", "lr": 0.3, **options})
    opt.param_groups[0]["lr"] = 0.2
    for _ in range(3):
        opt.step(x, y)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def responds(opt: Any) -> int:
    return str(opt.program.code).count("m.respond(")


@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential"])
@pytest.mark.parametrize("name", ["frozen", "attends", "late"])
def test_update_is_that_of_the_derivation(name: str, schedule: str) -> None:
    fast, dense = (trained(name, schedule=schedule, backend=backend) for backend in ("fast", "dense"))
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"coupling": 2}, {"coupling": "block"}])
def test_options_under_which_the_layer_itself_has_to_run(options: dict[str, Any]) -> None:
    fast, dense = (trained("attends", backend=backend, **options) for backend in ("fast", "dense"))
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)


def test_an_option_that_changes_after_compilation() -> None:
    """Momentum is read at every step: with it the new weight is not the old one less a multiple of the gradient."""
    found = []
    for backend in ("fast", "dense"):
        model, x, y = made("attends")
        opt = compile_optimizer(model, x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=0.3, backend=backend)  # type: ignore[arg-type]
        for momentum in (0.0, 0.9, 0.9, 0.0):
            for group in opt.param_groups:
                group["momentum"] = momentum
            opt.step(x, y)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_which_layers_do() -> None:
    """Those whose input is still and wider than the batch; not in the last stage, whose output nobody compares."""
    counts = {
        name: responds(compile_optimizer(*made(name)[:2], loss=LOSS, curvature="sgd", rollout="nonlinear"))
        for name in MODELS
    }
    assert counts == {"plain": 1, "frozen": 1, "attends": 3, "late": 2}
    model, x, _ = made("plain")
    assert responds(compile_optimizer(model, torch.cat([x, x]), loss=LOSS, curvature="sgd", rollout="nonlinear")) == 0
    assert responds(compile_optimizer(model, x, loss=LOSS, curvature="adam", rollout="nonlinear")) == 0
    assert (
        responds(compile_optimizer(model, x, loss=LOSS, curvature="sgd", rollout="nonlinear", memory="recompute")) == 0
    )


def test_layers_of_one_input_share_its_gram_matrix() -> None:
    model, x, _ = made("attends")
    code = compile_optimizer(model, x, loss=LOSS, curvature="sgd", rollout="nonlinear").program.code
    assert code.count(" = linear_inputs(") == 1 and code.count("inputs=inputs_x") == 3


def test_micro_batches_run_the_layer_on_the_update_of_them_all() -> None:
    found = []
    for accumulated in (False, True):
        model, x, y = made("late")
        opt = compile_optimizer(model, x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=0.3, coupling=2)
        if accumulated:
            opt.accumulate(x[:2], y[:2])
            opt.step(x[2:], y[2:])
        else:
            opt.step(x, y)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_micro_batches_of_a_program_with_responses() -> None:
    """With one micro-batch alone there is nothing to add up."""
    found = []
    for accumulated in (False, True):
        model, x, y = made("late")
        opt = compile_optimizer(model, x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=0.3)
        assert responds(opt) == 2
        if accumulated:
            opt.accumulate(x, y)
        loss = opt.step() if accumulated else opt.step(x, y)
        assert torch.isfinite(loss)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("suffix", [".py", ".json"])
def test_exported_programs(suffix: str, tmp_path: Path) -> None:
    model, x, y = made("attends")
    opt = compile_optimizer(copy.deepcopy(model), x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=0.3)
    path = tmp_path / f"step{suffix}"
    opt.program.export(path)
    ours = copy.deepcopy(model)
    own = compile_optimizer(ours, x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=0.3)
    if suffix == ".py":
        module, (params, buffers) = load_module(path), named(model)
        state = module.init_state(params)
        for _ in range(2):
            params, buffers, state, _ = module.step(params, buffers, state, x, y)
    else:
        theirs = copy.deepcopy(model)
        other = compile_optimizer(theirs, x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=0.3)
        other.adopt(type(opt.program).load(path))
        for _ in range(2):
            other.step(x, y)
        params = dict(theirs.named_parameters())
    for _ in range(2):
        own.step(x, y)
    assert largest(dict(ours.named_parameters()), params) < 1e-9


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_autocast_sees_no_rounding_of_its_own(momentum: float) -> None:
    """With a vanishing learning rate nothing moves, neither what is made from ``X Xᵀ`` nor what runs again."""
    model, x, y = made("attends", torch.float32)
    opt = compile_optimizer(model, x, loss=LOSS, curvature="sgd", rollout="nonlinear", lr=1e-30, momentum=momentum)
    with torch.autocast("cpu", torch.bfloat16):
        opt.step(x, y)
    changes = [stage["change"] for stage in opt._diagnostics._stages.values() if "change" in stage]
    assert responds(opt) == 3 and changes and all(float(change.abs().max()) == 0 for change in changes)
