"""What was tried where the default loses or might: every hypothesis with its figures, taken or not.

The runs are rows of the study, measured by ``time_to_target.py --only "tanh-40-64,aim 0.1 flat"``;
``python benchmarks/research.py`` writes the tables of docs/research.md from them and from ``research.csv``.
"""

from __future__ import annotations

import math
from pathlib import Path

from common import DOCS, csv_table, markdown, write_section
from study_methods import DEFAULT, METHODS
from study_runs import Runs, final, load, median, number
from study_tasks import TASKS
from time_to_target import validation

PAGE = DOCS / "research.md"


TRIED = {
    "a smaller aim: networks without normalisation, targets with noise": ("aim 0.1 flat", "aim 0.3 flat"),
    "where layers' outputs matter very unequally, K-FAC's metric is the better one": (
        "kfac damping 0.1", "kfac, aim 0.1",
    ),
    "inertia carries early mistakes on": ("inertia 0",),
    "taken: where a target has several numbers, the last step is taken before the look at the batch": ("look-ahead 0",),
    "taken: a loss that is a mean over many outputs makes every learning rate a small one": ("reach 0", "reach 0.3"),
    "taken: the first steps have nothing behind them that they could spoil: a greater aim and reach": ("early 0",),
    "taken: of many layers that nothing normalises the aim is less, over shortcuts too": ("deep 0",),
    "a smaller damping serves classifiers of images": ("damping 0.03",),
    "taken: FOOF's factor of few rows is drawn to a multiple of the identity": ("shrinkage 0", "shrinkage 10"),
    "taken: parameters hold an average of about the last twentieth of the steps": ("average 0", "average 10"),
}  # fmt: skip
"""Hypotheses, in the order of the table, and methods that try them."""
TRIED_ON = ("tanh-40-64", "autoencoder-128", "characters-16", "denoise-64", "diabetes-32", "digits-128", "digits-32",
            "digits-8", "residual-mlp-64", "mnist-plain-64", "vit-64")  # fmt: skip


def cell(runs: Runs, task: str, method: str) -> str:
    """Steps to the target or else the loss at the end, and the best validation; medians."""
    found = final(runs, TASKS[task], METHODS[method])
    if not found:
        return ""
    steps = median(found, "steps_to")
    loss = "valid_loss" if TASKS[task].watch == "valid" else "train_loss"
    reached = f"{number(steps)} steps" if math.isfinite(steps) else f"– ({median(found, loss):.2g})"
    return f"{reached}; {validation(found)}"


def table(runs: Runs) -> str:
    """A row a hypothesis and method."""
    rows = []
    for says, methods in TRIED.items():
        for method in methods:
            cells = [
                f"{task}: {cell(runs, task, DEFAULT.name)} → {found}"
                for task in TRIED_ON
                if (found := cell(runs, task, method))
            ]
            rows.append((says if method == methods[0] else "", f"`{method}`", "<br>".join(cells)))
    return markdown(("hypothesis", "method", "default → with it"), rows)


if __name__ == "__main__":
    write_section("tried", table(load()), PAGE)
    write_section("prototypes", csv_table(Path(__file__).with_suffix(".csv")), PAGE)
