"""Fig. 7: cooperative modules, EK-FAC against GT-EKFAC, without feedback and with (``benchmarks/cooperation.py``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

import cooperation
from common import read_rows
from shared import SETTINGS, Row, figure, interval, markdown, paired, save, where

RESULTS = "fig7"
GRIDS = cooperation.Runs(read_rows(cooperation.RAW))
TUNED = {method: cooperation.best(GRIDS, method) for method in cooperation.METHODS if method != "sgd"}
"""Learning rate and damping, each method's best of the grids in docs/cooperation.md."""
SHARED = (0.01, 0.1)
"""One setting for all, as the paper compares: below the best rate of EK-FAC with this damping."""


def jobs(rows: Sequence[Row]) -> list[Row]:
    """Every method at its own setting and at the shared one."""
    steps = "24" if SETTINGS.quick else "240"
    return [
        {"method": method, "lr": f"{lr:g}", "damping": f"{damping:g}", "steps": steps, "seed": str(seed)}
        for seed in range(min(SETTINGS.seeds, 5))
        for method, own in TUNED.items()
        for lr, damping in (own, SHARED)
    ]


def work(job: Row) -> Row:
    """Train loss at four points on the way, and test accuracy."""
    setting = float(job["lr"]), float(job["damping"]), int(job["seed"]), int(job["steps"])
    *curve, accuracy, _ = cooperation.run(job["method"], *setting)
    return {"curve": " ".join(f"{value:.4g}" for value in curve), "accuracy": f"{accuracy:.4f}"}


def runs_of(rows: Sequence[Row], method: str, setting: tuple[float, float]) -> list[Row]:
    """Runs of a method at a setting."""
    return where(rows, method=method, lr=f"{setting[0]:g}", damping=f"{setting[1]:g}")


def table(rows: Sequence[Row], shared: bool) -> str:
    """Mean losses, accuracy, and the paired difference to EK-FAC at the end."""
    lines, base = [], {}
    for method, own in TUNED.items():
        if not (found := runs_of(rows, method, SHARED if shared else own)):
            continue
        curves = {row["seed"]: [float(value) for value in row["curve"].split()] for row in found}
        last = {seed: curve[-1] for seed, curve in curves.items()}
        base = base or last
        means = [f"{statistics.fmean(column):.3f}" for column in zip(*curves.values(), strict=True)]
        accuracy = statistics.fmean(100 * float(row["accuracy"]) for row in found)
        against = interval(*paired(last, base)[:2], "+.3f") if method != "ekfac" else ""
        lines.append((method, found[0]["lr"], found[0]["damping"], str(len(found)), *means, against, f"{accuracy:.2f}"))
    steps = int(rows[0]["steps"])
    points = [f"loss at {steps * k // 4}" for k in (1, 2, 3, 4)]
    return markdown(("method", "lr", "damping", "seeds", *points, "paired difference to ekfac", "test %"), lines)


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """Curves and tables at the tuned settings and at a shared one."""
    made, axes = figure(2)
    for axis, shared in zip(axes[0], (False, True), strict=True):
        for method, own in TUNED.items():
            found = runs_of(rows, method, SHARED if shared else own)
            columns = zip(*([float(v) for v in row["curve"].split()] for row in found), strict=True)
            steps = int(rows[0]["steps"])
            axis.plot(
                [steps * k // 4 for k in (1, 2, 3, 4)], [statistics.fmean(c) for c in columns], "o-", label=method
            )
        axis.set(yscale="log", xlabel="step", title="one setting for all" if shared else "each at its best setting")
    axes[0][0].set_ylabel("train loss")
    axes[0][0].legend(fontsize=7)
    return {"fig7": save(made, folder, "fig7"), "fig7 tuned": table(rows, False), "fig7 shared": table(rows, True)}
