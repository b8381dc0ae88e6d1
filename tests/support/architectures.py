"""Architectures of every kind, as modules with inputs: what is compiled is checked against the module itself."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv2d, Linear
from torch.nn import functional as F

from support.networks import conv, make, mlp, seeded


@dataclass
class Example:
    model: nn.Module
    inputs: tuple[Tensor, ...]


def example(model: nn.Module, *shapes: tuple[int, ...], batch: int = 4) -> Example:
    source = torch.Generator().manual_seed(1)
    return Example(model, tuple(torch.randn(batch, *s, generator=source).double() for s in shapes))


def small(forward: Callable[..., object], *shapes: tuple[int, ...], **layers: Any) -> Example:
    return example(make(forward, **layers), *shapes)


def conv_norm(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    convolution = Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, BatchNorm2d(outputs))


class BasicBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.a, self.b = conv_norm(inputs, outputs, stride=stride), conv_norm(outputs, outputs)
        plain = inputs == outputs and stride == 1
        self.short = nn.Identity() if plain else conv_norm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.b(torch.relu(self.a(x))) + self.short(x))


def resnet18_like(width: int = 2) -> Example:
    def build() -> nn.Module:
        blocks = []
        for now in (width, 2 * width, 4 * width, 8 * width):
            blocks += [BasicBlock(max(now // 2, width), now, 1 + (now > width)), BasicBlock(now, now, 1)]
        ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(), Linear(8 * width, 3)
        return nn.Sequential(conv_norm(3, width), nn.ReLU(), *blocks, *ends)

    return example(seeded(build), (3, 8, 8))


def densenet_like(growth: int = 2, layers: int = 3) -> Example:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        for index in range(layers):
            x = torch.cat([x, torch.relu(getattr(net, f"l{index}")(x))], 1)
        return net.head(x.mean((2, 3)))

    convolutions = {f"l{i}": conv(2 + i * growth, growth) for i in range(layers)}
    return small(forward, (2, 4, 4), **convolutions, head=(2 + layers * growth, 3))


def unet_like() -> Example:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        top = torch.relu(net.down(x))
        low = torch.relu(net.bottom(F.max_pool2d(top, 2)))
        joined = torch.cat([F.interpolate(low, scale_factor=2, mode="nearest"), top], 1)
        return net.head(torch.relu(net.up(joined)).flatten(1))

    return small(forward, (1, 4, 4), down=conv(1, 2), bottom=conv(2, 3), up=conv(5, 2), head=(32, 3))


def inception_like() -> Example:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        pooled = net.p(F.avg_pool2d(x, 3, 1, 1))
        x = torch.cat([net.a(x), net.c(torch.relu(net.b(x))), pooled], 1)
        return net.head(torch.relu(x).mean((2, 3)))

    pointwise = {"a": conv(2, 2, kernel=1), "b": conv(2, 3, kernel=1), "p": conv(2, 2, kernel=1)}
    return small(forward, (2, 4, 4), **pointwise, c=conv(3, 2), head=(6, 3))


def attention_block() -> Example:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        y = net.n1(x)
        x = x + net.out(F.scaled_dot_product_attention(net.q(y), net.k(y), net.v(y)))
        x = x + net.m2(F.gelu(net.m1(net.n2(x))))
        return net.head(x.mean(1))

    norm = partial(nn.LayerNorm, 4)
    return small(forward, (3, 4), n1=norm, q=(4, 4), k=(4, 4), v=(4, 4), out=(4, 4), n2=norm, m1=(4, 6), m2=(6, 4),
                 head=(4, 3))  # fmt: skip


def siamese() -> Example:
    def forward(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return net.head(torch.tanh(net.a(x)) * torch.tanh(net.a(y)))

    return small(forward, (4,), (4,), a=(4, 5), head=(5, 3))


def tied() -> Example:
    return small(lambda net, x: net.head(F.linear(torch.tanh(net.a(x)), net.a.weight.T)), (4,), a=(4, 5), head=(4, 3))


def two_inputs() -> Example:
    def forward(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return net.head(torch.tanh(torch.cat([net.a(x), net.b(y)], 1)))

    return small(forward, (4,), (2,), a=(4, 3), b=(2, 3), head=(6, 3))


def dict_output() -> Example:
    def forward(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
        return {"logits": net.head(torch.tanh(net.a(x))), "value": net.value(x)}

    return small(forward, (4,), a=(4, 5), head=(5, 3), value=(4, 1))


def dropout_mlp() -> Example:
    mask = partial(nn.Dropout, 0.5)
    return small(lambda net, x: net.head(net.mask(torch.tanh(net.a(x)))), (4,), a=(4, 6), mask=mask, head=(6, 3))


def frozen() -> Example:
    model = mlp().model
    model.b.requires_grad_(False)
    return example(model, (4,))


def embedding_mlp() -> Example:
    table = partial(nn.Embedding, 6, 4)
    model = make(lambda net, words: net.head(torch.tanh(net.table(words)).mean(1)), table=table, head=(4, 3))
    return Example(model, (torch.arange(12).reshape(4, 3) % 6,))


EXAMPLES: dict[str, Callable[[], Example]] = {
    build.__name__: build
    for build in (
        resnet18_like, densenet_like, unet_like, inception_like, attention_block, siamese, tied, two_inputs,
        dict_output, dropout_mlp, frozen, embedding_mlp,
    )
}  # fmt: skip
