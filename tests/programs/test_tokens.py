"""Layers of many positions under FOOF: by hand, against the dense backend; their sketches against exact matrices."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import FOOF, compile_optimizer, kernels
from gtddp_compile.lowering.cooperation import even_blocks
from support.compared import assert_equal, assert_union, batches, flat, optimizer, trained
from support.networks import Case, make
from support.recorded import draw

TOKENS, WIDTH, ROWS = 5, 6, 7
PUBLISHED = FOOF(lr=0.3, shrinkage=0.0, stat_decay=0.5, refresh=1, stat_every=1)
OPTIONS: dict[str, Any] = {"steps": 3, "size": 6, "curvature": FOOF(lr=0.3, stat_decay=0.5, refresh=1, stat_every=1)}


def tokens() -> Case:
    """Words and their places, a layer to fewer outputs than inputs, one without a bias, a head on the mean."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        hidden = torch.tanh(net.narrow(torch.tanh(net.words(x) + net.places)))
        return net.head(torch.tanh(net.plain(hidden)).mean(1))

    def drawn(seed: int, size: int) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed)
        return torch.randint(ROWS, (size, TOKENS), generator=source), torch.randint(4, (size,), generator=source)

    tables = {"words": lambda: nn.Embedding(ROWS, WIDTH), "places": lambda: nn.Parameter(torch.randn(1, TOKENS, WIDTH))}
    return Case(make(forward, **tables, narrow=(WIDTH, 2), plain=(2, 3, False), head=(3, 4)), draw=drawn)


@pytest.fixture(params=[128, 2])
def narrow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """One block of inputs, or three."""
    monkeypatch.setattr("gtddp_compile.lowering.cooperation.NARROW", request.param)
    return int(request.param)


@pytest.mark.parametrize(
    ("width", "wanted", "widest", "blocks"),
    [(512, 128, 1024, 4), (128, 128, 1024, 1), (384, 128, 1024, 3), (257, 128, 1024, 1), (514, 128, 1024, 2),
     (1031, 128, 1024, 1031), (4096, 4096, 1024, 4)],
)  # fmt: skip
def test_blocks_divide_the_inputs_and_are_not_slivers(width: int, wanted: int, widest: int, blocks: int) -> None:
    assert even_blocks(width, wanted, widest) == blocks


def test_without_feedback_it_is_the_published_method(narrow: int) -> None:
    net, lr, damping, seen = tokens().model, 0.3, 0.1, {}
    blocks = {"narrow": 3 if narrow == 2 else 1, "plain": 1, "head": 1}
    for name in blocks:
        getattr(net, name).register_forward_hook(lambda _, x, __, name=name: seen.__setitem__(name, x[0].detach()))
    running: dict[str, Tensor] = {}
    for step, (x, y) in enumerate(batches(tokens(), 3, 6), start=1):
        net.zero_grad()
        F.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for name, count in blocks.items():
                layer, keep = getattr(net, name), min(1 - 1 / step, 0.5)
                rows = F.pad(seen[name], (0, 1), value=1.0) if name == "head" else seen[name].flatten(0, 1)
                factor = torch.stack([part.T @ part / len(x) for part in rows.split(rows.shape[1] // count, 1)])
                running[name] = keep * running[name] + (1 - keep) * factor if name in running else factor
                mean = running[name].diagonal(dim1=1, dim2=2).mean(1)
                inverse = torch.block_diag(*(torch.linalg.inv(a + damping * d * torch.eye(len(a)).double())
                                             for a, d in zip(running[name], mean, strict=True)))  # fmt: skip
                if name == "head":
                    both = torch.cat([layer.weight.grad, layer.bias.grad[:, None]], 1) @ inverse
                    layer.weight -= lr * both[:, :-1]
                    layer.bias -= lr * both[:, -1]
                else:
                    layer.weight -= lr * layer.weight.grad @ inverse
            net.narrow.bias -= lr * net.narrow.bias.grad / (TOKENS * (1 + damping))
            for plain in (net.words.weight, net.places):  # looked up or added less than once a sample
                plain -= lr * plain.grad / (1 + damping)
    torch.testing.assert_close(
        trained(tokens(), feedback=False, **{**OPTIONS, "curvature": PUBLISHED}), flat(net), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "options",
    [{}, {"coupling": 3}, {"curvature": FOOF(lr=0.3, weight_decay=0.1), "inertia": 0.0}, {"rollout": "nonlinear"},
     {"terminal": "ggn"},
     {"coupling": "block", "recursion": "substituted"}, {"curvature": "adam", "lr": 0.01}],
)  # fmt: skip
def test_it_is_what_explicit_matrices_give(options: dict[str, Any], narrow: int) -> None:
    assert_equal(tokens(), **{**OPTIONS, **options})


def test_micro_batches_make_the_step_of_their_union(narrow: int) -> None:
    assert_union(tokens(), 3)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_a_sketch_is_unbiased_and_its_change_exact(blocks: int, bias: bool) -> None:
    x, g, weight, shift = draw(5, 4, 6), draw(5, 4, 3, seed=1), draw(3, 6, seed=2), draw(3, seed=3)
    maps, direction = draw(blocks, 6 // blocks, 6 // blocks, seed=4), (draw(3, 6, seed=5), draw(3, seed=6))[: 1 + bias]
    layer = kernels.Layer((x,), g, (weight, shift if bias else None), (True, bias))
    metric = (0.7, 0.3)[: 1 + bias]
    exact = kernels.linear_gram(kernels.linear_whitened(layer, maps), metric)
    assert torch.equal(kernels.linear_whitened(layer, maps).operands[0], x @ torch.block_diag(*maps)) or blocks > 1
    torch.testing.assert_close(kernels.linear_whitened(layer, maps).operands[0], x @ torch.block_diag(*maps))
    grams = []
    for seed in range(400):
        filters = kernels.channel_filters(maps @ kernels.channel_signs(maps, (6,), 4, seed), (6,))
        rows, change = kernels.linear_sketched(layer, filters, metric, direction)
        grams.append(rows @ rows.T)
        assert change is not None
    torch.testing.assert_close(change, kernels.linear_directional(layer, direction))
    one, all_of_them = (float((found - exact).norm()) for found in (grams[0], torch.stack(grams).mean(0)))
    assert all_of_them < one / 8  # falls as the square root of the number of sketches, 20


@pytest.mark.parametrize("blocks", [1, 3])
def test_the_step_of_a_token_layer_is_one_product(blocks: int) -> None:
    gradient, last, inverse = draw(4, 6), draw(4, 6, seed=1), draw(blocks, 6 // blocks, 6 // blocks, seed=2)
    whole = gradient @ torch.block_diag(*inverse)
    torch.testing.assert_close(kernels.channel_step(gradient, inverse), whole)
    found = kernels.channel_carried(gradient, inverse, last, 0.9, 0.3)
    torch.testing.assert_close(found, 0.9 * last - 0.3 * whole)


def test_a_large_layer_is_sketched_and_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtddp_compile.lowering.costs.NEGLIGIBLE", 0.0)
    case = tokens()
    case.model.narrow, case.model.plain = nn.Linear(WIDTH, 40).double(), nn.Linear(40, 3, bias=False).double()
    _, opt = optimizer(case, 30)
    assert "linear_sketched" in opt.program.code
    losses = [float(opt.step(*case.batch(0, 30))) for _ in range(20)]
    assert losses[-1] < 0.5 * losses[0]


class Pixels(nn.Module):
    """Convolutions down to a pixel where the image is small, and a mean over what is left."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, 2, 1), nn.Conv2d(3, 2, 3, 2, 1)
        self.norm, self.out = nn.GroupNorm(1, 2), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.second(torch.tanh(self.first(x))))).mean((2, 3)))


class Steps(nn.Module):
    """A layer of every position, a normalisation, a shift, and a mean."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.norm, self.out = nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3)
        self.shift = nn.Parameter(torch.randn(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.positions(x)) + self.shift).mean(1))


LENGTHS: dict[str, tuple[type[nn.Module], tuple[int, ...], tuple[int, ...]]] = {
    "shorter": (Steps, (7, 4), (3, 4)),
    "of one": (Steps, (7, 4), (1, 4)),
    "longer": (Steps, (1, 4), (6, 4)),
    "a smaller image": (Pixels, (1, 8, 8), (1, 5, 5)),
    "down to a pixel": (Pixels, (1, 8, 8), (1, 2, 2)),
}
"""Of the batch and of the example, beside the samples."""


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("options", [
    {"inertia": 0.9}, {"feedback": False}, {"backend": "dense"}, {"curvature": "kfac", "lr": 0.1},
    {"terminal": "ggn", "inertia": 0.0}, {"memory": "recompute"},
], ids=str)  # fmt: skip
def test_the_example_s_length_decides_nothing(length: str, options: dict[str, Any]) -> None:
    """At how many positions a parameter is used is the batch's, and fast equals dense whatever the example was."""
    kind, own, other = LENGTHS[length]
    torch.manual_seed(0)
    model = kind().double()
    x, y = torch.randn(6, *own, dtype=torch.float64), torch.randint(3, (6,))
    found = []
    for shape in (own, other):
        trained_here = copy.deepcopy(model)
        example = torch.randn(6, *shape, dtype=torch.float64)
        given: dict[str, Any] = {"curvature": "foof", "gram": "exact", **options}
        opt = compile_optimizer(trained_here, example, loss=nn.CrossEntropyLoss(), **given)
        for _ in range(2):
            opt.step(x, y)
        found.append(flat(trained_here))
    assert (found[0] - flat(model)).abs().max() > 1e-3
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-10)


def attended(net: Any, x: Tensor, mask: Tensor, passed: Tensor | float = 0.0) -> Tensor:
    """Attention of one head, twice; the second adds scores that are passed on."""
    h = net.embed(x)
    scores = net.q(h) @ h.mT + mask
    h = h + scores.softmax(-1) @ h
    scores = net.r(h) @ h.mT + (mask if isinstance(passed, float) else scores)
    return net.out(h + scores.softmax(-1) @ h).mean(1)  # type: ignore[no-any-return]


def made_inside(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    """The mask is no sample's own, and made when a layer's output is known."""
    h = torch.tanh(net.before(x))
    return attended(net, h, net.mask.to(h.dtype) * 1)


def given(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    return attended(net, x, mask)


def passed_on(net: Any, x: Tensor, mask: Tensor) -> Tensor:
    return attended(net, x, mask, mask)


DENSE = [
    ("dense", rollout, forward) for rollout in ("linear", "nonlinear") for forward in (made_inside, given, passed_on)
]


@pytest.mark.parametrize("samples", [2, 3])
@pytest.mark.parametrize(("backend", "rollout", "forward"), [*DENSE, ("fast", "linear", passed_on)])
def test_a_mask_of_minus_infinity_is_a_very_small_number(
    backend: str, rollout: str, samples: int, forward: Any
) -> None:
    """Infinities that stay where they are have not moved; of as many samples as positions, too."""
    found = []
    for low in (float("-inf"), -1e9):
        torch.manual_seed(0)
        mask = torch.full((3, 3), low, dtype=torch.float64).triu(1)
        linear = dict.fromkeys(("before", "embed", "q", "r"), (4, 4))
        net = make(forward, **linear, out=(4, 3), mask=lambda mask=mask: mask)
        x, y = torch.randn(samples, 3, 4, dtype=torch.float64), torch.arange(samples) % 3
        inputs = x, mask.expand(samples, 3, 3)
        options: Any = {"curvature": "sgd", "lr": 0.3, "rollout": rollout, "backend": backend}
        opt = compile_optimizer(net, inputs, loss=nn.CrossEntropyLoss(), **options)
        opt.step(inputs, y)
        found.append(flat(net))
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)
