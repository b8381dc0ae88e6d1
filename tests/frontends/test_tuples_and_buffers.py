"""What lies between the layers: tuples of tensors, broadcasting sums, and buffers that a player's function reads."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sympy import Integer, MatrixSymbol, ZeroMatrix
from sympy.matrices.expressions.blockmatrix import BlockMatrix
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from gtddp_compile.algebra.paths import stage_entries
from gtddp_compile.algebra.pattern import DENSE
from gtddp_compile.algebra.symbols import block_entries
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import cut_after
from gtddp_compile.runtime.compiler import build_graph

SAMPLES, FEATURES, CLASSES = 4, 6, 3
UNPACK = {
    "chunk": lambda h: h.chunk(2, 1),
    "split": lambda h: h.split(2, 1),
    "unbind": lambda h: h.view(-1, 2, 2).unbind(1),
    "tensor_split": lambda h: torch.tensor_split(h, 2, 1),
}


class Unpacked(nn.Module):
    """ShuffleNet's unit: one part of a tuple waits while the other goes through two layers."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.e, self.o = how, nn.Linear(FEATURES, 4), nn.Linear(4, CLASSES)
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        kept, through = UNPACK[self.how](torch.tanh(self.e(x)))
        return self.o(torch.cat((kept, self.b(torch.tanh(self.a(through)))), 1))


class Broadcast(nn.Module):
    """A column added to a matrix, and one taken from it."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.b, self.o = nn.Linear(FEATURES, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.e(x))
        column = h.mean(1, keepdim=True)
        return self.o(column - (torch.tanh(self.b(h)) + column))


class Positions(nn.Module):
    """CLIP: a table read at positions that are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.table, self.o = nn.Linear(FEATURES, 8), nn.Embedding(4, 2), nn.Linear(8, CLASSES)
        self.register_buffer("positions", torch.arange(4)[None])

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(self.e(x).view(-1, 4, 2) + self.table(self.positions)).flatten(1))


class RelativePositions(nn.Module):
    """Swin: a table read at indices that are a buffer, then reshaped."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.table, self.o = nn.Linear(FEATURES, 4), nn.Parameter(torch.randn(5, 1)), nn.Linear(4, CLASSES)
        self.register_buffer("index", torch.arange(16) * 3 % 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.e(x)
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1)
        scores = (h[:, :, None] * h[:, None, :] + bias).softmax(-1)
        return self.o((scores @ h[:, :, None]).squeeze(-1))


class RelativeAttention(RelativePositions):
    """One bias for two of torch's own attentions: its change reaches the second by a derivative along it."""

    def __init__(self) -> None:
        super().__init__()
        self.k = nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.stack([self.e(x), self.e(x).tanh()], -1)[:, None]
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1)[None].contiguous()
        h = torch.tanh(self.k(F.scaled_dot_product_attention(h, h, h, bias)))
        return self.o(F.scaled_dot_product_attention(h, h, h, bias).sum(-1).flatten(1))


class RepeatedMask(nn.Module):
    """Swin's shifted windows: a mask as long as the batch is added to the bias before the samples' values are."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.table, self.o = nn.Linear(FEATURES, 8), nn.Parameter(torch.randn(5, 1)), nn.Linear(8, CLASSES)
        self.register_buffer("index", torch.arange(16) * 3 % 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.e(x)).view(-1, 4)  # two windows a sample
        mask = torch.arange(2.0, dtype=h.dtype).view(2, 1, 1).repeat(h.shape[0] // 2, 1, 1)
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1) + mask
        weights = F.scaled_dot_product_attention(h[:, :, None], h[:, :, None], h[:, :, None], bias)
        return self.o(weights.reshape(-1, 8))


class Windows(RepeatedMask):
    """The same function with the samples apart: the mask is spread, not repeated."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.e(x)).view(-1, 2, 4)[..., None]
        mask = torch.arange(2.0, dtype=h.dtype).view(2, 1, 1)
        bias = self.table[self.index].view(4, 4, -1).permute(2, 0, 1) + mask
        return self.o(F.scaled_dot_product_attention(h, h, h, bias).reshape(-1, 8))


class KeyBias(nn.Module):
    """BEiT: a bias made of two parameters and, between them, a buffer of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.qkv, self.o = nn.Linear(FEATURES, 4), nn.Linear(4, 12, bias=False), nn.Linear(4, CLASSES)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4))
        self.register_buffer("k_bias", torch.zeros(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, self.k_bias, self.v_bias))
        q, k, v = F.linear(torch.tanh(self.e(x)), self.qkv.weight, bias).chunk(3, -1)
        return self.o(q * k + v)


class Masked(nn.Module):
    """A weight times a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.o = nn.Parameter(torch.randn(FEATURES, 4)), nn.Linear(4, CLASSES)
        self.register_buffer("mask", (torch.arange(24) % 3 > 0).double().view(FEATURES, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.o(torch.tanh(x @ (self.weight * self.mask)))


class MaskedTable(nn.Module):
    """DeBERTa in its own words: a table, used again by a later layer, under a mask that is drawn anew for its size."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.a = nn.Linear(FEATURES, 4), nn.Linear(4, 4)
        self.table, self.o = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, CLASSES)

    def masked(self, h: Tensor) -> Tensor:
        table = torch.tanh(self.table.t())
        kept = torch.empty_like(table).bernoulli_(0.5)
        return h[:, : table.shape[0]] @ table.masked_fill((1 - kept).bool(), 0)

    def forward(self, x: Tensor) -> Tensor:
        h = self.masked(F.dropout(torch.tanh(self.e(x)), 0.5))
        return self.o(self.masked(F.dropout(torch.tanh(self.a(h)), 0.5)))


class DroppedQueries(nn.Module):
    """DETR's decoder: dropout of what a layer makes of learned queries, before any sample is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.q = nn.Linear(FEATURES, 4), nn.Linear(4, 4)
        self.queries, self.o = nn.Parameter(torch.randn(2, 4)), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.unsqueeze(0).repeat(x.shape[0], 1, 1)
        queries = torch.tanh(F.dropout(self.q(queries), 0.5)) + F.dropout(self.queries, 0.5)
        return self.o((queries * F.dropout(torch.tanh(self.e(x)), 0.5)[:, None]).sum(1))


NETWORKS = {
    **{how: lambda how=how: Unpacked(how) for how in UNPACK},
    **{kind.__name__: kind for kind in (Broadcast, Positions, RelativePositions, RelativeAttention, KeyBias, Masked)},
}


def seeded(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]().double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(SAMPLES, FEATURES, generator=generator).double(), torch.arange(SAMPLES) % CLASSES


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(name: str, **options: Any) -> Tensor:
    model = seeded(name)
    optimizer = compile_optimizer(model, batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.3, **options)
    for step in range(3):
        optimizer.step(*batch(step))
    return flat(model)


@pytest.mark.parametrize("coupling", ["full", "block"])
@pytest.mark.parametrize("name", NETWORKS)
def test_the_program_is_the_derivation(name: str, coupling: str) -> None:
    fast, dense = trained(name, coupling=coupling), trained(name, coupling=coupling, backend="dense")
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)
    assert (fast - trained(name, feedback=False)).abs().max() > 1e-6


@pytest.mark.parametrize("name", NETWORKS)
def test_without_feedback_it_is_sgd(name: str) -> None:
    model = seeded(name)
    sgd, criterion = torch.optim.SGD(model.parameters(), lr=0.3), nn.CrossEntropyLoss()
    for step in range(3):
        x, y = batch(step)
        sgd.zero_grad()
        criterion(model(x), y).backward()
        sgd.step()
    torch.testing.assert_close(trained(name, feedback=False), flat(model), rtol=0, atol=1e-9)


def test_a_mask_repeated_for_every_sample() -> None:
    """Its player is evaluated on the whole batch: on one sample the mask would be too long."""
    found = []
    for kind in (RepeatedMask, Windows):
        torch.manual_seed(0)
        model = kind().double()
        opt = compile_optimizer(model, batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.3)
        for step in range(3):
            opt.step(*batch(step))
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["asap", "sequential"])
@pytest.mark.parametrize("kind", [MaskedTable, DroppedQueries])
def test_masks_of_parameter_expressions(kind: type[nn.Module], schedule: str) -> None:
    """The mask is drawn at a stage before the one that reads it; the table is computed where it is read."""
    found = {}
    for backend in ("sgd", "off", "fast", "dense"):
        torch.manual_seed(0)
        model = kind().double()
        criterion, sgd = nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.3)
        options = {"off": {"feedback": False}, "dense": {"backend": "dense"}}.get(backend, {})
        opt = compile_optimizer(
            model, batch(0)[0], loss=criterion, curvature="sgd", lr=0.3, schedule=schedule, **options
        )
        for step in range(3):
            torch.manual_seed(step)
            if backend == "sgd":
                sgd.zero_grad()
                criterion(model(batch(step)[0]), batch(step)[1]).backward()
                sgd.step()
            else:
                opt.step(*batch(step))
        found[backend] = flat(model)
    torch.testing.assert_close(found["off"], found["sgd"], rtol=0, atol=1e-9)
    torch.testing.assert_close(found["fast"], found["dense"], rtol=0, atol=1e-9)
    assert (found["fast"] - found["off"]).abs().max() > 1e-3


def test_every_part_of_a_tuple_comes_from_its_player() -> None:
    graph = build_graph(copy.deepcopy(seeded("chunk")), (batch(0)[0],), Options())
    stage = graph.stages[0]
    parts = cut_after(graph, stage)
    entries = stage_entries(graph, stage, parts)
    assert len(parts) == 2 and all(entries.control[part] == {"e": DENSE} for part in parts)


def test_a_broadcast_operand_is_no_identity() -> None:
    """A column taken from itself, spread over a matrix, is not the zero that two identities would give."""
    graph = build_graph(seeded("Broadcast"), (batch(0)[0],), Options())
    stage = next(stage for stage in graph.stages if stage.players == ("b",))
    (output,) = cut_after(graph, stage)
    (column,) = (name for name in stage.live if graph.op(name).shape == (SAMPLES, 1))
    assert stage_entries(graph, stage, (output,)).state[output][column] == DENSE


def test_a_zero_matrix_keeps_its_blocks() -> None:
    """sympy collapses a block matrix of zeros to one zero matrix."""
    n, m = Integer(2), Integer(3)
    zeros = BlockMatrix([[ZeroMatrix(n, n), ZeroMatrix(n, m)], [ZeroMatrix(m, n), ZeroMatrix(m, m)]])
    column = BlockMatrix([[MatrixSymbol("v", n, 1)], [MatrixSymbol("w", m, 1)]])
    assert block_entries(zeros * column, [n, m], [Integer(1)]) == [[ZeroMatrix(n, 1)], [ZeroMatrix(m, 1)]]
