"""The study that decides the defaults: networks, batch sizes and options against tuned torch.optim methods.

Every method starts from the same weights, sees the same batches and is evaluated at the same steps; those of a task
and seed take turns in one process, a few steps each, so that what else the machine does hits all alike. Only steps are
timed. Methods with learning rates to tune are swept first, by a factor of 3 and on a seed of its own. Every finished
run is a row of ``robustness.csv`` and not run again; docs/robustness.md is written from it.

    python benchmarks/robustness.py                                  what is missing, then the page
    python benchmarks/robustness.py --quick                          a few minutes, nothing is kept
    python benchmarks/robustness.py --only digits-128,default        some tasks, some methods
    python benchmarks/robustness.py --retime                         the default's and the tuned rivals' runs again
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from robustness_cases import DEFAULT, METHODS, RIVALS, TASKS, Method, Task
from robustness_runs import Study, load

RAW = Path(__file__).with_name("robustness.csv")
QUICK = (("digits-128", "resnet-64"), (DEFAULT, *RIVALS))


def chosen(only: str) -> tuple[list[Task], list[Method]]:
    """Tasks and methods by name; all where none is named.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS and name not in METHODS]:
        raise typer.BadParameter(f"{unknown} is not among {[*TASKS, *METHODS]}")
    tasks = [task for name, task in TASKS.items() if name in names] or list(TASKS.values())
    return tasks, [method for name, method in METHODS.items() if name in names] or list(METHODS.values())


def main(
    only: Annotated[str, typer.Option(help="names of tasks and methods, with commas; all where none is named")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="seeds at most")] = 5,
    quick: Annotated[bool, typer.Option(help="two tasks, one seed; nothing is kept or written")] = False,
    retime: Annotated[bool, typer.Option(help="the default's and the tuned rivals' runs again, nothing else")] = False,
) -> None:
    """Measure what is missing; write docs/robustness.md."""
    torch.set_num_threads(1)
    tasks, methods = chosen(only)
    if quick:
        tasks, methods, seeds = [TASKS[name] for name in QUICK[0]], list(QUICK[1]), 1
    if retime:
        methods = [DEFAULT, *RIVALS]
    study = Study(None if quick else RAW, Console(), {} if quick else load(RAW))
    for task in tasks:
        study.measure(task, methods, seeds, again=retime)


if __name__ == "__main__":
    typer.run(main)
