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
from common import DOCS, machine, markdown, measured, read_rows, write_rows, write_section
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
HEADER = ("shape", "layers", "aim", "seed", "train_loss", "accuracy", "measured", "machine")
LOSS = nn.CrossEntropyLoss()


def run(build: Callable[[int], nn.Module], layers: int, terminal: Geometric | None, seed: int) -> tuple[float, float]:
    """Train loss and validation accuracy at the end."""
    torch.manual_seed(seed)
    images = digits()
    (x, y), (valid, labels) = ((part[0].flatten(1), part[1]) for part in (images.train, images.valid))
    model, generator = build(layers), torch.Generator().manual_seed(seed)
    optimizer = compile_optimizer(model, x[:BATCH], loss=LOSS, terminal=terminal, on_nonfinite="skip")
    for _ in range(STEPS):
        rows = torch.randint(len(y), (BATCH,), generator=generator)
        optimizer.step(x[rows], y[rows])
    with torch.no_grad():
        return float(LOSS(model(x), y)), float((model(valid).argmax(1) == labels).float().mean())


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    rows = [list(row.values()) for row in read_rows(RAW)]
    known = {tuple(row[:4]) for row in rows}
    places = [(shape, layers) for shape, (_, depths) in SHAPES.items() for layers in depths]
    for (shape, layers), (name, terminal), seed in itertools.product(places, AIMS.items(), SEEDS):
        if (key := (shape, f"{layers}", name, f"{seed}")) not in known:
            found = (f"{value:.4g}" for value in run(SHAPES[shape][0], layers, terminal, seed))
            rows.append([*key, *found, measured(), machine(1)])
            write_rows(RAW, HEADER, rows)

    def cell(shape: str, layers: int, name: str) -> str:
        own = [row for row in rows if row[:3] == [shape, f"{layers}", name]]
        losses, accuracies = ([float(row[column]) for row in own] for column in (4, 5))
        spread, accuracy = f"{min(losses):.2g}–{max(losses):.2g}", statistics.median(accuracies)
        return f"{statistics.median(losses):.3g} ({spread}), {accuracy:.1%}"

    header = ("", "layers", *(f"{name}: train loss (of {len(SEEDS)} seeds), accuracy" for name in AIMS))
    table = markdown(
        header, [(shape, f"{layers}", *(cell(shape, layers, name) for name in AIMS)) for shape, layers in places]
    )
    write_section("depth", f"{table}\n\nMachine: {rows[0][-1]}.", DOCS / "research.md")


if __name__ == "__main__":
    main()
