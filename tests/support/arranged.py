"""Networks whose samples do not lie along the leading axis, each with the same network written so that they do."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import Case, Net

Forward = Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Arranged:
    """``plain`` computes what ``folded`` does, with samples along the leading axis of every value.

    Attributes:
        layers: by name.
        folded, plain: the forward passes.
        shape: of one sample's input; ``vocabulary``: how many words, where the inputs are words.
        layouts: words that the layouts of ``folded`` must be described by.
    """

    layers: Callable[[], dict[str, nn.Module]]
    folded: Forward
    plain: Forward
    shape: tuple[int, ...]
    layouts: frozenset[str]
    vocabulary: int = 0

    def models(self) -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        layers = self.layers()
        nets = [Net(run, **copy.deepcopy(layers)).double() for run in (self.folded, self.plain)]
        return nets[0], nets[1]

    def cases(self) -> tuple[Case, Case]:
        """Folded and plain."""
        folded, plain = self.models()
        return Case(folded, draw=self.batch), Case(plain, draw=self.batch)

    def batch(self, seed: int, size: int = 4) -> tuple[Tensor, Tensor]:
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(size, *self.shape, generator=source, dtype=torch.float64)
        if self.vocabulary:
            x = torch.randint(self.vocabulary, (size, *self.shape), generator=source)
        return x, torch.randint(3, (size,), generator=source)


# --- tokens of all samples in one list, experts chosen by a router ----------------------------------------------------


def experts() -> dict[str, nn.Module]:
    return {
        "embed": nn.Embedding(6, 3), "router": nn.Linear(3, 3), "norm": nn.LayerNorm(3),
        **{f"expert_{i}": nn.Linear(3, 3, bias=i > 0) for i in range(3)}, "head": nn.Linear(3, 3),
    }  # fmt: skip


def mixture(net: Any, x: Tensor) -> Tensor:
    """Dense masks of the two best experts; works on any leading axes."""
    scores = net.router(x).softmax(-1)
    mask = torch.zeros_like(scores).scatter(-1, scores.topk(2, -1)[1], 1.0)
    weights = scores * mask
    return sum(weights[..., i : i + 1] * torch.tanh(getattr(net, f"expert_{i}")(x)) for i in range(3))


def tokens_in_one_list(net: Any, x: Tensor) -> Tensor:
    h = net.embed(x)
    y = mixture(net, net.norm(h).reshape(-1, h.shape[-1]))
    return net.head((h + y.reshape(h.shape)).sum(1))


def tokens_apart(net: Any, x: Tensor) -> Tensor:
    h = net.embed(x)
    return net.head((h + mixture(net, net.norm(h))).sum(1))


def sorted_experts() -> dict[str, nn.Module]:
    return {
        "embed": nn.Embedding(6, 3), "router": nn.Linear(3, 3), "norm": nn.LayerNorm(3), "up": nn.Bilinear(3, 3, 3),
        "bias": nn.Embedding(3, 3), "down": nn.Linear(3, 3), "head": nn.Linear(3, 3), "score": nn.Identity(),
    }  # fmt: skip


def scored_experts() -> dict[str, nn.Module]:
    """The scores go through a layer of their own: rows are sorted before they are known."""
    return {**sorted_experts(), "score": nn.Linear(1, 1)}


def tokens_sorted_by_expert(net: Any, x: Tensor) -> Tensor:
    """Two experts a token, all rows of one expert together; their matrices are ``up.weight``, one each."""
    h = net.embed(x)
    rows = net.norm(h).reshape(-1, 3)
    scores, chosen = net.router(rows).softmax(-1).topk(2, -1)
    expert, perm = torch.sort(chosen.reshape(-1), stable=True)
    y = torch.bmm(net.up.weight[expert], rows[perm // 2].unsqueeze(-1)).squeeze(-1) + net.bias(expert)
    y = net.down(torch.tanh(y)) * net.score(scores.reshape(-1, 1))[perm]
    back = torch.zeros_like(perm).scatter(0, perm, torch.arange(perm.shape[0]))
    return net.head((h + y[back].reshape(h.shape[0], -1, 2, 3).sum(2)).sum(1))


def tokens_with_their_experts(net: Any, x: Tensor) -> Tensor:
    h = net.embed(x)
    rows = net.norm(h)
    scores, chosen = net.router(rows).softmax(-1).topk(2, -1)
    y = (net.up.weight[chosen] @ rows[:, :, None, :, None]).squeeze(-1) + net.bias(chosen)
    y = net.down(torch.tanh(y)) * net.score(scores.unsqueeze(-1))
    return net.head((h + y.sum(2)).sum(1))


# --- time first, heads with samples -----------------------------------------------------------------------------------


def attention() -> dict[str, nn.Module]:
    return {"qkv": nn.Linear(2, 6), "out": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "head": nn.Linear(2, 3)}


def time_first(net: Any, x: Tensor) -> Tensor:
    x = x.transpose(0, 1)
    q, k, v = net.qkv(net.norm(x)).chunk(3, -1)
    scores = torch.einsum("tbn,sbn->bts", q, k).softmax(-1)
    y = torch.tanh(x + net.out(torch.einsum("bts,sbn->tbn", scores, v)))
    return net.head(net.norm(y).mean(0))


def time_second(net: Any, x: Tensor) -> Tensor:
    q, k, v = net.qkv(net.norm(x)).chunk(3, -1)
    scores = torch.einsum("btn,bsn->bts", q, k).softmax(-1)
    y = torch.tanh(x + net.out(torch.einsum("bts,bsn->btn", scores, v)))
    return net.head(net.norm(y).mean(1))


def heads() -> dict[str, nn.Module]:
    return {
        "qkv": nn.Linear(4, 12), "scale": nn.LayerNorm(2), "mix": nn.Linear(2, 2), "out": nn.Linear(4, 4),
        "head": nn.Linear(4, 3),
    }  # fmt: skip


def heads_with_samples(net: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = net.qkv(x).view(batch, length, 3, 2, 2).permute(2, 0, 3, 1, 4).reshape(3, batch * 2, length, 2).unbind(0)
    y = torch.bmm(torch.bmm(net.scale(q), k.transpose(1, 2)).softmax(-1), v)
    y = torch.tanh(net.mix(y)).view(batch, 2, length, 2).transpose(1, 2).reshape(batch, length, 4)
    return net.head((x + net.out(y)).sum(1))


def heads_apart(net: Any, x: Tensor) -> Tensor:
    batch, length, _ = x.shape
    q, k, v = net.qkv(x).view(batch, length, 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)
    y = (net.scale(q) @ k.transpose(2, 3)).softmax(-1) @ v
    y = torch.tanh(net.mix(y)).transpose(1, 2).reshape(batch, length, 4)
    return net.head((x + net.out(y)).sum(1))


# --- images: frames, two views -------------------------------------------------------------------------------


def frames() -> dict[str, nn.Module]:
    return {
        "conv": nn.Conv2d(1, 2, 2, padding=1), "norm": nn.GroupNorm(1, 2),
        "mix": nn.Conv2d(2, 2, 3, groups=2, bias=False), "up": nn.ConvTranspose2d(2, 1, 2), "head": nn.Linear(2, 3),
    }  # fmt: skip


def frames_with_samples(net: Any, x: Tensor) -> Tensor:
    """(B, F, 1, 3, 3)."""
    batch = x.shape[0]
    y = torch.tanh(net.norm(net.conv(x.flatten(0, 1))))
    y = net.up(torch.tanh(net.mix(y))).square().mean((1, 2, 3))
    return net.head(y.view(batch, -1))


def frames_apart(net: Any, x: Tensor) -> Tensor:
    """Frames along an axis of three-dimensional images, or beside the channels, a group of them each."""
    h = F.conv3d(x.transpose(1, 2), net.conv.weight.unsqueeze(2), net.conv.bias, padding=(0, 1, 1)).transpose(1, 2)
    count = h.shape[1]
    h = F.group_norm(h.flatten(1, 2), count, net.norm.weight.repeat(count), net.norm.bias.repeat(count)).view(h.shape)
    h = torch.tanh(F.conv3d(torch.tanh(h.transpose(1, 2)), net.mix.weight.unsqueeze(2), groups=2))
    y = F.conv_transpose3d(h, net.up.weight.unsqueeze(2), net.up.bias)
    return net.head(y.square().mean((1, 3, 4)))


def tokens() -> dict[str, nn.Module]:
    return {"patch": nn.Linear(2, 3), "token": Bare(3), "mix": nn.Linear(3, 3), "norm": nn.LayerNorm(3),
            "head": nn.Linear(3, 3)}  # fmt: skip


class Bare(nn.Module):
    """A parameter."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.linspace(-1, 1, size).view(1, 1, size))


def class_tokens_a_frame(net: Any, x: Tensor) -> Tensor:
    """(B, F, T, 2): the class token is no function of the inputs, and every frame gets a copy."""
    count, frames = x.shape[:2]
    h = torch.cat([net.token.value.expand(count, -1, -1), net.patch(x).flatten(1, 2)], 1)
    token = torch.tanh(net.mix(h[:, :1].repeat(1, frames, 1).reshape(-1, 1, 3)))
    y = net.norm(token + h[:, 1:].reshape(count * frames, -1, 3))
    return net.head(y.reshape(count, -1, 3).sum(1))


def class_tokens_apart(net: Any, x: Tensor) -> Tensor:
    count, frames = x.shape[:2]
    h = torch.cat([net.token.value.expand(count, -1, -1), net.patch(x).flatten(1, 2)], 1)
    token = torch.tanh(net.mix(h[:, :1].repeat(1, frames, 1)))
    y = net.norm(token.unsqueeze(2) + h[:, 1:].reshape(count, frames, -1, 3))
    return net.head(y.sum((1, 2)))


def views() -> dict[str, nn.Module]:
    return {"first": nn.Linear(3, 4), "norm": nn.LayerNorm(4), "second": nn.Linear(4, 2), "head": nn.Linear(4, 3)}


def views_one_after_the_other(net: Any, x: Tensor) -> Tensor:
    y = torch.cat([x, x.flip(1)])
    y = torch.tanh(net.second(torch.tanh(net.norm(net.first(y)))))
    return net.head(torch.cat(y.chunk(2), 1))


def views_apart(net: Any, x: Tensor) -> Tensor:
    y = torch.stack([x, x.flip(1)], 1)
    y = torch.tanh(net.second(torch.tanh(net.norm(net.first(y)))))
    return net.head(y.flatten(1))


def own() -> dict[str, nn.Module]:
    return {"first": nn.Linear(2, 3), "gate": nn.PReLU(3), "second": nn.Bilinear(3, 3, 2), "head": nn.Linear(2, 3)}


def own_with_samples(net: Any, x: Tensor) -> Tensor:
    y = net.gate(net.first(x.reshape(-1, 2)))
    return net.head(torch.tanh(net.second(y, y.tanh())).view(x.shape[0], -1, 2).sum(1))


def own_apart(net: Any, x: Tensor) -> Tensor:
    h = net.first(x)
    y = torch.where(h > 0, h, h * net.gate.weight)
    return net.head(torch.tanh(net.second(y, y.tanh())).sum(1))


def gates() -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {name: nn.Linear(3, 3) for name in ("listed", "first", "apart", "once")}
    return {"stem": nn.Linear(2, 3), **layers, "image": nn.Conv1d(3, 3, 1), "head": nn.Linear(3, 3)}


def gates_that_lie_differently(net: Any, x: Tensor) -> Tensor:
    """A coalition of which only some layers have samples along the leading axis; one has a single row of each."""
    h = torch.tanh(net.stem(x))
    rows = h.reshape(-1, 3)
    y = torch.tanh(net.listed(rows)).view(h.shape) * torch.sigmoid(net.first(h.transpose(0, 1))).transpose(0, 1)
    y = y * torch.sigmoid(net.image(rows.unsqueeze(-1))).view(h.shape) + net.apart(h)
    return net.head(y.sum(1) * torch.sigmoid(net.once(h.mean(1))))


def gates_apart(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.stem(x))
    y = torch.tanh(net.listed(h)) * torch.sigmoid(net.first(h)) * torch.sigmoid(net.image(h.mT)).mT + net.apart(h)
    return net.head(y.sum(1) * torch.sigmoid(net.once(h.mean(1))))


INNER, OUTER, SECOND = "axis 0, B*k", "axis 0, k*B", "axis 1"

NETWORKS = {
    "experts": Arranged(experts, tokens_in_one_list, tokens_apart, (3,), frozenset({INNER}), 6),
    "rows sorted by expert": Arranged(
        sorted_experts, tokens_sorted_by_expert, tokens_with_their_experts, (3,), frozenset({"in the order of"}), 6
    ),
    "rows sorted before they are scored": Arranged(
        scored_experts, tokens_sorted_by_expert, tokens_with_their_experts, (3,), frozenset({"in the order of"}), 6
    ),
    "time first": Arranged(attention, time_first, time_second, (3, 2), frozenset({SECOND})),
    "time first, as long as the batch": Arranged(attention, time_first, time_second, (4, 2), frozenset({SECOND})),
    "heads": Arranged(heads, heads_with_samples, heads_apart, (3, 4), frozenset({INNER})),
    "frames": Arranged(frames, frames_with_samples, frames_apart, (2, 1, 3, 3), frozenset({INNER})),
    "class tokens": Arranged(tokens, class_tokens_a_frame, class_tokens_apart, (2, 3, 2), frozenset({INNER})),
    "views": Arranged(views, views_one_after_the_other, views_apart, (3,), frozenset({OUTER})),
    "layers by the generic rule": Arranged(own, own_with_samples, own_apart, (3, 2), frozenset({INNER})),
}
COALITION = Arranged(gates, gates_that_lie_differently, gates_apart, (3, 2), frozenset({INNER, SECOND}))
"""Beside the others: its layers share one metric under Theorem 3."""
