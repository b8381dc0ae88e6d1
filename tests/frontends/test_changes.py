"""What changes in a model after it was compiled, and sizes that a recording has built in."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.networks import make
from support.recorded import batch
from support.refused import TARGETS, Layer, Options, compiled, expect_the_base_methods_update, model


def reads_attributes(layer: Any, x: Tensor) -> Tensor:
    """What is made of them is a constant to every front end."""
    y: Tensor = layer.fc(x) * (layer.scale * layer.options.gain) + (layer.state * 2 + layer.shift)
    for mask in layer.options.masks:
        y = y * mask
    return y**layer.options.power


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "act", nn.Sigmoid()),
        lambda net: setattr(net.block[0], "scale", 3.0),
        lambda net: setattr(net.block[0], "run", lambda layer, x: layer.fc(x) ** 2),
        lambda net: setattr(net.block[0], "state", torch.ones(4)),
        lambda net: net.block[0].state.fill_(2.0),
        lambda net: setattr(net.block[0].options, "gain", 3.0),
        lambda net: net.block[0].options.masks.append(torch.tensor(0.5)),
        lambda net: setattr(Layer, "shift", 1.0),
        lambda net: setattr(Options, "power", 2),
        lambda net: net.block[0].fc.requires_grad_(False),
        lambda net: net.eval(),
    ],
    ids=["module", "number", "function", "tensor", "in place", "field", "item", "class", "its class", "frozen", "mode"],
)
def test_a_changed_model_is_compiled_again(change: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Layer, "shift", 0.0)
    monkeypatch.setattr(Options, "power", 1)
    net = model(reads_attributes)
    opt = compiled(net, lr=0.5, feedback=False)
    expect_the_base_methods_update(opt, net, batch(6))
    change(net)
    expect_the_base_methods_update(opt, net, batch(6))


def test_hooks_on_gradients_are_pointed_out() -> None:
    net = model()
    net.out.bias.register_hook(lambda gradient: 0 * gradient)
    with pytest.warns(UserWarning, match="gradient hooks of out.bias do not run"):
        compiled(net)


def test_a_model_that_keeps_changing_is_pointed_out() -> None:
    net = model(lambda layer, x: layer.fc(x) * layer.scale)
    opt = compiled(net, lr=0.5, feedback=False)
    with pytest.warns(UserWarning, match="had attributes changed"):
        for index in range(12):
            net.block[0].scale = float(index)
            opt.step(batch(6), TARGETS)
    expect_the_base_methods_update(opt, net, batch(6))


def as_often_as_samples(net: Any, x: Tensor) -> Tensor:
    y = net.a(x)
    for _ in range(x.shape[0]):
        y = torch.tanh(y)
    return net.b(y)


def by_batch_size(net: Any, x: Tensor) -> Tensor:
    y = torch.tanh(net.a(x))
    return net.b(y) if x.shape[0] > 3 else net.b(2 * y)


@pytest.mark.parametrize(("forward", "specialised"), [(as_often_as_samples, True), (by_batch_size, False)])
def test_a_program_for_another_batch_size_is_compiled_again(forward: Callable[..., Any], specialised: bool) -> None:
    """torch.export builds the batch size in, or follows one side of a decision on it."""
    net = make(forward, a=(4, 5), b=(5, 3))
    opt = compiled(net, lr=0.5, feedback=False)
    assert (opt.graph.ops.frontend, opt.graph.ops.specialised) == ("export", specialised)
    programs = []
    for size in (6, 2, 6, 4, 2):
        expect_the_base_methods_update(opt, net, batch(size), size)
        programs.append(opt.program.code)
    assert programs[0] == programs[2] and programs[1] == programs[4] and programs[0] != programs[1]


def test_an_input_that_was_left_out_at_first() -> None:
    net = make(lambda net, x, y=None: net.b(torch.tanh(net.a(x if y is None else x * y))), a=(4, 5), b=(5, 3))
    opt = compiled(net, lr=0.5, feedback=False)
    for inputs in (batch(6), (batch(6), batch(6, 1)), batch(6)):
        expect_the_base_methods_update(opt, net, inputs)
