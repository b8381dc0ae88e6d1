"""``compile=True``: the generated step is one graph, for any batch size, and computes what it computes without."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.runtime import compiled
from support.compared import LOSS
from support.networks import Case, conv, make


def residual() -> nn.Module:
    """A convolution, a normalisation, a shortcut and a head."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(net.norm(net.conv(x))).flatten(1)
        return net.head(h + torch.tanh(net.mix(h)))

    return make(forward, conv=conv(1, 2), norm=lambda: nn.BatchNorm2d(2), mix=(18, 18), head=(18, 3))


def batch(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    return Case(nn.Identity(), (1, 3, 3)).batch(seed, samples)


def pair(backend: Any, model: nn.Module, **options: Any) -> tuple[Any, Any, nn.Module, nn.Module]:
    """Without and with torch.compile, on the same weights; tracing takes a second a layer."""
    models, x = (model, copy.deepcopy(model)), batch(6, 0)[0]
    torch._dynamo.reset()
    given: list[dict[str, Any]] = [{}, {"compile": {"backend": backend}}]
    ours, theirs = (compile_optimizer(m, x, loss=LOSS, **how, **options) for m, how in zip(models, given, strict=True))
    return ours, theirs, *models


def assert_alike(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-12)


def linear() -> nn.Module:
    return make(lambda net, x: net.a(x.flatten(1)), a=(9, 3))


@pytest.mark.parametrize(("network", "options"), [
    (residual, {"curvature": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}),
    (linear, {"curvature": "rmsprop"}),
    (linear, {"curvature": "sgd", "lr": 0.3, "inertia": 0.9}),
])  # fmt: skip
def test_one_graph_for_every_batch_size_and_rate(network: Any, options: dict[str, Any]) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    ours, theirs, plain, other = pair(counting, network(), **options)
    for step, samples in enumerate((6, 6, 8, 10, 6, 6)):
        x, y = batch(samples, step)
        for group in (*ours.param_groups, *theirs.param_groups):
            group["lr"] *= 0.9
        torch.testing.assert_close(theirs.step(x, y), ours.step(x, y), rtol=1e-9, atol=1e-12)
    assert_alike(plain, other)
    assert 1 <= len(graphs) <= 2  # momentum and moments have no buffer before the first step


def test_a_factor_that_fails_is_made_again_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs, plain, other = pair("eager", linear(), curvature="sgd", lr=0.3)
    original, calls = compiled.CompiledStep.__call__, []

    def failing(self: compiled.CompiledStep, m: Any, *arguments: Any) -> Tensor:
        original(self, m, *arguments)
        calls.append(len(m._written))
        raise compiled.NotFactored

    monkeypatch.setattr(compiled.CompiledStep, "__call__", failing)
    for step in range(2):
        x, y = batch(6, step)
        ours.step(x, y), theirs.step(x, y)
    assert len(calls) == 1 and calls[0] > 0
    assert_alike(plain, other)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"curvature": "kfac"}, "kfac"), ({"terminal": "ggn"}, "vmap"), ({"backend": "dense"}, "dense"),
     ({"memory": "recompute"}, "recompute")],
)  # fmt: skip
def test_what_is_no_graph_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(CompileError, match=word):
        compile_optimizer(residual(), batch(6, 0)[0], loss=LOSS, compile=True, **{"curvature": "sgd", **options})


def test_random_layers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    with pytest.raises(CompileError, match="random numbers") as error:
        compile_optimizer(model, torch.randn(3, 4), loss=LOSS, curvature="sgd", compile=True)
    assert error.value.module == "1"
