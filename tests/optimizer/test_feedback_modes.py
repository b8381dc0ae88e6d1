"""Feedback modes against the feedback matrix written out by automatic differentiation, sample by sample."""

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from support.compared import LOSS as CE
from support.networks import make
from support.recorded import batch as drawn

LR, B = 0.3, 5


def shortcut(net: nn.Module, x: Tensor) -> Tensor:
    h = torch.tanh(net.first(x))
    return net.head(h + torch.tanh(net.second(h)))


@pytest.fixture
def batch() -> tuple[nn.Module, Tensor, Tensor]:
    return make(shortcut, first=(4, 3), second=(3, 3), head=(3, 3)), drawn(B), torch.arange(B) % 3


def written_out(model: nn.Module, x: Tensor, y: Tensor, block: bool) -> Tensor:
    """``K`` of the layer ``second``: every sample's gradients in the layers behind ``first`` and in ``h``, stacked."""
    h = torch.tanh(model.first(x)).detach()
    phi, own, behind, state = [], [], [], []
    for i in range(B):
        leaf = h[i].clone().requires_grad_()
        loss = CE(model.head(leaf + torch.tanh(model.second(leaf)))[None], y[i : i + 1])
        parameters = (*model.second.parameters(), *model.head.parameters())
        *found, g = torch.autograd.grad(loss, (*parameters, leaf))
        flat = [part.flatten() for part in found]
        phi.append(loss.detach())
        own.append(torch.cat(flat[:2]))
        behind.append(torch.cat(flat[2:]))
        state.append(g)
    rows, head, columns = torch.stack(own), torch.stack(behind), torch.block_diag(*(g[None] for g in state))
    if block:  # rho behind the head: 1/B^2 (1 - rho gamma M^-1 gamma), sample by sample
        rho = torch.full((B,), B**-2.0, dtype=torch.float64)
        weights = torch.diag(rho * (1 - rho * LR * head.square().sum(1)))
    else:
        weights = torch.linalg.inv(torch.diag(B * torch.stack(phi)) + LR * (head @ head.T + rows @ rows.T))
    return -LR * rows.T @ weights @ columns


@pytest.mark.parametrize("form", ["linear", "nonlinear", "paper"])
def test_modes_are_the_singular_vectors_of_the_feedback_matrix(form: str, batch: tuple) -> None:
    model, x, y = batch
    how = {"coupling": "block", "recursion": "substituted"} if form == "paper" else {"rollout": form}
    optimizer = compile_optimizer(model, x, loss=CE, curvature="sgd", lr=LR, **how)
    before = [p.detach().clone() for p in model.parameters()]
    values, directions = optimizer.feedback_modes("second", x, y, k=3)
    (direction,) = directions.values()
    gain = written_out(model, x, y, form == "paper")
    assert direction.shape == (3, B, 3) and values.shape == (3,)
    torch.testing.assert_close(values, torch.linalg.svdvals(gain)[:3], rtol=1e-9, atol=0)
    torch.testing.assert_close((gain @ direction.flatten(1).T).norm(dim=0), values, rtol=1e-9, atol=0)
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_groups_answer_each_to_its_own_samples(batch: tuple) -> None:
    model, x, y = batch
    optimizer = compile_optimizer(model, x[:4], loss=CE, curvature="sgd", lr=LR, coupling=2)
    _, directions = optimizer.feedback_modes("second", x[:4], y[:4])
    assert next(iter(directions.values())).shape == (1, 4, 3)


@pytest.mark.parametrize("wrong", [{"player": "third"}, {"k": 0}])
def test_what_has_no_modes_is_refused(wrong: dict, batch: tuple) -> None:
    model, x, y = batch
    optimizer = compile_optimizer(model, x, loss=CE, curvature="rmsprop")
    with pytest.raises(CompileError, match="feedback modes"):
        optimizer.feedback_modes(**{"player": "second", "inputs": x, "targets": y, **wrong})


def test_the_base_method_has_none(batch: tuple) -> None:
    model, x, y = batch
    with pytest.raises(CompileError, match="feedback=True"):
        compile_optimizer(model, x, loss=CE, feedback=False).feedback_modes("second", x, y)
