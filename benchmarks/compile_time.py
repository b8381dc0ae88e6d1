"""How compile time grows with depth: residual MLPs of 10 to 1000 blocks, and torchvision's ResNets.

``python benchmarks/compile_time.py`` prints a table and writes ``docs/compile_time.md``. Seconds are of processor time,
on one thread; each network is compiled in a process of its own, after a small one that sets up torch and sympy.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pool
import torch
import typer
import zoo
from common import DOCS, exponent, markdown
from coverage import environment, warm
from rich.console import Console
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

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
    """Seconds to compile and to step, the least of the repeats."""
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
    counts = {"operations": len(graph.ops.ops), "players": len(graph.players), "stages": len(graph.stages)}
    send({**counts, "seconds": min(seconds), "step": min(stepping)})


def grows(rows: list[Row]) -> str:
    """Exponent of seconds over operations."""
    return f"{exponent([(row['operations'], row['seconds']) for row in rows]):.2f}"


def page(rows: list[Row]) -> str:
    """docs/compile_time.md."""
    said = ", ".join(f"{name} {value}" for name, value in environment().items() if name not in ("date", "machine"))
    lines = []
    for before, row in zip([{}, *rows], rows, strict=False):
        if row["problem"]:
            lines.append([row["name"], row["problem"][:200], *[""] * 5])
            continue
        counts = [str(row[name]) for name in ("operations", "players", "stages")]
        related = before.get("family") == row["family"] and not before["problem"]
        grown = grows([before, row]) if related else ""
        lines.append([row["name"], *counts, f"{row['seconds']:.2f}", grown, f"{row['step']:.3f}"])
    header = ("network", "operations", "players", "stages", "compile s", "exponent from the row above", "one step s")
    families: dict[str, list[Row]] = {}
    for row in rows:
        if not row["problem"]:
            families.setdefault(row["family"], []).append(row)
    fits = [f"Exponent, {family}: {grows(own)}." for family, own in families.items() if len(own) > 1]
    return f"""# Compile time over depth

Written by `python benchmarks/compile_time.py`; nothing here is typed in by hand.
Measured {environment()["date"]} on {environment()["machine"]}: {said}.

Seconds of processor time on one thread, the least of the repeats. The exponent is the slope of the logarithm
of the seconds over the logarithm of the number of operations.

{markdown(header, lines)}

{chr(10).join(fits)}
"""


def main(
    out: Annotated[Path, typer.Option(dir_okay=False, help="The report to write.")] = DOCS / "compile_time.md",
    repeats: Annotated[int, typer.Option(min=1, help="Compilations of a network; the fastest counts.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="Limit for one network.")] = 600,
    gigabytes: Annotated[float, typer.Option(min=1, help="Memory limit for one network.")] = 8,
) -> None:
    """Measure compile time over depth."""
    networks: list[tuple[str, Any]] = [("residual MLP", blocks) for blocks in BLOCKS]
    networks += [("ResNet", name) for name in RESNETS if zoo.installed("torchvision")]
    zoo.preload([])
    warm([])
    rows: list[Row] = []
    with Console().status("compiling") as status:
        jobs = [(network, lambda send, of=network: _measure(*of, send, repeats)) for network in networks]
        for outcome in pool.run(jobs, workers=1, seconds=seconds, gigabytes=gigabytes,
                                tick=lambda keys: status.update(f"compiling {keys[0][1]}")):  # fmt: skip
            family, size = outcome.key
            name = f"{family}, {size} blocks" if family == "residual MLP" else size
            rows.append({"family": family, "name": name, "problem": outcome.problem, **outcome.found})
    out.write_text(page(rows), encoding="utf-8")
    print(page(rows))


if __name__ == "__main__":
    typer.run(main)
