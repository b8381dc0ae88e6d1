"""Models that only torch.export can record: recurrent layers and attention whole, and what models return."""

import copy
import gc
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, compile_optimizer
from support.compared import assert_base, assert_equal, torch_step
from support.networks import Case, make
from support.recorded import assert_recorded_by

LR, SAMPLES, STEPS, WIDTH, CLASSES = 0.1, 3, 3, 4, 2
RECURRENT: dict[str, tuple[type[nn.RNNBase], dict[str, Any]]] = {
    "lstm, deep, both ways, dropout": (nn.LSTM, {"num_layers": 2, "bidirectional": True, "dropout": 0.3}),
    "lstm, projected": (nn.LSTM, {"proj_size": 2}),
    "gru, no bias": (nn.GRU, {"bias": False, "batch_first": True}),
}


def recurrent(kind: type[nn.RNNBase], options: dict[str, Any]) -> nn.Module:
    """A recurrent module read in every way, behind a question on the number of steps that torch.fx cannot answer."""

    def forward(net: Any, x: Tensor) -> Tensor:
        if x.shape[1] < 2:
            return x
        first = options.get("batch_first", False)
        y, states = net.layer(x if first else x.transpose(0, 1))
        y = y if first else y.transpose(0, 1)
        states = states if isinstance(states, tuple) else (states,)
        ends = [state.transpose(0, 1).flatten(1) for state in states]
        return net.out(torch.cat([y.mean(1), *ends], 1))

    return make(forward, layer=lambda: kind(3, WIDTH, **options), out=lambda: nn.LazyLinear(CLASSES))


def attention(first: bool) -> nn.Module:
    """torch's attention module, where torch.fx gives up."""

    def forward(net: Any, x: Tensor) -> Tensor:
        x = F.pad(x, (0, 1))
        if x.shape[1] < 2:
            return x
        h = x if first else x.transpose(0, 1)
        y = net.attention(h, h, h)[0]
        return net.out((y if first else y.transpose(0, 1)).mean(1))

    return make(forward, attention=lambda: nn.MultiheadAttention(4, 2, batch_first=first), out=(4, CLASSES))


def data(seed: int = 2, size: int = SAMPLES) -> tuple[Tensor, Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = (size, STEPS, 3), (size, CLASSES)
    x, y = (torch.randn(*shape, generator=made, dtype=torch.float64) for shape in shapes)
    return x, y


def case_of(model: nn.Module, loss: Any = None) -> Case:
    model(data()[0])
    return Case(model, loss=loss or nn.MSELoss(), draw=data)


def assert_base_method_and_dense(case: Case, frontend: str) -> CompiledOptimizer:
    """With feedback off torch's own step; with feedback the dense backend's, another one."""
    base = assert_base(case, steps=1, curvature="sgd", lr=LR)
    run = assert_equal(case, steps=1, curvature="sgd", lr=LR)
    assert_recorded_by(base.optimizer.graph.ops, frontend)
    assert not torch.allclose(base.parameters, run.parameters)
    return run.optimizer


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_modules(name: str) -> None:
    opt = assert_base_method_and_dense(case_of(recurrent(*RECURRENT[name])), "export")
    layers = RECURRENT[name][1].get("num_layers", 1)
    assert [p.kind for p in opt.graph.players] == ["recurrent"] * layers + ["linear"]


@pytest.mark.parametrize("first", [True, False])
def test_attention_modules(first: bool) -> None:
    assert_base_method_and_dense(case_of(attention(first)), "export")


Named = namedtuple("Named", ["logits", "hidden"])


@dataclass
class Output:
    logits: Tensor
    hidden: tuple[Tensor, ...]


def auxiliary(pack: Any, asks: bool) -> nn.Module:
    """Two heads behind one layer, returned as asked."""

    def forward(net: Any, x: Tensor) -> Any:
        if asks and x.shape[1] < 2:
            return x
        h = torch.tanh(net.trunk(x.mean(1)))
        return pack(net.main(h), net.side(h))

    return make(forward, trunk=(3, WIDTH), main=(WIDTH, CLASSES), side=(WIDTH, CLASSES))


PACKED: dict[str, tuple[Any, Any, Any]] = {
    "tuple": (lambda a, b: (a, b), lambda o: o[0], lambda o: o[1]),
    "named tuple": (Named, lambda o: o.logits, lambda o: o.hidden),
    "dict": (lambda a, b: {"b": b, "a": [a]}, lambda o: o["a"][0], lambda o: o["b"]),
    "dataclass": (lambda a, b: Output(a, (b, 2 * b)), lambda o: o.logits, lambda o: o.hidden[1] / 2),
}


@pytest.mark.parametrize("asks", [False, True], ids=["fx", "export"])
@pytest.mark.parametrize("name", PACKED)
def test_the_loss_says_which_outputs_matter(name: str, asks: bool) -> None:
    pack, main, side = PACKED[name]

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        return ((main(outputs) - targets) ** 2 + 0.3 * side(outputs) ** 2).mean(1)

    assert_base_method_and_dense(case_of(auxiliary(pack, asks), loss), "export" if asks else "fx")


def autocast(net: Any, x: Tensor) -> Tensor:
    """A region of the forward pass in lower precision."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = torch.tanh(net.a(x.mean(1)))
    return net.b(h.float())


def test_an_autocast_region_is_in_lower_precision() -> None:
    model = make(autocast, a=(3, WIDTH), b=(WIDTH, CLASSES)).float()
    x, y = (value.float() for value in data())
    own, before = copy.deepcopy(model), copy.deepcopy(model)
    torch_step(torch.optim.SGD(own.parameters(), lr=LR), F.mse_loss(own(x), y))
    opt = compile_optimizer(model, x, loss=nn.MSELoss(), curvature="sgd", lr=LR, feedback=False)
    (cast,) = (op for op in opt.graph.ops.ops if op.name == opt.graph.players[0].op)
    assert cast.dtype == torch.bfloat16
    opt.step(x, y)
    for name, value in model.named_parameters():
        expected, start = own.get_parameter(name), before.get_parameter(name)
        assert (value - expected).abs().max() <= 2e-2 * (expected - start).abs().max(), "a bfloat16 has 8 bits"


def moved(net: Any, x: Tensor) -> Tensor:
    """CTRL: a table that its owner sends to where the input is, which it is already."""
    net.table = net.table.to(device=x.device, dtype=x.dtype)
    return net.a(torch.tanh(x.mean(1) * net.table))


def test_a_buffer_assigned_to_itself_is_not_written() -> None:
    case = case_of(make(moved, a=(3, CLASSES), table=lambda: torch.randn(3)))
    table = case.model.table
    assert_base_method_and_dense(case, "fx")
    assert case.model.table is table and isinstance(table, Tensor)


def test_what_a_refusal_saw_is_let_go_of() -> None:
    """A recording is tried on copies of the parameters; they are gone when torch.export has done what torch.fx refused,
    without waiting for the garbage collector.
    """

    def compiled(width: int) -> CompiledOptimizer:
        model = make(lambda net, x: net.a(x) if x.shape[1] == width else x, a=(width, 41))
        return compile_optimizer(model, torch.randn(3, width).double(), loss=nn.CrossEntropyLoss())

    compiled(2)  # what torch.export imports at its first call keeps the frames that called it
    gc.collect()
    gc.disable()
    try:
        compiled(37)
        copies = [o for o in gc.get_objects() if type(o) is Tensor and o.shape == (41, 37)]
    finally:
        gc.enable()
    assert not copies
