"""One row a layer of torch: it compiles, feedback off is torch.optim (buffers too), and fast equals dense."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils.checkpoint import checkpoint

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.lowering import uses
from support.compared import assert_base, assert_equal, train, trained
from support.networks import Case

B = 3
Build = Callable[[], tuple[nn.Module, tuple[Tensor, ...]]]


class Around(nn.Module):
    """A layer between a linear one (where one is given) and a linear head."""

    def __init__(self, layer: nn.Module, call: Callable[..., Tensor] | None = None, before: nn.Module | None = None):
        super().__init__()
        self.before, self.layer, self.call, self.head = before, layer, call, nn.LazyLinear(3)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        x = x if self.before is None else torch.tanh(self.before(x))
        y = self.call(self.layer, x, *others) if self.call else self.layer(x, *others)
        return self.head(torch.tanh(y).flatten(1))


def own(layer: Callable[[], nn.Module], *shapes: tuple[int, ...], call: Any = None, before: Any = None) -> Build:
    def build() -> tuple[nn.Module, tuple[Tensor, ...]]:
        inputs = tuple(torch.randn(B, *shape) for shape in shapes)
        return Around(layer(), call, before() if before else None), inputs

    return build


def words(layer: Callable[[], nn.Module]) -> Build:
    return lambda: (Around(layer()), (torch.arange(B * 3).reshape(B, 3) % 7,))


def linear() -> nn.Module:
    return nn.Linear(4, 4)


def attention(call: Any, *shapes: tuple[int, ...], **options: Any) -> Build:
    return own(lambda: nn.MultiheadAttention(4, 2, **options), *(shapes or ((3, 4),)), call=call)


def recurrent(kind: str, call: Any = lambda m, x: m(x)[0], *more: tuple[int, ...], **options: Any) -> Build:
    options = {"batch_first": True, **options}
    return own(lambda: getattr(nn, kind)(4, 3, **options), (3, 4), *more, call=call, before=linear)


class Rounded(torch.autograd.Function):
    """Whose backward is not the derivative of its forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Any:
        return (scale * x).round(), x.sign()

    @staticmethod
    def backward(ctx: Any, g: Tensor, h: Tensor) -> Any:
        return g - h, None


def itself(m: nn.Module, x: Tensor) -> Tensor:
    return m(x, x, x, need_weights=False)[0]


def masked(m: nn.Module, x: Tensor, p: Tensor) -> Tensor:
    padding = F.pad(p > 0, (1, 0))  # never the first key
    return m(x, x, x, key_padding_mask=padding, attn_mask=torch.ones(3, 3, dtype=torch.bool).triu(1))[0]


def in_time(m: nn.Module, x: Tensor) -> Tensor:
    """By ``len``, which torch.fx does not pass."""
    h = c = x.new_zeros(len(x), 3)
    for t in range(x.shape[1]):
        h, c = m(x[:, t], (h, c))
    return h


def from_nothing(m: Any, x: Tensor) -> Tensor:
    state = m(x[:, 0])
    for t in (1, 2):
        state = torch.lstm_cell(x[:, t], state, m.weight_ih, m.weight_hh, b_ih=m.bias_ih, b_hh=m.bias_hh)
    return torch.cat(state, 1)


def flipped(call: Any) -> Any:
    return lambda m, x: call(m, x.transpose(0, 1)).transpose(0, 1)


LAYERS: dict[str, Build] = {
    "conv1d": own(lambda: nn.Conv1d(4, 6, 3, stride=2, dilation=2, groups=2, padding=2), (4, 9)),
    "conv2d reflect": own(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"), (2, 4, 4)),
    "conv2d circular": own(lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "conv3d": own(lambda: nn.Conv3d(2, 2, 3, padding=1, groups=2), (2, 3, 3, 3)),
    "transposed": own(lambda: nn.ConvTranspose2d(2, 4, 3, stride=2, padding=1, output_padding=1, groups=2), (2, 3, 3)),
    "batch norm": own(lambda: nn.BatchNorm1d(4), (4,), before=linear),
    "instance norm": own(lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True), (2, 5)),
    "group norm": own(lambda: nn.GroupNorm(2, 4), (4, 3)),
    "rms norm": own(lambda: nn.RMSNorm(4), (4,), before=linear),
    "local response": own(lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.LocalResponseNorm(2)), (2, 3, 3)),
    "embedding": words(lambda: nn.Embedding(7, 4, padding_idx=0)),
    "embedding bag": words(lambda: nn.EmbeddingBag(7, 4)),
    "prelu": own(lambda: nn.PReLU(4), (4,), before=linear),
    "prelu, images": own(lambda: nn.PReLU(2), (2, 3, 3), before=lambda: nn.Conv2d(2, 2, 1)),
    "prelu, one slope": own(lambda: nn.PReLU(), (3, 4), before=linear),
    "bilinear": own(lambda: nn.Bilinear(4, 3, 5), (4,), (3,)),
    "attention": attention(itself, batch_first=True),
    "attention, masks": attention(masked, (3, 4), (2,), batch_first=True),
    "attention, weights": attention(lambda m, x: torch.cat([p.flatten(1) for p in m(x, x, x)], 1), batch_first=True),
    "attention, time first": attention(flipped(itself)),
    "attention, separate": attention(
        lambda m, x, k, v: m(x, k, v)[0], (3, 4), (2, 3), (2, 5), kdim=3, vdim=5, batch_first=True
    ),
    "attention, added keys": attention(itself, batch_first=True, add_bias_kv=True, add_zero_attn=True),
    "attention, dropout": attention(itself, batch_first=True, dropout=0.3),
    "encoder layer": own(lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.2, batch_first=True), (3, 4)),
    "decoder layer": own(lambda: nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True), (3, 4), (2, 4)),
    "lstm": recurrent("LSTM"),
    "lstm, deep": recurrent("LSTM", num_layers=2, dropout=0.3, bidirectional=True),
    "lstm, state": recurrent("LSTM", lambda m, x: m(x)[1][0].transpose(0, 1), proj_size=2),
    "gru, time first": recurrent("GRU", flipped(lambda m, x: m(x)[0]), batch_first=False),
    "gru, given state": recurrent("GRU", lambda m, x, h: m(x, h.transpose(0, 1))[0], (1, 3)),
    "gru, dropout after": recurrent("GRU", lambda m, x: F.dropout(m(x)[0], 0.3, m.training)),
    "rnn": recurrent("RNN", bidirectional=True, nonlinearity="relu"),
    "lstm cell": own(lambda: nn.LSTMCell(4, 3), (4,), call=lambda m, x: m(x, m(x))[0]),
    "lstm cell, in time": own(lambda: nn.LSTMCell(4, 3), (3, 4), call=in_time, before=linear),
    "lstm cell, no bias": own(lambda: nn.LSTMCell(4, 3, bias=False), (3, 4), call=in_time),
    "lstm cell, from nothing": own(lambda: nn.LSTMCell(4, 3), (3, 4), call=from_nothing),
    "gru cell": own(lambda: nn.GRUCell(4, 3), (4,)),
    "weight norm": own(lambda: parametrizations.weight_norm(nn.Linear(4, 4)), (4,), before=linear),
    "spectral norm": own(lambda: parametrizations.spectral_norm(nn.Linear(4, 4)).eval(), (4,), before=linear),
    "orthogonal": own(lambda: parametrizations.orthogonal(nn.Linear(4, 4)), (4,), before=linear),
}
LAYERS |= {
    "straight-through": own(linear, (4,), call=lambda m, x: Rounded.apply(m(x), 1.0)[0]),
    "straight-through weights": own(linear, (4,), call=lambda m, x: F.linear(x, Rounded.apply(m.weight, 2.0)[1])),
    "checkpoint": own(linear, (4,), call=lambda m, x: checkpoint(m, x, use_reentrant=True)),
}
REFUSED: dict[str, tuple[Build, str]] = {
    "max_norm": (words(lambda: nn.Embedding(7, 4, max_norm=0.5)), "max_norm rewrites its table"),
    "frequency": (words(lambda: nn.Embedding(7, 4, scale_grad_by_freq=True)), "scale_grad_by_freq"),
    "spectral norm, torch's first": (own(lambda: nn.utils.spectral_norm(nn.Linear(4, 4)), (4,)), "writes the buffer"),
    "packed sequences": (
        recurrent("LSTM", lambda m, x: m(pack_padded_sequence(x, torch.tensor([3, 2, 1]), True))[1][0][0]),
        "module 'layer', operation LSTM, at test_layers_of_torch.py:.* PackedSequence.* padded batch",
    ),
}


def made(build: Build) -> Case:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, inputs = build()
        model(*inputs)
    given = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return Case(model.double(), draw=lambda seed, size: (given, torch.arange(B)))


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name: str) -> None:
    case, options = made(LAYERS[name]), {"steps": 2, "curvature": "sgd", "lr": 0.1}
    off, fast = assert_base(case, **options), assert_equal(case, **options)
    assert (fast.parameters - off.parameters).abs().max() > 1e-6


@pytest.mark.parametrize("largest", [0, uses.LARGEST_TRIAL])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recurrent_layers_in_single_precision(kind: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32 they are oneDNN's, which torch.func has no rule for; not tried, too."""
    monkeypatch.setattr(uses, "LARGEST_TRIAL", largest)
    case = made(recurrent(kind))
    (x,), y = case.batch(0)
    single = Case(copy.deepcopy(case.model).float(), draw=lambda seed, size: (x.float(), y))
    run, options = train(single, 1, curvature="sgd", lr=0.1), {"steps": 1, "curvature": "sgd", "lr": 0.1}
    assert "slow" not in run.optimizer.program.cost()
    assert (run.parameters - trained(case, **options)).abs().max() < 1e-5


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, why = REFUSED[name]
    case = made(build)
    with pytest.raises(CompileError, match=why):
        compile_optimizer(case.model, case.batch(0)[0], loss=case.loss, curvature="sgd")
