"""What decided the defaults: options beside the default, on networks and batch sizes of many kinds.

The runs are the study's (``study_runs.py``), and so is the file; docs/robustness.md is written from it. What the
default is worth against tuned rivals is ``time_to_target.py``'s question.

    python benchmarks/robustness.py                            what is missing, then the page
    python benchmarks/robustness.py --only digits-128,default  some tasks, some methods
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import DOCS, markdown
from study_methods import DEFAULT, METHODS, RIVALS, Method
from study_runs import RAW, Run, Runs, Spent, Study, final, load, median, number, tuned
from study_tasks import DECIDED
from time_to_target import chosen, looks

PAGE = DOCS / "robustness.md"
DECISIONS: dict[str, tuple[str, ...]] = {
    "rate": ("lr / 3", "lr × 3"),
    "aim": ("aim 0.1 flat", "aim 0.3 flat", "aim 1.0 flat", "aim 2.0 flat", "aim 0.6 B/(B + 16)"),
    "inertia": ("inertia 0", "inertia 0.7", "inertia at once", "inertia, ramp 1", "inertia, ramp 10"),
    "damping": ("damping 0.01", "damping 0.03", "damping 1", "shrinkage 0", "shrinkage 10", "refresh 1"),
    "metric": ("kfac damping 0.1", "kfac damping 0.01", "sgd linear", "adam linear"),
    "rollout": ("nonlinear", "open"),
    "gram": ("exact Γ", "Γ of 64 columns"),
}
"""Tables of the page: what each compares with the default."""


def comparison(runs: Runs, names: Sequence[str]) -> str:
    """Options that were run beside the default, a column a task; of the default the same seeds as of the others."""
    names = [name for name in names if any(final(runs, task, METHODS[name]) for task in DECIDED)]
    seeds = {task: max(len(final(runs, task, METHODS[name])) for name in names) for task in DECIDED}
    tasks = [task for task in DECIDED if seeds[task]]
    rows = []
    for name in (DEFAULT.name, *names):
        cells = []
        for task in tasks:
            found = final(runs, task, METHODS[name])[: seeds[task]]
            rate, _ = tuned(runs, task, METHODS[name])
            cells.append(shown(found) + (f" (lr {rate:g})" if rate and found else ""))
        rows.append((name, *cells, ratio(runs, METHODS[name])))
    heads = (f"{task.name}, seed{f's 0–{seeds[task] - 1}' if seeds[task] > 1 else ' 0'}" for task in tasks)
    return markdown(("", *heads, "steps over the default's"), rows)


def ratio(runs: Runs, method: Method) -> str:
    """Geometric mean over tasks and seeds where both got to the target, and where only one did."""
    pairs = [
        (mine.steps_to, runs[default].steps_to)
        for task in DECIDED
        for mine in final(runs, task, method)
        if (default := (task.name, DEFAULT.name, 0.0, "constant", mine.seed)) in runs
    ]
    logs = [math.log(mine / base) for mine, base in pairs if math.isfinite(mine) and math.isfinite(base)]
    if method is DEFAULT or not logs:
        return ""
    lost, won = (sum(math.isinf(pair[i]) and math.isfinite(pair[1 - i]) for pair in pairs) for i in (0, 1))
    said = [f"{count} {what}" for count, what in ((lost, "never"), (won, "where the default never")) if count]
    return f"{math.exp(statistics.mean(logs)):.2f} of {len(pairs)}" + "".join(f", {part}" for part in said)


def shown(runs: Sequence[Run]) -> str:
    """Steps, accuracy at the end."""
    return f"{number(median(runs, 'steps_to'))}; {median(runs, 'accuracy'):.1%}" if runs else ""


def page(runs: Runs) -> str:
    """docs/robustness.md, from robustness.md.in and the rows."""
    text = Path(__file__).with_name("robustness.md.in").read_text(encoding="utf-8")
    tasks = {task.name for task in DECIDED}
    stamps = sorted({run.machine for run in runs.values() if run.task in tasks})
    text = text.replace("{machine}", "; ".join(stamps)).replace("{looks}", looks(DECIDED))
    for mark, names in DECISIONS.items():
        text = text.replace(f"{{{mark}}}", comparison(runs, names))
    return text


def main(
    only: Annotated[str, typer.Option(help="names of tasks and methods, with commas; all where none is named")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="seeds at most")] = 3,
    budget: Annotated[float, typer.Option(help="minutes after which nothing new begins")] = math.inf,
) -> None:
    """Measure what is missing; write docs/robustness.md."""
    torch.set_num_threads(1)
    tasks, methods = chosen(only, DECIDED)
    study = Study(RAW, load(), until=time.monotonic() + 60 * budget, cosine=False)
    try:
        for task in tasks:
            study.measure(task, methods or [one for one in METHODS.values() if one not in RIVALS], range(seeds))
    except Spent:
        print("the time is over: start it again to go on")
    PAGE.write_text(page(study.runs), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
