"""The networks that are timed, written out so that no model zoo is needed, each with the batch it is timed on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Network:
    """A network to time.

    Attributes:
        name: as the tables print it.
        build: makes the module, random weights.
        inputs: shape of one sample (tokens where ``vocabulary`` is set).
        batch: samples a step.
        classes: number of classes of the targets.
        pairs: interleaved pairs of steps that are enough for a steady median.
        vocabulary: number of tokens; targets are then one class a position.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[int, ...]
    batch: int
    classes: int = 10
    pairs: int = 9
    vocabulary: int = 0

    def data(self, batch: int | None = None) -> tuple[Tensor, Tensor]:
        """A random batch."""
        samples = batch or self.batch
        if self.vocabulary:
            tokens = torch.randint(self.vocabulary, (samples, self.inputs[0] + 1))
            return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
        return torch.randn(samples, *self.inputs), torch.randint(self.classes, (samples,))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean loss of the batch, for torch.optim."""
        return self.losses(outputs, targets).mean()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy a sample, shape (B,); mean over the positions of a sequence."""
        if self.vocabulary:
            return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(
                targets.shape).mean(1)  # fmt: skip
        return F.cross_entropy(outputs, targets, reduction="none")


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers with ReLU between them."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class DigitsNet(nn.Module):
    """One residual block of three convolutions and a linear head (paper: Fig. 5), for images of ``side`` pixels.

    With 8 it is the network of ``examples/digits.py``, with 28 that of MNIST.
    """

    def __init__(self, width: int = 16, side: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width * (side // 2) ** 2, 10)

    def forward(self, images: Tensor) -> Tensor:
        shortcut = torch.relu(self.conv1(images))
        main = torch.relu(self.conv2(shortcut))
        merged = torch.relu(self.conv3(main) + shortcut)
        return self.head(F.max_pool2d(merged, 2).flatten(1))


class ResidualMLP(nn.Module):
    """Blocks ``x + relu(W x)`` between a first and a last layer: depth, width and shortcuts to choose."""

    def __init__(self, inputs: int, width: int, depth: int, classes: int = 10, shortcuts: int = 0) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.last = nn.Linear(width, classes)
        self.shortcuts = shortcuts

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        for index, block in enumerate(self.blocks):
            moved = torch.relu(block(x))
            x = x + moved if index < self.shortcuts else moved
        return self.last(x)


class ResidualTwos(nn.Module):
    """Blocks of two layers, ``relu(x + B relu(A x))``, without normalisation."""

    def __init__(self, inputs: int, width: int, depth: int, classes: int = 10) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2 * depth))
        self.last = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.flatten(1)))
        for inner, outer in zip(self.layers[::2], self.layers[1::2], strict=True):
            x = torch.relu(x + outer(torch.relu(inner(x))))
        return self.last(x)


def tanh_mlp(inputs: int, width: int, depth: int, classes: int = 10) -> nn.Sequential:
    """Many tanh layers with nothing that helps gradients through them."""
    sizes = (inputs, *[width] * (depth + 1))
    layers = [part for before, after in itertools.pairwise(sizes) for part in (nn.Linear(before, after), nn.Tanh())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(width, classes))


# --- convolutional networks -------------------------------------------------------------------------------------------


class ConvBlock(nn.Module):
    """ResNet's basic block (two 3×3) or bottleneck (1×1, 3×3, 1×1), with a projection where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        outputs = width * expansion
        sizes = [(inputs, width, 3, stride), (width, width, 3, 1)]
        if expansion > 1:
            sizes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, k, s, k // 2, bias=False) for i, o, k, s in sizes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(o) for _, o, _, _ in sizes)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for index, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            h = norm(conv(torch.relu(h) if index else h))
        return torch.relu(h + self.shortcut(x))


def resnet(blocks: Sequence[int], expansion: int, *, small: bool, classes: int = 10) -> nn.Sequential:
    """ResNet; ``small`` has the 3×3 stem of CIFAR networks, otherwise 7×7 with pooling."""
    stem: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    if not small:
        stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    layers, channels = list(stem), 64
    for level, count in enumerate(blocks):
        for index in range(count):
            layers.append(ConvBlock(channels, 64 * 2**level, 2 if level and not index else 1, expansion))
            channels = 64 * 2**level * expansion
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def small_resnet(width: int = 16, classes: int = 10) -> nn.Sequential:
    """Two of ResNet's basic blocks for grey images of a few pixels."""
    stem = (nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
    blocks = (ConvBlock(width, width, 1, 1) for _ in range(2))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, classes))


class DenseLayer(nn.Module):
    """DenseNet's layer: its output is concatenated to its input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(torch.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(torch.relu(self.norm2(h)))], 1)


def densenet121(classes: int = 10) -> nn.Sequential:
    """DenseNet-121."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    layers.append(nn.MaxPool2d(3, 2, 1))
    channels = 64
    for level, count in enumerate((6, 12, 24, 16)):
        for _ in range(count):
            layers.append(DenseLayer(channels, 32))
            channels += 32
        layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        if level < 3:
            layers += [nn.Conv2d(channels, channels // 2, 1, bias=False), nn.AvgPool2d(2)]
            channels //= 2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


# --- transformers -----------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class TransformerBlock(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, causal: bool, expansion: int = 4) -> None:
        super().__init__()
        hidden = expansion * width
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class VisionTransformer(nn.Module):
    """ViT with a class token."""

    def __init__(self, size: int, patch: int, width: int, depth: int, heads: int, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.position = nn.Parameter(0.02 * torch.randn(1, (size // patch) ** 2 + 1, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x))[:, 0])


class SmallViT(nn.Module):
    """ViT for grey images of 8×8 pixels: 16 patches, their mean instead of a class token."""

    def __init__(self, width: int = 32, depth: int = 3, heads: int = 4, classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False, 2) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


class GPT(nn.Module):
    """A decoder-only language model."""

    def __init__(self, vocabulary: int, length: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(1, length, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, True) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.tokens(tokens) + self.position)))


NETWORKS = {
    network.name: network
    for network in (
        Network("digits", DigitsNet, (1, 8, 8), 128, pairs=60),
        Network("mnist", lambda: DigitsNet(8, 28), (1, 28, 28), 128, pairs=30),
        Network("mlp", lambda: mlp((784, 512, 512, 512, 512, 10)), (784,), 128, pairs=60),
        Network("resnet18", lambda: resnet((2, 2, 2, 2), 1, small=True), (3, 32, 32), 128, pairs=5),
        Network("resnet50", lambda: resnet((3, 4, 6, 3), 4, small=False), (3, 64, 64), 16),
        Network("densenet121", densenet121, (3, 64, 64), 16),
        Network("vit-small", lambda: VisionTransformer(64, 8, 384, 12, 6), (3, 64, 64), 16),
        Network("gpt6", lambda: GPT(256, 128, 384, 6, 6), (128,), 16, vocabulary=256),
    )
}
"""By name."""
