"""What lies between the layers: tuples of tensors, broadcasting sums, and buffers that a player's function reads."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile.algebra.paths import stage_entries
from gtddp_compile.algebra.pattern import DENSE
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import cut_after
from gtddp_compile.runtime.compiler import build_graph
from support.compared import assert_base, assert_equal, trained
from support.networks import Case, make

FEATURES, CLASSES = 6, 3
UNPACK = {
    "chunk": lambda h: h.chunk(2, 1), "split": lambda h: h.split(2, 1), "unbind": lambda h: h.view(-1, 2, 2).unbind(1),
    "tensor_split": lambda h: torch.tensor_split(h, 2, 1),
}  # fmt: skip


def unpacked(how: str) -> Any:
    """ShuffleNet's unit: one part of a tuple waits while the other goes through two layers."""

    def forward(net: Any, x: Tensor) -> Tensor:
        kept, through = UNPACK[how](torch.tanh(net.e(x)))
        return net.o(torch.cat((kept, net.b(torch.tanh(net.a(through)))), 1))

    return forward, {"e": (FEATURES, 4), "a": (2, 2), "b": (2, 2), "o": (4, CLASSES)}


def broadcast(net: Any, x: Tensor) -> Tensor:
    """A column added to a matrix, and one taken from it."""
    h = torch.tanh(net.e(x))
    column = h.mean(1, keepdim=True)
    return net.o(column - (torch.tanh(net.b(h)) + column))


def positions(net: Any, x: Tensor) -> Tensor:
    """CLIP: a table read at positions that are a buffer."""
    return net.o(torch.tanh(net.e(x).view(-1, 4, 2) + net.table(net.positions)).flatten(1))


def relative_positions(net: Any, x: Tensor) -> Tensor:
    """Swin: a table read at indices that are a buffer, then reshaped."""
    h = net.e(x)
    bias = net.table[net.index].view(4, 4, -1).permute(2, 0, 1)
    scores = (h[:, :, None] * h[:, None, :] + bias).softmax(-1)
    return net.o((scores @ h[:, :, None]).squeeze(-1))


def relative_attention(net: Any, x: Tensor) -> Tensor:
    """One bias for two of torch's own attentions: its change reaches the second by a derivative along it."""
    h = torch.stack([net.e(x), net.e(x).tanh()], -1)[:, None]
    bias = net.table[net.index].view(4, 4, -1).permute(2, 0, 1)[None].contiguous()
    h = torch.tanh(net.k(F.scaled_dot_product_attention(h, h, h, bias)))
    return net.o(F.scaled_dot_product_attention(h, h, h, bias).sum(-1).flatten(1))


def repeated_mask(net: Any, x: Tensor) -> Tensor:
    """Swin's shifted windows: a mask as long as the batch is added to the bias before the samples' values are."""
    h = torch.tanh(net.e(x)).view(-1, 4)  # two windows a sample
    mask = torch.arange(2.0, dtype=h.dtype).view(2, 1, 1).repeat(h.shape[0] // 2, 1, 1)
    bias = net.table[net.index].view(4, 4, -1).permute(2, 0, 1) + mask
    weights = F.scaled_dot_product_attention(h[:, :, None], h[:, :, None], h[:, :, None], bias)
    return net.o(weights.reshape(-1, 8))


def windows(net: Any, x: Tensor) -> Tensor:
    """The same function with the samples apart: the mask is spread, not repeated."""
    h = torch.tanh(net.e(x)).view(-1, 2, 4)[..., None]
    bias = net.table[net.index].view(4, 4, -1).permute(2, 0, 1) + torch.arange(2.0, dtype=h.dtype).view(2, 1, 1)
    return net.o(F.scaled_dot_product_attention(h, h, h, bias).reshape(-1, 8))


def key_bias(net: Any, x: Tensor) -> Tensor:
    """BEiT: a bias made of two parameters and, between them, a buffer of zeros."""
    bias = torch.cat((net.q_bias, net.k_bias, net.v_bias))
    q, k, v = F.linear(torch.tanh(net.e(x)), net.qkv.weight, bias).chunk(3, -1)
    return net.o(q * k + v)


def masked(net: Any, x: Tensor) -> Tensor:
    """A weight times a buffer."""
    return net.o(torch.tanh(x @ (net.weight * net.mask)))


def masked_table(net: Any, x: Tensor) -> Tensor:
    """DeBERTa in its own words: a table, used again by a later layer, under a mask that is drawn anew for its size."""

    def under_a_mask(h: Tensor) -> Tensor:
        table = torch.tanh(net.table.t())
        kept = torch.empty_like(table).bernoulli_(0.5)
        return h[:, : table.shape[0]] @ table.masked_fill((1 - kept).bool(), 0)

    h = under_a_mask(F.dropout(torch.tanh(net.e(x)), 0.5))
    return net.o(under_a_mask(F.dropout(torch.tanh(net.a(h)), 0.5)))


def dropped_queries(net: Any, x: Tensor) -> Tensor:
    """DETR's decoder: dropout of what a layer makes of learned queries, before any sample is seen."""
    queries = net.queries.unsqueeze(0).repeat(x.shape[0], 1, 1)
    queries = torch.tanh(F.dropout(net.q(queries), 0.5)) + F.dropout(net.queries, 0.5)
    return net.o((queries * F.dropout(torch.tanh(net.e(x)), 0.5)[:, None]).sum(1))


def parameter(*shape: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(shape))


RELATIVE: dict[str, Any] = {"table": parameter(5, 1), "index": lambda: torch.arange(16) * 3 % 5}
WINDOWED = {"e": (FEATURES, 8), **RELATIVE, "o": (8, CLASSES)}
NETWORKS: dict[str, tuple[Any, dict[str, Any]]] = {
    **{how: unpacked(how) for how in UNPACK},
    "broadcast": (broadcast, {"e": (FEATURES, 4), "b": (4, 4), "o": (4, CLASSES)}),
    "positions": (positions, {"e": (FEATURES, 8), "table": lambda: nn.Embedding(4, 2), "o": (8, CLASSES),
                              "positions": lambda: torch.arange(4)[None]}),
    "relative positions": (relative_positions, {"e": (FEATURES, 4), **RELATIVE, "o": (4, CLASSES)}),
    "relative attention": (relative_attention, {"e": (FEATURES, 4), **RELATIVE, "k": (2, 2), "o": (4, CLASSES)}),
    "key bias": (key_bias, {"e": (FEATURES, 4), "qkv": (4, 12, False), "o": (4, CLASSES), "q_bias": parameter(4),
                            "v_bias": parameter(4), "k_bias": lambda: torch.zeros(4)}),
    "masked": (masked, {"weight": parameter(FEATURES, 4), "o": (4, CLASSES),
                        "mask": lambda: (torch.arange(24) % 3 > 0).double().view(FEATURES, 4)}),
}  # fmt: skip
DRAWING: list[tuple[Any, dict[str, Any]]] = [
    (masked_table, {"e": (FEATURES, 4), "a": (4, 4), "table": parameter(4, 4), "o": (4, CLASSES)}),
    (dropped_queries, {"e": (FEATURES, 4), "q": (4, 4), "queries": parameter(2, 4), "o": (4, CLASSES)}),
]


def case_of(forward: Any, layers: dict[str, Any]) -> Case:
    return Case(make(forward, **layers), (FEATURES,))


@pytest.mark.parametrize("name", NETWORKS)
def test_program_and_base_method(name: str) -> None:
    case = case_of(*NETWORKS[name])
    base = assert_base(case, curvature="sgd", lr=0.3).parameters
    for coupling in ("full", "block"):
        found = assert_equal(case, curvature="sgd", lr=0.3, coupling=coupling).parameters
        assert (found - base).abs().max() > 1e-6


def test_a_mask_repeated_for_every_sample() -> None:
    """Its player is evaluated on the whole batch: on one sample the mask would be too long."""
    found = [trained(case_of(way, WINDOWED), curvature="sgd", lr=0.3) for way in (repeated_mask, windows)]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("schedule", ["asap", "sequential"])
@pytest.mark.parametrize(("forward", "layers"), DRAWING)
def test_masks_of_parameter_expressions(forward: Any, layers: dict[str, Any], schedule: str) -> None:
    """The mask is drawn at a stage before the one that reads it; the table is computed where it is read."""
    case, options = case_of(forward, layers), {"curvature": "sgd", "lr": 0.3, "schedule": schedule}
    off = assert_base(case, **options).parameters
    assert (assert_equal(case, **options).parameters - off).abs().max() > 1e-3


def graph_of(name: str) -> Any:
    case = case_of(*NETWORKS[name])
    return build_graph(case.model, (case.batch(0)[0],), Options())


def test_a_broadcast_operand_is_no_identity() -> None:
    """A column taken from itself, spread over a matrix, is not the zero that two identities would give."""
    graph = graph_of("broadcast")
    stage = next(stage for stage in graph.stages if stage.players == ("b",))
    (output,) = cut_after(graph, stage)
    (column,) = (name for name in stage.live if graph.op(name).shape == (7, 1))
    assert stage_entries(graph, stage, (output,)).state[output][column] == DENSE
