"""What malformed models and inputs are told, and that nothing has changed then."""

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
from support.refused import compiled, model, refused


def line(forward: Callable[..., Any], offset: int) -> str:
    return f"test_errors.py:{forward.__code__.co_firstlineno + offset}"


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


def assigns_a_buffer(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x)
    layer.mean = 0.9 * layer.mean + y.detach().mean(0)
    return y - layer.mean


UNTRACEABLE = {
    takes_a_number: (None, 2, "a tensor goes where its numbers are needed"),
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


INPUTS: dict[str, tuple[Any, str]] = {
    "array": (np.zeros((6, 4)), "inputs must be tensors, got ndarray"),
    "too wide": (torch.zeros(6, 5).double(), "fails on inputs of shape (6, 5)"),
    "another dtype": (batch(6).float(), "fails on inputs of shape (6, 4)"),
    "too many": ((batch(6), batch(6)), "fails on inputs of shape (6, 4), (6, 4)"),
}


@pytest.mark.parametrize("name", INPUTS)
def test_malformed_examples(name: str) -> None:
    """Those of a step: tests/docs/test_errors_page.py."""
    wrong, said = INPUTS[name]
    refused(lambda: compiled(model(), wrong), said)


def test_errors_can_be_sent_between_processes() -> None:
    error = refused(lambda: compiled(model(takes_a_number)))
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.module, twin.source) == (str(error), error.module, error.source)
