"""What malformed models and inputs are told, and that nothing has changed then."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from gtddp_compile.passes import normalise
from support.networks import make, seeded
from support.recorded import FRONT_ENDS, batch

LOSS = nn.CrossEntropyLoss()
TARGETS = torch.arange(6) % 3


class Layer(nn.Module):
    """A layer with something in its forward pass that is put there by a test."""

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.fc, self.run = nn.Linear(4, 4), forward
        self.register_buffer("mean", torch.zeros(4))
        self.scale, self.calls, self.state = 2.0, 0, torch.zeros(4)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any] = lambda layer, x: layer.fc(x)) -> None:
        super().__init__()
        self.block, self.act, self.out = nn.ModuleList([Layer(forward)]), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.block[0](x)))


def model(forward: Callable[[Any, Tensor], Any] | None = None) -> Any:
    return seeded(lambda: Model() if forward is None else Model(forward))


def compiled(net: nn.Module, inputs: Any = None, **options: Any) -> CompiledOptimizer:
    return compile_optimizer(net, batch(6) if inputs is None else inputs, loss=LOSS, **{"curvature": "sgd", **options})


def everything(opt: CompiledOptimizer, net: nn.Module) -> str:
    """Parameters, buffers, optimizer state and random state, as text."""
    return f"{net.state_dict()} {opt.state_dict()} {torch.get_rng_state().sum()} {net.training}"


def refused(call: Callable[[], Any], *said: str) -> CompileError:
    with pytest.raises(CompileError) as caught:
        call()
    for text in said:
        assert text in str(caught.value), str(caught.value)
    assert caught.value.why and caught.value.remedy
    return caught.value


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


def keeps_state(layer: Any, x: Tensor) -> Tensor:
    y = layer.fc(x) + layer.state
    layer.state = y.detach().mean(0)
    return y


def counts(layer: Any, x: Tensor) -> Tensor:
    layer.calls += 1
    return layer.fc(x) / layer.calls


def overwrites(layer: Any, x: Tensor) -> Tensor:
    y = torch.tanh(layer.fc(x))
    y.mul_(2)
    return y


UNTRACEABLE = {
    takes_a_number: (None, 2, "a tensor goes where its numbers are needed"),
    calls_numpy: (None, 2, "numpy"),
    writes_a_buffer: (None, 2, "writes the buffer 'block.0.mean'"),
    assigns_a_buffer: (None, None, "writes the buffer 'block.0.mean'"),
    keeps_state: (None, None, "reads the attribute 'block.0.state' and writes it"),
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


def test_a_forward_pass_that_changes_a_number_is_refused() -> None:
    net = model(counts)
    error = refused(lambda: compiled(net), "changes the attribute 'block.0.calls' from 0 to 1")
    assert error.module == "block.0" and net.block[0].calls == 0


def test_a_model_that_cannot_be_differentiated() -> None:
    refused(lambda: compiled(model(overwrites)), "cannot be differentiated", "inplace operation", "loss.backward()")
    refused(lambda: compiled(model(lambda layer, x: layer.fc(x).sign().long())), "the model itself fails")
    strict = make(lambda net, x: net.a(x).detach(), a=(4, 3))
    refused(lambda: compiled(strict), "no output of the model depends on its trainable parameters")
    with torch.inference_mode():
        refused(lambda: compiled(model()), "torch.inference_mode() is on")


def test_a_loss_inside_the_model_is_called_one() -> None:
    net = make(lambda net, x: F.cross_entropy(net.a(x), TARGETS), a=(4, 3))
    error = refused(lambda: compiled(net), "a single number of the 6 samples", "give the loss to compile_optimizer")
    assert error.operation == "cross_entropy"


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


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda: "model", "a str is not a torch.nn.Module"),
        (lambda: F.relu, "is not a torch.nn.Module"),
        (nn.ReLU, "no trainable parameters"),
        (lambda: nn.Sequential(nn.LazyLinear(3)), "parameters have no shape yet: 0.weight, 0.bias"),
        (lambda: torch.jit.trace(model(), batch(6)), "Compile the module it was made from"),
        (lambda: nn.DataParallel(model()), "Compile its .module"),
        (lambda: torch.compile(model(), backend="eager"), "wrapped by torch.compile"),
        (lambda: nn.Linear(4, 3, device="meta"), "parameter 'weight' is on the meta device"),
    ],
)
def test_what_is_no_model(wrong: Callable[[], Any], said: str) -> None:
    refused(lambda: compiled(wrong()), said)


# --- inputs -----------------------------------------------------------------------------------------------------------

INPUTS: dict[str, tuple[Any, str]] = {
    "text": ("text", "inputs must be tensors, got str"),
    "array": (np.zeros((6, 4)), "inputs must be tensors, got ndarray"),
    "list of numbers": ([1.0, 2.0], "inputs must be tensors, got float"),
    "packed": (nn.utils.rnn.pack_sequence([torch.zeros(2, 4)]), "inputs must be tensors, got PackedSequence"),
    "dict": ({"x": torch.zeros(6, 4)}, "inputs must be tensors, got dict"),
    "nothing in a tuple": ((), "there are no inputs"),
    "no batch axis": (torch.tensor(1.0), "no batch axis"),
    "empty batch": (batch(6)[:0], "the batch is empty"),
    "too wide": (torch.zeros(6, 5).double(), "fails on inputs of shape (6, 5)"),
    "another dtype": (batch(6).float(), "fails on inputs of shape (6, 4)"),
    "integers": (torch.zeros(6, 4, dtype=torch.long), "fails on inputs of shape (6, 4)"),
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


def test_a_step_without_its_batch() -> None:
    opt = compiled(model())
    for arguments in ((), (batch(6),), (lambda: 0.0,)):
        refused(lambda given=arguments: opt.step(*given), "the batch itself is needed")


WRONG_TARGETS: dict[str, tuple[Any, str]] = {
    "too large": (torch.tensor([0, 1, 2, 3, 0, 1]), "class target 3 at [3], but there are 3 classes"),
    "negative": (torch.tensor([0, -1, 2, 0, 0, 1]), "class target -1 at [1]"),
    "too few": (TARGETS[:4], "differ in batch size"),
    "none at all": (TARGETS[:0], "the targets are empty"),
    "floats": (torch.zeros(6).double(), "takes class indices"),
    "text": ("cat", "targets as a tensor, but they are str"),
}


@pytest.mark.parametrize("name", WRONG_TARGETS)
@pytest.mark.parametrize("first", [True, False], ids=["first step", "later step"])
def test_malformed_targets(name: str, first: bool) -> None:
    net = model()
    opt = compiled(net, curvature="rmsprop")
    if not first:
        opt.step(batch(6), TARGETS)
    before = everything(opt, net)
    wrong, said = WRONG_TARGETS[name]
    refused(lambda: opt.step(batch(6), wrong), said)
    assert everything(opt, net) == before


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


# --- changes after compilation ----------------------------------------------------------------------------------------


def expect_the_base_methods_update(opt: CompiledOptimizer, net: nn.Module, inputs: Any, size: int = 6) -> None:
    plain = copy.deepcopy(net)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    F.cross_entropy(plain(*given), TARGETS[:size]).backward()
    torch.optim.SGD(plain.parameters(), lr=0.5).step()
    opt.step(inputs, TARGETS[:size])
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "act", nn.Sigmoid()),
        lambda net: setattr(net.block[0], "scale", 3.0),
        lambda net: setattr(net.block[0], "run", lambda layer, x: layer.fc(x) ** 2),
        lambda net: net.block[0].fc.requires_grad_(False),
        lambda net: net.eval(),
    ],
    ids=["module", "number", "function", "frozen", "mode"],
)
def test_a_changed_model_is_compiled_again(change: Callable[[Any], Any]) -> None:
    net = model(lambda layer, x: layer.fc(x) * layer.scale)
    opt = compiled(net, lr=0.5, feedback=False)
    expect_the_base_methods_update(opt, net, batch(6))
    change(net)
    expect_the_base_methods_update(opt, net, batch(6))


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda net: setattr(net, "out", nn.Linear(4, 3).double()), "out."),
        (lambda net: setattr(net, "extra", nn.Linear(4, 3)), "extra."),
        (lambda net: delattr(net, "out"), "out."),
    ],
)
def test_changed_parameters_are_refused(change: Callable[[Any], Any], name: str) -> None:
    net = model()
    opt = compiled(net)
    change(net)
    refused(lambda: opt.step(batch(6), TARGETS), f"parameter '{name}", "added, removed or replaced", "again")


def test_a_model_that_was_converted_after_its_first_step() -> None:
    net = model().float()
    opt = compiled(net, batch(6).float(), curvature="adam")
    opt.step(batch(6).float(), TARGETS)
    net.double()
    before = everything(opt, net)
    refused(lambda: opt.step(batch(6), TARGETS), "parameters are torch.float64", "state for them is torch.float32")
    assert everything(opt, net) == before
    opt.load_state_dict(opt.state_dict())
    assert torch.isfinite(opt.step(batch(6), TARGETS))


def test_hooks_on_gradients_are_pointed_out() -> None:
    net = model()
    net.out.bias.register_hook(lambda gradient: 0 * gradient)
    with pytest.warns(UserWarning, match="gradient hooks of out.bias do not run"):
        compiled(net)


def test_a_model_that_keeps_changing_is_pointed_out() -> None:
    net = model(lambda layer, x: layer.fc(x) * layer.scale)
    opt = compiled(net, lr=0.5, feedback=False)
    with pytest.warns(UserWarning, match="had numbers among their attributes changed"):
        for index in range(12):
            net.block[0].scale = float(index)
            opt.step(batch(6), TARGETS)
    expect_the_base_methods_update(opt, net, batch(6))


# --- sizes that a recording has built in ------------------------------------------------------------------------------


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


def test_errors_can_be_sent_between_processes() -> None:
    error = refused(lambda: compiled(model(takes_a_number)))
    twin = pickle.loads(pickle.dumps(error))
    assert (str(twin), twin.module, twin.source) == (str(error), error.module, error.source)
