"""Time to a target against torch.optim and a peer's K-FAC, each method with its own tuned learning rate.

Two networks on real digits: the paper's residual block on scikit-learn's digits and on 5,000 images of MNIST. First a
sweep: every method over its grid of learning rates, judged by the time to a train loss of 0.05; then runs from other
seeds with the best rate of each. Runs take turns, a few steps each, so that what else the machine does hits all alike;
evaluation is not timed, compilation is listed apart. The peer is ASDL (``pip install --no-deps asdfghjkl``), whose
K-FAC is left out, with a word, where it is not installed.

    python benchmarks/wall_clock.py                      runs what benchmarks/wall_clock.json does not have
    python benchmarks/wall_clock.py --data digits        one of the two
    python benchmarks/wall_clock.py --write              and writes docs/wall-clock.md
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import DOCS, machine, markdown
from digit_images import Images
from networks import DigitsNet
from rich.console import Console
from torch import Tensor
from wall_clock_methods import BATCH, DATA, LOSS, METHODS, PAIRS, Data, Method, make

RAW = Path(__file__).parent / "wall_clock.json"
TARGET = 0.05
SWEEP_SEED = 100


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What is kept of a run.

    Attributes:
        data, method, rate, seed, sweep: which one.
        compile: seconds to make the step.
        steps, seconds, loss, accuracy: at every evaluation: steps so far, their processor time, train loss,
            validation accuracy.
        ended: why it ended.
    """

    data: str
    method: str
    rate: float
    seed: int
    sweep: bool
    compile: float = 0.0
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    ended: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Identifies it."""
        return self.data, self.method, self.rate, self.seed, self.sweep

    def reached(self, target: float = TARGET) -> tuple[float, float]:
        """Steps and seconds at which the train loss fell to a target, interpolated; infinite if it did not."""
        for index, value in enumerate(self.loss):
            if value <= target:
                if not index:
                    return self.steps[0], self.seconds[0]
                high, low = math.log(self.loss[index - 1]), math.log(max(value, 1e-12))
                part = (high - math.log(target)) / (high - low) if high > low else 1.0
                return tuple(  # type: ignore[return-value]
                    series[index - 1] + part * (series[index] - series[index - 1])
                    for series in (self.steps, self.seconds)
                )
        return math.inf, math.inf

    def accurate(self, target: float) -> tuple[float, float]:
        """Steps and seconds at the first evaluation with this validation accuracy; infinite if there is none."""
        found = [index for index, value in enumerate(self.accuracy) if value >= target]
        return (self.steps[found[0]], self.seconds[found[0]]) if found else (math.inf, math.inf)

    @property
    def best(self) -> float:
        """Best validation accuracy."""
        return max(self.accuracy, default=0.0)


class Training:
    """A run under way."""

    def __init__(self, run: Run, data: Data, images: Images) -> None:
        self.run, self.data, self.limit = run, data, math.inf
        torch.manual_seed(run.seed)
        self.model = DigitsNet(data.width, data.side)
        pixels = (-1, 1, data.side, data.side)
        (x, y), (vx, vy) = images.train, images.valid
        self.train, self.valid = (x.view(pixels), y), (vx.view(pixels), vy)
        start = time.process_time()
        self.step = make(METHODS[run.method], run.rate, self.model, self.train[0][:BATCH])
        run.compile = time.process_time() - start
        self.order = torch.Generator().manual_seed(run.seed)
        self.batches = iter(self._batches())
        self._clock, self._done = 0.0, 0

    def _batches(self) -> Iterator[Tensor]:
        count = len(self.train[1])
        while True:
            for part in torch.randperm(count, generator=self.order).split(BATCH):
                if len(part) == BATCH:
                    yield part

    def turn(self) -> None:
        """A few steps, timed, and an evaluation, not timed."""
        for _ in range(self.data.every):
            index = next(self.batches)
            x, y = self.train[0][index], self.train[1][index]
            start = time.process_time()
            try:
                self.step(x, y)
            except torch.linalg.LinAlgError:  # the peer, once it has diverged
                self.run.ended = "factorisation failed"
            self._clock += time.process_time() - start
            self._done += 1
        loss, accuracy = self._evaluate()
        run = self.run
        run.steps.append(self._done)
        run.seconds.append(self._clock)
        run.loss.append(loss)
        run.accuracy.append(accuracy)
        if not math.isfinite(loss) or loss > 1e6:
            run.ended = "diverged"
        elif loss <= (TARGET if run.sweep else TARGET / 5):
            run.ended = "fitted"
        elif self._done >= self.data.most:
            run.ended = "steps"
        elif self._clock > self.limit:
            run.ended = "twice the best rate's time"

    def _evaluate(self) -> tuple[float, float]:
        x, y = (part[: self.data.sample or None] for part in self.train)
        with torch.no_grad():
            loss = sum(float(LOSS(self.model(a), b)) * len(b) for a, b in zip(x.split(500), y.split(500), strict=True))
            right = self.model(self.valid[0]).argmax(1) == self.valid[1]
        return loss / len(y), float(right.float().mean())


# --- many runs --------------------------------------------------------------------------------------------------------


def take_turns(runs: list[Run], data: Data, save: Callable[[Run], None], console: Console) -> None:
    """Run them side by side, a turn each, until all have ended; a sweep's are given up at twice the best time."""
    images, best = data.load(), dict[str, float]()
    active = [Training(run, data, images) for run in runs]
    while active:
        for training in list(active):
            run = training.run
            if run.sweep:
                training.limit = 2 * best.get(run.method, math.inf)
            training.turn()
            if run.ended:
                active.remove(training)
                best[run.method] = min(best.get(run.method, math.inf), run.reached()[1])
                save(run)
                console.print(f"{run.data}: {run.method}, lr {run.rate:g}, seed {run.seed}: {run.ended} after "
                              f"{run.steps[-1]} steps, {run.seconds[-1]:.1f} s, loss {run.loss[-1]:.3f}")  # fmt: skip


def tuned(runs: list[Run], method: str) -> float:
    """The rate that reached the target first in the sweep; else the one with the lowest loss."""
    mine = [run for run in runs if run.method == method and run.sweep]
    return min(mine, key=lambda run: (run.reached()[1], min(filter(math.isfinite, run.loss), default=math.inf))).rate


def chosen_runs(data: Data, runs: list[Run]) -> dict[str, list[Run]]:
    """The runs of every method with its best rate, those of the sweep left out."""
    here = [run for run in runs if run.data == data.name]
    return {
        name: [run for run in here if run.method == name and not run.sweep and run.rate == tuned(here, name)]
        for name in METHODS
        if any(run.method == name and not run.sweep for run in here)
    }


def methods() -> list[Method]:
    """Those that can run here."""
    return [method for method in METHODS.values() if method.side != "asdl" or find_spec("asdl") is not None]


def main(
    data: Annotated[list[str] | None, typer.Option(help="digits, mnist-5k; both if none is given")] = None,
    only: Annotated[str, typer.Option(help="methods whose names contain this")] = "",
    write: Annotated[bool, typer.Option(help="write docs/wall-clock.md")] = False,
    raw: Annotated[Path, typer.Option(help="raw results, read and added to")] = RAW,
) -> None:
    """Compare times to a target; see the module's docstring."""
    torch.set_num_threads(1)
    console = Console()
    done = {
        run.key: run for run in map(lambda entry: Run(**entry), json.loads(raw.read_text()) if raw.exists() else [])
    }

    def save(run: Run) -> None:
        done[run.key] = run
        entries = [asdict(one) for one in done.values()]
        raw.write_text("[\n" + ",\n".join(json.dumps(_short(entry)) for entry in entries) + "\n]\n")

    chosen = [method for method in methods() if only in method.name]
    if find_spec("asdl") is None:
        console.print("ASDL is not installed: its K-FAC is left out")
    for name in data or DATA:
        sweep = [Run(name, m.name, rate, SWEEP_SEED, True) for m in chosen for rate in m.rates]
        take_turns([run for run in sweep if run.key not in done], DATA[name], save, console)
        here = [run for run in done.values() if run.data == name]
        final = [Run(name, m.name, tuned(here, m.name), seed, False) for m in chosen for seed in DATA[name].seeds]
        take_turns([run for run in final if run.key not in done], DATA[name], save, console)
        console.print(section(DATA[name], list(done.values())), markup=False)
    if write:
        found = list(done.values())
        parts = [section(DATA[name], found) for name in DATA if any(run.data == name for run in found)]
        (DOCS / "wall-clock.md").write_text(HEAD.format(machine=machine(1)) + "\n".join(parts).rstrip() + "\n")


def _short(entry: dict[str, Any]) -> dict[str, Any]:
    return {key: [round(v, 5) for v in value] if isinstance(value, list) else value for key, value in entry.items()}


# --- the page ---------------------------------------------------------------------------------------------------------

HEAD = """# Time to a target

Written by `benchmarks/wall_clock.py --write`, nothing by hand; every run is in `benchmarks/wall_clock.json`. {machine}.
Seconds are processor time of the training steps alone (evaluation and compilation left out; the latter is a column).
Runs took turns. Each method has the learning rate of its grid that reached a train loss of 0.05 first, from another
seed; medians over seeds, with least and most in parentheses; "–" where not every seed got there. ASDL is a peer's K-FAC
(package `asdfghjkl`), with the same damping and refresh period as ours and the empirical Fisher matrix, once with its
own default (factors of the last batch it looked at), once averaged as ours.

"""


def section(data: Data, runs: list[Run]) -> str:
    """Tables of one data set."""
    here = [run for run in runs if run.data == data.name]
    final = chosen_runs(data, runs)
    shown = list(final)
    if not shown:
        return f"## {data.name}\n\nNot run.\n"
    # Every method has to get there: the accuracy that the least accurate of them reaches with every seed.
    common = min(min(run.best for run in final[name]) for name in shown if _fits(final[name]))
    rows = []
    for name in sorted(shown, key=lambda name: statistics.median(run.reached()[1] for run in final[name])):
        mine = final[name]
        rows.append((
            name, f"{mine[0].rate:g}", spread([run.reached()[1] for run in mine], "{:.2f} s"),
            spread([run.reached()[0] for run in mine], "{:.0f}"),
            spread([run.accurate(common)[1] for run in mine], "{:.2f} s"),
            spread([100 * run.best for run in mine], "{:.1f} %"),
            spread([run.accurate(run.best)[1] for run in mine], "{:.2f} s"),
            f"{1e3 * statistics.median(run.seconds[-1] / run.steps[-1] for run in mine):.1f} ms",
            f"{statistics.median(run.compile for run in mine):.2f} s",
        ))  # fmt: skip
    header = ("method", "lr", f"train loss {TARGET}", "steps", f"{100 * common:.1f} % valid", "best valid", "at",
              "a step", "compile")  # fmt: skip
    grid = []
    for name in shown:
        mine = sorted((run for run in here if run.method == name and run.sweep), key=lambda run: run.rate)
        grid.append((name, *(f"{run.rate:g}: {_outcome(run)}" for run in mine)))
    count = max(len(row) for row in grid)
    table = [(*row, *[""] * (count - len(row))) for row in grid]
    images = f"batch {BATCH}, {data.width} channels, images {data.side}×{data.side}, {len(data.seeds)} seeds"
    return (
        f"## {data.name}\n\n{images}"
        + (f"; train loss over {data.sample} of the training images" if data.sample else "")
        + ".\n\n" + verdict(final) + "\n\n" + markdown(header, rows)
        + "\n\nBy base method, without feedback and with it:\n\n" + markdown(COMPARED, compared(final))
        + f"\n\nThe sweep (seconds to a train loss of {TARGET}, or how it ended and the last loss):\n\n"
        + markdown(("method", *["rate"] * (count - 1)), table) + "\n"
    )  # fmt: skip


def verdict(final: dict[str, list[Run]]) -> str:
    """Who was first, by time and by steps."""

    def order(index: int) -> list[tuple[float, str]]:
        return sorted((statistics.median(run.reached()[index] for run in mine), name) for name, mine in final.items())

    said = []
    for index, what, form in ((1, "time", "{:.2f} s"), (0, "steps", "{:.0f}")):
        ranked = order(index)
        mine = next(((value, name) for value, name in ranked if name.startswith("ours")), None)
        others = next(((value, name) for value, name in ranked if not name.startswith("ours")), None)
        if mine and others:
            said.append(f"by {what} the first of ours is {mine[1]} ({form.format(mine[0])}), of the others {others[1]} "
                        f"({form.format(others[0])}): {others[0] / mine[0]:.2f} times ours")  # fmt: skip
    return f"To a train loss of {TARGET}, " + "; ".join(said) + "."


COMPARED = ("base method", "steps without", "with", "time without", "with", "best valid without", "with")


def compared(final: dict[str, list[Run]]) -> list[tuple[str, ...]]:
    """The same base method without feedback and with it, medians over seeds."""
    rows = []
    for name, pair in PAIRS.items():
        if not all(one in final for one in pair):
            continue
        sides = [final[one] for one in pair]
        cells = [
            [median([value(run) for run in side], form) for side in sides]
            for value, form in (
                (lambda run: run.reached()[0], "{:.0f}"), (lambda run: run.reached()[1], "{:.2f} s"),
                (lambda run: 100 * run.best, "{:.1f} %"),
            )
        ]  # fmt: skip
        rows.append((name, *(cell for both in cells for cell in both)))
    return rows


def median(values: list[float], form: str) -> str:
    """Median; a dash where not every seed got there."""
    return form.format(statistics.median(values)) if all(map(math.isfinite, values)) else "–"


def _fits(runs: list[Run]) -> bool:
    return all(math.isfinite(run.reached()[1]) for run in runs)


def _outcome(run: Run) -> str:
    found = run.reached()[1]
    return f"{found:.2f} s" if math.isfinite(found) else f"{run.ended}, {run.loss[-1]:.2g}"


def spread(values: list[float], form: str) -> str:
    """Median, least and most."""
    if not all(math.isfinite(value) for value in values):
        return "–"
    low, high = form.split(" ")[0].format(min(values)), form.split(" ")[0].format(max(values))
    return f"{form.format(statistics.median(values))} ({low}–{high})"


if __name__ == "__main__":
    typer.run(main)
