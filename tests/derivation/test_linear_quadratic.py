"""With linear dynamics and a quadratic loss the exact mode is optimal control itself: one step is the optimum.

The problem of a step is ``min J(u + δ) + ½ δᵀ M δ``. With dynamics linear in state and control it is one least-squares
problem in all controls; DDP with full coupling and the exact terminal Hessian has to find its solution in one step.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from support import networks


def only_biases(model: nn.Module) -> nn.Module:
    """Additive controls: weights are the (time-varying) dynamics, biases decide."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def chain() -> nn.Module:
    """``x_{t+1} = A_t x_t + u_t``, four stages of different widths."""
    layers = {"a": (4, 3), "b": (3, 5), "c": (5, 4), "d": (4, 2)}
    return only_biases(networks.make(lambda net, x: net.d(net.c(net.b(net.a(x)))), **layers))


def shortcut() -> nn.Module:
    """The same with a waiting state and a coalition: ``A_4 (A_2 A_1 x + A_3 x)`` and their controls."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(net.b(net.a(net.stem(x))) + net.short(net.stem(x)) + net.stem(x))

    return only_biases(networks.make(forward, stem=(4, 3), a=(3, 4), b=(4, 3), short=(3, 3), head=(3, 2)))


def single() -> nn.Module:
    """Linear least squares: one layer, weight and bias."""
    return networks.make(lambda net, x: net.a(x), a=(4, 3))


PROBLEMS = {"single": single, "chain": chain, "shortcut": shortcut}


def data(model: nn.Module, size: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, dtype=torch.float64, generator=source)
    with torch.no_grad():
        outputs = model(x)
    return x, torch.randn(outputs.shape, dtype=torch.float64, generator=source)


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
