"""FOOF: the input factor's metric, against an independent computation and the dense backend."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import FOOF, Sketch, compile_optimizer, kernels
from support import exported

PAPER = {"coupling": "block", "recursion": "substituted"}


class Layers(nn.Module):
    """A convolution, a normalisation and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3, padding=1)
        self.norm = nn.GroupNorm(1, 3)
        self.fc = nn.Linear(48, 4)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(torch.tanh(self.norm(self.conv(x))).flatten(1))
        return scores


def network() -> Layers:
    torch.manual_seed(0)
    return Layers().double()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(6, 2, 4, 4, generator=generator).double(), torch.randint(0, 4, (6,), generator=generator))
        for _ in range(count)
    ]


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def published(model: Layers, steps: int, lr: float, damping: float, decay: float) -> None:
    """``δW = -lr G (A + λ ā I)⁻¹`` by hand: homogeneous inputs of the linear layer, channels of the convolution."""
    running: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for name in ("conv", "fc"):
        getattr(model, name).register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].detach()))
    for step, (x, y) in enumerate(batches(steps), start=1):
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        pixels = seen["conv"].movedim(1, -1).reshape(-1, 2)
        rows = F.pad(seen["fc"], (0, 1), value=1.0)
        keep = min(1 - 1 / step, decay)
        for name, factor in (("conv", pixels.T @ pixels / len(x)), ("fc", rows.T @ rows / len(x))):
            running[name] = keep * running[name] + (1 - keep) * factor if name in running else factor
        inverse = {
            name: torch.linalg.inv(a + damping * a.trace() / len(a) * torch.eye(len(a)).double())
            for name, a in running.items()
        }
        with torch.no_grad():
            both = torch.cat([model.fc.weight.grad, model.fc.bias.grad[:, None]], 1) @ inverse["fc"]
            model.fc.weight -= lr * both[:, :-1]
            model.fc.bias -= lr * both[:, -1]
            model.conv.weight -= lr * torch.einsum("mckl,cd->mdkl", model.conv.weight.grad, inverse["conv"])
            for plain in (model.conv.bias, model.norm.weight, model.norm.bias):  # 16 positions, input 1
                plain -= lr * plain.grad / (16 * (1 + damping))


@pytest.mark.parametrize("steps", [1, 4])
def test_without_feedback_it_is_the_published_method(steps: int) -> None:
    ours, theirs = network(), network()
    options = {"lr": 0.05, "damping": 0.1, "stat_decay": 0.5, "refresh": 1, "stat_every": 1}
    opt = compile_optimizer(
        ours, batches(1)[0][0], loss=nn.CrossEntropyLoss(), curvature=FOOF(**options), feedback=False
    )
    for x, y in batches(steps):
        opt.step(x, y)
    published(theirs, steps, 0.05, 0.1, 0.5)
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"coupling": 4}, {"rollout": "nonlinear"}, {"feedback": False}, PAPER])
def test_a_wide_layer_has_a_factor_of_every_block_of_its_inputs(options: dict[str, Any]) -> None:
    found = []
    for backend in ("fast", "dense"):
        model = network()
        curvature = FOOF(widest=20, lr=0.1)  # 49 homogeneous inputs: three blocks of 17, two zeros behind the last
        opt = compile_optimizer(
            model, batches(1)[0][0], loss=nn.CrossEntropyLoss(), curvature=curvature, backend=backend, **options
        )
        for x, y in batches(2):
            opt.step(x, y)
        assert opt.state[model.fc.weight]["factor_x"].shape == (3, 17, 17)
        found.append(parameters(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_factors_are_made_more_often_at_the_beginning() -> None:
    model = network()
    opt = compile_optimizer(model, batches(1)[0][0], loss=nn.CrossEntropyLoss(), lr=1e-9)
    changed, before = [], None
    for step, (x, y) in enumerate(batches(22)):
        opt.step(x, y)
        now = opt.state[model.conv.weight]["map_x"]
        if before is None or not torch.equal(now, before):
            changed.append(step)
        before = now
    assert changed == [0, 1, 2, 4, 8, 10, 20]


def sketched(seed: int, columns: int, **options: Any) -> tuple[Tensor, Tensor]:
    """A sketch of ``Γ`` with its change, of one convolution."""
    (x, _), weight = batches(1)[0], network().conv.weight.detach()
    shape, generator = (2, 3, 3), torch.Generator().manual_seed(1)
    maps = torch.linalg.cholesky(torch.tensor([[[2.0, 0.5], [0.5, 1.0]]]).double())
    g = torch.randn(6, 3, 4, 4, generator=generator).double()
    filters = kernels.channel_filters(maps, shape, columns, seed)
    direction = (torch.ones_like(weight), torch.arange(3).double())
    arguments = ((x,), g, (weight, torch.zeros(3).double()), (True, True))
    geometry = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    (gram,), change = kernels.conv_sketched(*arguments, filters, (0.7, 0.3), direction, (slice(0, 6),), **geometry)
    if not options.get("exact"):
        assert change is not None
        torch.testing.assert_close(change, kernels.conv_directional(*arguments, direction, **geometry))
        return gram, change
    white = kernels.conv_whitened((x,), g, (weight, None), maps)
    return kernels.conv_gram(white, *arguments[1:], (0.7, 0.3), **geometry), gram


def test_the_sketch_is_unbiased_and_its_change_exact() -> None:
    exact, _ = sketched(0, 4, exact=True)
    grams = torch.stack([sketched(seed, 4)[0] for seed in range(400)])
    error = (grams.mean(0) - exact).norm() / exact.norm()
    one = (grams[0] - exact).norm() / exact.norm()
    assert error < one / 8  # falls as the square root of the number of sketches, 20


@pytest.mark.parametrize("gram", ["exact", "sketch"])
def test_an_exported_module_takes_the_same_steps(tmp_path: Path, gram: str) -> None:
    model, same = network(), network()
    options = {} if gram == "exact" else {"gram": Sketch(4)}
    opt = compile_optimizer(model, batches(1)[0][0], loss=nn.CrossEntropyLoss(), **options)
    opt.program.export(tmp_path / "step.py")
    module = exported.load_module(tmp_path / "step.py")
    params = {name: value.detach().clone() for name, value in same.named_parameters()}
    state, buffers = module.init_state(params), {}
    for x, y in batches(3):
        opt.step(x, y)
        params, buffers, state, _ = module.step(params, buffers, state, x, y)
    found = torch.cat([value.flatten() for value in params.values()])
    torch.testing.assert_close(found, parameters(model), rtol=0, atol=1e-12)
