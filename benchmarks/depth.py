"""Layers in a row that nothing normalises or leads past: the default, whose aim falls with their number, and one aim.

    python benchmarks/depth.py         what depth.csv has not, then the table in docs/research.md

tanh layers of 48 on scikit-learn's digits, batch 64, torch's own initial weights, 120 steps; train loss and validation
accuracy at the end.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from pathlib import Path

import torch
from common import DOCS, machine, markdown, measured, read_rows, write_rows, write_section
from digit_images import digits
from networks import tanh_mlp
from torch import nn

from gtddp_compile import Geometric, compile_optimizer
from gtddp_compile.options import SUGGESTED

DEPTHS = (2, 4, 6, 8, 12, 16, 24)
SEEDS = range(3)
STEPS, BATCH, WIDTH = 120, 64, 48
SUGGESTION = SUGGESTED["foof"]["terminal"]
AIMS: dict[str, Geometric | None] = {"default": None, "one aim": replace(SUGGESTION, deep=0.0)}
RAW = Path(__file__).with_suffix(".csv")
HEADER = ("layers", "aim", "seed", "train_loss", "accuracy", "measured", "machine")
LOSS = nn.CrossEntropyLoss()


def run(layers: int, terminal: Geometric | None, seed: int) -> tuple[float, float]:
    """Train loss and validation accuracy at the end."""
    torch.manual_seed(seed)
    images = digits()
    (x, y), (valid, labels) = ((part[0].flatten(1), part[1]) for part in (images.train, images.valid))
    model, generator = tanh_mlp(x.shape[1], WIDTH, layers), torch.Generator().manual_seed(seed)
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
    known = {tuple(row[:3]) for row in rows}
    for layers in DEPTHS:
        for name, terminal in AIMS.items():
            for seed in SEEDS:
                if (f"{layers}", name, f"{seed}") not in known:
                    found = (f"{value:.4g}" for value in run(layers, terminal, seed))
                    rows.append([f"{layers}", name, f"{seed}", *found, measured(), machine(1)])
                    write_rows(RAW, HEADER, rows)

    def cell(layers: int, name: str) -> str:
        own = [row for row in rows if row[:2] == [f"{layers}", name]]
        losses, accuracies = ([float(row[column]) for row in own] for column in (3, 4))
        spread, accuracy = f"{min(losses):.2g}–{max(losses):.2g}", statistics.median(accuracies)
        return f"{statistics.median(losses):.3g} ({spread}), {accuracy:.1%}"

    header = ("layers", *(f"{name}: train loss (of {len(SEEDS)} seeds), accuracy" for name in AIMS))
    table = markdown(header, [(f"{layers}", *(cell(layers, name) for name in AIMS)) for layers in DEPTHS])
    write_section("depth", f"{table}\n\nMachine: {rows[0][-1]}.", DOCS / "research.md")


if __name__ == "__main__":
    main()
