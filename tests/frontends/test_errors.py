"""What malformed models and inputs are told, and that nothing has changed then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gtddp_compile.passes import normalise
from support.networks import make
from support.recorded import FRONT_ENDS, batch
from support.refused import TARGETS, compiled, everything, model, refused


def line(forward: Callable[..., Any], offset: int) -> str:
    return f"test_errors.py:{forward.__code__.co_firstlineno + offset}"


# --- models that cannot be compiled -----------------------------------------------------------------------------------


def branches_on_a_value(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    if y.sum() > 0:
        return y
    return -y


def loops_while(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    while y.norm() > 1:
        y = y / 2
    return y


def takes_a_number(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    return y * float(y.detach().max())


def calls_numpy(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    return y * torch.from_numpy(np.tanh(x.numpy()))


def writes_a_buffer(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    layer.mean.mul_(0.9).add_(y.detach().mean(0))
    return y - layer.mean


def assigns_a_buffer(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    layer.mean = 0.9 * layer.mean + y.detach().mean(0)
    return y - layer.mean


def overwrites(layer: Any, x: Tensor) -> Tensor:
    y = torch.tanh(layer.fc(x))
    y.mul_(2)
    return y


UNTRACEABLE = {
    takes_a_number: (None, 2, "a tensor goes where its numbers are needed"),
    calls_numpy: (None, 2, "numpy"),
    writes_a_buffer: (None, 2, "writes the buffer 'block.0.mean'"),
    assigns_a_buffer: (None, None, "writes the buffer 'block.0.mean'"),
}


@pytest.mark.parametrize("forward", UNTRACEABLE, ids=lambda f: f.__name__)
def test_untraceable_models_say_where_and_why(forward: Callable[..., Any]) -> None:
    operation, offset, why = UNTRACEABLE[forward]
    net = model(forward)
    before = copy.deepcopy(net.state_dict())
    error = refused(lambda: compiled(net), why, "orward pass" if offset is None else "torch.where")
    assert error.module == "block.0"
    assert error.operation == operation
    assert error.source == (None if offset is None else line(forward, offset))
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("front_end", FRONT_ENDS)
@pytest.mark.parametrize("forward", [branches_on_a_value, loops_while])
def test_control_flow_is_refused_by_every_front_end(
    front_end: str, forward: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused(lambda: normalise(model(forward), (batch(6),), (FRONT_ENDS[front_end],)), "depend")
    assert error.source == line(forward, 2)
    assert capsys.readouterr() == ("", ""), "torch.export's own log is not for our users"


def test_a_model_that_cannot_be_differentiated() -> None:
    refused(lambda: compiled(model(overwrites)), "cannot be differentiated", "inplace operation", "loss.backward()")
    refused(lambda: compiled(model(lambda layer, x: layer.fc(x).sign().long())), "the model itself fails")
    strict = make(lambda net, x: net.a(x).detach(), a=(4, 3))
    refused(lambda: compiled(strict), "no output of the model depends on its trainable parameters")
    with torch.inference_mode():
        refused(lambda: compiled(model()), "torch.inference_mode() is on")


def shuffled(net: Any, x: Tensor) -> Tensor:
    """Rows in an order that no axis has."""
    rows = torch.tanh(net.a(x.reshape(-1, 4)[[0, 3, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]]))
    return net.b(rows[[0, 2, 3, 1, 4, 5, 6, 7, 8, 9, 10, 11]].reshape(x.shape[0], -1))


def one_sample_at_a_time(net: Any, x: Tensor) -> Tensor:
    rows = [torch.tanh(net.a(x[i].flatten()[:4])) for i in range(x.shape[0])]
    return net.b(torch.cat([torch.stack(rows)] * 2, 1))


@pytest.mark.parametrize(("forward", "shape"), [(shuffled, (12, 5)), (one_sample_at_a_time, (5,))])
def test_samples_that_no_axis_tells_apart(forward: Callable[..., Any], shape: tuple[int, ...]) -> None:
    net = make(forward, a=(4, 5), b=(10, 3))
    x = torch.stack([batch(6), batch(6, 1)], 1)
    error = refused(lambda: compiled(net, x), f"its value has shape {shape}", "of the 6 samples", "(B, T, n)")
    assert (error.module, error.operation) == ("a", "linear")


# --- inputs -----------------------------------------------------------------------------------------------------------

INPUTS: dict[str, tuple[Any, str]] = {
    "array": (np.zeros((6, 4)), "inputs must be tensors, got ndarray"),
    "too wide": (torch.zeros(6, 5).double(), "fails on inputs of shape (6, 5)"),
    "another dtype": (batch(6).float(), "fails on inputs of shape (6, 4)"),
    "too many": ((batch(6), batch(6)), "fails on inputs of shape (6, 4), (6, 4)"),
}


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("when", ["example", "step"])
def test_malformed_inputs(name: str, when: str) -> None:
    net = model()
    wrong, said = INPUTS[name]
    if when == "example":
        refused(lambda: compiled(net, wrong), said)
        return
    opt = compiled(net, curvature="adam")
    opt.step(batch(6), TARGETS)
    before = everything(opt, net)
    error = refused(lambda: opt.step(wrong, TARGETS), said)
    assert everything(opt, net) == before
    if name in ("too wide", "another dtype"):
        assert (error.module, error.operation) == ("block.0.fc", "Linear")
    opt.step(batch(6), TARGETS)


# --- parameters -------------------------------------------------------------------------------------------------------


def test_parameters_without_a_path_to_the_loss_are_named_and_left_untouched() -> None:
    net = make(lambda net, x: net.b(torch.tanh(net.a(x))), a=(4, 5), b=(5, 3), spare=(4, 4))
    before = [p.clone() for p in net.spare.parameters()]
    opt = compiled(net, weight_decay=0.1)
    opt.step(batch(6), TARGETS)
    assert opt.graph.unused == ("spare.weight", "spare.bias")
    assert all(torch.equal(a, b) for a, b in zip(net.spare.parameters(), before, strict=True))
    assert "spare" not in str(opt.graph.players)


def test_frozen_parameters_are_respected() -> None:
    net = model()
    net.block[0].fc.requires_grad_(False)
    before = net.block[0].fc.weight.clone()
    opt = compiled(net, weight_decay=0.1)
    opt.step(batch(6), TARGETS)
    assert [player.name for player in opt.graph.players] == ["out"]
    assert torch.equal(net.block[0].fc.weight, before)


def test_errors_can_be_sent_between_processes() -> None:
    error = refused(lambda: compiled(model(takes_a_number)))
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.module, twin.source) == (str(error), error.module, error.source)
