"""In-place operations: the normal form has none and computes what the model computes, aliases and views included."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gtddp_compile import CompileError
from gtddp_compile.passes import normalise
from support.compared import assert_base
from support.networks import Case
from support.recorded import FRONT_ENDS, assert_recorded_by, assert_same, batch, net, values


def alias_of_iadd(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    alias = h
    h += x.sum(1, keepdim=True)
    return net.b(torch.tanh(alias)) + alias[:, :3]


def relu_underscore(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    y = h.relu_()
    return net.b(y) + h[:, :3]


def relu_inplace(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    F.relu(h, inplace=True)
    return net.b(h)


def item_assignment(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h[:, 0] = torch.tanh(h[:, 1].clone())
    h[:, 1] = 0.5
    return net.b(h)


def add_to_a_view(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    part = h[:, :2]
    part += 1
    return net.b(h)


def add_below_a_view(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    flat = h.view(-1)
    h.mul_(2)
    return net.b(flat.view(-1, 5))


def halves(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    first, second = h[:, :2], h[:, 2:4]
    first.add_(second)
    return net.b(h)


def several_underscores(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h.clamp_(min=-0.5).add_(1).mul_(x[:, :1])
    h.masked_fill_(x[:, 1:2] > 0, 2.0)
    z = torch.zeros_like(h)
    z.copy_(h)
    h.zero_()
    return net.b(z + h)


def filled(net: Any, x: Tensor) -> Tensor:
    """A number of the model's own in every entry, which has a gradient."""
    h = torch.tanh(net.a(x))
    return net.b(h + torch.zeros_like(h).fill_(net.a.bias[0]) + torch.ones_like(h).fill_(0.5))


def augmented(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h *= 2
    h -= 0.1
    h /= 3
    return net.b(h)


def inputs_own(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x += 1
    return net.b(torch.tanh(net.a(x)))


def part_of_a_part(net: Any, x: Tensor) -> Tensor:
    h = net.a(x).unflatten(1, (5, 1)) * torch.ones(2, dtype=x.dtype)
    row = h[1:3][0]
    row *= 2
    h[:, 4] += x[:, :2]
    first = h[..., 0]
    for column in (1, 3):
        first[:, column] = torch.tanh(h[:, column, 1])
    return net.b(first) + h.sum(2)[:, :3]


IN_PLACE = [
    part_of_a_part, alias_of_iadd, relu_underscore, relu_inplace, item_assignment, add_to_a_view, add_below_a_view,
    halves, several_underscores, augmented, inputs_own, filled,
]  # fmt: skip


@pytest.mark.parametrize("forward", IN_PLACE, ids=lambda f: f.__name__)
def test_in_place_operations(forward: Callable[..., object]) -> None:
    """By whichever front end takes them; parts of values are followed by the first."""
    model = net(forward)
    graph = normalise(model, (batch(4),))
    assert_same(values(graph, model, batch(6, 1)), model(batch(6, 1)))
    if forward in (part_of_a_part, add_to_a_view, filled):
        assert_recorded_by(graph, "fx")


@pytest.mark.parametrize("forward", IN_PLACE[:6], ids=lambda f: f.__name__)
@pytest.mark.parametrize("front_end", ["export", "functional"])
def test_in_place_operations_through_export(forward: Callable[..., object], front_end: str) -> None:
    """Either the model's own values, or a refusal that is left to the next front end; never other values."""
    model = net(forward)
    try:
        graph = normalise(model, (batch(4),), (FRONT_ENDS[front_end],))
    except CompileError as error:
        assert "through another view" in str(error) and front_end == "export"
        return
    assert_same(values(graph, model, batch(6, 1)), model(batch(6, 1)))


def test_a_training_step_with_in_place_operations_is_the_base_methods() -> None:
    for forward in (alias_of_iadd, relu_underscore, item_assignment, add_to_a_view, filled):
        assert_base(Case(net(forward), (4,)), curvature="sgd", lr=0.1)
