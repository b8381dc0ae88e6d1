"""Time and memory over batch, depth, width and shortcuts, against the dense formulation where both compute one update.

The dense backend executes the derivation with explicit Jacobians and matrices, the whole batch-augmented value Hessian
among them: the earlier formulation of the paper's Fig. 1. Every case checks first that both make the same step.

    python benchmarks/scaling.py               writes docs/performance.md and docs/scaling.svg
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from common import DOCS, in_process, machine, markdown, peak, reset_peak, resident, write_section
from matplotlib.figure import Figure
from networks import ResidualMLP
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

START = {"batch": 16, "width": 16, "depth": 3, "shortcuts": 1}
SWEEPS = {"batch": (4, 8, 16, 32, 64, 128), "width": (8, 16, 32), "depth": (2, 4, 8), "shortcuts": (0, 1, 2, 3)}
"""What is varied, the rest as in START; images of 8×8."""


def step_of(case: dict[str, int], backend: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model and its step, in double precision."""
    torch.manual_seed(0)
    model = ResidualMLP(64, case["width"], case["depth"], shortcuts=case["shortcuts"]).double()
    x, y = torch.randn(case["batch"], 64).double(), torch.randint(10, (case["batch"],))
    optimizer = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1, backend=backend)
    return model, lambda: optimizer.step(x, y)


def measure(case: dict[str, int], backend: str, repeats: int) -> dict[str, float]:
    """Median seconds of a step, peak MiB above the imports, and a checksum of the parameters after one step."""
    before = resident()
    model, step = step_of(case, backend)
    step()
    checksum = sum(float((p * torch.arange(p.numel()).view_as(p).cos()).sum()) for p in model.parameters())
    reset_peak()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        taken.append(time.process_time() - start)
    return {"seconds": statistics.median(taken), "peak": peak() - before, "checksum": checksum}


def main(
    repeats: Annotated[int, typer.Option(help="steps a case")] = 5,
    sweep: Annotated[list[str] | None, typer.Option(help="which sweeps; all if none is given")] = None,
    case: Annotated[str, typer.Option(hidden=True, help="one case as JSON")] = "",
    backend: Annotated[str, typer.Option(hidden=True)] = "fast",
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md and the plot")] = False,
) -> None:
    """Compare the closed form with the dense formulation; see the module's docstring."""
    torch.set_num_threads(1)
    if case:
        print(json.dumps(measure(json.loads(case), backend, repeats)))
        return
    cases = [(name, value) for name in sweep or SWEEPS for value in SWEEPS[name]]
    console, rows, points = Console(), [], {}
    for name, value in track(cases, description="scaling", console=console):
        arguments = ["--case", json.dumps({**START, name: value}), "--repeats", str(repeats)]
        fast, dense = (in_process(__file__, *arguments, "--backend", kind) for kind in ("fast", "dense"))
        if abs(fast["checksum"] - dense["checksum"]) > 1e-8 * max(1.0, abs(dense["checksum"])):
            raise RuntimeError(f"{name} {value}: the two updates differ")
        points[name, value] = (fast, dense)
        rows.append(
            (name, str(value), f"{1e3 * fast['seconds']:.2f} ms", f"{1e3 * dense['seconds']:.2f} ms",
             f"{dense['seconds'] / fast['seconds']:.1f}", f"{fast['peak']:.0f} MiB", f"{dense['peak']:.0f} MiB",
             f"{dense['peak'] / max(fast['peak'], 1.0):.1f}")
        )  # fmt: skip
        console.print(*rows[-1], sep="  ")
    if write:
        header = ("varied", "value", "closed form", "dense", "times", "closed form", "dense", "times")
        write_section("scaling", f"## Against the dense formulation\n\n{machine(1)}. Others: {START}.\n\n"
                      + markdown(header, rows) + "\n\n![time and memory](scaling.svg)")  # fmt: skip
        plot(points)


def plot(points: dict[tuple[str, int], tuple[dict[str, float], dict[str, float]]]) -> None:
    """Time and memory over what is varied."""
    names = list(dict.fromkeys(name for name, _ in points))
    figure = Figure(figsize=(3.2 * len(names), 5.5), layout="constrained")
    axes = figure.subplots(2, len(names), squeeze=False)
    for column, name in enumerate(names):
        values = [value for other, value in points if other == name]
        for row, (key, label) in enumerate((("seconds", "seconds a step"), ("peak", "peak MiB"))):
            for side, kind in enumerate(("closed form", "dense")):
                axes[row, column].plot(values, [points[name, v][side][key] for v in values], "o-", label=kind)
            axes[row, column].set(xlabel=name, ylabel=label, yscale="log")
    axes[0, 0].legend()
    figure.savefig(DOCS / "scaling.svg")


if __name__ == "__main__":
    typer.run(main)
