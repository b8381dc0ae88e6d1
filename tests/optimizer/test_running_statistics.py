"""Batch-norm's running statistics: the model's own, or with nothing left of what they began with."""

import copy

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import UpdateProgram, compile_optimizer, kernels
from support.compared import LOSS
from support.networks import make

STEPS = 13


def normed(tracked: int = 0, by_size: bool = False) -> nn.Module:
    """``shape`` makes torch.fx hand it on to torch.export."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(net.norm(net.conv(x))).flatten(1)
        return net.out(h / 2 if by_size and h.shape[0] > 3 else h)

    model = make(forward, conv=lambda: nn.Conv2d(1, 2, 3), norm=lambda: nn.BatchNorm2d(2), out=(8, 3))
    model.norm.num_batches_tracked += tracked
    return model


def batch(step: int, size: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(step)
    return torch.randn(size, 1, 4, 4, dtype=torch.float64), torch.randint(3, (size,))


def train(model: nn.Module, **options: object) -> list[tuple[Tensor, Tensor]]:
    """Means and variances of every batch, as torch finds them with the weights before the step."""
    optimizer = compile_optimizer(model, batch(0)[0], loss=LOSS, **options)
    seen = []
    for step in range(STEPS):
        x, y = batch(step, 6 if step % 2 else 5)
        h = copy.deepcopy(model).conv(x).detach().transpose(0, 1).flatten(1)
        seen.append((h.mean(1), h.var(1)))
        optimizer.step(x, y)
    return seen


def assert_averaged(model: nn.Module, tracked: int, **options: object) -> None:
    """Plain means while they have fewer than ten batches, then torch's moving average."""
    mean, var = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for k, (own_mean, own_var) in enumerate(train(model, **options), tracked + 1):
        gain = 1 / k if k < 10 else 0.1
        mean, var = (1 - gain) * mean + gain * own_mean, (1 - gain) * var + gain * own_var
    torch.testing.assert_close(model.norm.running_mean, mean, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(model.norm.running_var, var, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("by_size", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"memory": "recompute"}, {"backend": "dense"}, {"curvature": "sgd", "lr": 0.1,
                "running_statistics": "corrected"}], ids=["default", "recompute", "dense", "sgd"],
)  # fmt: skip
def test_nothing_is_left_of_the_beginning(options: dict[str, object], by_size: bool) -> None:
    model = normed(by_size=by_size)
    assert_averaged(model, 0, **options)
    assert model.norm.num_batches_tracked == STEPS


@pytest.mark.parametrize("tracked, options", [(50, {}), (0, {"running_statistics": "model"})])
def test_torch_s_own_where_asked_for_and_after_many_batches(tracked: int, options: dict[str, object]) -> None:
    assert_averaged(normed(tracked), 50, **options)


@pytest.mark.parametrize("options", [{}, {"memory": "recompute"}, {"backend": "dense"}], ids=str)
def test_a_cumulative_average_is_torch_s_to_rounding(options: dict[str, object]) -> None:
    """In the model's precision, whatever torch's default dtype is."""
    model = nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.Linear(4, 3)).double()
    theirs = copy.deepcopy(model[0])
    optimizer = compile_optimizer(model, torch.randn(5, 4).double(), loss=LOSS, **options)
    for _ in range(STEPS):
        x = torch.randn(5, 4).double()
        theirs(x)
        optimizer.step(x, torch.arange(5) % 3)
    torch.testing.assert_close(dict(model[0].named_buffers()), dict(theirs.named_buffers()), rtol=1e-15, atol=1e-16)


def test_under_look_ahead_they_are_of_the_place_that_a_batch_is_looked_at_from() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(8, 4).double(), torch.randn(8, 3).double()
    optimizer = compile_optimizer(model, x, loss=nn.MSELoss(), lookahead=0.05, running_statistics="model")
    optimizer.step(x, y)
    ahead, here = copy.deepcopy(model), copy.deepcopy(model)
    for own, param in zip(ahead.parameters(), model.parameters(), strict=True):
        own.data += 0.05 * optimizer.state[param]["last_step"]
    optimizer.step(x, y)
    ahead(x), here(x)
    torch.testing.assert_close(model[1].running_mean, ahead[1].running_mean, rtol=1e-12, atol=1e-12)
    assert float((ahead[1].running_mean - here[1].running_mean).abs().max()) > 1e-5


def test_updates_do_not_depend_on_it() -> None:
    models = normed(), normed()
    for model, how in zip(models, ("corrected", "model"), strict=True):
        train(model, running_statistics=how)
    assert all(map(torch.equal, *(model.parameters() for model in models)))
    assert not torch.allclose(models[0].norm.running_mean, models[1].norm.running_mean)


def test_a_saved_program_has_it(tmp_path) -> None:
    model, twin = normed(), normed()
    optimizer = compile_optimizer(model, batch(0)[0], loss=LOSS)
    optimizer.program.export(tmp_path / "program.json")
    loaded = compile_optimizer(twin, program=UpdateProgram.load(tmp_path / "program.json"))
    for step in range(3):
        optimizer.step(*batch(step))
        loaded.step(*batch(step))
    torch.testing.assert_close(twin.norm.running_mean, model.norm.running_mean, rtol=0, atol=0)
    assert "corrected=True" in optimizer.program.code


def test_moments_found_apart_advance_alike() -> None:
    x, counter = torch.randn(4, 3, 5, 5, dtype=torch.float64), torch.tensor(1)
    found = []
    for moments in (None, kernels.batch_moments(x)):
        buffers = torch.zeros(3).double(), torch.ones(3).double(), counter.clone()
        kernels.batch_norm(x, *buffers, None, None, training=True, corrected=True, moments=moments)
        found.append(torch.stack(buffers[:2]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-12)
    mean = x.mean((0, 2, 3))
    torch.testing.assert_close(found[0][0], mean / 2, rtol=1e-12, atol=1e-12)
