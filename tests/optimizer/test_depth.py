"""The default's aim where many layers follow each other with neither a normalisation nor a shortcut between them."""

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import Geometric, compile_optimizer
from support.compared import LOSS, assert_equal
from support.networks import Case, make, seeded


def shortcuts(net: nn.Module, x: Tensor) -> Tensor:
    for layer in list(net.children())[:-1]:
        x = x + torch.tanh(layer(x))
    return net.last(x)


RESIDUAL = make(shortcuts, **{f"l{k}": (4, 4) for k in range(10)}, last=(4, 3)).float()


class Tied(nn.Module):
    """A recurrent network: its layers count once, however often they are used."""

    def __init__(self, steps: int) -> None:
        super().__init__()
        self.steps, self.read, self.keep, self.head = steps, nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros_like(x)
        for _ in range(self.steps):
            h = torch.tanh(self.read(x) + self.keep(h))
        return self.head(h)


def chain(layers: int, norm: bool = False) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(4, 4), *([nn.LayerNorm(4)] if norm else []), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(4, 3))


@pytest.mark.parametrize(
    "model, row, depth, aim",
    [(chain(1), 2, 2, 0.75), (chain(3), 4, 4, 0.75), (chain(11), 12, 12, 0.25), (chain(11, norm=True), 1, 1, 0.75),
     (RESIDUAL, 2, 11, 0.75 * (4 / 11) ** 0.5), (Tied(9), 1, 2, 0.75)],
    ids=["two", "four", "twelve", "normalised", "shortcuts", "tied"],
)  # fmt: skip
def test_the_aim_falls_with_layers_in_a_row(model: nn.Module, row: int, depth: int, aim: float) -> None:
    optimizer = compile_optimizer(model, torch.zeros(2, 4), loss=LOSS)
    terminal = optimizer.program.options.terminal
    assert (optimizer.graph.unbroken, optimizer.graph.depth) == (row, depth)
    assert isinstance(terminal, Geometric) and terminal.deep == 0 and terminal.aim == pytest.approx(aim)


def test_an_aim_that_was_given_stays() -> None:
    optimizer = compile_optimizer(chain(11), torch.zeros(2, 4), loss=LOSS, terminal=Geometric(0.6))
    assert optimizer.program.options.terminal == Geometric(0.6)


def test_fast_and_dense_take_the_same_aim() -> None:
    assert_equal(Case(seeded(lambda: chain(7)), (4,)))
