"""Graphs of different sizes in one list: the step of the network as it is, by explicit per-graph gradients."""

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError, GraphBatches, compile_optimizer
from support.refused import refused

LOSS, RATE = nn.CrossEntropyLoss(), 0.1


class Graphs(nn.Module):
    """Two convolutions of Kipf and Welling with edges' weights, a norm between, and pooling."""

    def __init__(self, pool: str = "mean", norm: nn.Module | None = None, words: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4) if words else nn.Identity()
        self.a, self.b, self.head, self.pool = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3), pool
        self.edge, self.norm = nn.Linear(2, 1), nn.Identity() if norm is None else norm

    def passed(self, h: Tensor, edge_index: Tensor, weight: Tensor) -> Tensor:
        source, target = edge_index
        degree = torch.ones_like(h[:, :1]).index_add(0, target, torch.ones_like(weight)).rsqrt()
        sent = (h * degree)[source] * torch.sigmoid(weight)
        return (h * degree + torch.zeros_like(h).index_add(0, target, sent)) * degree

    def forward(self, x: Tensor, edge_index: Tensor, edge_attr: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        weight = self.edge(edge_attr)
        h = self.norm(torch.tanh(self.passed(self.a(self.table(x)), edge_index, weight)))
        h = torch.tanh(self.passed(self.b(h), edge_index, weight))
        start = h.new_zeros(num_graphs, h.shape[1])
        if self.pool == "max":
            index = batch[:, None].expand(-1, h.shape[1])
            return self.head(start.scatter_reduce(0, index, h, "amax", include_self=False))
        pooled = start.index_add(0, batch, h)
        if self.pool == "mean":
            pooled = pooled / start[:, :1].index_add(0, batch, torch.ones_like(h[:, :1]))
        return self.head(pooled)


def graphs(sizes: tuple[int, ...], seed: int, words: bool = False) -> tuple[dict[str, Any], Tensor]:
    """Random graphs, the nodes and edges of all in any order, and their classes."""
    source = torch.Generator().manual_seed(seed)
    batch = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    first, many = batch.new_tensor(sizes).cumsum(0) - batch.new_tensor(sizes), [2 * n - 1 for n in sizes]
    ends = [start + torch.randint(n, (2, k), generator=source) for start, n, k in zip(first, sizes, many, strict=True)]
    nodes, edges = (torch.randperm(k, generator=source) for k in (len(batch), sum(many)))
    place = torch.empty_like(nodes).scatter(0, nodes, torch.arange(len(nodes)))
    x = torch.randn(len(batch), 4, generator=source, dtype=torch.float64)
    data = {"x": torch.randint(7, (len(batch),), generator=source) if words else x, "batch": batch[nodes],
            "edge_index": place[torch.cat(ends, 1)[:, edges]], "num_graphs": len(sizes),
            "edge_attr": torch.randn(sum(many), 2, generator=source, dtype=torch.float64)}  # fmt: skip
    return data, torch.randint(3, (len(sizes),), generator=source)


def stepped(net: nn.Module, data: dict[str, Any], y: Tensor) -> list[Tensor]:
    """``u - η γᵀ (B I + η γ γᵀ)⁻¹ 1``, with the gradient γ of every graph's loss from the list as it is."""
    phi, params = F.cross_entropy(net(**data), y, reduction="none"), list(net.parameters())
    rows = [torch.autograd.grad(value, params, retain_graph=True) for value in phi]
    gamma = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows])
    b = torch.eye(len(y), dtype=gamma.dtype)
    w = torch.linalg.solve(len(y) * b + RATE * gamma @ gamma.T, torch.ones_like(phi))
    steps = (RATE * gamma.T @ w).split([p.numel() for p in params])
    return [(p - step.view_as(p)).detach() for p, step in zip(params, steps, strict=True)]


NETS: dict[str, Any] = {
    "mean": Graphs, "sum": lambda: Graphs("sum"), "max": lambda: Graphs("max"),
    "layer norm": lambda: Graphs(norm=nn.LayerNorm(5)), "words": lambda: Graphs(words=True),
    "batch-norm in evaluation": lambda: Graphs(norm=nn.BatchNorm1d(5)),
}  # fmt: skip


@pytest.mark.parametrize("name", NETS)
def test_steps_are_those_of_the_graphs_as_they_are(name: str) -> None:
    """Of graphs of other sizes and another number too, without compiling again; and as the dense derivation."""
    torch.manual_seed(0)
    net = NETS[name]().double().train(name != "batch-norm in evaluation")
    twin = copy.deepcopy(net)
    options = {"loss": LOSS, "curvature": "sgd", "lr": RATE, "terminal": "gradient"}
    opt = compile_optimizer(GraphBatches(net), gram="exact", **options)
    dense = compile_optimizer(GraphBatches(twin), backend="dense", **options)
    programs = []
    for seed, sizes in enumerate(((3, 1, 5, 2), (4, 2, 6), (2, 1, 1, 1, 3))):
        data, y = graphs(sizes, seed, name == "words")
        wanted = stepped(net, data, y)
        loss = LOSS(net(**data), y).detach()
        torch.testing.assert_close(opt.step(data, y), loss, rtol=0, atol=1e-12)
        dense.step(SimpleNamespace(**data), y)
        programs.append(opt.program.lowered)
        for own, value, other in zip(net.parameters(), wanted, twin.parameters(), strict=True):
            torch.testing.assert_close(own, value, rtol=0, atol=1e-9)
            torch.testing.assert_close(own, other, rtol=0, atol=1e-9)
    assert programs[0] is programs[1] is programs[2]


def test_what_is_padded_has_room() -> None:
    data, y = graphs((3, 1, 5, 2), 0)
    torch.manual_seed(0)
    net = Graphs().double()
    wide = GraphBatches(copy.deepcopy(net), nodes=8, edges=20)
    assert [tuple(value.shape) for value in wide.padded(data)] == [(4, 8), (4, 2, 20), (4, 8, 4), (4, 20, 2)]
    opt = compile_optimizer(wide, wide.padded(data), loss=LOSS, curvature="sgd", lr=RATE, terminal="gradient")
    wanted = stepped(net, data, y)
    opt.accumulate(data, y)
    opt.step()
    for own, value in zip(wide.parameters(), wanted, strict=True):
        torch.testing.assert_close(own, value, rtol=0, atol=1e-9)
    for rooms in ({"nodes": 5}, {"edges": 9}):
        refused(lambda rooms=rooms: GraphBatches(net, **rooms).padded(data), "does not fit nodes, edges", "Give room")


def over_all(net: Any, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
    h = net.a(x)
    h = h - h.mean(0)
    return net.head(h.new_zeros(num_graphs, 5).index_add(0, batch, h))  # type: ignore[no-any-return]


def test_what_would_see_padding_is_refused() -> None:
    data, y = graphs((3, 1, 5, 2), 0)
    normed = GraphBatches(Graphs(norm=nn.BatchNorm1d(5)).double())
    nn.init.zeros_(normed.net.head.weight)  # type: ignore[attr-defined]
    before = copy.deepcopy(normed.state_dict())
    refused(lambda: compile_optimizer(normed, data, loss=LOSS), "depend on nodes that are padded", "batch-norm over")
    torch.testing.assert_close(normed.state_dict(), before, rtol=0, atol=0)
    opt = compile_optimizer(normed.eval(), data, loss=LOSS)
    normed.train()
    refused(lambda: opt.step(data, y), "depend on nodes that are padded")

    class Centred(Graphs):
        forward = over_all

    refused(lambda: GraphBatches(Centred().double()).padded(data), "depend on nodes that are padded")


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no batch": ({"batch": None}, "a dict has no tensor 'batch'"),
    "nodes for edges": ({"edge_attr": torch.zeros(3, 2)}, "edge_attr do not fit"),
    "another kind of number": ({"batch": torch.zeros(11)}, "they do not fit"),
    "a node that is not there": ({"edge_index": torch.full((2, 18), 11)}, "they do not fit"),
    "edges between": ({"batch": torch.arange(11)}, "an edge joins two"),
    "an empty graph": ({"num_graphs": 5}, "of 5 graphs one has no node"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_batch_of_graphs_is_refused(name: str) -> None:
    change, said = WRONG[name]
    data, _ = graphs((3, 1, 5, 2), 0)
    with pytest.raises(CompileError, match=said):
        GraphBatches(Graphs().double()).padded({**data, **change})
    refused(lambda: GraphBatches(Graphs()).padded((data["x"], data["batch"])), "a tuple has no tensor 'batch'")
