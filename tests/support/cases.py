"""Small networks of every kind of layer and of coalition; those with stages by hand are in `networks`."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import Case, conv, make


def conv_mixed(seed: int = 0) -> Case:
    """Strides, dilation, groups, a layer without bias, a projection, a norm."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        y = torch.tanh(net.norm(net.grouped(x)))
        return net.head((net.down(y) + net.short(x)).flatten(1))

    layers = {
        "stem": lambda: nn.Conv2d(1, 4, 3, padding=1, stride=(1, 2)),
        "grouped": lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=2),
        "norm": lambda: nn.GroupNorm(2, 4),
        "down": lambda: nn.Conv2d(4, 3, (3, 1), stride=2, padding=(1, 0), bias=False),
        "short": lambda: nn.Conv2d(4, 3, 1, stride=2),
        "head": (6, 3),
    }
    return Case(make(forward, seed, **layers), (1, 4, 4))


def embedded(seed: int = 0) -> Case:
    """Tokens: an embedding, layers applied at every position, a layer norm."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        tokens = net.table((x.abs() * 3).long().clamp_max(5)) + 0.1 * x.unsqueeze(-1).expand(-1, -1, 4)
        return net.head((tokens + net.mix(torch.tanh(net.norm(tokens)))).mean(1))

    model = make(forward, seed, table=lambda: nn.Embedding(6, 4), norm=lambda: nn.LayerNorm(4), mix=(4, 4), head=(4, 3))
    return Case(model, (5,))


def wide(seed: int = 0) -> Case:
    """Layers wider than batches are large, one without bias: per-sample gradients are kept as rows."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.c(torch.tanh(net.b(torch.relu(net.a(x)))))

    return Case(make(forward, seed, a=(9, 8), b=(8, 9, False), c=(9, 3)), (9,))


def convolutional(seed: int = 0) -> Case:
    """More positions than outputs and kernel elements: per-sample gradients are kept themselves."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(torch.sigmoid(net.b(torch.tanh(net.a(x)))).flatten(1))

    layers = {"a": lambda: nn.Conv2d(1, 2, 2), "b": lambda: nn.Conv2d(2, 2, 1, groups=2, bias=False), "head": (32, 3)}
    return Case(make(forward, seed, **layers), (1, 5, 5))


def lines(seed: int = 0) -> Case:
    """A convolution whose patches share lines of pixels, with a bias, and one without, strided along the other axis."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(torch.tanh(net.b(torch.tanh(net.a(x)))).flatten(1))

    layers = {
        "a": lambda: nn.Conv2d(4, 2, 3, padding=1),
        "b": lambda: nn.Conv2d(2, 2, (4, 4), padding=(2, 1), stride=(1, 3), bias=False),
        "head": (24, 3),
    }
    return Case(make(forward, seed, **layers), (4, 5, 5))


def tokens(seed: int = 0) -> Case:
    """Layers over positions, one without a bias and one whose weight is frozen."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.tanh(net.first(x))
        h = h + torch.tanh(net.inner(h))
        return net.head(torch.tanh(net.frozen(h)).mean(1))

    model = make(forward, seed, first=(9, 10), inner=(10, 10, False), frozen=(10, 10), head=(10, 3))
    model.frozen.weight.requires_grad_(False)
    return Case(model, (2, 9))


def rereading(seed: int = 0) -> Case:
    """Layers that read the input, two of them as it is, one further on; a layer between players that nobody trains."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        scores = torch.softmax(net.q(x) * net.k(x), 1)
        h = torch.relu(net.between(net.inner(scores) * torch.tanh(net.v(x))))
        return net.head(h * h + net.again(x))

    layers = {"q": (7, 5), "k": (7, 5, False), "v": (7, 5), "inner": (5, 5), "between": (5, 5), "again": (7, 5)}
    model = make(forward, seed, **layers, head=(5, 3))
    model.between.requires_grad_(False)
    return Case(model, (7,))


def tied() -> Case:
    """A layer of three uses, one of them transposed."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.a(torch.tanh(net.stem(x))))
        x = x + torch.tanh(net.a(x)) + torch.sin(F.linear(x, net.a.weight.T))
        return net.head(x)

    return Case(make(forward, stem=(3, 2), a=(2, 2), head=(2, 3)), (3,))


def of_both(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets, reduction="none") + outputs[1].square().sum(1)


def two_outputs() -> Case:
    """The first output waits for the second."""

    def forward(net: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.tanh(net.stem(x))
        early = net.early(x)
        return early, net.late(torch.tanh(net.a(x)) + early)

    return Case(make(forward, stem=(3, 2), early=(2, 3), a=(2, 3), late=(3, 2)), (3,), loss=of_both)


def gates(players: int = 3) -> Case:
    """Layers side by side whose outputs are multiplied: different inputs' rows, different output derivatives."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        parts = [torch.sigmoid(getattr(net, f"p{k}")(x)) + k for k in range(players)]
        return net.head(torch.stack(parts).prod(0) + x)

    layers = {f"p{k}": (3, 3, k != 1) for k in range(players)}
    return Case(make(forward, stem=(4, 3), head=(3, 3), **layers), (4,))


def sums(players: int = 3, kind: str = "linear") -> Case:
    """Fig. 7a: layers of the same input, added up."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        parts = [getattr(net, f"p{k}")(x) for k in range(players)]
        return net.head(torch.tanh(sum(parts[1:], parts[0])).flatten(1))

    if kind == "linear":
        layers: dict[str, Any] = {f"p{k}": (3, 4) for k in range(players)}
        return Case(make(forward, stem=(4, 3), head=(4, 3), **layers), (4,))
    layers = {f"p{k}": conv(2, 3) for k in range(players)}
    return Case(make(forward, stem=conv(1, 2), head=(27, 3), **layers), (1, 3, 3))


def late(added: bool = True) -> Case:
    """A coalition of three after two stages: the first to see what its cooperative factor made of the value Hessian."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.mid(torch.tanh(net.stem(x))))
        y = net.p0(x) + net.p1(x) if added else net.p0(x) * torch.tanh(net.p1(x))
        return net.head(torch.tanh(y) * torch.sigmoid(net.p2(x)))

    return Case(make(forward, stem=(4, 3), mid=(3, 3), p0=(3, 2), p1=(3, 2), p2=(3, 2), head=(2, 3)), (4,))


def beside(players: int = 4) -> Case:
    """``b(tanh(a(x)))`` beside ``players - 1`` mappings of x, which decide with a ("asap"), with b ("alap") or alone.

    x comes from a layer too: the value Hessian that the last stage leaves is read by one whose state has changed.
    One mapping is a gate (Theorem 3); three mappings are a gate and two that are added (Corollary 7), two are added.
    """

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        parts = [getattr(net, f"p{k}")(x) for k in range(players - 1)]
        y: Tensor = net.b(torch.tanh(net.a(x)))
        if players != 2:
            y = y + parts[-1] + parts[-2]
        return y if players == 3 else y * torch.sigmoid(parts[0])

    mappings: dict[str, Any] = {f"p{k}": (2, 3) for k in range(players - 1)}
    return Case(make(forward, stem=(2, 2), a=(2, 2, players != 2), b=(2, 3), **mappings), (2,))
