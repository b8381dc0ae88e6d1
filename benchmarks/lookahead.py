"""Where a sample's target has several numbers: the place a batch is looked at from, on tasks that the study has not.

    python benchmarks/lookahead.py     what lookahead.csv has not, then the table in docs/research.md

Small networks on scikit-learn's digits: an autoencoder; the lower halves from the upper ones, and eight means of their
pixels; one-hot labels by squares; each pixel's grey level in five classes, of images with noise; and an LSTM on the
study's characters. Validation loss (the same that is trained) after so many steps.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import DOCS, Row, machines, markdown, measure_missing, write_section
from digit_images import digits
from study_tasks import TASKS
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from gtddp_compile.options import SUGGESTED

SEEDS = range(3)
SUGGESTION = SUGGESTED["foof"]["lookahead"]
PLACES: dict[str, dict[str, Any]] = {
    "inertia 0": {"inertia": 0.0},
    "inertia 0.9, no look-ahead": {"inertia": 0.9, "lookahead": 0.0},
    "look-ahead 0.5": {"inertia": 0.9, "lookahead": 0.5},
    f"default: {SUGGESTION}": {},
    "default, early 0": {"terminal": replace(SUGGESTED["foof"]["terminal"], early=0.0)},
    "look-ahead 0.9": {"inertia": 0.9, "lookahead": 0.9},
}
RAW = Path(__file__).with_suffix(".csv")
Batch = tuple[Tensor, Tensor]


class Tagger(nn.Module):
    """The next character after each."""

    def __init__(self, letters: int = 128, width: int = 96) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(letters, width), nn.LSTM(width, width, batch_first=True)
        self.out = nn.Linear(width, letters)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.embed(x))[0])


def dense(*widths: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    pairs = [layer for n, m in itertools.pairwise(widths) for layer in (nn.Linear(n, m), activation())]
    return nn.Sequential(*pairs[:-1])


def segmenter() -> nn.Sequential:
    convolutions = (nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 5, 1))
    return nn.Sequential(convolutions[0], nn.ReLU(), convolutions[1], nn.ReLU(), convolutions[2])


def classifier() -> nn.Sequential:
    strided = nn.Conv2d(16, 16, 3, padding=1, stride=2)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), strided, nn.ReLU(), nn.Flatten(), nn.Linear(256, 10)
    )


def noisy(x: Tensor, y: Tensor, g: torch.Generator) -> Batch:
    return x + 0.3 * torch.randn(x.shape, generator=g), (x * 4.999).long().clamp(0, 4).squeeze(1)


def means(x: Tensor, y: Tensor, g: torch.Generator) -> Batch:
    lower = x[:, 0, 4:].transpose(1, 2)  # a column's pixels from left to right
    return x[:, 0, :4].flatten(1), 3 * torch.cat([lower[:, :4].mean(1), lower[:, 6:].mean(1)], 1)


class Small(NamedTuple):
    """A network, a batch's size, what a batch is made of images and labels, its loss a sample, and steps."""

    build: Callable[[], nn.Module]
    batch: int
    made: Callable[[Tensor, Tensor, torch.Generator], Batch]
    loss: Callable[[Tensor, Tensor], Tensor]
    steps: int = 160


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().flatten(1).mean(1)


def entropies(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none").flatten(1).mean(1)


SMALL = {
    "autoencoder": Small(lambda: dense(64, 48, 16, 48, 64), 64, lambda x, y, g: (x.flatten(1), x.flatten(1)), squares),
    "lower halves": Small(lambda: dense(32, 64, 64, 32, activation=nn.Tanh), 32,
                          lambda x, y, g: (x[:, 0, :4].flatten(1), x[:, 0, 4:].flatten(1)), squares),
    "eight means": Small(lambda: dense(32, 64, 64, 8), 32, means, squares),
    "one-hot labels": Small(classifier, 32, lambda x, y, g: (x, F.one_hot(y, 10).float()), squares),
    "grey levels": Small(segmenter, 32, noisy, entropies),
}  # fmt: skip


def data(task: str, seed: int) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor], Iterator[Batch], Batch, int]:
    """Network, loss, batches, what it is judged by, and steps."""
    if task == "characters":
        study = TASKS["characters-16"]
        text = study.load()
        return Tagger(), study.loss, text.batches(16, seed), text.valid, 120
    own, found, g = SMALL[task], digits(), torch.Generator().manual_seed(seed)
    (x, y), valid = ((flat.view(-1, 1, 8, 8), labels) for flat, labels in (found.train, found.valid))

    def batches() -> Iterator[Batch]:
        while True:
            rows = torch.randint(len(y), (own.batch,), generator=g)
            yield own.made(x[rows], y[rows], g)

    judged = own.made(*valid, torch.Generator().manual_seed(9))
    return own.build(), own.loss, batches(), judged, own.steps


def run(task: str, place: str, seed: int) -> tuple[float]:
    """Validation loss at the end."""
    torch.manual_seed(seed)
    model, loss, batches, (x, y), steps = data(task, seed)
    optimizer = compile_optimizer(model, next(batches)[0], loss=loss, on_nonfinite="skip", **PLACES[place])  # type: ignore[arg-type]
    for _ in range(steps):
        optimizer.step(*next(batches))
    with torch.no_grad():
        return (float(loss(model(x), y).mean()),)


def text(rows: list[Row]) -> str:
    """The table of the rows."""

    def cell(*key: str) -> str:
        losses = [float(row["valid_loss"]) for row in rows if (row["task"], row["place"]) == key]
        return f"{statistics.median(losses):.3g} ({min(losses):.3g}–{max(losses):.3g})"

    table = [(task, *(cell(task, place) for place in PLACES)) for task in dict.fromkeys(row["task"] for row in rows)]
    return f"{markdown(('task', *PLACES), table)}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = itertools.product((*SMALL, "characters"), PLACES, SEEDS)
    rows = measure_missing(RAW, ("task", "place", "seed"), ("valid_loss",), wanted, run)
    write_section("lookahead", text(rows), DOCS / "research.md")


if __name__ == "__main__":
    main()
