"""The default's aim where many layers follow each other with neither a normalisation nor a shortcut between them."""

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import Geometric, compile_optimizer

LOSS = nn.CrossEntropyLoss()


class Shortcuts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(10))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.last(x)


def chain(layers: int, norm: bool = False) -> nn.Module:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(4, 4), *([nn.LayerNorm(4)] if norm else []), nn.Tanh()]
    return nn.Sequential(*parts, nn.Linear(4, 3))


@pytest.mark.parametrize(
    "model, row, aim",
    [(chain(1), 2, 0.75), (chain(3), 4, 0.75), (chain(11), 12, 0.25), (chain(11, norm=True), 1, 0.75),
     (Shortcuts(), 2, 0.75)], ids=["two", "four", "twelve", "normalised", "shortcuts"],
)  # fmt: skip
def test_the_aim_falls_with_layers_in_a_row(model: nn.Module, row: int, aim: float) -> None:
    optimizer = compile_optimizer(model, torch.zeros(2, 4), loss=LOSS)
    terminal = optimizer.program.options.terminal
    assert optimizer.graph.unbroken == row
    assert isinstance(terminal, Geometric) and terminal.deep == 0 and terminal.aim == pytest.approx(aim)


def test_an_aim_that_was_given_stays() -> None:
    optimizer = compile_optimizer(chain(11), torch.zeros(2, 4), loss=LOSS, terminal=Geometric(0.6))
    assert optimizer.program.options.terminal == Geometric(0.6)


def test_fast_and_dense_take_the_same_aim() -> None:
    torch.manual_seed(0)
    models = [chain(7).double()]
    models.append(chain(7).double())
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randint(3, (5,))
    for model, backend in zip(models, ("fast", "dense"), strict=True):
        optimizer = compile_optimizer(model, x, loss=LOSS, backend=backend)
        for _ in range(2):
            optimizer.step(x, y)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
