"""The length of a step, chosen by forward passes on its own batch."""

import copy

import pytest
import torch
from torch import nn

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support.compared import LOSS, flat
from support.networks import Case, seeded


def network() -> nn.Sequential:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3))

    return seeded(build)


X, Y = Case(nn.Identity(), (5,)).batch(1, 12)


def stepped(model: nn.Module, **options: object) -> CompiledOptimizer:
    opt = compile_optimizer(model, X, loss=LOSS, **options)
    torch.manual_seed(7)
    opt.step(X, Y)
    return opt


@pytest.mark.parametrize("curvature", ["foof", "sgd"])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_the_best_of_the_grid_is_taken(curvature: str, rollout: str) -> None:
    start, whole, found = network(), network(), network()
    options = {"curvature": curvature, "lr": 3.0, "rollout": rollout}
    stepped(whole, **options)
    length = stepped(found, line_search=(0.125, 0.5, 1.0, 4.0), **options).diagnostics["step_length"]
    losses = {}
    for tried in (0.0, 0.125, 0.5, 1.0, 4.0):
        model = copy.deepcopy(start)
        torch.nn.utils.vector_to_parameters(torch.lerp(flat(start), flat(whole), tried), model.parameters())
        torch.manual_seed(7)
        losses[tried] = LOSS(model(X), Y).item()
    assert length == min(losses, key=losses.__getitem__)
    torch.testing.assert_close(flat(found), torch.lerp(flat(start), flat(whole), length), rtol=0, atol=1e-12)


def test_no_step_is_taken_that_is_worse_than_none() -> None:
    start, found = network(), network()
    opt = stepped(found, curvature="sgd", lr=1.0, line_search=(1e6,))
    assert opt.diagnostics["step_length"] == 0.0
    assert torch.equal(flat(found), flat(start))


def test_buffers_and_random_numbers_advance_as_in_one_step() -> None:
    plain, found = network(), network()
    stepped(plain, curvature="sgd", lr=0.1)
    after = torch.rand(3)
    stepped(found, curvature="sgd", lr=0.1, line_search=(0.5, 1.0))
    assert torch.equal(torch.rand(3), after)
    assert all(map(torch.equal, plain.buffers(), found.buffers()))


def test_inertia_remembers_the_step_that_was_taken() -> None:
    start, found = network(), network()
    opt = stepped(found, curvature="sgd", lr=1.0, inertia=0.5, line_search=(0.25,))
    assert opt.diagnostics["step_length"] == 0.25
    last = torch.cat([opt.state[p]["last_step"].flatten() for p in found.parameters()])
    torch.testing.assert_close(last, flat(found) - flat(start), rtol=0, atol=1e-12)


def test_what_it_cannot_be_used_with_is_refused(tmp_path: object) -> None:
    opt = compile_optimizer(network(), X, loss=LOSS, line_search=(0.5,))
    for call in (lambda: opt.accumulate(X, Y), lambda: opt.program.export(f"{tmp_path}/step.py"),
                 lambda: compile_optimizer(network(), X, loss=LOSS, line_search=(0.0,))):  # fmt: skip
        with pytest.raises(CompileError, match="line_search"):
            call()
