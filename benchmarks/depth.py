"""Layers that nothing normalises: the default, whose aim falls with their number, and one aim.

    python benchmarks/depth.py         what depth.csv has not, then the table in docs/research.md

tanh layers of 48 in a row, and residual blocks of two layers with ReLU, on scikit-learn's digits, batch 64, torch's own
initial weights, 120 steps; train loss and validation accuracy at the end.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from common import DOCS, Row, machines, markdown, measure_missing, write_section
from digit_images import digits
from networks import ResidualTwos, tanh_mlp
from torch import nn

from gtddp_compile import Geometric, compile_optimizer
from gtddp_compile.options import SUGGESTED

SHAPES: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "in a row": (lambda layers: tanh_mlp(PIXELS, WIDTH, layers), (2, 4, 6, 8, 12, 16, 24)),
    "over shortcuts": (lambda layers: ResidualTwos(PIXELS, WIDTH, layers // 2), (2, 4, 8, 12, 16, 24)),
}
SEEDS = range(3)
STEPS, BATCH, WIDTH, PIXELS = 120, 64, 48, 64
SUGGESTION = SUGGESTED["foof"]["terminal"]
AIMS: dict[str, Geometric | None] = {"default": None, "one aim": replace(SUGGESTION, deep=0.0)}
RAW = Path(__file__).with_suffix(".csv")
PLACES = [(shape, layers) for shape, (_, depths) in SHAPES.items() for layers in depths]
LOSS = nn.CrossEntropyLoss()


def run(shape: str, layers: int, aim: str, seed: int) -> tuple[float, float]:
    """Train loss and validation accuracy at the end."""
    torch.manual_seed(seed)
    images = digits()
    (x, y), (valid, labels) = ((part[0].flatten(1), part[1]) for part in (images.train, images.valid))
    model, generator = SHAPES[shape][0](layers), torch.Generator().manual_seed(seed)
    optimizer = compile_optimizer(model, x[:BATCH], loss=LOSS, terminal=AIMS[aim], on_nonfinite="skip")
    for _ in range(STEPS):
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        optimizer.step(x[rows], y[rows])
    with torch.no_grad():
        return float(LOSS(model(x), y)), float((model(valid).argmax(1) == labels).float().mean())


def text(rows: list[Row]) -> str:
    """The table of the rows."""

    def cell(*key: str) -> str:
        own = [row for row in rows if (row["shape"], row["layers"], row["aim"]) == key]
        losses, accuracies = ([float(row[column]) for row in own] for column in ("train_loss", "accuracy"))
        spread, accuracy = f"{min(losses):.2g}–{max(losses):.2g}", statistics.median(accuracies)
        return f"{statistics.median(losses):.3g} ({spread}), {accuracy:.1%}"

    header = ("", "layers", *(f"{name}: train loss (of {len(SEEDS)} seeds), accuracy" for name in AIMS))
    table = [(shape, f"{layers}", *(cell(shape, f"{layers}", aim) for aim in AIMS)) for shape, layers in PLACES]
    return f"{markdown(header, table)}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = [(*place, aim, seed) for place, aim, seed in itertools.product(PLACES, AIMS, SEEDS)]
    keys, values = ("shape", "layers", "aim", "seed"), ("train_loss", "accuracy")
    write_section("depth", text(measure_missing(RAW, keys, values, wanted, run)), DOCS / "research.md")


if __name__ == "__main__":
    main()
