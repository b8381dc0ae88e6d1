"""The paper's recursions start from ``V_xx = V_x V_xᵀ``: Proposition 5's factor is the gradient of the batch's cost."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from gtddp_compile.tools.demo.digits import Data, DigitsNet
from gtddp_compile.tools.demo.experiment import Scale
from support.networks import CASES
from support.oracle import Params, State, flat, jacobians, pack, trajectory, unpack

PAPER: dict[str, Any] = {"curvature": "sgd", "coupling": "block", "recursion": "substituted", "feedback_clip": None}


@pytest.mark.parametrize("backend", ["fast", "dense"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["mlp", "residual", "projection"])
def test_the_terminal_hessian_is_the_outer_product_of_the_terminal_gradient(
    name: str, reduction: str, backend: str
) -> None:
    """One step against explicit blocks: gradients by autograd of the user's own loss, no scale written down here."""
    case, lr = CASES[name](), 0.1
    (x, y), criterion = case.batch(0), nn.CrossEntropyLoss(reduction=reduction)
    stages, params = case.stages["asap"], {name: p.detach().clone() for name, p in case.model.named_parameters()}
    states = trajectory(stages, params, (x,))
    v_x = grad(lambda outputs: criterion(outputs, y))(states[-1][0])
    gains: list[tuple[Tensor, Tensor]] = []
    value_x, value_xx = v_x.flatten(), torch.block_diag(*(torch.outer(row, row) for row in v_x))
    for t in reversed(range(len(stages))):
        f_x, f_u = jacobians(stages[t], states[t], params)
        q_ux = f_u.T @ value_xx @ f_x
        k, feedback = -lr * f_u.T @ value_x, -lr * q_ux
        gains.insert(0, (k, feedback))
        value_x = f_x.T @ value_x + q_ux.T @ k
        whole = f_x.T @ value_xx @ f_x - lr * q_ux.T @ q_ux
        size = len(whole) // len(x)
        value_xx = torch.block_diag(*(whole[i : i + size, i : i + size] for i in range(0, len(whole), size)))
    expected: Params = dict(params)
    moved: State = (x,)
    for t, stage in enumerate(stages):
        k, feedback = gains[t]
        change = feedback @ (flat(moved) - flat(states[t])).flatten()
        assert t == 0 or change.norm() > 0
        expected |= unpack(pack(params, stage.names) + k + change, params, stage.names)
        moved = stage.step(moved, expected)
    optimizer = compile_optimizer(case.model, x, loss=criterion, lr=lr, backend=backend, **PAPER)
    optimizer.step(x, y)
    assert optimizer.diagnostics["clipped_radicands"] == 0
    for key, parameter in case.model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[key], rtol=0, atol=1e-9)


def test_the_papers_form_trains_at_the_papers_rate() -> None:
    """DIGITS, batch 8, sgd lr 0.01: the loss falls as the base method's does, and feedback corrects the open gain."""
    data = Data.load()
    torch.manual_seed(0)
    models = {"base": DigitsNet()}
    models["paper"], models["open"] = copy.deepcopy(models["base"]), copy.deepcopy(models["base"])
    options = {"base": {"curvature": "sgd", "feedback": False}, "paper": PAPER, "open": PAPER | {"feedback": "open"}}
    example, criterion = data.train[0][:8], nn.CrossEntropyLoss()
    steps = {
        kind: compile_optimizer(models[kind], example, loss=criterion, lr=0.01, **options[kind]).step for kind in models
    }

    def loss(kind: str) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(models[kind](data.train[0]), data.train[1]))

    shares, first = [], loss("base")
    for number, index in enumerate(data.batches(Scale(8, 400, 1), 0)):
        batch = data.train[0][index], data.train[1][index]
        before = {name: value.clone() for name, value in models["paper"].state_dict().items()}
        steps["base"](*batch)
        steps["paper"](*batch)
        if number % 10 == 0:
            models["open"].load_state_dict(before)
            steps["open"](*batch)
            moved, opened = (models[kind].state_dict() for kind in ("paper", "open"))
            shares.append(distance(moved, opened) / distance(opened, before))
    assert loss("base") < 0.6 * first
    assert loss("paper") == pytest.approx(loss("base"), rel=0.1)
    assert 0 < sorted(shares)[len(shares) // 2] < 0.1


def distance(left: Params, right: Params) -> float:
    """Euclidean, over all parameters."""
    return sum(float((left[name] - right[name]).square().sum()) for name in left) ** 0.5
