"""Time to target: the default of the package, untouched, and chosen curvatures against rivals tuned for every task.

All methods of a task and seed start from the same weights, see the same batches, are evaluated at the same steps and
take turns in one process, so that what else the machine does hits all alike. Only steps are timed, in processor time;
making a compiled step is told beside it, from a new process (``cold.py``). Rivals' learning rates are swept by a
factor of 3 on a seed of its own, those meant to have a schedule also with a cosine over the run. Every finished run
is a row of ``study.csv`` and not run again; docs/time-to-target.md and its picture are written from it.

    python benchmarks/time_to_target.py                            what is missing, then the page
    python benchmarks/time_to_target.py --quick                    a quarter of an hour on two cores; nothing is kept
    python benchmarks/time_to_target.py --only digits-128,SOAP     some tasks, some methods
    python benchmarks/time_to_target.py --budget 30 --core 1       half an hour, on one core; start it again to go on
    python benchmarks/time_to_target.py --retime                   the default's and the best rivals' runs again
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import torch
import typer
from common import DOCS, keep_heap, machine, markdown, save_svg, write_section
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from study_methods import DEFAULT, METHODS, RIVALS, Method
from study_runs import RAW, Run, Runs, Spent, Study, final, load, median, number, tuned
from study_tasks import RACED, TASKS, Task

PAGE, PICTURE = DOCS / "time-to-target.md", DOCS / "time-to-target.svg"
OURS = (DEFAULT, METHODS["kfac damping 0.1"])
CORE = (DEFAULT, *RIVALS[:4])
QUICK = ("digits-128", "digits-8", "mnist-plain-64", "poisson-300", "adding-64", "diabetes-32")
STUDENT = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Of so many degrees of freedom: 95 % of the distribution lies within."""
VERDICTS = {
    "ahead": "ahead on",
    "level": "about level, or not decided, on",
    "behind": "behind on",
    "one": "of one seed, undecided therefore, on",
}
"""Ahead and behind: the whole 95 % interval is, or the other side alone missed the target in some seed."""


def chosen(only: str, otherwise: Sequence[Task] = RACED) -> tuple[list[Task], list[Method]]:
    """Tasks and methods by name; where no task is named, those given.

    Raises:
        typer.BadParameter: a name is unknown.
    """
    names = [name.strip() for name in only.split(",") if name.strip()]
    if unknown := [name for name in names if name not in TASKS and name not in METHODS]:
        raise typer.BadParameter(f"{unknown} is not among {[*TASKS, *METHODS]}")
    tasks = [task for name, task in TASKS.items() if name in names] or list(otherwise)
    return tasks, [method for name, method in METHODS.items() if name in names]


# --- figures ----------------------------------------------------------------------------------------------------------


def best_rival(runs: Runs, task: Task) -> tuple[Method, list[Run]] | None:
    """The one with the least time to the target, else with the best validation loss; None where none was run."""
    found = [(method, final(runs, task, method)) for method in RIVALS]
    return min((pair for pair in found if pair[1]), default=None,
               key=lambda pair: (median(pair[1], "seconds_to"), median(pair[1], "best_valid_loss")))  # fmt: skip


def speedup(mine: Sequence[Run], theirs: Sequence[Run], of: str = "seconds_to", more: float = 0.0) -> tuple[float, ...]:
    """Rival's time (or steps) over ours, seed by seed: geometric mean, and its 95 % interval from two seeds on.

    Args:
        more: is added to ours.

    Returns:
        Nothing where a side did not reach the target, or no seed is shared.
    """
    other = {run.seed: getattr(run, of) for run in theirs}
    logs = [math.log(other[run.seed] / (getattr(run, of) + more)) for run in mine
            if run.seed in other and math.isfinite(getattr(run, of)) and math.isfinite(other[run.seed])]  # fmt: skip
    if not logs or len(logs) < sum(run.seed in other for run in mine):
        return ()
    middle = statistics.mean(logs)
    if len(logs) == 1:
        return (math.exp(middle),)
    half = STUDENT[min(len(logs) - 1, 9)] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def ratio(mine: Sequence[Run], theirs: Sequence[Run], compiling: float = 0.0) -> str:
    """:func:`speedup` in time, as text; with seconds to be added to ours. In how many seeds, where not in all."""
    found = speedup(mine, theirs, more=compiling)
    if found:
        said = f"{found[0]:.2f} (one seed" if len(found) == 1 else "{:.2f} ({:.2f}–{:.2f}".format(*found)
        return said + f"; ours in {reached(mine)}" * missed(mine) + ")"
    return f"rival in {reached(theirs)}, ours in {reached(mine)}"


def reached(runs: Sequence[Run]) -> str:
    """In how many of its seeds a method reached the target."""
    return f"{sum(math.isfinite(run.seconds_to) for run in runs)} of {len(runs)}"


def missed(runs: Sequence[Run]) -> bool:
    """Whether a method missed the target in some seed."""
    return any(math.isinf(run.seconds_to) for run in runs)


def verdict(mine: Sequence[Run], theirs: Sequence[Run], of: str = "seconds_to", more: float = 0.0) -> str:
    """How ours stands, a word of :data:`VERDICTS`; a side that missed the target in some seed, alone, is behind."""
    found = speedup(mine, theirs, of, more)
    if missed(mine) != missed(theirs):
        return "behind" if missed(mine) else "ahead"
    if len(found) < 3:
        return "one" if found else "level"
    return "ahead" if found[1] > 1 else "behind" if found[2] < 1 else "level"


def standing(runs: Runs, of: str = "seconds_to", compiling: bool = False) -> list[str]:
    """The default against each task's best rival, the tasks by their verdict."""
    tasks: dict[str, list[str]] = {name: [] for name in VERDICTS}
    for task, mine, (_, theirs) in pairs(runs):
        more = making(mine) if compiling else 0.0
        found = speedup(mine, theirs, of, more)
        shown = f" ({found[0]:.2f})" if found and not missed(mine) else ""
        tasks[verdict(mine, theirs, of, more)].append(task.name + shown)
    return [f"{VERDICTS[name]} {', '.join(some)}" for name, some in tasks.items() if some]


def pairs(runs: Runs) -> Iterator[tuple[Task, list[Run], tuple[Method, list[Run]]]]:
    """Every task that the default and a rival were run on, with the runs of both."""
    for task in RACED:
        mine, rival = final(runs, task, DEFAULT), best_rival(runs, task)
        if mine and rival is not None:
            yield task, mine, rival


def validation(runs: Sequence[Run], best: bool = True) -> str:
    """Accuracy where there is one, else the loss; medians."""
    of = "best_" if best else ""
    accuracy = median(runs, f"{of}accuracy")
    return number(median(runs, f"{of}valid_loss"), ".3g") if not accuracy > 0 else f"{accuracy:.1%}"


def making(runs: Sequence[Run]) -> float:
    """Seconds to make the step in a new process."""
    return max(run.cold_s for run in runs)


# --- the page ---------------------------------------------------------------------------------------------------------


def all_methods(runs: Runs) -> str:
    """Every method that was run, task by task, the fastest first."""
    rows = []
    for task in RACED:
        found = [(method, final(runs, task, method)) for method in METHODS.values() if method in (*OURS, *RIVALS)]
        for method, of in sorted((pair for pair in found if pair[1]), key=lambda pair: median(pair[1], "seconds_to")):
            rate, schedule = tuned(runs, task, method)
            setting = f", lr {rate:g}" * (rate > 0) + f", {schedule}" * (schedule != "constant")
            name = f"**{method.name}**" if method.ours else method.name
            ended = {run.ended for run in of} - {"steps"}
            rows.append((
                task.name, name + setting + f" ({', '.join(sorted(ended))})" * bool(ended), str(len(of)),
                number(median(of, "steps_to")), number(median(of, "seconds_to"), ".2f"),
                f"{making(of):.1f}" if making(of) else "", f"{median(of, 'step_ms'):.1f}",
                number(median(of, "train_loss"), ".2g"), validation(of), validation(of, best=False),
            ))  # fmt: skip
    header = ("task", "method", "seeds", "steps", "s", "compile s", "ms a step", "train loss", "best valid.", "final")
    return markdown(header, rows)


def summary(runs: Runs) -> str:
    """The default against the best tuned rival, a row a task."""
    rows = []
    for task, mine, (method, theirs) in pairs(runs):
        steps, took = (
            " / ".join(number(median(side, of), form, unit) + f" ({reached(side)})" * missed(side)
                       for side in (mine, theirs))
            for of, form, unit in (("steps_to", "g", ""), ("seconds_to", ".2f", " s"))
        )  # fmt: skip
        rows.append((
            task.name, method.name.removeprefix("torch "), steps, took,
            ratio(mine, theirs), ratio(mine, theirs, making(mine)) if making(mine) else "–",
            f"{validation(mine)} / {validation(theirs)}",
        ))  # fmt: skip
    header = ("task, batch", "best rival, tuned", "steps to target", "processor time", "rival's time over ours",
              "with compiling", "best validation")  # fmt: skip
    return markdown(header, rows)


def reading(runs: Runs) -> str:
    """What the table shows, in words."""
    return (
        f"- Of steps alone the default is {'; '.join(standing(runs, 'steps_to'))}.\n"
        f"- Of processor time it is {'; '.join(standing(runs))}.\n"
        f"- With making the step counted in, it is {'; '.join(standing(runs, compiling=True))}."
    )


def tasks_table(runs: Runs) -> str:
    """What is trained."""
    of = {"train": "train", "valid": "validation"}
    rows = [
        (task.name, task.says, str(task.steps), f"{of[task.watch]} {task.target:g}", str(task.every),
         str(len(final(runs, task, DEFAULT))))
        for task in RACED
    ]  # fmt: skip
    return markdown(("task, batch", "what", "steps of a run", "target", "looked at every … steps", "seeds"), rows)


def looks(tasks: Sequence[Task]) -> str:
    """How often the loss is looked at."""
    found = {every: [task.name for task in tasks if task.every == every] for every in sorted({t.every for t in tasks})}
    said = (f"every {every} steps on {', '.join(names)}" for every, names in found.items())
    return f"The loss is looked at {'; '.join(said)}.".replace("every 1 steps", "after every step")


def write_page(runs: Runs) -> None:
    """The measured sections of docs/time-to-target.md, and its picture."""
    stamps = "; ".join(sorted({run.machine for run in runs.values() if run.task in {task.name for task in RACED}}))
    write_section("tasks", tasks_table(runs), PAGE)
    write_section("summary", summary(runs), PAGE)
    write_section("reading", reading(runs), PAGE)
    write_section("methods", f"{all_methods(runs)}\n\nMachines: {stamps}.", PAGE)
    draw(runs, PICTURE)


def draw(runs: Runs, path: Path) -> None:
    """A row a task, a mark a method at its time to the target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * len(RACED) + 1.4), layout="constrained")
    axes = figure.subplots()
    marks = "osD^v<>Pp*hX8"
    for index, method in enumerate((*OURS, *RIVALS)):
        found = [(row, final(runs, task, method)) for row, task in enumerate(RACED)]
        places = [(median(of, "seconds_to"), row) for row, of in found if of]
        reached = [place for place in places if math.isfinite(place[0])]
        if not reached:
            continue
        style = {"color": "crimson", "s": 70, "zorder": 3} if method.ours else {"color": f"C{index}", "s": 32}
        axes.scatter(*zip(*reached, strict=True), marker=marks[index % len(marks)], label=method.name,
                     facecolors="none" if method is OURS[1] else None, **style)  # fmt: skip
    axes.set(xscale="log", xlabel="processor seconds of steps to the target", yticks=range(len(RACED)))
    axes.set_yticklabels([task.name for task in RACED])
    axes.invert_yaxis()
    axes.grid(axis="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save_svg(figure, path)


# --- running it -------------------------------------------------------------------------------------------------------


def plan(tasks: Sequence[Task], methods: Sequence[Method], seeds: int) -> list[tuple[Task, Sequence[Method], range]]:
    """Breadth first: every task with the first methods and a seed, then two, then more methods, then more seeds."""
    groups = [methods] if methods else [CORE, (*OURS, *RIVALS)]
    stages = [(groups[0], range(1)), *((group, range(min(seeds, 2))) for group in groups), (groups[-1], range(seeds))]
    return [(task, group, some) for group, some in stages for task in tasks]


def main(
    only: Annotated[str, typer.Option(help="names of tasks and methods, with commas; all where none is named")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="seeds at most")] = 5,
    budget: Annotated[float, typer.Option(help="minutes after which nothing new begins")] = math.inf,
    core: Annotated[int, typer.Option(help="core to stay on; processes on other cores may share the file")] = -1,
    cosine: Annotated[bool, typer.Option(help="sweep schedules too")] = True,
    quick: Annotated[bool, typer.Option(help="six tasks, one seed, a quarter of an hour; nothing is kept")] = False,
    retime: Annotated[bool, typer.Option(help="the default's and the best rivals' runs again")] = False,
) -> None:
    """Measure what is missing; write docs/time-to-target.md."""
    keep_heap()
    torch.set_num_threads(1)
    if core >= 0:
        os.sched_setaffinity(0, {core})
    tasks, methods = chosen(only)
    if quick:
        tasks = tasks if only else [TASKS[name] for name in QUICK]
        methods, seeds, cosine = [DEFAULT, *RIVALS[:4]], 1, False
        budget = min(budget, 13.0)
    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(soft_wrap=True)) as progress:
        bar = progress.add_task("")
        kept = (None, {}) if quick else (RAW, load())
        until = time.monotonic() + 60 * budget
        study = Study(*kept, lambda said: progress.update(bar, description=said), until, cosine)
        parts = plan(tasks, methods, seeds)
        if retime:
            best = {task.name: best_rival(study.runs, task) for task in tasks}
            parts = [(task, [DEFAULT, rival[0]], range(seeds)) for task in tasks if (rival := best[task.name])]
        progress.update(bar, total=len(parts))
        try:
            for task, group, some in parts:
                study.measure(task, group, some, again=retime)
                progress.advance(bar)
        except Spent:
            progress.console.print("the time is over: start it again to go on")
    if quick:
        print(f"{machine(1)}\n\n{summary(study.runs)}\n\n{all_methods(study.runs)}")
    else:
        write_page(study.runs)


if __name__ == "__main__":
    typer.run(main)
