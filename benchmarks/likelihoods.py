"""Losses that may be negative: likelihoods with a variance that is learned, against Adam at three rates.

    python benchmarks/likelihoods.py         what likelihoods.csv has not, then the table in docs/research.md

1,024 samples of 10 numbers, a target whose noise depends on one of them; two tanh layers of 32, 8 epochs; mean loss of
all samples at the end. *falling*: the default with a rate that falls over the last third; *as one*: a negative loss
counts as 1 in the aim, as it did before.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import DOCS, Row, machines, markdown, measure_missing, torch_step, write_section
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gtddp_compile import compile_optimizer
from gtddp_compile.kernels import loss as kernel

RAW = Path(__file__).with_suffix(".csv")
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "normal": lambda out, y: out[:, 1] + 0.5 * ((y - out[:, 0]) * torch.exp(-out[:, 1])) ** 2,
    "normal, softplus": lambda out, y: (
        nn.functional.softplus(out[:, 1]).add(1e-3).log()
        + 0.5 * ((y - out[:, 0]) / (nn.functional.softplus(out[:, 1]) + 1e-3)) ** 2
    ),
    "Laplace": lambda out, y: out[:, 1] + (y - out[:, 0]).abs() * torch.exp(-out[:, 1]),
    "Poisson": lambda out, y: torch.exp(out[:, 0]) - y.abs().round() * out[:, 0],
}
METHODS: dict[str, float | None] = {"default": None, "falling": None, "as one": None, "Adam, 0.003": 3e-3,
                                    "Adam, 0.01": 1e-2, "Adam, 0.03": 3e-2}  # fmt: skip
BATCHES, SEEDS, EPOCHS = (32, 128), range(3), 8


def as_one(values: Tensor, mean: Tensor, least: Tensor, weight: tuple[float, float, float], together: int) -> Tensor:
    """The aims as they were."""
    aim, own, half = weight
    aims = torch.threshold(values, 0.0, 1.0).clamp_min_(1e-4 * mean)
    return aims * (aim * together / (together + half) + own / together)


def run(loss: str, batch: int, method: str, seed: int) -> tuple[float]:
    """Mean loss at the end."""
    torch.manual_seed(seed)
    phi, rate = LOSSES[loss], METHODS[method]
    x = torch.randn(1024, 10)
    y = x[:, 0].sin() + x[:, 1] * x[:, 2] + 0.3 * torch.randn(1024) * x[:, 3].abs()
    model = nn.Sequential(nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2))
    step: Callable[..., Any]
    schedule, steps = None, EPOCHS * len(y) // batch
    if rate is None:
        optimizer = compile_optimizer(model, x[:batch], loss=phi, on_nonfinite="skip")
        left = LambdaLR(optimizer, lambda taken: min(1.0, 3 * (1 - taken / steps)))
        step, schedule = optimizer.step, left if method == "falling" else None
    else:
        step = torch_step(model, torch.optim.Adam(model.parameters(), lr=rate), lambda out, y: phi(out, y).mean())
    with mock.patch.object(kernel, "terminal_aims", as_one if method == "as one" else kernel.terminal_aims):
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(y)).split(batch):
                step(x[rows], y[rows])
                if schedule is not None:
                    schedule.step()
    with torch.no_grad():
        return (float(phi(model(x), y).mean()),)


def text(rows: Iterable[Row]) -> str:
    """The section of docs/research.md."""
    rows = list(rows)

    def cell(*key: object) -> str:
        own = tuple(map(str, key))
        found = [float(row["loss"]) for row in rows if (row["task"], row["batch"], row["method"]) == own]
        return f"{statistics.median(found):.3g} ({min(found):.2g} to {max(found):.2g})"

    table = markdown(
        ("density", "batch", *METHODS),
        [(loss, f"{batch}", *(cell(loss, batch, name) for name in METHODS)) for loss in LOSSES for batch in BATCHES],
    )
    return f"{table}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = itertools.product(LOSSES, BATCHES, METHODS, SEEDS)
    rows = measure_missing(RAW, ("task", "batch", "method", "seed"), ("loss",), wanted, run)
    write_section("likelihoods", text(rows), DOCS / "research.md")


if __name__ == "__main__":
    main()
