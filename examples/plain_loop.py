"""A training loop of one's own: batches, a learning-rate schedule, validation.

python examples/plain_loop.py
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

Batch = tuple[Tensor, Tensor]


def train(model: nn.Module, batches: list[Batch], epochs: int) -> list[float]:
    """Train and return the mean loss of every epoch."""
    optimizer = compile_optimizer(model, batches[0][0], loss=nn.CrossEntropyLoss(), curvature="adam", lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    history = []
    for _ in range(epochs):
        losses = [optimizer.step(x, y) for x, y in batches]  # no zero_grad, no backward: both sweeps are in the step
        schedule.step()
        history.append(float(torch.stack(losses).mean()))
    return history


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Batch]) -> float:
    """Share of samples that are classified right."""
    model.eval()
    right = [(model(x).argmax(1) == y).float() for x, y in batches]
    model.train()
    return float(torch.cat(right).mean())


class Residual(nn.Module):
    """A residual block between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.head = nn.Linear(2, 16), nn.Linear(16, 16), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.head(x + torch.tanh(self.block(x)))


def moons(samples: int = 128, batch: int = 32) -> list[Batch]:
    """Two interleaved half circles, in batches."""
    source = torch.Generator().manual_seed(0)
    angle, label = torch.rand(samples, generator=source) * torch.pi, torch.arange(samples) % 2
    side = 1.0 - 2.0 * label
    points = torch.stack([angle.cos() * side + label, angle.sin() * side + 0.5 * label], 1)
    return list(zip(points.split(batch), label.split(batch), strict=True))


def main() -> None:
    torch.manual_seed(0)
    model, batches = Residual(), moons()
    history = train(model, batches, epochs=20)
    print(f"loss {history[0]:.3f} -> {history[-1]:.3f}, accuracy {accuracy(model, batches):.3f}")


if __name__ == "__main__":
    main()
