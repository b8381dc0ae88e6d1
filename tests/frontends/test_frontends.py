"""Front ends: whichever one records a model, the normal form is the same and computes what the model computes.

A recording is evaluated here by `values`, a few lines that share nothing with the compiler's own check, on a batch
of another size than the one that was recorded.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.frontends import traced
from gtddp_compile.graph import OpGraph
from gtddp_compile.passes import find_players, normalise
from support.architectures import EXAMPLES
from support.networks import CASES, Net, conv_residual, make, seeded
from support.recorded import FRONT_ENDS, assert_recorded_by, assert_same, batch, net, values

both = pytest.mark.parametrize("front_end", ["fx", "export"])


def shapes(graph: OpGraph) -> list[tuple[Any, ...]]:
    """Everything that the passes look at but the functions themselves."""
    return [
        (op.name, op.kind, op.module, op.operands, op.parameters, op.shape, op.advances, op.random, op.mixes_samples)
        for op in graph.ops
    ]


@pytest.mark.parametrize("installed", [True, False])
def test_whose_a_line_is(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed, this package lies beside torch and the model libraries."""
    if installed:
        monkeypatch.setattr(traced, "OURS", (f"{traced.SITE}/gtddp_compile/", traced.OURS[-1]))
    apart = traced.__file__, find_players.__code__.co_filename
    for name in (*([f"{traced.SITE}/gtddp_compile/api.py"] if installed else apart), nn.__file__, "<string>"):
        assert not traced.is_users(name), name
    for name in (__file__, f"{traced.SITE}/torchvision/models/resnet.py"):
        assert traced.is_users(name), name


# --- one normal form --------------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]] = {
    **{name: lambda b=build: (b().model, b().inputs) for name, build in EXAMPLES.items()},
    **{name: lambda b=build: (b().model, (b().batch(0)[0],)) for name, build in CASES.items()},
    "conv_residual_eval": lambda: (conv_residual(training=False).model, (conv_residual().batch(0)[0],)),
}


@pytest.mark.parametrize("name", MODELS)
def test_both_front_ends_give_the_same_normal_form(name: str) -> None:
    model, inputs = MODELS[name]()
    graphs = [normalise(model, inputs, (FRONT_ENDS[f],)) for f in ("fx", "export")]
    assert [graph.frontend for graph in graphs] == ["fx", "export"]
    assert shapes(graphs[0]) == shapes(graphs[1])
    assert graphs[0].parameters == graphs[1].parameters
    first, second = map(find_players, graphs)
    assert (first.players, first.unused) == (second.players, second.unused)


def stopped(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = torch.tanh(net.a(x))
    return net.b(target) + net.b(torch.tanh(x @ net.a.weight.T))


@both
def test_no_grad_stops_gradients(front_end: str) -> None:
    model = net(stopped)
    graph = normalise(model, (batch(4),), (FRONT_ENDS[front_end],))
    assert "detach" in {op.kind for op in graph.ops}
    x = batch(6)
    found = torch.autograd.grad(values(graph, model, x).sum(), list(model.parameters()), allow_unused=True)
    expected = torch.autograd.grad(model(x).sum(), list(model.parameters()), allow_unused=True)
    assert_same(found, expected)
    assert find_players(graph).unused == ("a.bias",)


def noisy(net: Any, x: Tensor) -> Tensor:
    h = net.a(x)
    h = h + 0.1 * torch.randn_like(h)
    return net.b(F.dropout(h, 0.3)) + torch.empty_like(x).normal_()[:, :3]


def noisy_by_size(net: Any, x: Tensor) -> Tensor:
    return net.b(net.a(x) * torch.rand(x.shape[0], 1))


def wasteful(net: Any, x: Tensor) -> Tensor:
    """Draws a mask that nothing reads before one that it uses: without the first, the second is another."""
    h = net.a(x)
    F.dropout(net.b(h), 0.3)
    return net.b(F.dropout(h, 0.3))


@pytest.mark.parametrize(
    ("forward", "front_end", "kinds"),
    [*((noisy, one, ["randn_like", "dropout", "normal"]) for one in ("fx", "export")),
     *((wasteful, one, ["dropout", "dropout"]) for one in ("fx", "export")),
     (noisy_by_size, "", ["rand"])],
)  # fmt: skip
def test_random_numbers_are_drawn_as_the_model_draws_them(forward: Any, front_end: str, kinds: list[str]) -> None:
    """Those too that nothing reads. torch.fx cannot see torch.rand(x.shape[0], 1), and leaves it to torch.export."""
    model = net(forward)
    graph = normalise(model, (batch(4),), *([(FRONT_ENDS[front_end],)] if front_end else []))
    assert [op.kind for op in graph.ops if op.random] == kinds and graph.frontend == (front_end or "export")
    torch.manual_seed(7)
    expected = model(batch(6))
    torch.manual_seed(7)
    assert_same(values(graph, model, batch(6)), expected)


@both
def test_buffers_are_read_and_statistics_advance(front_end: str) -> None:
    layers = {"fc": (4, 3), "norm": lambda: nn.BatchNorm1d(3), "shift": lambda: torch.arange(3.0)}
    model = make(lambda net, x: net.norm(net.fc(x) * net.constant) + net.shift, **layers)
    model.constant = torch.tensor(2.0)
    graph = normalise(model, (batch(4),), (FRONT_ENDS[front_end],))
    (norm,) = (op for op in graph.ops if op.kind == "batch_norm")
    assert norm.advances == ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked")
    assert norm.mixes_samples
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.shift.add_(1)
        twin.shift.add_(1)
    assert_same(values(graph, model, batch(6)), twin(batch(6)))
    assert_same(dict(model.named_buffers()), dict(twin.named_buffers()))


# --- names, arguments, outputs ----------------------------------------------------------------------------------------


def inner() -> nn.Module:
    return Net(lambda net, x: net.act(net.fc(x)) + x, fc=nn.Linear(4, 4), act=nn.Tanh())


@both
def test_operations_are_named_after_their_modules(front_end: str) -> None:
    model = seeded(lambda: nn.Sequential(inner(), nn.Sequential(inner(), nn.Linear(4, 3))))
    graph = normalise(model, (batch(4),), (FRONT_ENDS[front_end],))
    names = ["input", "0.fc", "0.act", "0.add", "1.0.fc", "1.0.act", "1.0.add", "1.1"]
    assert [op.name for op in graph.ops] == names
    assert [op.module for op in graph.ops][1:4] == ["0.fc", "0.act", "0"]


class Lines(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = x + x.sum(1, keepdim=True)
        return torch.tanh(self.fc(x))


@both
def test_operations_know_the_users_line(front_end: str) -> None:
    graph = normalise(with_layer(Lines), (batch(4),), (FRONT_ENDS[front_end],))
    first = Lines.forward.__code__.co_firstlineno
    lines = {op.kind: op.source for op in graph.ops if op.kind != "input"}
    after = {"sum": 1, "add": 1, "linear": 2, "tanh": 2}
    assert lines == {kind: f"test_frontends.py:{first + line}" for kind, line in after.items()}


class Arguments(Net):
    def forward(self, x: Tensor, y: Tensor, *rest: Tensor, scale: float = 2.0) -> Tensor:
        return self.fc(x + scale * y + sum(rest))


class Defaults(Net):
    def forward(self, x: Tensor, mask: Tensor | None = None, power: int = 2) -> Tensor:
        y = self.fc(x) ** power
        return y if mask is None else y * mask


def with_layer(kind: type[Net]) -> nn.Module:
    return seeded(lambda: kind(lambda: None, fc=nn.Linear(4, 3)))


@both
@pytest.mark.parametrize("count", [2, 3, 4])
def test_variable_arguments(front_end: str, count: int) -> None:
    model, given = with_layer(Arguments), tuple(batch(4, seed) for seed in range(count))
    graph = normalise(model, given, (FRONT_ENDS[front_end],))
    rest = {2: (), 3: ("rest",), 4: ("rest_0", "rest_1")}[count]
    assert graph.inputs == ("x", "y", *rest)
    assert_same(values(graph, model, *given), model(*given))


@both
def test_arguments_that_are_not_given_keep_their_defaults(front_end: str) -> None:
    model = with_layer(Defaults)
    for given in ((batch(4),), (batch(4), batch(4, 1)[:, :3])):
        graph = normalise(model, given, (FRONT_ENDS[front_end],))
        assert graph.inputs == ("x", "mask")[: len(given)]
        assert_same(values(graph, model, *given), model(*given))


# --- the model is left alone ------------------------------------------------------------------------------------------


class Remembering(nn.Module):
    """Keeps its last hidden value, as models do for inspection."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm, self.drop, self.out = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 3)
        self.hidden: Tensor | None = None
        self.seen: list[Tensor] = []
        self.fc.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = self.drop(self.norm(self.fc(x)))
        self.seen.append(self.hidden)
        return self.out(self.hidden)


class Looping(Remembering):
    """A length that torch.fx takes for data: torch.export records it."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x[0]) - 3):
            y = super().forward(x)
        return y


def state(model: nn.Module) -> Iterator[Any]:
    for module in model.modules():
        yield module.training
        yield {k: copy.copy(v) for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            yield (id(tensor), tensor._version, tensor.requires_grad, tensor.grad) if tensor is not None else None


@pytest.mark.parametrize("kind", [Remembering, Looping])
@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_not_changed_by_compiling(kind: type[Remembering], training: bool) -> None:
    model = seeded(kind).train(training)
    model.drop.train()
    weights, before = copy.deepcopy(model.state_dict()), list(state(model))
    torch.manual_seed(3)
    random, x = torch.get_rng_state(), batch(4)
    kept = x.clone()
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd")
    assert list(state(model)) == before
    assert_same(model.state_dict(), weights)
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(x, kept) and torch.is_grad_enabled()
    assert model(x).shape == (4, 3)
    assert_recorded_by(opt.graph.ops, "fx" if kind is Remembering else "export")


def test_the_model_is_not_changed_by_a_refusal() -> None:
    class Refused(Remembering):
        def forward(self, x: Tensor) -> Tensor:
            y = super().forward(x)
            return y * float(y.detach().max())

    model = seeded(Refused)
    before = list(state(model))
    with pytest.raises(CompileError):
        compile_optimizer(model, batch(4), loss=nn.CrossEntropyLoss(), curvature="sgd")
    assert list(state(model)) == before
