"""What would be silently wrong is refused, and nothing has changed then: state, random numbers, values left behind."""

import copy
from collections.abc import Callable
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from gtddp_compile.frontends import trace_followed
from support.compared import torch_step
from support.networks import make
from support.recorded import FRONT_ENDS, batch
from support.refused import TARGETS, Layer, Model, compiled, everything, expect_the_base_methods_update, refused

Forward = Callable[[Any, Tensor], Any]


class Holding(Layer):
    """A layer with attributes of several kinds, in which a test's forward pass keeps something."""

    def __init__(self, forward: Forward) -> None:
        super().__init__(forward)
        self.kept: Any = None
        self.table: dict[str, Any] = {"mean": torch.zeros(4)}
        self.options = SimpleNamespace(mean=torch.zeros(4), calls=0)
        self.numpy = np.random.default_rng(0)


def holding(forward: Forward) -> Any:
    net = Model()
    net.block[0] = Holding(forward).double()
    return net.double()


def hidden_of_this_size(layer: Any, x: Tensor) -> Tensor:
    """Forgotten when a batch of another size comes, the last of an epoch."""
    y: Tensor = layer.fc(x)
    before, layer.kept = layer.kept, y.detach()
    return y if before is None or before.shape != y.shape else y + before


def first_batch(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    if layer.kept is None:
        layer.kept = y.detach().mean(0)
    return y - layer.kept


def running_mean(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.state = 0.999 * layer.state + 0.001 * y.detach().mean(0)
    return y - layer.state


def written_in_place(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.state.mul_(0.9).add_(y.detach().mean(0))
    return y - layer.state


def in_a_dict(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.table["mean"] = 0.9 * layer.table["mean"] + y.detach().mean(0)
    return y - layer.table["mean"]


def in_an_object(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.options.mean = 0.9 * layer.options.mean + y.detach().mean(0)
    return y - layer.options.mean


def counted_in_an_object(layer: Any, x: Tensor) -> Tensor:
    layer.options.calls += 1
    return layer.fc(x)  # type: ignore[no-any-return]


CARRIED = {
    hidden_of_this_size: "reads the attribute 'block.0.kept' and writes it",
    first_batch: "reads the attribute 'block.0.kept' and writes it",
    running_mean: "reads the attribute 'block.0.state' and writes it",
    written_in_place: "reads the attribute 'block.0.state' and writes it",
    in_a_dict: "reads the attribute 'block.0.table' and writes it",
    in_an_object: "reads the attribute 'block.0.options' and writes it",
    counted_in_an_object: "changes the attribute 'block.0.options.calls' from 0 to 1",
}


def snapshot(net: Any) -> str:
    """Whatever a pass could have written, as text."""
    layer = net.block[0]
    drawn = torch.get_rng_state().sum(), layer.numpy.bit_generator.state
    return f"{net.state_dict()} {layer.kept} {layer.state} {layer.table} {layer.options} {drawn}"


@pytest.mark.parametrize("forward", CARRIED, ids=lambda f: f.__name__)
def test_what_is_carried_to_the_next_pass(forward: Forward) -> None:
    """More of it: docs/errors.md."""
    net = holding(forward)
    before = snapshot(net)
    refused(lambda: compiled(net), "module 'block.0'", CARRIED[forward])
    assert snapshot(net) == before


@pytest.mark.parametrize("of_this_size", [False, True])
def test_what_is_carried_outside_the_modules(of_this_size: bool) -> None:
    """Forgotten by some when a batch of another size comes."""
    kept: list[Tensor] = []

    def forward(layer: Any, x: Tensor) -> Tensor:
        y: Tensor = layer.fc(x)
        kept.append(y.detach() if of_this_size else y.detach().mean(0))
        before = kept[-2] if len(kept) > 1 else None
        return y if before is None or (of_this_size and before.shape != y.shape) else y + before

    refused(lambda: compiled(holding(forward)), "computes something else every time", "keep nothing outside")


def test_random_numbers_that_are_not_torchs() -> None:
    """A layer left out rarely: the first draws seldom tell. Other generators: docs/errors.md."""
    net = holding(lambda layer, x: x if layer.numpy.random() < 0.01 else layer.fc(x))
    before = snapshot(net)
    refused(lambda: compiled(net), "draws random numbers from block.0.numpy", "torch's functions")
    assert snapshot(net) == before


def layer_drop(layer: Any, x: Tensor) -> Tensor:
    """As wav2vec2 leaves layers out."""
    return x if torch.rand(()) < 0.5 else layer.fc(x)


def noise(layer: Any, x: Tensor) -> Tensor:
    return layer.fc(x) * (1 + torch.rand(4).double())  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore:the path through the model")
@pytest.mark.parametrize("forward", [layer_drop, noise])
def test_torchs_random_numbers_are_drawn_at_every_step(forward: Forward) -> None:
    """The path is that of the step's own draw, found anew where it is another one."""
    net = holding(forward)
    plain = copy.deepcopy(net)
    opt, sgd = compiled(net, lr=0.5, feedback=False), torch.optim.SGD(plain.parameters(), lr=0.5)
    for seed in range(6):
        torch.manual_seed(seed)
        torch_step(sgd, F.cross_entropy(plain(batch(6, seed)), TARGETS))
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        opt.step(batch(6, seed), TARGETS)
        assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def left_as_a_number(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.state = y.square().mean()
    return y


def left_in_a_list(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.kept = [y.square().mean(1)]
    return y


def left_in_a_dict(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.table["penalty"] = y.square().mean(1)
    return y


def left_in_an_object(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.options.mean = y.square().mean(1)
    return y


LEFT: dict[Forward, tuple[Callable[[Any], Any], str]] = {
    left_as_a_number: (lambda layer: layer.state, "block.0.state"),
    left_in_a_list: (lambda layer: sum(layer.kept), "block.0.kept"),
    left_in_a_dict: (lambda layer: layer.table["penalty"], "block.0.table"),
    left_in_an_object: (lambda layer: layer.options.mean, "block.0.options"),
}


@pytest.mark.parametrize("forward", LEFT, ids=lambda f: f.__name__)
@pytest.mark.parametrize("was_run", [False, True])
def test_a_loss_that_reads_what_the_pass_left(forward: Forward, was_run: bool) -> None:
    """An auxiliary loss would have no gradient, and the value of the last pass of the model itself."""
    net = holding(forward)
    penalty, name = LEFT[forward]
    if was_run:
        net(batch(6))

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") + penalty(net.block[0])

    opt = compile_optimizer(net, batch(6), loss=loss, curvature="sgd")
    before = f"{snapshot(net)} {everything(opt, net)}"
    refused(lambda: opt.step(batch(6), TARGETS), f"the loss reads the attribute '{name}'", "Return it from forward")
    refused(lambda: opt.accumulate(batch(6), TARGETS), f"the loss reads the attribute '{name}'")
    assert f"{snapshot(net)} {everything(opt, net)}" == before


def for_inspection(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.kept, layer.options.mean, layer.table["mean"] = [y.detach()], y.detach(), y.detach()
    return y


def test_what_the_pass_leaves_for_inspection_does_no_harm() -> None:
    net = holding(for_inspection)
    opt = compiled(net, lr=0.5, feedback=False)
    code = opt.program.code
    for size in (6, 4):
        net(batch(size))  # a validation, which leaves other tensors every time
        expect_the_base_methods_update(opt, net, batch(6))
    assert opt.program.code is code


def returning(which: Callable[[Any], Tensor]) -> Any:
    """Returns something beside its logits that no player makes."""
    layers = {"a": (4, 3), "scale": lambda: nn.Parameter(torch.arange(1.0, 4)), "shift": lambda: torch.ones(3),
              "frozen": lambda: nn.Parameter(torch.ones(3), requires_grad=False)}  # fmt: skip
    net = make(lambda net, x: (net.a(x), which(net)), **layers)
    net.plain = torch.ones(3)
    return net


def of_product(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0] * outputs[1] * 2, targets, reduction="none")


UNCHANGED: dict[str, Any] = {"loss": of_product, "curvature": "sgd", "lr": 0.5, "feedback": False}


@pytest.mark.parametrize("front_end", [*FRONT_ENDS.values(), trace_followed])
@pytest.mark.parametrize("which", ["shift", "frozen", "plain"])
def test_constants_among_the_outputs(which: str, front_end: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtddp_compile.passes.p01_normalise.normalise.__defaults__", ((front_end,),))
    net = returning(attrgetter(which))
    opt = compile_optimizer(net, batch(6), **UNCHANGED)
    expect_the_base_methods_update(opt, net, batch(6), loss=of_product)


def test_a_parameter_as_an_output() -> None:
    """The remedy works: what is returned once a sample."""
    net = returning(attrgetter("scale"))
    said = "its parameter 'scale' as it is", "scale.expand(len(x)"
    refused(lambda: compile_optimizer(net, batch(6), **UNCHANGED), *said)
    net = returning(lambda net: net.scale.expand(6, 3))
    opt = compile_optimizer(net, batch(6), **UNCHANGED)
    expect_the_base_methods_update(opt, net, batch(6), plain=lambda net, x: (net.a(x), net.scale), loss=of_product)


@pytest.mark.parametrize("bag", [False, True])
@pytest.mark.parametrize("by_name", [False, True])
def test_tables_with_sparse_gradients_have_dense_ones(bag: bool, by_name: bool) -> None:
    def forward(net: Any, i: Tensor) -> Tensor:
        function = F.embedding_bag if bag else F.embedding
        found: Tensor = function(i, net.table.weight, sparse=True) if by_name else net.table(i)
        return net.b(found if bag else found.mean(1))  # type: ignore[no-any-return]

    net = make(forward, b=(4, 3))
    net.table = (nn.EmbeddingBag if bag else nn.Embedding)(9, 4, sparse=True).double()
    words = torch.arange(24).reshape(6, 4) % 9
    expect_the_base_methods_update(compiled(net, words, lr=0.5, feedback=False), net, words)


NODES = [4, 1, 3, 5, 2, 3]
"""Of six graphs."""


def by_index_add(h: Tensor, graph: Tensor) -> Tensor:
    return torch.zeros(6, h.shape[1], dtype=h.dtype).index_add(0, graph, h)


def by_scatter(h: Tensor, graph: Tensor) -> Tensor:
    return torch.zeros(6, h.shape[1], dtype=h.dtype).scatter_add(0, graph[:, None].expand_as(h), h)


def by_mean(h: Tensor, graph: Tensor) -> Tensor:
    return by_index_add(h, graph) / by_index_add(torch.ones_like(h), graph)


def by_index_put(h: Tensor, graph: Tensor) -> Tensor:
    return h.new_zeros(6, h.shape[1]).index_put((graph,), h, accumulate=True)


def in_place(h: Tensor, graph: Tensor) -> Tensor:
    return h.new_zeros(int(graph.max()) + 1, h.shape[1]).index_add_(0, graph, h)


@pytest.mark.parametrize("pool", [by_index_add, by_scatter, by_mean, by_index_put, in_place])
def test_nodes_pooled_to_graphs(pool: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Samples are rows of the inputs, nodes here. The remedy works: the same update from a padded batch."""
    net = make(lambda net, x, graph: net.b(pool(torch.tanh(net.a(x)), graph)), a=(4, 5), b=(5, 3))
    graph = torch.repeat_interleave(torch.arange(6), torch.tensor(NODES))
    nodes = batch(sum(NODES))
    said = "each of the 18 samples", "axis of inputs_0, inputs_1", "as nodes to graphs", "(B, N, n), with a mask"
    refused(lambda: compiled(net, (nodes, graph)), *said)

    def pooled(net: Any, x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum(1, True) if pool is by_mean else 1
        return net.b((torch.tanh(net.a(x)) * mask[..., None]).sum(1) / count)  # type: ignore[no-any-return]

    padded = make(pooled, a=(4, 5), b=(5, 3))
    padded.load_state_dict(net.state_dict())
    x = nn.utils.rnn.pad_sequence(list(nodes.split(NODES)), batch_first=True)
    mask = (torch.arange(5) < torch.tensor(NODES)[:, None]).double()
    opt = compiled(padded, (x, mask), lr=0.5, feedback=False)
    expect_the_base_methods_update(opt, padded, (x, mask), plain=lambda own, *_: net.run(own, nodes, graph))


def by_where(net: Any, x: Tensor, expert: int, own: Tensor, out: Tensor) -> Tensor:
    (rows,) = torch.where(own)
    return out.index_add_(0, rows, net[expert](x[rows]))


def by_mask(net: Any, x: Tensor, expert: int, own: Tensor, out: Tensor) -> Tensor:
    out[own] = net[expert](x[own])
    return out


def by_some(net: Any, x: Tensor, expert: int, own: Tensor, out: Tensor) -> Tensor:
    return by_mask(net, x, expert, own, out) if own.any() else out


def by_nonzero(net: Any, x: Tensor, expert: int, own: Tensor, out: Tensor) -> Tensor:
    rows = own.nonzero()[:, 0]
    return out.index_copy(0, rows, net[expert](x[rows]))


class Routed(nn.Module):
    def __init__(self, form: Callable[..., Tensor]) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(4, 2), nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)])
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        weight, chosen = self.router(x).softmax(-1).max(-1)
        out = x.new_zeros(x.shape[0], 3)
        for expert in range(2):
            out = self.form(self.experts, x, expert, chosen == expert, out)
        return out * weight[:, None]


@pytest.mark.parametrize("form", [by_where, by_mask, by_some, by_nonzero])
def test_experts_with_rows_of_their_own(form: Callable[..., Tensor]) -> None:
    """As docs/supported.md says; dense ones: tests/frontends/test_layouts.py."""
    torch.manual_seed(0)  # both experts have rows
    refused(lambda: compiled(Routed(form).double()), "of its elements belong to which of the 6 samples")


def neighbours(net: Any, h: Tensor, source: Tensor, target: Tensor) -> Tensor:
    return torch.zeros_like(h).index_add(0, target, h[source])


MESSAGES: dict[Callable[..., Tensor], str] = {
    lambda net, h, i, j: h + neighbours(net, h, i, j): "",
    lambda net, h, i, j: h + torch.zeros_like(h).scatter_add(0, j[:, None].expand(-1, 5), h[i]): "",
    lambda net, h, i, j: (h.new_zeros(6, 6).index_put((j, i), h.new_ones(10), accumulate=True)) @ h: "",
    neighbours: "as nodes to graphs",
    lambda net, h, i, j: h.index_add(0, j, h[i]): "as nodes to graphs",
    lambda net, h, i, j: h + torch.zeros_like(h).index_add(0, j, net.c(h[i])): "belong to which of the 6 samples",
}
"""Forms of a sum over neighbours, and what they are refused for."""


@pytest.mark.parametrize("form", MESSAGES)
def test_one_loss_a_node(form: Callable[..., Tensor]) -> None:
    net = make(
        lambda net, x, i, j: net.b(torch.tanh(form(net, torch.tanh(net.a(x)), i, j))), a=(4, 5), b=(5, 3), c=(5, 5)
    )
    edges = torch.randint(6, (2, 10), generator=torch.Generator().manual_seed(0))
    inputs = (batch(6), *edges)
    if MESSAGES[form]:
        refused(lambda: compiled(net, inputs), MESSAGES[form])
    else:
        expect_the_base_methods_update(compiled(net, inputs, lr=0.5, feedback=False), net, inputs)
