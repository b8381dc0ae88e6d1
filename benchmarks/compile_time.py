"""How compile time grows with depth: residual MLPs of 10 to 1000 blocks, and torchvision's ResNets.

    python benchmarks/compile_time.py     what compile_time.csv has not, then docs/compile_time.md

Seconds are of processor time, on one thread; each network is compiled twice in a process of its own, after a small one
that sets up torch and sympy: what was derived for a pattern of stages is kept for the process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pool
import torch
import zoo
from common import DOCS, Row, exponent, machines, markdown, measure_missing
from coverage import warm
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

MLP, RESNET = "residual MLP", "ResNet"
BLOCKS = (10, 30, 100, 300, 1000)
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
WIDTH, SEED, SECONDS, GIGABYTES = 16, 0, 600, 8
RAW, PAGE = Path(__file__).with_suffix(".csv"), DOCS / "compile_time.md"
KEYS, COUNTS = ("family", "network", "seed"), ("operations", "players", "stages")
TIMES = ("compile_s", "again_s", "step_s")


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


def once(family: str, network: str, send: Callable[[dict[str, Any]], None]) -> None:
    """Counts; seconds to compile, to compile again and to step."""
    torch.manual_seed(SEED)
    if family == MLP:
        targets = torch.randint(zoo.CLASSES, (zoo.BATCH,))
        model = ResidualMLP(int(network.partition(" ")[0]))
        case = zoo.Case(model, (torch.randn(zoo.BATCH, WIDTH),), targets, zoo.classification)
    else:
        case = zoo.build("torchvision", network)
    stamps = [time.process_time()]
    for _ in range(2):
        optimizer = compile_optimizer(case.model, case.inputs, loss=case.loss, curvature="sgd", lr=0.01)
        stamps.append(time.process_time())
    optimizer.step(case.inputs, case.targets)
    graph = optimizer.graph
    seconds = [after - before for before, after in pairwise((*stamps, time.process_time()))]
    send({"found": (len(graph.ops.ops), len(graph.players), len(graph.stages), *seconds)})


def run(family: str, network: str, *_: int) -> tuple[object, ...]:
    """The same, in a process of its own."""
    reported = pool.alone(lambda send: once(family, network, send), seconds=SECONDS, gigabytes=GIGABYTES)
    found: tuple[object, ...] = reported["found"]
    return found


def grows(points: list[tuple[float, float]]) -> str:
    """Exponent of seconds over operations."""
    return f"{exponent(points):.2f}"


def text(rows: list[Row]) -> str:
    """The page of the rows."""
    lines, fits = [], []
    for family in dict.fromkeys(row["family"] for row in rows):
        points: list[tuple[float, float]] = []
        for row in (row for row in rows if row["family"] == family):
            first, again, step = (float(row[name]) for name in TIMES)
            points.append((float(row["operations"]), again))
            grown = grows(points[-2:]) if len(points) > 1 else ""
            counts = [row[name] for name in COUNTS]
            lines.append([f"{family}, {row['network']}", *counts, f"{first:.2f}", f"{again:.2f}", grown, f"{step:.3f}"])
        fits.append(f"Exponent, {family}: {grows(points)}.")
    header = ("network", *COUNTS, "compile s", "again s", "exponent from the row above", "one step s")
    return f"""# Compile time over depth

Written by `benchmarks/compile_time.py`. {machines(rows)}.

Seconds of processor time. *Again*: a second time in the same process, which has derived the equations of every kind of
stage by then. The exponent is the slope of the logarithm of these seconds over the logarithm of the number of
operations.

{markdown(header, lines)}

{chr(10).join(fits)}
"""


def main() -> None:
    """Measure what is missing; write the page."""
    zoo.preload([])
    warm([])
    networks = [(MLP, f"{blocks} blocks") for blocks in BLOCKS]
    networks += [(RESNET, name) for name in RESNETS if zoo.installed("torchvision")]
    rows = measure_missing(RAW, KEYS, (*COUNTS, *TIMES), [(*network, SEED) for network in networks], run)
    PAGE.write_text(text(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
