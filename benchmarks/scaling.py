"""Time and memory of a step over batch, depth, width and shortcuts, against the dense formulation (paper: Fig. 1).

The dense backend executes the derivation with explicit Jacobians and matrices, the whole batch-augmented value Hessian
among them: the earlier formulation of full coupling. It carries that Hessian to the inputs, where nobody reads it, so
the networks here have inputs no wider than their states. Every pair of cases is compared: both make the same step.
What the dense side cannot hold at batch 128 is extrapolated from smaller batches, and called so.

    python benchmarks/scaling.py            measures what benchmarks/.data/scaling.json does not have yet
    python benchmarks/scaling.py --write    and writes docs/scaling.md and docs/scaling.svg
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated

import pool
import torch
import typer
from common import DOCS, exponent, machine, markdown, peak, reset_peak, resident, start_again, torch_step
from digit_images import CACHE
from matplotlib.figure import Figure
from networks import DigitsNet, ResidualMLP
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

RAW = CACHE / "scaling.json"
BATCH = 128
"""Of the paper's MNIST runs."""


@dataclass(frozen=True)
class Case:
    """A network and a batch.

    Attributes:
        network: ``"mlp"`` (residual layers, inputs as wide as they are) or ``"conv"`` (Fig. 5's residual block on
            MNIST's 28×28 pixels).
        batch, width, depth, shortcuts: its sizes; ``"conv"`` has a depth and a shortcut of its own.
        side: ``"closed"``, ``"dense"``, ``"recompute"`` (the closed form, trajectory run again), ``"paper"`` (its own
            form) or ``"torch"`` (torch.optim.SGD).
        double: in float64 (where both sides are compared) or float32.
        steps: timed.
    """

    network: str
    batch: int
    width: int
    depth: int = 3
    shortcuts: int = 1
    side: str = "closed"
    double: bool = True
    steps: int = 5

    @property
    def key(self) -> str:
        """Identifies it in the raw results."""
        return json.dumps(asdict(self), sort_keys=True)


@dataclass(frozen=True)
class Sweep:
    """Cases that differ in one number.

    Attributes:
        title: heading of its table and plot.
        varied: attribute of :class:`Case` that varies.
        cases: of the closed form.
        sides: what it is compared with; for each, up to which value that is measured.
    """

    title: str
    varied: str
    cases: tuple[Case, ...]
    sides: tuple[tuple[str, int], ...]


def varied(base: Case, name: str, values: Sequence[int]) -> tuple[Case, ...]:
    """The case with other values of one attribute."""
    return tuple(Case(**{**asdict(base), name: value}) for value in values)


SMALL = Case("mlp", 16, 16)
SWEEPS = (
    Sweep("MNIST, residual block: batch", "batch", varied(Case("conv", 1, 1), "batch", (1, 2, 4, 8, 32, 128)),
          (("dense", 4),)),
    Sweep("MNIST, residual block of 16 channels: batch", "batch",
          varied(Case("conv", 1, 16, double=False), "batch", (16, 32, 64, 128, 256)), (("torch", 256),)),
    Sweep("Small: batch", "batch", varied(SMALL, "batch", (8, 16, 32, 64, 128)), (("dense", 128),)),
    Sweep("Small: width", "width", varied(SMALL, "width", (8, 16, 32)), (("dense", 32),)),
    Sweep("Small: depth", "depth", varied(SMALL, "depth", (2, 4, 8, 16)), (("dense", 16),)),
    Sweep("Small: shortcuts", "shortcuts", varied(Case("mlp", 16, 16, 4), "shortcuts", (0, 1, 2, 4)), (("dense", 4),)),
    Sweep("Trajectory kept or run again: depth", "depth",
          varied(Case("mlp", 128, 256, double=False, steps=3), "depth", (16, 32, 64, 128)),
          (("recompute", 128), ("torch", 128))),
)  # fmt: skip


# --- one case, in a process of its own --------------------------------------------------------------------------------


def step_of(case: Case) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model and its step."""
    torch.manual_seed(0)
    if case.network == "conv":
        model: nn.Module = DigitsNet(case.width, 28)
        x = torch.randn(case.batch, 1, 28, 28)
    else:
        model = ResidualMLP(case.width, case.width, case.depth, shortcuts=case.shortcuts)
        x = torch.randn(case.batch, case.width)
    y = torch.randint(10, (case.batch,))
    if case.double:
        model, x = model.double(), x.double()
    loss = nn.CrossEntropyLoss()
    if case.side == "torch":
        plain = torch_step(model, torch.optim.SGD(model.parameters(), lr=0.1), loss)
        return model, lambda: plain(x, y)
    own = {"coupling": "block", "recursion": "substituted"} if case.side == "paper" else {}
    compiled = compile_optimizer(
        model, x, loss=loss, curvature="sgd", lr=0.1, **own,
        backend="dense" if case.side == "dense" else "fast", memory="recompute" if case.side == "recompute" else "keep",
    )  # fmt: skip
    return model, lambda: compiled.step(x, y)


def measure(case: Case) -> dict[str, float]:
    """Median seconds of processor time a step, peak MiB above what was there, checksum of the parameters after it."""
    warm_up()  # pages of libraries are mapped once more in a forked process
    before = resident()
    model, step = step_of(case)
    reset_peak()
    start = time.process_time()
    step()
    taken = [time.process_time() - start]
    checksum = sum(
        float((p.detach().double() * torch.arange(p.numel()).view_as(p).cos()).sum()) for p in model.parameters()
    )
    if taken[0] < 1:  # the first step of small networks has what is done once in it
        taken = []
        for _ in range(case.steps):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    return {"seconds": statistics.median(taken), "peak": peak() - before, "checksum": checksum}


def warm_up() -> None:
    """Load what compiling and the first steps load, so that it is no part of the first case."""
    for side in ("closed", "dense", "torch"):
        step_of(Case("mlp", 2, 2, 1, side=side))[1]()


def with_allocator() -> None:
    """Start again with an allocator that gives memory back, if this is not one."""
    settings = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        start_again(settings)


# --- all of them ------------------------------------------------------------------------------------------------------


def wanted(sweep: Sweep) -> list[Case]:
    """Cases of a sweep, the other sides where they are measured."""
    found = list(sweep.cases)
    for side, most in sweep.sides:
        found += [Case(**{**asdict(case), "side": side}) for case in sweep.cases if getattr(case, sweep.varied) <= most]
    return found


def check(sweep: Sweep, raw: dict[str, dict[str, float]]) -> None:
    """The dense formulation (and running segments again) makes the same update.

    Raises:
        RuntimeError: it does not.
    """
    for case in wanted(sweep):
        if case.side in ("dense", "recompute"):
            ours, theirs = (
                raw[c.key]["checksum"] for c in (Case(**{**asdict(case), "side": "closed"}), case)
            )  # fmt: skip
            tolerance = (1e-8 if case.double else 1e-4) * max(1.0, abs(theirs))
            if abs(ours - theirs) > tolerance:
                raise RuntimeError(f"{sweep.title}: at {getattr(case, sweep.varied)} the two updates differ")


def series(sweep: Sweep, raw: dict[str, dict[str, float]], side: str, quantity: str) -> list[tuple[int, float]]:
    """Measured points of one side."""
    cases = [case for case in wanted(sweep) if case.side == side and case.key in raw]
    return [(getattr(case, sweep.varied), raw[case.key][quantity]) for case in cases]


def section(sweep: Sweep, raw: dict[str, dict[str, float]]) -> str:
    """Table of one sweep, with exponents, and what the other side would take where it was not measured."""
    rows = []
    for case in wanted(sweep):
        found, value = raw[case.key], getattr(case, sweep.varied)
        other = raw[Case(**{**asdict(case), "side": "closed"}).key]
        compared = "" if case.side == "closed" else (
            f"{found['seconds'] / other['seconds']:.3g}× time, {found['peak'] / max(other['peak'], 1.0):.3g}× memory"
        )  # fmt: skip
        rows.append((case.side, str(value), seconds(found["seconds"]), f"{found['peak']:.0f} MiB", compared))
    sides = list(dict.fromkeys(case.side for case in wanted(sweep)))
    header = ("side", sweep.varied, "time a step", "peak memory", "against the closed form")
    said = [markdown(header, rows), ""]
    if sweep.varied != "shortcuts":
        fits = [
            f"{side} {exponent(series(sweep, raw, side, 'seconds')):.2f} in time, "
            f"{exponent(series(sweep, raw, side, 'peak')):.2f} in memory"
            for side in sides
        ]
        said += [f"Exponents in the {sweep.varied} (least squares through logarithms): {'; '.join(fits)}.", ""]
    first = sweep.cases[0]
    if sweep.varied == "batch" and first.network == "conv" and sweep.sides[0][0] == "dense":
        said += [extrapolation(sweep, raw), ""]
    fixed = {key: value for key, value in asdict(first).items()
             if key not in (sweep.varied, "side", "steps", "double", "network")}  # fmt: skip
    if first.network == "conv":
        fixed = {"channels": first.width}
    shown = ", ".join(f"{key} {value}" for key, value in fixed.items())
    return f"## {sweep.title}\n\n{shown}; {'float64' if first.double else 'float32'}.\n\n" + "\n".join(said)


def extrapolation(sweep: Sweep, raw: dict[str, dict[str, float]]) -> str:
    """What the dense side would take at batch 128, by its own fitted exponents."""
    said = []
    closed = raw[next(case for case in sweep.cases if case.batch == BATCH).key]
    for quantity, shown in (("seconds", seconds), ("peak", mebibytes)):
        points = series(sweep, raw, "dense", quantity)
        last, value = points[-1]
        guess = value * (BATCH / last) ** exponent(points)
        ratio = guess / max(closed[quantity], 1e-3)
        said.append(f"{shown(guess)} ({ratio:.2g} times the closed form's {shown(closed[quantity])})")
    return (
        f"**Extrapolated, not measured**: at batch {BATCH} the dense formulation would take {said[0]} and {said[1]}, "
        "by the exponents fitted to its measured batches, which still rise at such small ones (its products are cubic "
        "and its matrices square in the batch)."
    )


def seconds(value: float) -> str:
    """With a unit that fits."""
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1)):
        if value >= (1 if unit == "s" else 2) * size:
            return f"{value / size:.3g} {unit}"
    return f"{1e3 * value:.3g} ms"


def mebibytes(value: float) -> str:
    """With a unit that fits."""
    return f"{value:.0f} MiB" if value < 4096 else f"{value / 1024:.0f} GiB"


def main(
    only: Annotated[str, typer.Option(help="measure only sweeps whose title contains this")] = "",
    again: Annotated[bool, typer.Option(help="measure again what is there already")] = False,
    write: Annotated[bool, typer.Option(help="write docs/scaling.md and docs/scaling.svg")] = False,
) -> None:
    """Compare the closed form with the dense formulation; see the module's docstring."""
    with_allocator()
    torch.set_num_threads(1)
    warm_up()
    raw: dict[str, dict[str, float]] = json.loads(RAW.read_text()) if RAW.exists() else {}
    sweeps = [sweep for sweep in SWEEPS if only in sweep.title]
    cases = list(dict.fromkeys(c for sweep in sweeps for c in wanted(sweep) if again or c.key not in raw))
    console = Console()
    jobs = [(case, lambda send, case=case: send(measure(case))) for case in cases]
    outcomes = pool.run(jobs, workers=1, seconds=math.inf, gigabytes=math.inf, tick=lambda keys: None)
    for outcome in track(outcomes, description="scaling", total=len(jobs), console=console):
        one, found = outcome.key, outcome.found
        if outcome.problem:
            raise RuntimeError(f"{one}: {outcome.problem}")
        raw[one.key] = found
        RAW.parent.mkdir(exist_ok=True)
        RAW.write_text(json.dumps(raw, indent=1))
        size = f"batch {one.batch}, width {one.width}, depth {one.depth}, shortcuts {one.shortcuts}"
        console.print(f"{one.network} {one.side}: {size}: {seconds(found['seconds'])}, {found['peak']:.0f} MiB")
    for sweep in sweeps:
        check(sweep, raw)
        console.print(section(sweep, raw), markup=False)
    if write:
        head = (
            "# Scaling against the dense formulation\n\nWritten by `benchmarks/scaling.py --write`, nothing by "
            f"hand. {machine(1)}. Processor time of a step (median), peak resident memory of a process "
            "of its own above its beginning. *closed* is the default program (full coupling), *dense* the same update "
            "with explicit matrices (the earlier formulation of the paper's Fig. 1; both make the same step, checked), "
            '*torch* torch.optim.SGD\'s step, *recompute* the program with `memory="recompute"`.\n\n'
            "![time and memory](scaling.svg)\n\n"
        )
        path = DOCS / "scaling.md"
        _, title, others = path.read_text().partition("\n## Several processes\n")  # benchmarks/ranks.py writes it
        path.write_text(head + "\n".join(section(s, raw) for s in SWEEPS).rstrip() + "\n" + title + others)
        plot(raw)


def plot(raw: dict[str, dict[str, float]]) -> None:
    """Time and memory over what is varied."""
    figure = Figure(figsize=(2.6 * len(SWEEPS), 5.2), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), squeeze=False)
    looks = {"closed": "C0o-", "dense": "C3s-", "recompute": "C2^-", "torch": "C7d--"}
    for column, sweep in enumerate(SWEEPS):
        for row, (quantity, label) in enumerate((("seconds", "seconds a step"), ("peak", "peak MiB"))):
            seen: set[float] = set()
            for side in dict.fromkeys(case.side for case in wanted(sweep)):
                points = series(sweep, raw, side, quantity)
                seen.update(x for x, _ in points)
                axes[row, column].plot(*zip(*points, strict=True), looks[side], label=side, markersize=4)
            scale = "linear" if sweep.varied == "shortcuts" else "log"
            axes[row, column].set(xlabel=sweep.varied, yscale="log", xscale=scale)
            axes[row, column].set_xticks(sorted(seen), [f"{x:g}" for x in sorted(seen)])
            axes[row, column].minorticks_off()
            axes[row, 0].set_ylabel(label)
        axes[0, column].set_title("\n".join(sweep.title.replace(": ", ":\n").replace(" of ", "\nof ").split("\n")),
                                  fontsize=8)  # fmt: skip
        axes[1, column].legend(fontsize=7)
    figure.savefig(DOCS / "scaling.svg")


if __name__ == "__main__":
    typer.run(main)
