"""Time and memory of a step over batch, depth, width and shortcuts, against the dense formulation (paper: Fig. 1).

The dense backend executes the derivation with explicit Jacobians and matrices, the whole batch-augmented value Hessian
among them: the earlier formulation of full coupling. It carries that Hessian to the inputs, where nobody reads it, so
the networks here have inputs no wider than their states. Every pair of cases is compared: both make the same step.
What the dense side cannot hold at batch 128 is extrapolated from smaller batches, and called so.

    python benchmarks/scaling.py     what scaling.csv has not, then the section of docs/scaling.md and docs/scaling.svg
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

import pool
import torch
from common import (
    DOCS,
    Row,
    exponent,
    machines,
    markdown,
    measure_missing,
    peak,
    reset_peak,
    resident,
    save_svg,
    start_again,
    torch_step,
    write_section,
)
from matplotlib.figure import Figure
from networks import DigitsNet, ResidualMLP
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

RAW, PAGE, PICTURE = Path(__file__).with_suffix(".csv"), DOCS / "scaling.md", DOCS / "scaling.svg"
VALUES, SEED, STEPS = ("seconds", "peak_mib", "checksum"), 0, 5
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
        dtype: float64 (where both sides are compared) or float32.
    """

    network: str
    batch: int
    width: int
    depth: int = 3
    shortcuts: int = 1
    side: str = "closed"
    dtype: str = "float64"


KEYS = (*(field.name for field in fields(Case)), "seed")
Raw = dict[Case, dict[str, float]]


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
    return tuple(replace(base, **{name: value}) for value in values)  # type: ignore[arg-type]


SMALL = Case("mlp", 16, 16)
SWEEPS = (
    Sweep("MNIST, residual block: batch", "batch", varied(Case("conv", 1, 1), "batch", (1, 2, 4, 8, 32, 128)),
          (("dense", 4),)),
    Sweep("MNIST, residual block of 16 channels: batch", "batch",
          varied(Case("conv", 1, 16, dtype="float32"), "batch", (16, 32, 64, 128, 256)), (("torch", 256),)),
    Sweep("Small: batch", "batch", varied(SMALL, "batch", (8, 16, 32, 64, 128)), (("dense", 128),)),
    Sweep("Small: width", "width", varied(SMALL, "width", (8, 16, 32)), (("dense", 32),)),
    Sweep("Small: depth", "depth", varied(SMALL, "depth", (2, 4, 8, 16)), (("dense", 16),)),
    Sweep("Small: shortcuts", "shortcuts", varied(Case("mlp", 16, 16, 4), "shortcuts", (0, 1, 2, 4)), (("dense", 4),)),
    Sweep("Trajectory kept or run again: depth", "depth",
          varied(Case("mlp", 128, 256, dtype="float32"), "depth", (16, 32, 64, 128)),
          (("recompute", 128), ("torch", 128))),
)  # fmt: skip


# --- one case, in a process of its own --------------------------------------------------------------------------------


def step_of(case: Case) -> tuple[nn.Module, Callable[[], Tensor]]:
    """The model and its step."""
    torch.manual_seed(SEED)
    if case.network == "conv":
        model: nn.Module = DigitsNet(case.width, 28)
        x = torch.randn(case.batch, 1, 28, 28)
    else:
        model = ResidualMLP(case.width, case.width, case.depth, shortcuts=case.shortcuts)
        x = torch.randn(case.batch, case.width)
    y = torch.randint(10, (case.batch,))
    if case.dtype == "float64":
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


def measure(case: Case, steps: int = STEPS) -> tuple[float, float, str]:
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
        for _ in range(steps):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    return statistics.median(taken), peak() - before, repr(checksum)


def warm_up() -> None:
    """Load what compiling and the first steps load, so that it is no part of the first case."""
    for side in ("closed", "dense", "torch"):
        step_of(Case("mlp", 2, 2, 1, side=side))[1]()


def with_allocator() -> None:
    """Start again with an allocator that gives memory back, if this is not one."""
    settings = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        start_again(settings)


def run(*key: object) -> tuple[object, ...]:
    """The same, in a process of its own."""
    found: tuple[object, ...] = pool.alone(lambda send: send({"found": measure(Case(*key[:-1]))}))["found"]  # type: ignore[arg-type]
    return found


# --- all of them ------------------------------------------------------------------------------------------------------


def wanted_of(sweep: Sweep) -> list[Case]:
    """Cases of a sweep, the other sides where they are measured."""
    found = list(sweep.cases)
    for side, most in sweep.sides:
        found += [replace(case, side=side) for case in sweep.cases if getattr(case, sweep.varied) <= most]
    return found


def check(sweep: Sweep, raw: Raw) -> None:
    """The dense formulation (and running segments again) makes the same update.

    Raises:
        RuntimeError: it does not.
    """
    for case in wanted_of(sweep):
        if case.side in ("dense", "recompute"):
            ours, theirs = (raw[each]["checksum"] for each in (replace(case, side="closed"), case))
            tolerance = (1e-8 if case.dtype == "float64" else 1e-4) * max(1.0, abs(theirs))
            if abs(ours - theirs) > tolerance:
                raise RuntimeError(f"{sweep.title}: at {getattr(case, sweep.varied)} the two updates differ")


def series(sweep: Sweep, raw: Raw, side: str, quantity: str) -> list[tuple[int, float]]:
    """Measured points of one side."""
    cases = [case for case in wanted_of(sweep) if case.side == side and case in raw]
    return [(getattr(case, sweep.varied), raw[case][quantity]) for case in cases]


def section(sweep: Sweep, raw: Raw) -> str:
    """Table of one sweep, with exponents, and what the other side would take where it was not measured."""
    rows = []
    for case in wanted_of(sweep):
        found, value = raw[case], getattr(case, sweep.varied)
        other = raw[replace(case, side="closed")]
        slower, larger = found["seconds"] / other["seconds"], found["peak_mib"] / max(other["peak_mib"], 1.0)
        compared = "" if case.side == "closed" else f"{slower:.3g}× time, {larger:.3g}× memory"
        rows.append((case.side, str(value), seconds(found["seconds"]), f"{found['peak_mib']:.0f} MiB", compared))
    sides = list(dict.fromkeys(case.side for case in wanted_of(sweep)))
    header = ("side", sweep.varied, "time a step", "peak memory", "against the closed form")
    said = [markdown(header, rows), ""]
    if sweep.varied != "shortcuts":
        fits = [
            f"{side} {exponent(series(sweep, raw, side, 'seconds')):.2f} in time, "
            f"{exponent(series(sweep, raw, side, 'peak_mib')):.2f} in memory"
            for side in sides
        ]
        said += [f"Exponents in the {sweep.varied} (least squares through logarithms): {'; '.join(fits)}.", ""]
    first = sweep.cases[0]
    if sweep.varied == "batch" and first.network == "conv" and sweep.sides[0][0] == "dense":
        said += [extrapolation(sweep, raw), ""]
    sizes = [name for name in ("batch", "width", "depth", "shortcuts") if name != sweep.varied]
    shown = ", ".join(f"{name} {getattr(first, name)}" for name in sizes)
    if first.network == "conv":
        shown = f"channels {first.width}"
    return f"## {sweep.title}\n\n{shown}; {first.dtype}.\n\n" + "\n".join(said)


def extrapolation(sweep: Sweep, raw: Raw) -> str:
    """What the dense side would take at batch 128, by its own fitted exponents."""
    said = []
    closed = raw[next(case for case in sweep.cases if case.batch == BATCH)]
    for quantity, shown in (("seconds", seconds), ("peak_mib", mebibytes)):
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


def load(rows: list[Row]) -> Raw:
    """What was measured, by case."""
    kinds = {field.name: int if field.type == "int" else str for field in fields(Case)}
    return {
        Case(**{name: kind(row[name]) for name, kind in kinds.items()}): {name: float(row[name]) for name in VALUES}
        for row in rows
    }


def text(rows: list[Row]) -> str:
    """The section of the rows; both sides of every pair made the same step."""
    raw = load(rows)
    for sweep in SWEEPS:
        check(sweep, raw)
    head = (
        f"Written by `benchmarks/scaling.py`. {machines(rows)}. Processor time of a step (median), peak resident memory"
        " of a process of its own above its beginning. *closed* is the default program (full coupling), *dense* the"
        " same update with explicit matrices (the earlier formulation of the paper's Fig. 1; both make the same step,"
        ' checked), *torch* torch.optim.SGD\'s step, *recompute* the program with `memory="recompute"`.'
    )
    return "\n\n".join([head, "![time and memory](scaling.svg)", *(section(sweep, raw).strip() for sweep in SWEEPS)])


def main() -> None:
    """Measure what is missing; write the section and the picture."""
    with_allocator()
    torch.set_num_threads(1)
    warm_up()
    wanted = [(*astuple(case), SEED) for case in dict.fromkeys(case for sweep in SWEEPS for case in wanted_of(sweep))]
    rows = measure_missing(RAW, KEYS, VALUES, wanted, run)
    write_section("scaling", text(rows), PAGE)
    plot(load(rows), PICTURE)


def plot(raw: Raw, path: Path) -> None:
    """Time and memory over what is varied."""
    figure = Figure(figsize=(2.6 * len(SWEEPS), 5.2), layout="constrained")
    axes = figure.subplots(2, len(SWEEPS), squeeze=False)
    looks = {"closed": "C0o-", "dense": "C3s-", "recompute": "C2^-", "torch": "C7d--"}
    for column, sweep in enumerate(SWEEPS):
        for row, (quantity, label) in enumerate((("seconds", "seconds a step"), ("peak_mib", "peak MiB"))):
            seen: set[float] = set()
            for side in dict.fromkeys(case.side for case in wanted_of(sweep)):
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
    save_svg(figure, path)


if __name__ == "__main__":
    main()
