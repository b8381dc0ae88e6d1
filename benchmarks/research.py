"""What was tried where the default loses or might: every hypothesis with its figures, taken or not.

The runs are rows of the study (``study_runs.py``), on the tasks of ``time_to_target.py``; docs/research.md's table is
written from them.

    python benchmarks/research.py                            what is missing, then the table
    python benchmarks/research.py --only tanh-40-64,averaged some tasks, some methods
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import DOCS, csv_table, keep_heap, markdown, write_section
from study_methods import DEFAULT, METHODS
from study_runs import RAW, Runs, Spent, Study, final, load, median, number
from study_tasks import TASKS
from time_to_target import chosen, validation

PAGE = DOCS / "research.md"


@dataclass(frozen=True)
class Hypothesis:
    """What might help, and whether it did.

    Attributes:
        says: the hypothesis.
        methods: names of what tries it.
        tasks: names of where.
        verdict: taken or not, and why; a sentence without figures.
    """

    says: str
    methods: tuple[str, ...]
    tasks: tuple[str, ...]
    verdict: str


TRIED = (
    Hypothesis("a smaller aim: networks without normalisation, targets with noise", ("aim 0.1 flat", "aim 0.3 flat"),
               ("tanh-40-64", "autoencoder-128", "denoise-64", "diabetes-32", "digits-128", "digits-32"), ""),
    Hypothesis("where layers' outputs matter very unequally, K-FAC's metric is the better one",
               ("kfac damping 0.1", "kfac, aim 0.1"),
               ("tanh-40-64", "autoencoder-128", "denoise-64", "diabetes-32", "digits-128"), ""),
    Hypothesis("inertia carries early mistakes on", ("inertia 0", "aim 0.1 flat, inertia 0"),
               ("tanh-40-64", "autoencoder-128", "digits-128", "digits-32"), ""),
    Hypothesis("a running average of the weights validates better", ("averaged",), ("diabetes-32", "denoise-64"), ""),
    Hypothesis("weight decay in the coupled problem validates better", ("weight decay 0.01",), ("diabetes-32",), ""),
)  # fmt: skip
"""In the order of the table."""


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
    """A row a hypothesis, method and task."""
    rows = []
    for tried in TRIED:
        for method in tried.methods:
            cells = [f"{task}: {cell(runs, task, DEFAULT.name)} → {shown}" for task in tried.tasks
                     if (shown := cell(runs, task, method))]  # fmt: skip
            first = method == tried.methods[0]
            rows.append(
                (tried.says if first else "", f"`{method}`", "<br>".join(cells), tried.verdict if first else "")
            )
    return markdown(("hypothesis", "method", "default → with it", "taken"), rows)


def main(
    only: Annotated[str, typer.Option(help="names of tasks and methods, with commas; all where none is named")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="seeds")] = 1,
    budget: Annotated[float, typer.Option(help="minutes after which nothing new begins")] = math.inf,
) -> None:
    """Measure what is missing; write the table of docs/research.md."""
    keep_heap()
    torch.set_num_threads(1)
    tasks, methods = chosen(only)
    study = Study(RAW, load(), until=time.monotonic() + 60 * budget, cosine=False)
    try:
        for task in tasks:
            wanted = {name for tried in TRIED if task.name in tried.tasks for name in tried.methods}
            for method in (one for one in methods or METHODS.values() if one.name in wanted):
                study.measure(task, [method], range(seeds))  # steps are compared here, not times
    except Spent:
        print("the time is over: start it again to go on")
    write_section("tried", table(study.runs), PAGE)
    write_section(
        "prototypes", csv_table(Path(__file__).with_suffix(".csv")), PAGE
    )  # not in the package, or some steps alone


if __name__ == "__main__":
    typer.run(main)
