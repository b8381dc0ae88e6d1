"""How Gram matrices are made: per-sample gradients kept or not, separable metrics, sketches, and what is refused."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import CompileError, Sketch, compile_optimizer, kernels
from gtddp_compile.kernels import approximate, linear
from gtddp_compile.lowering import costs
from support.cases import tokens
from support.compared import assert_equal, optimizer, train
from support.networks import Case, conv, make, mlp
from support.recorded import draw
from support.recorded import layer as bundled

CONV: dict[str, Any] = {"stride": (2, 1), "padding": (1, 0), "dilation": (1, 1), "groups": 2}
LAYERS: dict[str, tuple[str, tuple[Tensor, ...], Tensor, Tensor, dict[str, Any], int]] = {
    "linear": ("linear", (draw(5, 4),), draw(5, 3), draw(3, 4), {}, 4),
    "sequence": ("linear", (draw(5, 2, 3, 4),), draw(5, 2, 3, 3), draw(3, 4), {}, 4),
    "conv": ("conv", (draw(5, 4, 5, 4),), draw(5, 6, 3, 2), draw(6, 2, 3, 3), CONV, 18),
}


def outer(weight: Tensor, groups: int) -> Tensor:
    """A metric of the weight's shape that is a product of one of outputs and one of inputs in every group."""
    rows, columns = draw(weight.shape[0], seed=1).abs() + 0.1, draw(groups, weight.shape[1], seed=2).abs() + 0.1
    table = rows.reshape(groups, -1, 1) * columns[:, None]
    return table.reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2)).expand_as(weight).contiguous()


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_a_product_by_halves_is_the_whole_product(samples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "HALVED", 0)
    x, g, weight, bias = draw(samples, 4), draw(samples, 3), draw(3, 4), draw(3)
    gamma = g.unsqueeze(2) * x.unsqueeze(1)
    pairs = torch.einsum("imn,jmn->ij", gamma, gamma)
    (joint,) = kernels.joint_gram((gamma,), (0.3,), kernels.rows_of(samples, None))
    both = kernels.linear_gram(kernels.Layer((x,), g, (weight, bias), (True, True)), (0.3, 0.5))
    torch.testing.assert_close(joint, 0.3 * pairs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(both, 0.3 * pairs + 0.5 * torch.einsum("im,jm->ij", g, g), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("wants", [(True, True), (True, False), (False, True)])
def test_a_metric_of_rank_one_separates_exactly(layer: str, wants: tuple[bool, bool]) -> None:
    prefix, operands, g, weight, options, _ = LAYERS[layer]
    metric = (outer(weight, options.get("groups", 1)), draw(weight.shape[0], seed=3).abs())
    chosen = tuple(entry for entry, want in zip(metric, wants, strict=True) if want)
    own = bundled(prefix, operands, g, (weight, draw(weight.shape[0])), wants, **options)
    exact = getattr(kernels, f"{prefix}_gram")(own, chosen)
    found = getattr(kernels, f"{prefix}_separable_gram")(own, chosen)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("diagonal", [False, True])
def test_a_sketch_with_orthogonal_columns_is_exact(layer: str, diagonal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """``Ω Ωᵀ = I`` is all that the sketch assumes; random signs have it in the mean."""
    prefix, operands, g, weight, options, inputs = LAYERS[layer]

    def orthogonal(rows: int, columns: int, like: Tensor, seed: int) -> Tensor:
        eye = torch.eye(inputs, dtype=like.dtype)
        filters = eye.repeat(rows // inputs, 1) if rows > inputs else eye
        return filters * (columns / inputs) ** 0.5 if prefix == "conv" else filters

    monkeypatch.setattr(approximate, "_signs", orthogonal)
    metric = (outer(weight, options.get("groups", 1)) if diagonal else 0.3, 0.2)
    own = bundled(prefix, operands, g, (weight, draw(weight.shape[0])), (True, True), **options)
    exact = getattr(kernels, f"{prefix}_gram")(own, metric)
    found = getattr(kernels, f"{prefix}_sketch_gram")(own, metric, columns=inputs, seed=0)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)


def test_signs_are_white_and_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    like = torch.zeros((), dtype=torch.float64)
    drawn = [approximate._signs(4, 8, like, seed) for seed in range(400)]
    assert torch.get_rng_state().equal(state)
    mean = torch.stack([signs @ signs.T for signs in drawn]).mean(0)
    torch.testing.assert_close(mean.diagonal(), torch.ones(4, dtype=torch.float64))
    assert (mean - torch.eye(4, dtype=torch.float64)).abs().max() < 5 / (8 * 400) ** 0.5


def small() -> Case:
    """Convolution, normalisation, positions and a head: every kernel that can keep its gradients."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(net.norm(net.conv(x))).flatten(2)
        return net.head(torch.tanh(net.mix(h)).flatten(1))

    layers = {"conv": conv(2, 3), "norm": lambda: nn.BatchNorm2d(3), "mix": (16, 5), "head": (15, 3)}
    return Case(make(forward, **layers), (2, 4, 4))


OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.5, "momentum": 0.9},
    "decay": {"curvature": "rmsprop", "lr": 0.01, "weight_decay": 0.1},
    "adam, groups": {"curvature": "adam", "lr": 0.01, "eps": 1e-3, "coupling": 2},
    "block": {"curvature": "sgd", "lr": 0.5, "coupling": "block"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_keeping_gradients_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "linear_gram_form", lambda *shape: "materialised")
    monkeypatch.setattr(kernels, "conv_gram_form", lambda *shape: "materialised")
    results = []
    for keep, kept in ((0.0, 1), (1e9, 4)):
        monkeypatch.setattr(costs, "KEEP", keep)
        run = train(small(), 3, 6, **OPTIONS[name])
        results.append(run.parameters)
        assert run.optimizer.program.code.count("rows_weighted(") == kept * (1 if name in ("sgd", "block") else 2)
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12)


def test_approximations_are_taken_and_shown() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3)), torch.randn(8, 64)
    y, options = torch.arange(8) % 3, {"loss": nn.CrossEntropyLoss(), "curvature": "adam"}
    optimizer = compile_optimizer(model, x, gram="separable", **options)
    assert "metric separated" in optimizer.program.cost() and "linear_separable_gram" in optimizer.program.code
    first = float(optimizer.step(x, y))
    assert all(float(optimizer.step(x, y)) < first for _ in range(3))
    positions = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 32, 3))
    optimizer = compile_optimizer(positions, torch.randn(8, 32, 64), gram=Sketch(4), **options)
    assert "sketch of 4 columns" in optimizer.program.cost() and "linear_sketch_gram" in optimizer.program.code
    loss = float(optimizer.step(torch.randn(8, 32, 64), y))
    assert loss == pytest.approx(float(F.cross_entropy(torch.zeros(8, 3), y)), abs=1.0)


def choices(model: nn.Module, x: Tensor, **options: Any) -> list[str]:
    program = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options).program
    return [program.lowered.plan.layers[player.name].gram.approximate for player in program.graph.players]


def test_auto_is_exact_where_that_is_cheap() -> None:
    wide, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)), torch.randn(64, 64)
    assert choices(wide, x, curvature="adam") == ["separable", "exact"]  # 8 million multiplications, half a million
    assert choices(wide, x[:4], curvature="adam") == ["exact", "exact"]
    assert choices(wide, x, curvature="sgd") == ["exact", "exact"]
    assert choices(wide, x, curvature="adam", terminal="ggn") == ["exact", "exact"]
    assert choices(wide, x, curvature="adam", gram="exact") == ["exact", "exact"]
    kept = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 64, 3))  # gradients that are kept
    images = torch.randn(64, 8, 8, 8)
    assert choices(kept, images, curvature="adam", rollout="nonlinear")[0] == "exact"
    assert choices(kept, images[:16], curvature="adam")[0] == "exact"
    assert choices(kept, images.repeat(2, 1, 1, 1), curvature="adam")[0] == "sketch"  # the joint step's: B² m n


def test_a_diagonal_in_an_eigenbasis_separates_where_the_exact_one_is_dear() -> None:
    model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 3)), torch.randn(64, 64)
    for curvature, gram, found in (("ekfac", "auto", 1), ("ekfac", "exact", 0), ("kfac", "auto", 0)):
        optimizer = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature=curvature, gram=gram)
        assert optimizer.program.code.count("separable=True") == optimizer.program.cost().count("separated") == found
        assert float(optimizer.step(x, torch.arange(64) % 3)) > 0


def test_a_separated_diagonal_of_rank_one_is_exact() -> None:
    x, g = draw(5, 4), draw(5, 3)
    layer = kernels.Rows(kernels.linear_rows, kernels.Layer((x,), g, (None, None), (True, False)))
    maps, scale = (((draw(1, 4, 4), draw(1, 3, 3)),), draw(3, 1).abs() * draw(1, 4).abs())
    metric, rows = (maps, scale.unsqueeze(0), None, (0.1,)), [slice(0, 3), slice(3, 5)]
    exact = kernels.kronecker_gram([layer], metric, rows)
    found = kernels.kronecker_gram([layer], metric, rows, separable=True)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"gram": "separable", "backend": "dense"}, {"gram": Sketch(), "terminal": "ggn"},
     {"gram": "separable", "coupling": "block", "recursion": "substituted"}],
)  # fmt: skip
def test_refusals(options: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match="gram"):
        train(small(), curvature="sgd", **options)


@pytest.mark.parametrize("piece", [1, 80, 2**20])
@pytest.mark.parametrize("curvature", ["rmsprop", "adam"])
def test_statistics_and_grams_of_layers_over_positions(
    curvature: str, piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From per-sample gradients, a row, some rows, or all at a time."""
    monkeypatch.setattr(linear, "CHUNK", piece)
    assert_equal(tokens(), size=4, curvature=curvature, lr=5e-3, coupling=3)


class OneWeight(nn.Module):
    """Two layers with one weight, and a bias of its own each (or none, one, the same)."""

    def __init__(self, biases: str) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4, biases != "the first's"), nn.Linear(4, 3)
        self.second.weight = self.first.weight
        if biases == "the same":
            self.second.bias = self.first.bias
        self.first.bias.requires_grad_(biases != "the second's")

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


@pytest.mark.parametrize("biases", ["two", "the same", "the first's", "the second's"])
@pytest.mark.parametrize("curvature", ["sgd", "rmsprop", "foof"])
def test_the_bias_of_a_use_is_its_own(curvature: str, biases: str) -> None:
    """A weight's Gram matrix has the bias of those uses alone that share it."""
    torch.manual_seed(0)
    assert_equal(Case(OneWeight(biases).double(), (4,)), curvature=curvature, lr=0.05)


def test_the_cost_of_a_step_is_told_beside_the_other_rollout() -> None:
    """A few samples, so that Γ is exact in both: each program has its own number first."""
    said = r"about ([\d.]+) times the multiplications of a plain training step .*?with rollout='(\w+)' ([\d.]+)"
    found = {}
    for rollout in ("linear", "nonlinear"):
        _, opt = optimizer(mlp(), 2, curvature="sgd", rollout=rollout)
        ((own, other, theirs),) = re.findall(said, " ".join(opt.program.cost().split()))
        found[rollout] = own
        assert {rollout, other} == {"linear", "nonlinear"} and found.get(other, theirs) == theirs
    assert float(found["linear"]) < float(found["nonlinear"])
