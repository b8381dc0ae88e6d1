"""What changes in a model after it was compiled, and sizes that a recording has built in."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gtddp_compile.frontends import attributes
from support.networks import make
from support.recorded import batch
from support.refused import TARGETS, Layer, Options, compiled, expect_the_base_methods_update, model, refused


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


class Place:
    """An object without a dict."""

    __slots__ = ("__own", "gain", "unset")

    def __init__(self) -> None:
        self.gain, self.__own = 2.0, [1.0]

    def own(self) -> list[float]:
        return self.__own


class Below(Place):
    __slots__ = ("options",)

    def __init__(self) -> None:
        super().__init__()
        self.options = Frozen()


@dataclass(frozen=True, slots=True)
class Frozen:
    table: Any = field(default_factory=lambda: np.arange(4.0).reshape(2, 2).T)


def reads_what_has_no_dict(layer: Any, x: Tensor) -> Tensor:
    held = layer.options
    gain = held.gain * held.own()[0] * float(held.options.table[0, 1]) * layer.raw[0] * layer.row[1]
    return layer.fc(x) * gain + torch.from_numpy(layer.long[:4].copy()) + float(layer.words[0])


PLACES: dict[str, Callable[[Any], Any]] = {
    "slot": lambda layer: setattr(layer.options, "gain", 3.0),
    "list in a slot": lambda layer: layer.options.own().append(layer.options.own().pop() * 2),
    "array in a frozen dataclass": lambda layer: layer.options.options.table.__setitem__((0, 1), 5.0),
    "bytes": lambda layer: layer.raw.__setitem__(0, 3),
    "array": lambda layer: layer.row.__setitem__(1, 2.5),
    "long array": lambda layer: layer.long.__setitem__(1, 9.0),
    "another array": lambda layer: setattr(layer, "long", np.ones(20000)),
    "array of objects": lambda layer: layer.words.__setitem__(0, "4.5"),
}


@pytest.mark.parametrize("change", PLACES.values(), ids=PLACES)
def test_what_has_no_dict_is_looked_at(change: Callable[[Any], Any]) -> None:
    net = model(reads_what_has_no_dict)
    layer = net.block[0]
    layer.options, layer.raw, layer.row, layer.long = Below(), bytearray([2, 1]), array("d", [1.0, 0.5]), np.ones(20000)
    layer.words = np.array(["1.5", None], dtype=object)
    opt = compiled(net, lr=0.5, feedback=False)
    for _ in range(2):
        expect_the_base_methods_update(opt, net, batch(6))
    code = opt.program
    opt.step(batch(6), TARGETS)
    assert opt.program.graph is code.graph, "compiled again though nothing changed"
    change(layer)
    expect_the_base_methods_update(opt, net, batch(6))


def writes_what_has_no_dict(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.options.unset = layer.options.options.table[0, 0] = layer.raw[0] = 7
    layer.options.own()[0] = 3.0
    return y


def test_what_forward_writes_without_a_dict_is_put_back() -> None:
    net = model(writes_what_has_no_dict)
    layer = net.block[0]
    layer.options, layer.raw = Below(), bytearray([2, 1])
    with attributes.untouched(net):
        net(batch(6))
        assert layer.options.unset == layer.raw[0] == 7
    assert not hasattr(layer.options, "unset") and layer.options.own() == [1.0]
    assert layer.raw == bytearray([2, 1]) and layer.options.options.table[0, 0] == 0


def counts_in_a_slot(layer: Any, x: Tensor) -> Tensor:
    layer.options.gain += 1
    return layer.fc(x) / layer.options.gain  # type: ignore[no-any-return]


def test_a_counter_in_a_slot_is_refused() -> None:
    net = model(counts_in_a_slot)
    net.block[0].options = Place()
    refused(lambda: compiled(net), "changes the attribute 'block.0.options.gain' from 2.0 to 3.0")


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
