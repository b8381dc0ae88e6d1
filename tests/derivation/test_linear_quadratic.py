"""With linear dynamics and a quadratic loss the exact mode is optimal control itself: one step is the optimum.

The problem of a step is ``min J(u + δ) + ½ δᵀ M δ``. With dynamics linear in state and control it is one least-squares
problem in all controls; DDP with full coupling and the exact terminal Hessian has to find its solution in one step.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from support.quadratic import PROBLEMS, chain, data, single

EXACT: dict[str, Any] = {"curvature": "sgd", "loss": nn.MSELoss(), "terminal": "ggn", "feedback_clip": None}


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def optimum(model: nn.Module, x: Tensor, y: Tensor, lr: float) -> dict[str, Tensor]:
    """The least-squares solution in all controls together, by ``torch.linalg.lstsq`` on the network's Jacobian."""
    u = trained(model)

    def outputs(u: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, u, (x,))
        return found.flatten()

    jacobian = torch.func.jacrev(outputs)(u)
    columns = torch.cat([jacobian[name].reshape(y.numel(), -1) for name in u], 1)
    rows = torch.cat([columns * (2 / y.numel()) ** 0.5, torch.eye(columns.shape[1]).double() / lr**0.5])
    wanted = torch.cat([(y.flatten() - outputs(u)) * (2 / y.numel()) ** 0.5, torch.zeros(columns.shape[1]).double()])
    step = torch.linalg.lstsq(rows, wanted).solution.split([p.numel() for p in u.values()])
    return {name: p + part.reshape(p.shape) for (name, p), part in zip(u.items(), step, strict=True)}


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("backend", ["fast", "dense"])
@pytest.mark.parametrize("lr", [0.5, 100.0])
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_step_is_the_optimum_of_the_regularised_problem(name: str, lr: float, backend: Any, rollout: Any) -> None:
    model = PROBLEMS[name]()
    x, y = data(model)
    expected = optimum(model, x, y, lr)
    compile_optimizer(model, x, lr=lr, backend=backend, rollout=rollout, **EXACT).step(x, y)
    for key, value in trained(model).items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_one_step_reaches_the_lowest_loss(name: str, rollout: Any) -> None:
    """With the regulariser out of the way (lr 1e6) the loss after one step is the least-squares optimum's, to 1e-10."""
    model = PROBLEMS[name]()
    x, y = data(model)
    best = copy.deepcopy(model)
    best.load_state_dict(optimum(model, x, y, 1e12), strict=False)
    before = float(compile_optimizer(model, x, lr=1e6, rollout=rollout, **EXACT).step(x, y))
    lowest, found = (float(nn.functional.mse_loss(m(x), y).detach()) for m in (best, model))
    assert lowest < 0.9 * before
    assert found - lowest < 1e-10


def test_the_single_layer_is_the_normal_equations() -> None:
    """The derivation executed literally, lr 1e13: the weights of ordinary least squares."""
    model = single()
    x, y = data(model, 9)
    compile_optimizer(model, x, lr=1e13, backend="dense", **EXACT).step(x, y)
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(9, 1).double()], 1), y).solution
    torch.testing.assert_close(model.a.weight.detach(), solution[:4].T, rtol=0, atol=1e-10)
    torch.testing.assert_close(model.a.bias.detach(), solution[4], rtol=0, atol=1e-10)


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_the_chain_is_a_riccati_recursion(rollout: Any) -> None:
    """One sample, so that the state is the textbook's: gains by the discrete Riccati equation, written out here."""
    model, lr = chain(), 2.0
    x, y = data(model, 1)
    layers = [model.a, model.b, model.c, model.d]
    states = [x[0]]
    for layer in layers:
        states.append(layer(states[-1]).detach())
    s, v, gains = torch.eye(2).double() * 2 / 2, (states[-1] - y[0]), []
    for layer in reversed(layers):
        a = layer.weight.detach()
        m = torch.eye(len(a)).double() / lr
        k, feedback = -torch.linalg.solve(m + s, v), -torch.linalg.solve(m + s, s @ a)
        gains.insert(0, (k, feedback))
        s, v = a.T @ s @ a + (s @ a).T @ feedback, a.T @ v + (s @ a).T @ k
    change, controls = torch.zeros(4).double(), []
    for layer, (k, feedback) in zip(layers, gains, strict=True):
        controls.append(layer.bias.detach() + k + feedback @ change)
        change = layer.weight.detach() @ change + k + feedback @ change
    compile_optimizer(model, x, lr=lr, rollout=rollout, **EXACT).step(x, y)
    for layer, control in zip(layers, controls, strict=True):
        torch.testing.assert_close(layer.bias.detach(), control, rtol=0, atol=1e-10)


def test_feedback_is_what_makes_it_exact() -> None:
    """Open gains alone are not the joint optimum: the stages must know what those before have done."""
    model = chain()
    x, y = data(model)
    expected = optimum(model, x, y, 100.0)
    compile_optimizer(model, x, lr=100.0, feedback="open", **EXACT).step(x, y)
    assert max((value - expected[key]).abs().max() for key, value in trained(model).items()) > 1e-3
