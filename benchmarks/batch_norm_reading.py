"""Operations that mix samples: the per-sample reading against the exact one (docs/theory.md#mixing).

A small residual network with training-mode batch-norm on digits shrunk to 4 × 4, by the dense backend in both readings,
and the same network with running statistics, where the two are one.

    python benchmarks/batch_norm_reading.py     what batch_norm_reading.csv has not, then docs/batch-norm-reading.md
"""

from __future__ import annotations

import copy
import statistics
from itertools import product
from pathlib import Path

import torch
from common import DOCS, Row, machines, markdown, measure_missing
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

TRAINING, RUNNING = "training", "running statistics"
CASES = [(TRAINING, 4, 0.1), (TRAINING, 8, 0.1), (TRAINING, 12, 0.1), (TRAINING, 8, 1.0), (RUNNING, 8, 1.0)]
"""What batch-norm reads, batch size, learning rate."""
STEPS, SEEDS = 8, range(3)
RAW, PAGE = Path(__file__).with_suffix(".csv"), DOCS / "batch-norm-reading.md"
KEYS, VALUES = ("batch_norm", "batch", "lr", "seed"), ("first_update", "all_steps", "loss_block", "loss_exact")


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


def run(kind: str, size: int, lr: float, seed: int) -> tuple[float, float, float, float]:
    """Difference of the first update, of all updates, relative to them; the two mean losses of the second half."""
    torch.manual_seed(seed)
    start = Net().double().train(kind == TRAINING)
    models = {reading: copy.deepcopy(start) for reading in ("block", "exact")}
    data, losses, first = batches(size, STEPS, seed), {"block": [], "exact": []}, 0.0
    optimizers = {
        reading: compile_optimizer(
            model,
            data[0][0],
            loss=nn.CrossEntropyLoss(),
            curvature="sgd",
            lr=lr,
            terminal="gradient",
            backend="dense",
            mixing=reading,
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
    late = [statistics.mean(found[STEPS // 2 :]) for found in losses.values()]
    return first, float((block - exact).norm() / (exact - parameters(start)).norm()), late[0], late[1]


def text(rows: list[Row]) -> str:
    """The page of the rows."""
    header, table = ("batch-norm", "batch", "lr", "first update", "all steps", "loss, block", "loss, exact"), []
    for key in dict.fromkeys(tuple(row[name] for name in KEYS[:3]) for row in rows):
        own = [row for row in rows if tuple(row[name] for name in KEYS[:3]) == key]
        first, last, block, exact = (statistics.mean(float(row[name]) for row in own) for name in VALUES)
        table.append((*key, f"{first:.3f}", f"{last:.3f}", f"{block:.4f}", f"{exact:.4f}"))
    return f"""# Batch-norm: the per-sample reading against the exact one

Written by `benchmarks/batch_norm_reading.py`: dense backend, sgd, terminal gradient, {STEPS} steps, mean of
{len(SEEDS)} seeds. Differences of parameter changes relative to the exact ones; losses are means over the second half
of the steps.

{markdown(header, table)}

Machine: {machines(rows)}.
"""


def main() -> None:
    """Measure what is missing; write the page."""
    torch.set_num_threads(1)
    rows = measure_missing(RAW, KEYS, VALUES, [(*case, seed) for case, seed in product(CASES, SEEDS)], run)
    PAGE.write_text(text(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
