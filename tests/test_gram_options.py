"""Gram matrices in bfloat16, and of every few steps: what they equal, what is held, how they travel, refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from exported import load_module, named
from torch import Tensor, nn

from gtddp_compile import CompileError, LowPrecision, Refreshed, UpdateProgram, compile_optimizer, kernels
from gtddp_compile.kernels.pooled import gram_levels, held_blocks
from gtddp_compile.lowering import costs


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + sum(shape)))


CONV: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 2), "groups": 2}
LAYERS: dict[str, tuple[str, tuple[Tensor, ...], Tensor, Tensor, dict[str, Any]]] = {
    "sequence": ("linear", (draw(5, 2, 3, 4),), draw(5, 2, 3, 3), draw(3, 4), {}),
    "conv": ("conv", (draw(5, 4, 5, 6),), draw(5, 6, 3, 2), draw(6, 2, 3, 3), CONV),
    "frames": ("conv", (draw(5, 2, 4, 5, 6),), draw(5, 2, 6, 3, 2), draw(6, 2, 3, 3), CONV),
}


def positions(layer: str) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients position by position, groups apart: ``(B, G, T, n)`` and ``(B, G, T, m)``."""
    prefix, (x,), g, weight, options = LAYERS[layer]
    if prefix == "linear":
        return x.flatten(1, 2).unsqueeze(1), g.flatten(1, 2).unsqueeze(1)
    images, gradients = (value.flatten(0, 1) if layer == "frames" else value for value in (x, g))
    where = {name: options[name] for name in ("stride", "padding", "dilation")}
    patches = F.unfold(images, weight.shape[2:], **where).unflatten(1, (2, -1)).mT  # (B k, G, T, n)
    rows = gradients.flatten(2).unflatten(1, (2, -1)).mT
    return tuple(v.unflatten(0, (5, -1)).transpose(1, 2).flatten(2, 3) for v in (patches, rows))  # type: ignore


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("diagonal", [True, False])
def test_parts_are_those_of_mean_inputs_and_gradients(layer: str, bias: bool, diagonal: bool) -> None:
    prefix, operands, g, weight, options = LAYERS[layer]
    groups = options.get("groups", 1)
    by_output, by_input = draw(weight.shape[0], seed=1).abs() + 0.1, draw(groups, weight.shape[1], seed=2).abs() + 0.1
    table = (by_output.reshape(groups, -1, 1) * by_input[:, None]).reshape(*weight.shape[:2])
    metric = table.reshape(*table.shape, *(1,) * (weight.dim() - 2)).expand_as(weight) if diagonal else 0.3
    x, rows = positions(layer)
    if diagonal:
        x = x * by_input.repeat_interleave(weight[0, 0].numel(), 1)[:, None].sqrt()
        rows = rows * by_output.reshape(groups, 1, -1).sqrt()
    scale = 1.0 if diagonal else 0.3
    gamma = (rows.sum(2).unsqueeze(3) * x.mean(2).unsqueeze(2)).flatten(1)
    squares = (x.square().sum(3) * rows.square().sum(3)).sum((1, 2))
    arguments = (operands, g, (weight, None), (True, bias), (metric, 0.2) if bias else (metric,))
    found, shared, own = getattr(kernels, f"{prefix}_pooled")(*arguments, **options)
    torch.testing.assert_close(found, scale * squares, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(shared, scale * (gamma @ gamma.mT), rtol=1e-10, atol=1e-12)
    total = g.movedim(-1 if prefix == "linear" else g.dim() - 3, 1).flatten(2).sum(2)
    torch.testing.assert_close(own.expand(5, 5), 0.2 * (total @ total.mT) if bias else torch.zeros(5, 5).double())


@pytest.mark.parametrize("size", [1e-25, 1.0])
def test_levels_of_what_has_them_are_found_again(size: float) -> None:
    rows = [slice(0, 3), slice(3, 5)]
    factors = draw(5, 2) * size**0.5
    parts = (draw(5).square() * size, factors @ factors.mT, draw(5, 5) * size)
    blocks = held_blocks(parts, (torch.tensor(0.3, dtype=torch.float64), torch.tensor(1.7, dtype=torch.float64)), rows)
    for found, expected in zip(gram_levels(blocks, parts, rows), (0.3, 1.7), strict=True):
        assert float(found) == pytest.approx(expected, rel=1e-9)
    nothing = (torch.zeros(2), torch.zeros(2, 2), torch.zeros(()))
    assert [float(level) for level in gram_levels((torch.eye(2),), nothing, [slice(0, 2)])] == [0.0, 0.0]


class Small(nn.Module):
    """A convolution, and a layer with positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.mix, self.head = nn.Conv2d(2, 3, 3, padding=1), nn.Linear(16, 5), nn.Linear(15, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(torch.tanh(self.conv(x)).flatten(2))).flatten(1))


@pytest.fixture(autouse=True)
def every_layer(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small layers too, and no gradients that are kept."""
    monkeypatch.setattr(costs, "NEGLIGIBLE", 0.0)
    monkeypatch.setattr(costs, "KEEP", 0.0)
    yield


def batch(seed: int, samples: int = 6) -> tuple[Tensor, Tensor]:
    return draw(samples, 2, 4, 4, seed=seed), torch.arange(samples) % 3


def made(gram: Any, **options: Any) -> tuple[Small, Any]:
    model = Small()
    chosen = {"curvature": "adam", "lr": 0.01, **options}
    return model, compile_optimizer(model, batch(0)[0], loss=nn.CrossEntropyLoss(), gram=gram, **chosen)


def train(gram: Any, steps: int, **options: Any) -> list[Tensor]:
    model, optimizer = made(gram, **options)
    for seed in range(steps):
        optimizer.step(*batch(seed))
    return [p.detach().clone() for p in model.parameters()]


def same(left: list[Tensor], right: list[Tensor]) -> None:
    for one, other in zip(left, right, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"curvature": "sgd", "momentum": 0.9}, {"coupling": 4}])
def test_a_step_that_refreshes_is_the_exact_one(options: dict[str, Any]) -> None:
    same(train(Refreshed(1, of="exact"), 3, **options), train("exact", 3, **options))
    same(train(Refreshed(2, of="exact"), 1, **options), train("exact", 1, **options))
    model, held = made(Refreshed(2, of="exact"), **options)
    held.step(*batch(0))
    held.step(*batch(1, samples=5))  # between: its own batch's size
    other, exact = made("exact", **options)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    exact.load_state_dict(copy.deepcopy(held.state_dict()))
    held.step(*batch(2))
    exact.step(*batch(2))
    same(list(model.parameters()), list(other.parameters()))


def test_between_refreshes_the_levels_are_held_and_the_matrix_is_semidefinite() -> None:
    _, optimizer = made(Refreshed(3))
    assert optimizer.program.cost().count("every 3 steps") == 2
    ages, levels = [], []
    for seed in range(4):
        optimizer.step(*batch(seed))
        states = [state for state in optimizer.state.values() if "gram_age" in state]
        ages.append([state["gram_age"] for state in states])
        levels.append([float(state[key]) for state in states for key in ("gram_diagonal", "gram_pooled")])
        for stage in optimizer._diagnostics._stages.values():
            for (gram,) in stage.get("gammas", {}).values():
                torch.testing.assert_close(gram, gram.mT)
                assert torch.linalg.eigvalsh(gram)[0] > -1e-12 * gram.norm()
    assert ages == [[1, 1], [2, 2], [3, 3], [1, 1]]
    assert levels[0] == levels[1] == levels[2] != levels[3] and all(level >= 0 for level in levels[0])


def test_the_state_goes_on_where_it_was() -> None:
    model, optimizer = made(Refreshed(3))
    optimizer.step(*batch(0))
    other, again = made(Refreshed(3))
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in range(1, 5):
        optimizer.step(*batch(seed))
        again.step(*batch(seed))
    same(list(model.parameters()), list(other.parameters()))


@pytest.mark.parametrize("metric", ["spherical", "diagonal", "separated"])
@pytest.mark.parametrize("bias", [True, False])
def test_rounded_gradients_keep_the_matrix_semidefinite(metric: str, bias: bool) -> None:
    _, (x,), g, weight, _ = LAYERS["sequence"]
    by_output, by_input = draw(3).abs(), draw(4, seed=1).abs()
    known = {"spherical": 0.3, "diagonal": weight.square(), "separated": by_output.square()[:, None] * by_input**2}
    chosen = {**known, "separated": (by_output, by_input)}
    arguments = ((x,), g, (None, None), (True, bias))
    rest = (0.2,) if bias else ()
    exact = kernels.linear_gram(*arguments, (known[metric], *rest))
    found = kernels.linear_low_gram(*arguments, (chosen[metric], *rest))
    assert found.dtype == exact.dtype
    torch.testing.assert_close(found, found.mT, rtol=1e-14, atol=0)
    # Two factors and their sum over positions, each rounded by 2^-9; squared, twice as much, in every term of the sum.
    bound = kernels.linear_gram(((x.abs()),), g.abs(), (None, None), (True, bias), (known[metric], *rest))
    assert ((found - exact).abs() <= 6 * 2.0**-8 * bound).all() and not torch.allclose(found, exact, rtol=1e-6)
    assert torch.linalg.eigvalsh(found)[0] > -1e-12 * exact.norm()


def test_low_precision_is_taken_where_gradients_are_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "linear_gram_form", lambda *shape: "pairs")
        assert "low_gram" not in made(LowPrecision(), curvature="sgd")[1].program.code
    _, optimizer = made(LowPrecision(), curvature="sgd")
    assert optimizer.program.cost().count("bfloat16") == 1 == optimizer.program.code.count("linear_low_gram")
    for low, exact in zip(*(train(gram, 3, curvature="sgd") for gram in (LowPrecision(), "exact")), strict=True):
        torch.testing.assert_close(low, exact, rtol=0, atol=1e-3)
        assert not low.equal(exact)


@pytest.mark.parametrize("gram", [Refreshed(2), LowPrecision()])
def test_programs_travel(gram: Any, tmp_path: Path) -> None:
    model, optimizer = made(gram)
    optimizer.program.export(tmp_path / "step.py")
    optimizer.program.export(tmp_path / "step.json")
    module, loaded = load_module(tmp_path / "step.py"), UpdateProgram.load(tmp_path / "step.json")
    assert loaded.code == optimizer.program.code and loaded.options.gram == gram
    params, buffers = named(model)
    state = module.init_state(params)
    for seed in range(3):
        optimizer.step(*batch(seed))
        params, buffers, state, _ = module.step(params, buffers, state, *batch(seed))
    same(list(params.values()), [p.detach() for p in model.parameters()])


@pytest.mark.parametrize(
    ("gram", "options", "said"),
    [
        (lambda: LowPrecision("float16"), {}, "float16"),
        (lambda: LowPrecision(of="coarse"), {}, "coarse"),
        (lambda: Refreshed(0), {}, "every=0"),
        (lambda: Refreshed(2, of="sketch"), {}, "sketch"),
        (lambda: Refreshed(2), {"curvature": "kfac"}, "kfac"),
        (LowPrecision, {"curvature": "ekfac"}, "ekfac"),
        (lambda: Refreshed(2), {"compile": True}, "step count"),
        (LowPrecision, {"backend": "dense"}, "fast backend"),
        (lambda: Refreshed(2), {"terminal": "ggn"}, "rank-one"),
    ],
)
def test_refusals(gram: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        made(gram(), **options)


def test_what_a_branch_on_the_step_count_rules_out(tmp_path: Path) -> None:
    _, optimizer = made(Refreshed(2))
    with pytest.raises(CompileError, match="levels belong to steps"):
        optimizer.accumulate(*batch(0))
    with pytest.raises(CompileError, match="branch on the step count"):
        optimizer.program.export(tmp_path / "step.pt2")
