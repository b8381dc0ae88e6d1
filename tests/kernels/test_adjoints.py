"""Stages that are chains of known derivatives: their vector-Jacobian product is written out, and is torch's own."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer

LOSS = nn.CrossEntropyLoss()
BATCH, WIDTH = 4, 5


class Frozen(nn.Module):
    """Between two players a layer that nobody trains, and an activation on either side of it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.between, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.between.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.sigmoid(self.between(torch.relu(self.first(x)))))


class Twice(nn.Module):
    """A value that two operations read, and an activation of the state of a stage that torch differentiates."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.first(x))
        return self.head(torch.tanh(self.inner(h * h)))


def chain(act: Callable[[], nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 6), act(), nn.Linear(6, 6, bias=False), act(), nn.Linear(6, 3))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "relu": (lambda: chain(nn.ReLU), 0),
    "relu in place": (lambda: chain(lambda: nn.ReLU(inplace=True)), 0),
    "tanh": (lambda: chain(nn.Tanh), 0),
    "sigmoid": (lambda: chain(nn.Sigmoid), 0),
    "no known derivative": (lambda: chain(nn.SiLU), 2),
    "frozen": (Frozen, 0),
    "twice": (Twice, 1),
    "positions": (lambda: nn.Sequential(nn.Unflatten(1, (1, WIDTH)), chain(nn.ReLU), nn.Flatten()), 1),
}
"""With the number of stages that torch differentiates."""


def pair(build: Callable[[], nn.Module], **options: object) -> tuple[nn.Module, nn.Module, CompiledOptimizer]:
    """The network after three steps by the generated program and by the dense backend."""
    torch.manual_seed(0)
    ours = build().double()
    theirs = copy.deepcopy(ours)
    x = torch.randn(3, BATCH, WIDTH, dtype=torch.float64)
    y = torch.arange(BATCH) % 3
    fast = compile_optimizer(ours, x[0], loss=LOSS, **options)  # type: ignore[arg-type]
    dense = compile_optimizer(theirs, x[0], loss=LOSS, backend="dense", **options)  # type: ignore[arg-type]
    for batch in x:
        fast.step(batch, y)
        dense.step(batch, y)
    return ours, theirs, fast


@pytest.mark.parametrize("curvature", ["sgd", "rmsprop"])
@pytest.mark.parametrize("network", NETWORKS)
def test_equals_the_dense_backend(network: str, curvature: str) -> None:
    build, recorded = NETWORKS[network]
    ours, theirs, opt = pair(build, curvature=curvature, lr=0.01)
    assert opt.program.code.count("pull_back(") == recorded
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_values_carry_no_graph() -> None:
    """What a stage that torch differentiates hands to one that is written out is cut off it."""
    ours, theirs, opt = pair(Twice, curvature="sgd", lr=0.1)
    code = opt.program.code
    assert ".detach())" in code and "tanh_pulled(" in code
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


def test_under_autocast() -> None:
    """Gradients have their value's type, as torch gives them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(WIDTH), chain(nn.ReLU))
    x, y = torch.randn(BATCH, WIDTH), torch.arange(BATCH) % 3
    other = copy.deepcopy(model)
    opt = compile_optimizer(model, x, loss=LOSS, curvature="sgd", lr=0.1, feedback=False)
    with torch.autocast("cpu", torch.bfloat16):
        opt.step(x, y)
        LOSS(other(x).float(), y).backward()
    base = torch.optim.SGD(other.parameters(), lr=0.1)
    base.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0.02, atol=1e-3)


class ReadAgain(nn.Module):
    """What goes into the activation is read beside it, and the second activation's input is torch's to keep."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(WIDTH, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.head(torch.relu(self.inner(torch.relu(h) + h)).square())


# In the nonlinear rollout the first layer's output is read again: its new one is made from it.
@pytest.mark.parametrize(
    ("build", "rollout", "places"),
    [(NETWORKS["relu"][0], "nonlinear", 2), (NETWORKS["relu"][0], "linear", 2), (ReadAgain, "nonlinear", 0)],
)
def test_activations_write_where_nobody_else_reads(build: Callable[[], nn.Module], rollout: str, places: int) -> None:
    ours, theirs, opt = pair(build, curvature="sgd", lr=0.1, rollout=rollout)
    assert opt.program.code.count("inplace=True") == places
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
