"""Tied weights against explicit matrices: stages by hand, the whole batch in one state, torch.linalg for the gains.

The control of a weight that is used again waits in the state, as a vector beside the samples' values. Nothing here is
the package's own but the update that is tested.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian
from torch.func import grad

from gtddp_compile import compile_optimizer
from support.networks import CASES, make
from support.oracle import Params, State, flat, jacobians, pack, trajectory, unpack

SAMPLES, WIDTH, CLASSES, LR = 3, 3, 2, 0.5
Stage = Callable[[Tensor, Tensor], Tensor]
"""``f_t(state, control)``, flat vectors over the whole batch."""


def solve(
    stages: Sequence[Stage], start: Tensor, controls: Sequence[Tensor], losses: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """New controls: Riccati with Proposition 5's terminal and ``Q_uu = I/lr + f_uᵀ V f_u``, then a sweep forward."""
    states = [start]
    for stage, u in zip(stages, controls, strict=True):
        states.append(stage(states[-1], u))
    per_sample = jacobian(losses, states[-1])  # rows: samples; block-diagonal
    v_x, v_xx = per_sample.sum(0) / SAMPLES, per_sample.T @ per_sample / SAMPLES
    gains: list[tuple[Tensor, Tensor]] = []
    for stage, x, u in reversed(list(zip(stages, states, controls, strict=False))):
        f_x, f_u = jacobian(stage, (x, u))
        q_uu = torch.eye(len(u), dtype=u.dtype) / LR + f_u.T @ v_xx @ f_u
        q_ux = f_u.T @ v_xx @ f_x
        k, feedback = -torch.linalg.solve(q_uu, f_u.T @ v_x), -torch.linalg.solve(q_uu, q_ux)
        v_x, v_xx = f_x.T @ v_x + q_ux.T @ k, f_x.T @ v_xx @ f_x + q_ux.T @ feedback
        gains.insert(0, (k, feedback))
    state, found = start, []
    for stage, x, u, (k, feedback) in zip(stages, states, controls, gains, strict=False):
        found.append(u + k + feedback @ (state - x))
        state = stage(state, found[-1])
    return found


def network(net: nn.Module, x: Tensor) -> Tensor:
    """A matrix that comes back after another layer."""
    return net.c(torch.tanh(net.a(torch.tanh(net.b(torch.tanh(net.a(x)))))))


def reused(x: Tensor, targets: Tensor) -> tuple[list[Stage], Tensor, Callable[[Tensor], Tensor]]:
    square = WIDTH * WIDTH

    def first(state: Tensor, u: Tensor) -> Tensor:
        return torch.cat([torch.tanh(state.view(SAMPLES, -1) @ u.view(WIDTH, WIDTH).T).flatten(), u])

    def second(state: Tensor, u: Tensor) -> Tensor:
        h, waiting = state[:-square].view(SAMPLES, -1), state[-square:].view(WIDTH, WIDTH)
        return torch.tanh(torch.tanh(h @ u.view(WIDTH, WIDTH).T) @ waiting.T).flatten()

    def third(state: Tensor, u: Tensor) -> Tensor:
        return (state.view(SAMPLES, -1) @ u.view(CLASSES, WIDTH).T).flatten()

    return [first, second, third], x.flatten(), lambda y: (y.view(SAMPLES, -1) - targets).square().mean(1)


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_tied_weights_against_explicit_matrices(backend: str) -> None:
    torch.manual_seed(0)
    model = make(network, a=(WIDTH, WIDTH, False), b=(WIDTH, WIDTH, False), c=(WIDTH, CLASSES, False))
    x, y = torch.randn(SAMPLES, WIDTH).double(), torch.randn(SAMPLES, CLASSES).double()
    parameters = list(model.parameters())
    stages, start, losses = reused(x, y)
    before = [p.detach().clone() for p in parameters]
    expected = solve(stages, start, [p.flatten() for p in before], losses)
    options: dict[str, Any] = {"terminal": "gradient", "feedback_clip": None, "rollout": "nonlinear"}
    opt = compile_optimizer(model, x, loss=mean_square, curvature="sgd", lr=LR, backend=backend, **options)
    assert len(opt.graph.players[0].uses) == 2, "one player, two uses"
    opt.step(x, y)
    for p, old, new in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(p.detach().flatten(), new, rtol=0, atol=1e-11)
        assert (new - old.flatten()).abs().max() > 1e-3


# --- the paper's recursions start from ``V_xx = V_x V_xᵀ``: Proposition 5's factor is the gradient of the batc ---


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
