"""Draws ``docs/control_graph.svg``, the first picture of docs/inspect.md: ``python examples/control_graph.py [path]``.

A small residual network with both kinds of shortcut, in ordinary torch: what is drawn is what the compiler found.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from gtddp_compile import ControlGraph, compile_optimizer

PICTURE = Path(__file__).parent.parent / "docs" / "control_graph.svg"


class Block(nn.Module):
    """Two convolutions beside a shortcut: the identity, or a 1×1 convolution with batch-norm if the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1)
        plain = inputs == outputs and stride == 1
        mapping = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if plain else mapping

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, h, w) to (B, outputs, h / stride, w / stride)."""
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class SmallResNet(nn.Module):
    """A stem, an identity block, a projecting block, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 3, padding=1)
        self.layer1, self.layer2 = Block(8, 8), Block(8, 16, stride=2)
        self.head = nn.Linear(16, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of ten classes, (B, 10)."""
        x = self.layer2(self.layer1(torch.relu(self.stem(images))))
        return self.head(x.mean((2, 3)))


def graph() -> ControlGraph:
    """The control graph of the network."""
    return compile_optimizer(SmallResNet(), torch.zeros(4, 1, 8, 8), loss=nn.CrossEntropyLoss()).graph


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    graph().save(target)
    print(target)
