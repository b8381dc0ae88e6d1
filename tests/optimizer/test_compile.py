"""``compile=True``: the generated step is one graph, for any batch size, and computes what it computes without."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.runtime import compiled

LOSS = nn.CrossEntropyLoss()


class Residual(nn.Module):
    """A convolution, a normalisation, a shortcut and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.mix, self.head = nn.Linear(18, 18), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return self.head(h + torch.tanh(self.mix(h)))


def batch(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 1, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.arange(samples) % 3


def pair(
    backend: Any,
    network: Callable[[], nn.Module] = lambda: nn.Sequential(nn.Flatten(), nn.Linear(9, 3)),
    **options: Any,
) -> tuple[Any, Any, nn.Module, nn.Module]:
    """Without and with torch.compile, on the same weights; tracing takes a second a layer."""
    torch.manual_seed(0)
    plain = network().double()
    other = copy.deepcopy(plain)
    x, _ = batch(6, 0)
    return (
        compile_optimizer(plain, x, loss=LOSS, **{"curvature": "sgd", **options}),
        compile_optimizer(other, x, loss=LOSS, compile={"backend": backend}, **{"curvature": "sgd", **options}),
        plain,
        other,
    )


@pytest.mark.parametrize(
    "options", [{"curvature": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}, {"curvature": "rmsprop"}]
)
def test_one_graph_for_every_batch_size(options: dict[str, Any]) -> None:
    graphs = []

    def counting(graph: torch.fx.GraphModule, example: list[Any]) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    ours, theirs, plain, other = pair(counting, Residual, **options)
    for step, samples in enumerate((6, 6, 8, 10)):
        x, y = batch(samples, step)
        torch.testing.assert_close(theirs.step(x, y), ours.step(x, y), rtol=1e-9, atol=1e-12)
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)
    assert 1 <= len(graphs) <= 2  # momentum and moments have no buffer before the first step


def test_a_factor_that_fails_is_made_again_without_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    ours, theirs, plain, other = pair("eager", curvature="sgd", lr=0.3)
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
    for (name, a), b in zip(plain.state_dict().items(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize(
    ("options", "word"),
    [({"curvature": "kfac"}, "kfac"), ({"terminal": "ggn"}, "vmap"), ({"backend": "dense"}, "dense"),
     ({"memory": "recompute"}, "recompute")],
)  # fmt: skip
def test_what_is_no_graph_is_refused(options: dict[str, Any], word: str) -> None:
    with pytest.raises(CompileError, match=word):
        compile_optimizer(
            Residual().double(), batch(6, 0)[0], loss=LOSS, compile=True, **{"curvature": "sgd", **options}
        )


def test_random_layers_are_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 3))
    with pytest.raises(CompileError, match="random numbers") as error:
        compile_optimizer(model, torch.randn(3, 4), loss=LOSS, curvature="sgd", compile=True)
    assert error.value.module == "1"
