"""A loss that is not finite: the error says where that begins, and nothing has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import NonFiniteError, compile_optimizer
from support.recorded import batch, net

SIZE = 6
TARGETS = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(1)).double()
HERE = r"at test_origin\.py:"


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 5), Rooted())
        self.last = nn.Linear(5, 3)
        self.register_buffer("scale", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = x[:, 0].masked_fill(x[:, 0] > 9, -torch.inf).exp()  # a mask's infinity is nothing
        return self.last(self.inner(x) * self.scale) + 0 * hidden[:, None]  # type: ignore[no-any-return]


class Rooted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x + 10).sqrt()


def put(value: float, name: str) -> Callable[[nn.Module], None]:
    def change(model: nn.Module) -> None:
        dict([*model.named_parameters(), *model.named_buffers()])[name].data[1] = value

    return change


def rows(value: float, *which: int) -> Tensor:
    return batch(SIZE).index_fill(0, torch.tensor(which), value)


NAN = float("nan")
CASES: dict[str, tuple[Any, Any, Callable[[nn.Module], None] | None, str]] = {
    "an input": (rows(NAN, 2, 4), TARGETS, None, r"the input 'x' holds NaN \(first in rows \[2, 4\]\)\. Mend or drop"),
    "a target": (batch(SIZE), TARGETS.index_fill(0, torch.tensor(3), NAN), None,
                 r"the target holds NaN \(first in rows \[3\]\)"),
    "a parameter": (batch(SIZE), TARGETS, put(NAN, "inner.0.bias"),
                    r"^module 'inner\.0': .*: the parameter 'inner\.0\.bias' holds NaN\. Load values"),
    "a buffer": (batch(SIZE), TARGETS, put(NAN, "scale"), r"the buffer 'scale' holds NaN\. Load values that"),
    "an operation": (rows(-1e3, 1), TARGETS, put(1.0, "inner.0.weight"),
                     rf"^module 'inner\.1', operation sqrt, {HERE}\d+: "
                     r".*: NaN \(first in rows \[1\]\) comes first from here\. Bound"),
    "an infinite parameter": (batch(SIZE), TARGETS, put(torch.inf, "inner.0.bias"),
                              r"^module 'inner\.0', operation linear.*: infinity \(first in rows \[0, 1, 2, 3, 4\]\)"),
    "the loss": (batch(SIZE), TARGETS.index_fill(0, torch.tensor(5), 1e200), None,
                 r"^operation MSELoss.*outputs are finite, and infinity \(first in rows \[5\]\) comes first"),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_it_is_said_where_it_begins(name: str) -> None:
    x, y, change, said = CASES[name]
    torch.manual_seed(0)
    model = Deep().double()
    opt = compile_optimizer(model, batch(SIZE), loss=nn.MSELoss(), curvature="sgd")
    if change is not None:
        change(model)
    before, drawn = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    with pytest.raises(NonFiniteError, match=said) as raised:
        opt.step(x, y)
    assert "is not finite, and nothing was changed" in str(raised.value)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), drawn)


def test_a_line_of_the_users_own_loss_is_named() -> None:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().sum(1) / targets[:, 0].gt(-9)

    opt = compile_optimizer(net(lambda m, x: m.b(m.a(x))), batch(SIZE), loss=loss, curvature="sgd")
    said = rf"operation div, {HERE}\d+: .*infinity \(first in rows \[2\]\) comes first from the loss"
    with pytest.raises(NonFiniteError, match=said):
        opt.step(batch(SIZE), TARGETS.index_fill(0, torch.tensor(2), -10))
