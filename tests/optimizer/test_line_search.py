"""The length of a step, chosen by forward passes on its own batch."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support.compared import flat


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.3), nn.Linear(8, 3)).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(12, 5, generator=generator).double(), torch.randint(0, 3, (12,), generator=generator)


def stepped(model: nn.Module, **options: object) -> CompiledOptimizer:
    x, y = batch()
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options)  # type: ignore[arg-type]
    torch.manual_seed(7)
    opt.step(x, y)
    return opt


@pytest.mark.parametrize("curvature", ["foof", "sgd"])
@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_the_best_of_the_grid_is_taken(curvature: str, rollout: str) -> None:
    start, whole, found = network(), network(), network()
    options = {"curvature": curvature, "lr": 3.0, "rollout": rollout}
    stepped(whole, **options)
    length = stepped(found, line_search=(0.125, 0.5, 1.0, 4.0), **options).diagnostics["step_length"]
    x, y = batch()
    losses = {}
    for tried in (0.0, 0.125, 0.5, 1.0, 4.0):
        model = copy.deepcopy(start)
        torch.nn.utils.vector_to_parameters(torch.lerp(flat(start), flat(whole), tried), model.parameters())
        torch.manual_seed(7)
        losses[tried] = nn.CrossEntropyLoss()(model(x), y).item()
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
    pairs = zip(plain.buffers(), found.buffers(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_inertia_remembers_the_step_that_was_taken() -> None:
    start, found = network(), network()
    opt = stepped(found, curvature="sgd", lr=1.0, inertia=0.5, line_search=(0.25,))
    assert opt.diagnostics["step_length"] == 0.25
    last = torch.cat([opt.state[p]["last_step"].flatten() for p in found.parameters()])
    torch.testing.assert_close(last, flat(found) - flat(start), rtol=0, atol=1e-12)


def test_what_it_cannot_be_used_with_is_refused(tmp_path: object) -> None:
    x, y = batch()
    opt = compile_optimizer(network(), x, loss=nn.CrossEntropyLoss(), line_search=(0.5,))
    with pytest.raises(CompileError, match="line_search"):
        opt.accumulate(x, y)
    with pytest.raises(CompileError, match="line_search"):
        opt.program.export(f"{tmp_path}/step.py")
    with pytest.raises(CompileError, match="line_search"):
        compile_optimizer(network(), x, loss=nn.CrossEntropyLoss(), line_search=(0.0,))
