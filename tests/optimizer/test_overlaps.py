"""Parameters and buffers in one memory: two parameters are refused, what a buffer sees is the step's beginning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from support.networks import make
from support.recorded import batch
from support.refused import TARGETS, compiled, expect_the_base_methods_update, refused


def two(change: Callable[[Any], Any]) -> Any:
    net: Any = make(lambda net, x: net.b(torch.tanh(net.a(x)))[:, :3], a=(4, 6), b=(6, 4))
    change(net)
    return net


def transposed(net: Any) -> None:
    net.b.weight.data = net.a.weight.data.t()


def itself(net: Any) -> None:
    net.b.bias.data = net.a.weight.data.view(-1)[:4]


def one_entry(net: Any) -> None:
    """The last of one is the first of the other."""
    flat = torch.randn(47).double()
    net.a.weight.data, net.b.weight.data = flat[:24].view(6, 4), flat[23:].view(4, 6)


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("change", [transposed, itself, one_entry])
def test_two_parameters_in_one_memory_are_refused(change: Any, feedback: bool) -> None:
    net = two(change)
    other = "b.bias" if change is itself else "b.weight"
    refused(lambda: compiled(net, feedback=feedback), f"'a.weight' and '{other}' are two", "as one Parameter")
    net.requires_grad_(False)
    net.a.bias.requires_grad_(True)
    compiled(net)


def beside(net: Any) -> None:
    flat = torch.randn(48).double()
    net.a.weight.data, net.b.weight.data = flat[:24].view(6, 4), flat[24:].view(4, 6)


def between(net: Any) -> None:
    """Every other row of one memory, and every other column."""
    flat = torch.randn(6, 8).double()
    net.a.weight.data, net.b.weight.data = flat[:, ::2], flat[:, 1::2].t()


def empty(net: Any) -> None:
    net.a.none = net.b.none = nn.Parameter(torch.zeros(0).double())


@pytest.mark.parametrize("change", [beside, between, empty])
def test_views_beside_each_other_are_taken(change: Any) -> None:
    net = two(change)
    opt = compiled(net, lr=0.5, feedback=False)
    for _ in range(2):
        expect_the_base_methods_update(opt, net, batch(6))


class Aliased(nn.Module):
    """A buffer, or a plain attribute, that is a parameter's memory."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)
        self.double()
        if plain:
            self.again = self.b.weight.detach().t()
        else:
            self.register_buffer("again", self.b.weight.detach().t())

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.tanh(self.b(h)) + F.linear(torch.relu(h), self.again))


@pytest.mark.filterwarnings("ignore:the program was derived")
@pytest.mark.parametrize("plain", [True, False])
def test_a_buffer_in_a_parameters_memory(plain: bool) -> None:
    def step(feedback: bool, backend: Any = "fast") -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = Aliased(plain)
        opt = compile_optimizer(net, batch(6), loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.5,
                                feedback=feedback, backend=backend)  # fmt: skip
        for _ in range(3):
            opt.step(batch(6), TARGETS)
        return net.state_dict()

    torch.manual_seed(0)
    net = Aliased(plain)
    plainly = torch.optim.SGD(net.parameters(), lr=0.5)
    for _ in range(3):
        plainly.zero_grad()
        F.cross_entropy(net(batch(6)), TARGETS).backward()
        plainly.step()
    torch.testing.assert_close(step(False), net.state_dict(), rtol=0, atol=1e-12)
    torch.testing.assert_close(step(True), step(True, "dense"), rtol=0, atol=1e-9)
