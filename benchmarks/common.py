"""What the timing benchmarks share: the machine, interleaved timing, peak memory of a process of its own, tables."""

from __future__ import annotations

import csv
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parent.parent / "docs"
PERFORMANCE = DOCS / "performance.md"
Clock = Callable[[], float]
CLOCKS: dict[str, Clock] = {"cpu": time.process_time, "wall": time.perf_counter}
"""CPU time of the process is disturbed less by what else the machine does; with one thread the two agree at rest."""


def machine(threads: int) -> str:
    """One line: processor, cores, threads used, versions, day."""
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    processor = found.group(1) if found else platform.processor()
    return (
        f"{processor}, {os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''}, "
        f"torch {torch.__version__}, Python {platform.python_version()}, {date.today():%d %B %Y}"
    )


def measured() -> str:
    """When something was measured, and of which commit."""
    return f"{datetime.now(UTC):%d %B, %H:%M} ({_commit()})"


@cache
def _commit() -> str:
    """What git calls this process' code; "changed" if the code differs from it (tables always do)."""
    git = ["git", "-C", str(DOCS.parent)]
    described = subprocess.run([*git, "describe", "--always"], capture_output=True, text=True, check=True)
    code = ("gtddp_compile", "passes", "benchmarks/*.py")
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *code], check=False).returncode
    return f"{described.stdout.strip()}{', changed' if changed else ''}"


@dataclass(frozen=True)
class Ratio:
    """How long one thing takes against another, measured in turns.

    Attributes:
        base, ours: median seconds.
        ratio: median of the pairs' ratios.
        low, high: their quartiles.
    """

    base: float
    ours: float
    ratio: float
    low: float
    high: float


def interleaved(
    base: Callable[[], object], ours: Callable[[], object], pairs: int, clock: str = "cpu", warm: int = 2
) -> Ratio:
    """Time both in turns, after ``warm`` runs of each; the order within a pair changes from pair to pair."""
    now = CLOCKS[clock]

    def once(run: Callable[[], object]) -> float:
        start = now()
        run()
        return now() - start

    for _ in range(warm):
        base(), ours()
    first, second = [], []
    for index in range(pairs):
        if index % 2:
            second.append(once(ours))
            first.append(once(base))
        else:
            first.append(once(base))
            second.append(once(ours))
    ratios = [b / a for a, b in zip(first, second, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if pairs > 1 else ratios * 3
    return Ratio(statistics.median(first), statistics.median(second), middle, low, high)


def torch_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    """What a training loop of torch does with a batch; it returns the loss before the update."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        value = loss(model(x), y)
        value.backward()
        optimizer.step()
        return value.detach()

    return step


def last_tenth(model: nn.Module) -> AveragedModel:
    """A copy of a model that is the average of about the last tenth of the steps."""
    return AveragedModel(model, avg_fn=lambda old, new, steps: torch.lerp(old, new, 10 / (steps + 10)))


def keep_heap() -> None:
    """Start this script again with a C library that keeps freed memory for itself.

    glibc gives large blocks back to the system when they are freed, and takes them again page by page in the next step:
    time and noise, for either side. The usual remedy for PyTorch on CPUs is another
    allocator; this one needs nothing installed. A setting of the caller's own stays.
    """
    kept = {"MALLOC_TRIM_THRESHOLD_": str(2**40), "MALLOC_MMAP_THRESHOLD_": str(2**40)}
    if not kept.keys() & os.environ.keys():
        start_again(kept)


def start_again(settings: Mapping[str, str]) -> None:
    """This script in place of itself, with further environment variables."""
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """Slope of the regression line through the logarithms."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(max(y, 1e-12)) for _, y in points]
    return statistics.linear_regression(xs, ys).slope


# --- memory -----------------------------------------------------------------------------------------------------------


def resident() -> float:
    """Resident memory of this process, MiB."""
    return _status("VmRSS")


def reset_peak() -> None:
    """Begin a new peak of resident memory (Linux)."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak() -> float:
    """Peak of resident memory since :func:`reset_peak`, MiB."""
    return _status("VmHWM")


def _status(key: str) -> float:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    found = re.search(rf"{key}:\s+(\d+) kB", text)
    assert found is not None
    return int(found.group(1)) / 1024


def in_process(script: str, *arguments: str) -> Mapping[str, float]:
    """Run a benchmark script again in a process of its own; it prints one JSON object as its last line."""
    environment = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536"}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # packages are installed with their bytecode
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    result: Mapping[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


# --- tables -----------------------------------------------------------------------------------------------------------


Row = dict[str, str]


def read_rows(path: Path) -> list[Row]:
    """Rows of a CSV file by the names of its columns; none where there is no file yet."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def write_rows(path: Path, header: Sequence[str], rows: Iterable[Iterable[object]]) -> None:
    """A CSV file."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])


def measure_missing(
    path: Path, keys: Sequence[str], values: Sequence[str], wanted: Iterable[Sequence[object]],
    run: Callable[..., Iterable[object]],
) -> list[Row]:  # fmt: skip
    """Rows of a CSV file, after those of ``wanted`` that it lacks are measured and kept, one by one.

    Args:
        path: the file.
        keys: columns that tell rows apart.
        values: columns of what is measured; when, and on which machine, come behind them.
        wanted: the keys of all rows.
        run: measures the values of a key.
    """
    _commit()
    header, rows = (*keys, *values, "measured", "machine"), read_rows(path)
    known = {tuple(row[name] for name in keys) for row in rows}
    for key in wanted:
        if tuple(map(_shown, key)) not in known:
            row = map(_shown, (*key, *run(*key), measured(), machine(1)))
            rows.append(dict(zip(header, row, strict=True)))
            print(*list(rows[-1].values())[:-2], sep="  ", file=sys.stderr, flush=True)
            write_rows(path, header, [each.values() for each in rows])
    return rows


def _shown(value: object) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def machines(rows: Iterable[Row]) -> str:
    """The machines and days of measured rows."""
    return "; ".join(dict.fromkeys(row["machine"] for row in rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def csv_table(path: Path) -> str:
    """A Markdown table of a CSV file."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return markdown(header, rows)


def write_section(name: str, text: str, path: Path = PERFORMANCE) -> None:
    """Put a measured section into a page, between its own markers; every other part stays as it is."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    page = path.read_text(encoding="utf-8") if path.exists() else "# Performance\n"
    block = f"{begin}\n{text.strip()}\n{end}"
    if begin in page:
        before, _, rest = page.partition(begin)
        page = before + block + rest.partition(end)[2]
    else:
        page = f"{page.rstrip()}\n\n{block}\n"
    path.write_text(page, encoding="utf-8")


def save_svg(figure: Figure, path: Path) -> None:
    """A picture: of the same rows the same file."""
    from matplotlib import rc_context

    with rc_context({"svg.hashsalt": path.stem, "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
