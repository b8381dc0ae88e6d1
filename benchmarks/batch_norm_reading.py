"""Operations that mix samples: the per-sample reading against the exact one (docs/theory.md#mixing).

A small residual network with training-mode batch-norm on digits shrunk to 4 × 4, by the dense backend in both readings,
and the same network with running statistics, where the two are one. ``python benchmarks/batch_norm_reading.py`` writes
docs/batch-norm-reading.md in a minute or two.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from common import markdown
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

CASES = [(4, True, 0.1), (8, True, 0.1), (12, True, 0.1), (8, True, 1.0), (8, False, 1.0)]
"""Batch size, training mode, learning rate."""


class Net(nn.Module):
    """A convolution, a residual block of two, each with batch-norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.n0 = nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.c1, self.n1 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.c2, self.n2 = nn.Conv2d(2, 2, 3, padding=1, bias=False), nn.BatchNorm2d(2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.n0(self.c0(x)))
        y = self.n2(self.c2(torch.tanh(self.n1(self.c1(x)))))
        return self.head(nn.functional.avg_pool2d(torch.tanh(x + y), 2).flatten(1))


def batches(size: int, steps: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Digits 0 to 2, averaged to 4 × 4."""
    data = load_digits(n_class=3)
    x = nn.functional.avg_pool2d(torch.tensor(data.images, dtype=torch.float64).unsqueeze(1) / 16, 2)
    y = torch.tensor(data.target, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    return [(x[part], y[part]) for part in order.split(size)[:steps]]


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def compare(size: int, steps: int, seed: int, lr: float, training: bool) -> tuple[float, float, float, float]:
    """Difference of the first update, of all updates, relative to them; the two mean losses of the second half."""
    torch.manual_seed(seed)
    start = Net().double().train(training)
    models = {reading: copy.deepcopy(start) for reading in ("block", "exact")}
    data, losses, first = batches(size, steps, seed), {"block": [], "exact": []}, 0.0
    optimizers = {
        reading: compile_optimizer(
            model, data[0][0], loss=nn.CrossEntropyLoss(), lr=lr, terminal="gradient", backend="dense", mixing=reading
        )
        for reading, model in models.items()
    }
    for index, (x, y) in enumerate(data):
        for reading, optimizer in optimizers.items():
            losses[reading].append(float(optimizer.step(x, y)))
        if not index:
            block, exact = parameters(models["block"]), parameters(models["exact"])
            first = float((block - exact).norm() / (exact - parameters(start)).norm())
    block, exact = parameters(models["block"]), parameters(models["exact"])
    late = [sum(found[steps // 2 :]) / (steps - steps // 2) for found in losses.values()]
    return first, float((block - exact).norm() / (exact - parameters(start)).norm()), late[0], late[1]


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("docs/batch-norm-reading.md"))
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [
        "# Batch-norm: the per-sample reading against the exact one\n",
        f"Written by `benchmarks/batch_norm_reading.py` (torch {torch.__version__}): dense backend, sgd, terminal",
        f"gradient, {options.steps} steps, mean of {options.seeds} seeds. Differences of parameter changes relative to",
        "the exact ones; losses are means over the second half of the steps.\n",
    ]
    header, found = ("batch-norm", "batch", "lr", "first update", "all steps", "loss, block", "loss, exact"), []
    for size, training, lr in CASES:
        rows = [compare(size, options.steps, seed, lr, training) for seed in range(options.seeds)]
        first, last, block, exact = (sum(column) / len(column) for column in zip(*rows, strict=True))
        kind = "training" if training else "running statistics"
        found.append((kind, f"{size}", f"{lr}", f"{first:.3f}", f"{last:.3f}", f"{block:.4f}", f"{exact:.4f}"))
    options.out.write_text("\n".join([*lines, markdown(header, found)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
