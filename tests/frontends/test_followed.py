"""The front end that runs the model and notes what it calls: alone, it takes what the others do and more."""

import copy
import random as random_numbers
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import CompileError
from gtddp_compile.frontends import trace_followed
from gtddp_compile.passes import p01_normalise as normalisation
from support.compared import assert_base, assert_equal, train, trained
from support.networks import Case, make, seeded
from support.recorded import batch, net

LR = 0.1
Forward = Callable[[Any, Tensor], Tensor]


def asks_whether_it_is_traced(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if isinstance(h, torch.fx.Proxy) or torch.compiler.is_compiling() or type(h) is not Tensor:
        h = 2 * h
    return m.b(torch.tanh(h))


def sizes_of_what_is_made(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    mask = torch.ones(h.shape[0], h.shape[1], dtype=h.dtype)
    mask[:, 0] = 0
    return m.b(torch.tanh(h) * mask)


def operators(m: Any, x: Tensor) -> Tensor:
    h = 2 - m.a(x)
    h += 1.0
    h = h / (2 + h.abs())
    h = F.dropout(-h @ torch.eye(h.shape[1], dtype=h.dtype), 0.0, True, False)
    return m.b(h.mT.mT + abs(h) ** 2 + (h > 0))


def parts(m: Any, x: Tensor) -> Tensor:
    first, second = m.a(x).split([2, 3], 1)
    best = second.max(1)
    rows = [row * best.values[i] for i, row in enumerate(first)]
    return m.b(torch.cat([torch.stack(rows), second], 1))


def random(m: Any, x: Tensor) -> Tensor:
    if torch.rand([]) < 0.0:
        return m.b(m.a(x))
    return m.b(F.dropout(F.relu(m.a(x), inplace=True), 0.5, True))


def decides(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    if h.abs().max() > 100:
        return m.b(h)
    kept = (x[:, 0] < 1e3).nonzero()[:, 0]
    return m.b(torch.tanh(h[kept])) * int((x > 1e3).sum() + 1)


def without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = m.a(x)
        scale = m.b(h[x[:, 0] < 1e3]).max(1, keepdim=True).values
    return m.b(torch.tanh(m.a(x))) * scale


def numbers_of_numpy(m: Any, x: Tensor) -> Tensor:
    scale = np.sqrt(np.float64(x.shape[-1]))
    return m.b(torch.tanh(m.a(x) * scale).clamp(max=np.float32(0.5))[:, slice(np.int64(0), None)])  # type: ignore[no-any-return]


def drawn_in_vain(m: Any, x: Tensor) -> Tensor:
    h = torch.tanh(m.a(x))
    aside = m.b(h)
    found = F.dropout(m.b(h), 0.5)
    F.dropout(aside, 0.5)
    return found * torch.rand_like(found)


FORWARDS = (
    drawn_in_vain, numbers_of_numpy, asks_whether_it_is_traced, sizes_of_what_is_made, operators, parts, random,
    decides, without_gradient,
)  # fmt: skip


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(normalisation.normalise, "__defaults__", ((trace_followed,),))


def case_of(model: nn.Module, *shape: int) -> Case:
    """Targets are zeros of the outputs' shape."""

    def draw(seed: int, size: int) -> tuple[Tensor, Tensor]:
        x = batch(6) if not shape else torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()
        with torch.no_grad(), torch.random.fork_rng():
            return x, torch.zeros_like(copy.deepcopy(model)(x))

    return Case(model, loss=nn.MSELoss(), draw=draw)


OPTIONS: dict[str, Any] = {"steps": 1, "curvature": "sgd", "lr": LR}


@pytest.mark.filterwarnings("ignore:.*depends on values")
@pytest.mark.parametrize("forward", FORWARDS, ids=lambda f: f.__name__)
def test_feedback_off_is_torch(forward: Forward, alone: None) -> None:
    run = assert_base(case_of(net(forward)), **OPTIONS)
    assert run.optimizer.graph.ops.frontend == "eager"
    assert not torch.equal(run.parameters, trained(case_of(net(forward)), **OPTIONS))


class Layers(nn.Module):
    """Layers that are recorded by functions of their own, and one that calls attention with its own weights."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.norm = nn.LSTM(4, 4, batch_first=True), nn.BatchNorm1d(4)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.3, batch_first=True)
        self.q, self.k, self.v, self.out = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.lstm(x)
        y = y + self.attention(y, y, y)[0]
        y = self.norm(y.transpose(1, 2)).permute(2, 0, 1)
        bias = torch.cat([self.q.bias, self.k.bias, self.v.bias])
        mixed, _ = F.multi_head_attention_forward(
            y, y, y, 4, 2, torch.empty(0), bias, None, None, False, 0.2, self.out.weight, self.out.bias, self.training,
            need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.v.weight,
        )  # fmt: skip
        return (y + mixed).mean(0)


@pytest.mark.parametrize("front_end", ["fx", "eager"])
def test_layers(front_end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if front_end == "eager":
        monkeypatch.setattr(normalisation.normalise, "__defaults__", ((trace_followed,),))
    case = case_of(seeded(Layers).double(), 3, 5, 4)
    assert train(case, **OPTIONS).optimizer.graph.ops.frontend == front_end
    if front_end == "eager":
        assert_base(case, tolerance=1e-10, **OPTIONS)
        assert_equal(case, **OPTIONS)


class Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2 * gradient


def custom(m: Any, x: Tensor) -> Tensor:
    return m.b(Hidden.apply(m.a(x)))


def leaves_torch(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(torch.from_numpy(x.detach().numpy() + 1)))


def draws_elsewhere(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * random_numbers.random()


def builds_in(m: Any, x: Tensor) -> Tensor:
    return m.b(m.a(x)) * float(x.sum())


@pytest.mark.parametrize(("forward", "why"), [
    (custom, "computes something else"), (leaves_torch, "out of torch"),
    (draws_elsewhere, "draws random numbers from random"), (builds_in, "read from values is built in"),
], ids=lambda value: getattr(value, "__name__", ""))  # fmt: skip
def test_refused(forward: Forward, why: str, alone: None) -> None:
    with pytest.raises(CompileError, match=why):
        train(case_of(net(forward)), **OPTIONS)


QKV: dict[str, Any] = {"q": (4, 4), "k": (4, 4), "v": (4, 4)}


def queries_keys_values(net: Any, x: Tensor) -> tuple[Tensor, ...]:
    return tuple(part(x).unflatten(-1, (2, 2)).transpose(1, 2) for part in (net.q, net.k, net.v))


@pytest.mark.parametrize("scale", [None, 1.0])
def test_attention_that_adds_a_trained_bias_and_drops(scale: float | None) -> None:
    """T5: a trained bias of positions is added to the scores of every layer, and weights are dropped."""

    def forward(net: Any, x: Tensor) -> Tensor:
        q, k, v = queries_keys_values(net, x)
        distance = (torch.arange(5)[:, None] - torch.arange(5)).abs()
        bias = net.positions(distance).permute(2, 0, 1)[None]
        for _ in range(2):
            q = F.scaled_dot_product_attention(q, k, v, bias, dropout_p=0.4, scale=scale)
        return q.transpose(1, 2).flatten(2).mean(1)

    case = case_of(make(forward, **QKV, positions=lambda: nn.Embedding(5, 2)), 3, 5, 4)
    assert assert_base(case, **OPTIONS).optimizer.graph.ops.frontend == "fx"
    assert_equal(case, **OPTIONS)


def learned(reads: str, **given: Any) -> nn.Module:
    """Attention that drops weights and reads a trained table: as queries, keys, or as all three (DETR's decoder)."""

    def forward(net: Any, x: Tensor) -> Tensor:
        (q, k, v), options = queries_keys_values(net, x), {"dropout_p": 0.4, **given}
        if reads == "all":
            table = torch.tanh(net.table)
            q = q * F.scaled_dot_product_attention(table, table, table, **options)
        elif reads == "keys":
            k = net.table.expand(x.shape[0], -1, -1, -1)
        else:
            q, k, v = net.table, k[:, :1], v[:, :1]  # one head for two
            options["enable_gqa"] = True
        if reads != "all":
            q = F.scaled_dot_product_attention(q, k, v, **options)
        return q.transpose(1, 2).flatten(2).mean(1)

    return make(forward, **QKV, table=lambda: nn.Parameter(torch.randn(1, 2, 5, 2)))


ROWS = torch.ones(5, 5, dtype=torch.bool).tril() & (torch.arange(5) != 1)[:, None]
"""A mask that allows the second query nothing: torch gives it zeros."""


@pytest.mark.parametrize(
    "options", [{}, {"attn_mask": ROWS}, {"is_causal": True}], ids=lambda o: next(iter(o), "plain")
)
@pytest.mark.parametrize("reads", ["queries", "keys", "all"])
def test_attention_that_reads_parameters_and_drops(reads: str, options: dict[str, Any]) -> None:
    case = case_of(learned(reads, **options), 3, 5, 4)
    assert_base(case, **OPTIONS)
    assert_equal(case, **OPTIONS)
