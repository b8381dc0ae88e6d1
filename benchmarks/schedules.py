"""A schedule beside the default: does a learning rate that falls to nothing end better than one that stays?

python benchmarks/schedules.py     what schedules.csv has not, then the table in docs/training.md
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from common import DOCS, Row, machines, markdown, measure_missing, write_section
from study_tasks import TASKS
from torch.optim.lr_scheduler import LambdaLR

from gtddp_compile import compile_optimizer

LENGTHS = {"characters-16": 800, "mnist-bn-64": 234, "mnist-plain-64": 312, "digits-8": 720, "vit-64": 320,
           "tanh-40-64": 200, "denoise-64": 264, "autoencoder-128": 120, "diabetes-32": 100}  # fmt: skip
"""Steps."""
FORMS: dict[str, Callable[[float], float]] = {
    "constant": lambda left: 1.0,
    "constant, the newest": lambda left: 1.0,
    "falls in the last third": lambda left: min(1.0, 3 * left),
    "linear": lambda left: left,
    "linear, the rate alone": lambda left: left,
}
"""By what part of the run is left. *The newest*: parameters that hold no average."""
SEEDS = range(3)
RAW = Path(__file__).with_suffix(".csv")


def run(name: str, form: str, seed: int) -> tuple[float, float, float]:
    """At the end: train loss, validation loss, accuracy."""
    task, data, steps = TASKS[name], TASKS[name].load(), LENGTHS[name]
    torch.manual_seed(seed)
    model, batches = task.build(), data.batches(task.batch, seed)
    first = next(data.batches(task.batch, seed))[0]
    how = {"averaging": 0} if form.endswith("newest") else {}
    optimizer = compile_optimizer(model, first, loss=task.loss, on_nonfinite="skip", **how)
    for group in optimizer.param_groups if form.endswith("alone") else ():
        del group["peak_lr"]
    schedule = LambdaLR(optimizer, lambda step: FORMS[form](1.0 - step / steps))
    for _ in range(steps):
        optimizer.step(*next(batches))
        schedule.step()
    train, valid = (task.score(model, part) for part in task.parts(data))
    return train[0], *valid


def text(rows: list[Row]) -> str:
    """The table of the rows."""

    def cell(*key: str) -> str:
        own = [row for row in rows if (row["task"], row["schedule"]) == key]
        loss, right = (sorted(float(row[column]) for row in own) for column in ("valid", "accuracy"))
        said = f"{statistics.median(loss):.3g} ({loss[0]:.3g}–{loss[-1]:.3g})"
        return said if math.isnan(right[0]) else f"{said}, {statistics.median(right):.1%}"

    table = [(name, str(steps), *(cell(name, form) for form in FORMS)) for name, steps in LENGTHS.items()]
    return f"{markdown(('task, batch', 'steps', *FORMS), table)}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = itertools.product(LENGTHS, FORMS, SEEDS)
    rows = measure_missing(RAW, ("task", "schedule", "seed"), ("train", "valid", "accuracy"), wanted, run)
    write_section("schedules", text(rows), DOCS / "training.md")


if __name__ == "__main__":
    main()
