"""How compile time grows with depth: residual MLPs of 10 to 1000 blocks, and torchvision's ResNets.

``python benchmarks/compile_time.py`` prints a table and writes ``docs/compile_time.md``. Seconds are of processor time,
on one thread; each network is compiled in a process of its own, after a small one that sets up torch and sympy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pool
import torch
import typer
import zoo
from coverage import environment, warm
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

ROOT = Path(__file__).resolve().parent.parent
BLOCKS = (10, 30, 100, 300, 1000)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WIDTH = 16
Row = dict[str, Any]


class ResidualMLP(nn.Module):
    """Blocks of one hidden layer around an identity shortcut."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(blocks)
        )
        self.head = nn.Linear(WIDTH, zoo.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores."""
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def _measure(family: str, size: Any, send: Callable[[Row], None], repeats: int) -> None:
    if family == "residual MLP":
        torch.manual_seed(0)
        targets = torch.randint(zoo.CLASSES, (zoo.BATCH,))
        case = zoo.Case(ResidualMLP(size), (torch.randn(zoo.BATCH, WIDTH),), targets, zoo.classification)
    else:
        case = zoo.build("torchvision", size)
    seconds, stepping = [], []
    for _ in range(repeats):
        began = time.process_time()
        optimizer = compile_optimizer(case.model, case.inputs, loss=case.loss, curvature="sgd", lr=0.01)
        seconds.append(time.process_time() - began)
        began = time.process_time()
        optimizer.step(case.inputs, case.targets)
        stepping.append(time.process_time() - began)
    graph = optimizer.graph
    send(
        {
            "operations": len(graph.ops.ops),
            "players": len(graph.players),
            "stages": len(graph.stages),
            "seconds": min(seconds),
            "step": min(stepping),
        }
    )


def _slope(rows: list[Row]) -> float:
    """Exponent of seconds over operations: the slope of the regression line in logarithms."""
    points = [(math.log(row["operations"]), math.log(row["seconds"])) for row in rows]
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread


def _write(path: Path, rows: list[Row]) -> None:
    said = ", ".join(f"{name} {value}" for name, value in environment().items() if name not in ("date", "machine"))
    lines = [
        "# Compile time over depth\n",
        "Written by `python benchmarks/compile_time.py`; nothing here is typed in by hand.",
        f"Measured {environment()['date']} on {environment()['machine']}: {said}.\n",
        "Seconds of processor time on one thread, the least of the repeats. The exponent is the slope of the logarithm",
        "of the seconds over the logarithm of the number of operations.\n",
        "| network | operations | players | stages | compile s | exponent from the row above | one step s |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for before, row in zip([{}, *rows], rows, strict=False):
        figures = [row.get(name, "") for name in ("operations", "players", "stages")]
        if row["problem"]:
            lines.append(f"| {row['name']} | {row['problem'][:200]} | | | | | |")
            continue
        related = before.get("family") == row["family"] and not before["problem"]
        exponent = f"{_slope([before, row]):.2f}" if related else ""
        cells = [row["name"], *figures, f"{row['seconds']:.2f}", exponent, f"{row['step']:.3f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += [f"\nExponent, {family}: {exponent:.2f}." for family, exponent in _exponents(rows).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def _exponents(rows: list[Row]) -> dict[str, float]:
    families: dict[str, list[Row]] = {}
    for row in rows:
        if not row["problem"]:
            families.setdefault(row["family"], []).append(row)
    return {family: _slope(found) for family, found in families.items() if len(found) > 1}


def main(
    out: Annotated[Path, typer.Option(dir_okay=False, help="The report to write.")] = ROOT / "docs" / "compile_time.md",
    repeats: Annotated[int, typer.Option(min=1, help="Compilations of a network; the fastest counts.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="Limit for one network.")] = 600,
    gigabytes: Annotated[float, typer.Option(min=1, help="Memory limit for one network.")] = 8,
) -> None:
    """Measure compile time over depth."""
    console = Console()
    networks: list[tuple[str, Any]] = [("residual MLP", blocks) for blocks in BLOCKS]
    if zoo.installed("torchvision"):
        networks += [("ResNet", name) for name in RESNETS]
    zoo.preload([])
    warm([])

    def job(family: str, size: Any) -> pool.Job:
        return lambda send: _measure(family, size, send, repeats)

    table = Table(title="compile time", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("network", "operations", "players", "compile s", "step s"):
        table.add_column(column, justify="left" if column == "network" else "right")
    rows: list[Row] = []
    with console.status("compiling") as status:
        jobs = [(network, job(*network)) for network in networks]
        for outcome in pool.run(
            jobs,
            workers=1,
            seconds=seconds,
            gigabytes=gigabytes,
            tick=lambda keys: status.update(f"compiling {keys[0][1]}"),
        ):
            family, size = outcome.key
            name = f"{family}, {size} blocks" if family == "residual MLP" else size
            rows.append({"family": family, "name": name, "problem": outcome.problem, **outcome.found})
            shown = [f"{rows[-1].get(key, 0):.2f}" for key in ("seconds", "step")]
            counts = [str(rows[-1].get(key, "")) for key in ("operations", "players")]
            table.add_row(name, *counts, *(shown if not outcome.problem else [outcome.problem[:60], ""]))
    console.print(table)
    for family, exponent in _exponents(rows).items():
        console.print(f"exponent, {family}: {exponent:.2f}")
    _write(out, rows)
    console.print(f"report: [bold]{out}[/bold]", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
