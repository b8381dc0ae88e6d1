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

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import DOCS, markdown
from rich.console import Console
from robustness_cases import DEFAULT, METHODS, RIVALS, TASKS, Method, Task
from robustness_runs import TARGET, Run, Runs, Study, final, load, tuned

RAW = Path(__file__).with_name("robustness.csv")
QUICK = (("digits-128", "resnet-64"), (DEFAULT, *RIVALS))
DECISIONS: dict[str, tuple[str, ...]] = {
    "rate": ("lr / 3", "lr × 3"),
    "aim": ("aim 0.1 flat", "aim 0.3 flat", "aim 1.0 flat", "aim 2.0 flat", "aim 0.6 B/(B + 16)"),
    "inertia": ("inertia 0", "inertia 0.7", "inertia at once", "inertia, ramp 1", "inertia, ramp 10"),
    "damping": ("damping 0.01", "damping 1", "refresh 1"),
    "metric": ("kfac damping 0.1", "kfac damping 0.01", "sgd linear", "adam linear"),
    "rollout": ("nonlinear", "open"),
    "gram": ("exact Γ", "Γ of 64 columns"),
}
"""Tables of the page: what each compares with the default."""


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


# --- the page ---------------------------------------------------------------------------------------------------------


def median(runs: Sequence[Run], name: str) -> float:
    """Of a figure over runs."""
    return statistics.median(getattr(run, name) for run in runs)


def number(value: float, form: str) -> str:
    """A dash for what was not reached."""
    return format(value, form) if math.isfinite(value) else "–"


def against(runs: Runs) -> str:
    """The default beside the tuned rivals, task by task."""
    rows = []
    for task in TASKS.values():
        for method in (DEFAULT, *RIVALS):
            if not (found := final(runs, task, method)):
                continue
            rate = tuned(runs, task, method)
            steps = ", ".join(number(run.steps_to, "g") for run in found)
            rows.append((
                task.name, method.name + (f", lr {rate:g}" if rate else ""),
                f"{number(median(found, 'steps_to'), 'g')} ({steps})", number(median(found, "seconds_to"), ".2f"),
                f"{median(found, 'step_ms'):.1f}",
                f"{max(run.compile_s for run in found):.2f}", f"{median(found, 'train_loss'):.2g}",
                f"{median(found, 'valid_loss'):.3f} ({median(found, 'best_valid_loss'):.3f})",
                f"{median(found, 'accuracy'):.1%} ({median(found, 'best_accuracy'):.1%})",
            ))  # fmt: skip
    header = ("task", "method", f"steps to {TARGET} (seeds)", "s", "ms a step", "compile s", "train loss",
              "valid. loss (best)", "valid. accuracy (best)")  # fmt: skip
    return markdown(header, rows)


def comparison(runs: Runs, names: Sequence[str]) -> str:
    """Options beside the default, a column a task; of the default the same seeds as of the option with most."""
    tasks = [task for task in TASKS.values() if any(final(runs, task, METHODS[name]) for name in names)]
    rows = []
    for name in (DEFAULT.name, *names):
        cells = []
        for task in tasks:
            most = max(len(final(runs, task, METHODS[other])) for other in names)
            found = final(runs, task, METHODS[name])[:most]
            rate = tuned(runs, task, METHODS[name])
            cells.append(shown(found) + (f" (lr {rate:g})" if rate and found else ""))
        rows.append((name, *cells, ratio(runs, METHODS[name])))
    return markdown(("", *(task.name for task in tasks), "steps over the default's"), rows)


def ratio(runs: Runs, method: Method) -> str:
    """Geometric mean over tasks and seeds where both got to the target, and where only one did."""
    pairs = [
        (mine.steps_to, runs[default].steps_to)
        for task in TASKS.values()
        for mine in final(runs, task, method)
        if (default := (task.name, DEFAULT.name, 0.0, mine.seed)) in runs
    ]
    logs = [math.log(mine / base) for mine, base in pairs if math.isfinite(mine) and math.isfinite(base)]
    if method is DEFAULT or not logs:
        return ""
    lost, won = (sum(math.isinf(pair[i]) and math.isfinite(pair[1 - i]) for pair in pairs) for i in (0, 1))
    said = [f"{count} {what}" for count, what in ((lost, "never"), (won, "where the default never")) if count]
    return f"{math.exp(statistics.mean(logs)):.2f} of {len(pairs)}" + "".join(f", {part}" for part in said)


def shown(runs: Sequence[Run]) -> str:
    """Steps, accuracy at the end."""
    return f"{number(median(runs, 'steps_to'), 'g')}; {median(runs, 'accuracy'):.1%}" if runs else ""


def write_page(runs: Runs) -> None:
    """docs/robustness.md, from robustness.md.in and the rows."""
    text = Path(__file__).with_name("robustness.md.in").read_text(encoding="utf-8")
    stamps = sorted({run.machine for run in runs.values()})
    text = text.replace("{machine}", "; ".join(stamps)).replace("{against}", against(runs))
    for mark, names in DECISIONS.items():
        text = text.replace(f"{{{mark}}}", comparison(runs, names))
    (DOCS / "robustness.md").write_text(text, encoding="utf-8")


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
    if not quick:
        write_page(study.runs)


if __name__ == "__main__":
    typer.run(main)
