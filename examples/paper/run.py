"""The paper's results from our own runs, and docs/paper.md from them.

    python examples/paper/run.py                       everything that is missing, on the data that needs no download
    python examples/paper/run.py table2 fig8           some of it
    python examples/paper/run.py table2 --datasets cifar10,svhn --data-root ~/data
    python examples/paper/run.py --quick               small versions into build/paper; ``make paper-quick``
    python examples/paper/run.py --budget 0            the page alone, from the rows there are

Rows are kept in examples/paper/results as they end, with seed, versions, commit and machine; start it again to go on.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import shared
import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from shared import DATA, ROOT, MissingData, Row, Settings, Store

PARTS = ("table2", "fig1", "fig4", "fig6", "fig7", "fig8", "feedback")
RESULTS, DOCS, TEMPLATE = Path(__file__).with_name("results"), ROOT / "docs", Path(__file__).with_name("paper.md.in")


def work(part: str, job: Row) -> Row:
    """A job in a worker."""
    return {**job, **import_module(part).work(job)}


def run(part: Any, store: Store, pool: ProcessPoolExecutor, progress: Progress, until: float, workers: int) -> None:
    """What a part lacks, as many jobs at once as there are workers; nothing is begun after ``until``."""
    stamp = {"measured": shared.measured(), "machine": shared.machine(1)}
    while jobs := store.missing(part.jobs(store.rows)):
        bar = progress.add_task(part.__name__, total=len(jobs))
        running: set[Any] = set()
        while (jobs and time.monotonic() < until) or running:
            while jobs and len(running) < workers and time.monotonic() < until:
                running.add(pool.submit(work, part.__name__, jobs.pop(0)))
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for each in done:
                store.keep({**each.result(), **stamp})
                progress.advance(bar)
        if jobs:
            return


def write(stores: dict[str, Store], page: Path) -> None:
    """The page, from the rows; beside it its pictures."""
    machines = sorted({row["machine"] for store in stores.values() for row in store.rows})
    found = {"machines": "\n".join(f"- {each}" for each in machines)}
    for name in PARTS:
        part = import_module(name)
        if rows := stores[part.RESULTS].rows:
            found |= part.parts(rows, page.parent)
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(filled(TEMPLATE.read_text(encoding="utf-8"), found), encoding="utf-8")


def filled(text: str, found: dict[str, str]) -> str:
    """A template with what was found in the places of ``{{name}}``."""
    return re.sub(r"\{\{(.+?)\}\}", lambda place: found.get(place[1], "Not run."), text)


def main(
    parts: Annotated[list[str] | None, typer.Argument(help=f"of {', '.join(PARTS)}; all where none is named")] = None,
    data_root: Annotated[Path | None, typer.Option(help="a folder in torchvision's layout")] = None,
    datasets: Annotated[str, typer.Option(help=f"of {', '.join(DATA)}")] = "digits,mnist-5k",
    seeds: Annotated[int, typer.Option(min=2, help="of every run")] = 10,
    workers: Annotated[int, typer.Option(min=0, help="processes, each on a core of its own; 0: one a core")] = 0,
    budget: Annotated[float, typer.Option(min=0, help="minutes after which nothing new begins")] = 1e6,
    device: Annotated[str, typer.Option(help="torch's name of it")] = "cpu",
    quick: Annotated[bool, typer.Option(help="small versions, into build/paper")] = False,
) -> None:
    """Measure what is missing; write the page."""
    shared.keep_heap()
    torch.set_num_threads(1)
    names, wanted = tuple(datasets.split(",")), parts or list(PARTS)
    if unknown := [name for name in (*names, *wanted) if name not in (*DATA, *PARTS)]:
        raise typer.BadParameter(f"{unknown} is not among {[*PARTS, *DATA]}")
    settings = Settings(data_root, device, quick, 3 if quick else seeds, names)
    shared.begin(settings)
    try:
        for name in names:
            shared.load(name, data_root)
    except MissingData as error:
        typer.echo(error, err=True)
        raise typer.Exit(1) from error
    results, page = (ROOT / "build/paper", ROOT / "build/paper/paper.md") if quick else (RESULTS, DOCS / "paper.md")
    stores = {name: Store(results / f"{name}.csv") for name in {import_module(part).RESULTS for part in PARTS}}
    cores = sorted(os.sched_getaffinity(0))
    context, workers = multiprocessing.get_context("spawn"), workers or len(cores)
    queue = context.Queue()
    for index in range(workers):
        queue.put(cores[index % len(cores)])
    columns = (TextColumn("{task.description:10}"), MofNCompleteColumn(), BarColumn(), TimeElapsedColumn())
    until = time.monotonic() + 60 * budget
    with ProcessPoolExecutor(workers, context, shared.begin, (settings, queue)) as pool, Progress(
        *columns, console=Console(stderr=True, soft_wrap=True)) as progress:  # fmt: skip
        for name in wanted:
            part = import_module(name)
            run(part, stores[part.RESULTS], pool, progress, until, workers)
    write(stores, page)
    typer.echo(f"{page}")


if __name__ == "__main__":
    typer.run(main)
