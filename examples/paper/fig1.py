"""Fig. 1: memory and time of a step over the batch size, against the earlier formulation of the paper ([1] there).

That formulation carries the whole batch-augmented value Hessian as a matrix, which the dense backend does. Every case
is measured in a process of its own (``benchmarks/scaling.py``), on MNIST's residual block with one channel.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from shared import SETTINGS, Row, figure, in_process, markdown, save, where

RESULTS = "fig1"
SIDES = {"torch": "torch.optim.SGD", "paper": "the paper's form", "closed": "ours", "dense": "dense, as in [1]"}
BATCHES, DENSE = (1, 2, 4, 8, 32, 128), (1, 2)
"""Batch sizes; the dense formulation takes seconds a step and hundreds of MiB at the first two already."""


def jobs(rows: Sequence[Row]) -> list[Row]:
    """Every side at every batch size that it can hold."""
    most = 1 if SETTINGS.quick else len(DENSE)
    return [{"side": side, "batch": str(batch), "seed": "0"} for side in SIDES
            for batch in (DENSE[:most] if side == "dense" else BATCHES)]  # fmt: skip


def work(job: Row) -> Row:
    """Median processor time of a step; peak resident memory above what was there."""
    found = in_process(__file__, job["side"], job["batch"])
    return {"ms": f"{1e3 * found['seconds']:.4g}", "mib": f"{found['peak']:.4g}"}


def table(rows: Sequence[Row]) -> str:
    """A line a batch size."""

    def cell(side: str, batch: int) -> str:
        found = where(rows, side=side, batch=batch)
        return f"{float(found[0]['ms']):.3g} ms, {float(found[0]['mib']):.0f} MiB" if found else "–"

    return markdown(("batch", *SIDES.values()), [[str(b), *(cell(side, b) for side in SIDES)] for b in BATCHES])


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Two plots and the table."""
    made, axes = figure(2)
    for axis, name, says in zip(axes[0], ("ms", "mib"), ("ms a step", "MiB at most"), strict=True):
        for side, label in SIDES.items():
            points = sorted((int(row["batch"]), max(float(row[name]), 0.1)) for row in where(rows, side=side))
            if points:
                axis.plot(*zip(*points, strict=True), "o-", label=label)
        axis.set(xscale="log", yscale="log", xlabel="samples a step", ylabel=says)
    axes[0][0].legend()
    return {"fig1": f"{save(made, folder, 'fig1')}\n\n{table(rows)}"}


if __name__ == "__main__":
    from scaling import Case, measure

    torch.set_num_threads(1)
    seconds, peak, _ = measure(Case("conv", int(sys.argv[2]), 1, side=sys.argv[1]), steps=9)
    print(json.dumps({"seconds": seconds, "peak": peak}))
