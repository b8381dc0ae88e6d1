"""Runs of benchmarks/robustness.py: side by side, with sweeps of the learning rate, kept in a file as they end."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from common import machine, measured
from rich.console import Console
from robustness_cases import DEFAULT, LOSS, METHODS, RATES, RIVALS, TASKS, Method, Task
from torch import Tensor, nn

TARGET = 0.05
SWEEP_SEED = 100
SEEDS = 3
"""Of methods that only decide something."""
TEXT = ("task", "method", "ended", "measured", "machine")


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A row of the results.

    Attributes:
        task, method, rate, seed: which run; ``rate`` is 0 where nothing is tuned. The sweep's have their own seed.
        compile_s: processor time to make the step.
        step_ms: mean processor time of a step.
        steps_to, seconds_to: steps and their processor time at the first evaluation with a train loss below the target;
            infinite if there is none.
        train_loss, valid_loss, accuracy: at the end, in evaluation mode; accuracy is validation's.
        best_valid_loss, best_accuracy: over all evaluations.
        ended: why it ended: "steps", "target" (the sweep) or what went wrong.
        measured, machine: when, which commit, where.
    """

    task: str
    method: str
    rate: float
    seed: int
    compile_s: float = 0.0
    step_ms: float = 0.0
    steps_to: float = math.inf
    seconds_to: float = math.inf
    train_loss: float = math.inf
    valid_loss: float = math.inf
    accuracy: float = 0.0
    best_valid_loss: float = math.inf
    best_accuracy: float = 0.0
    ended: str = ""
    measured: str = ""
    machine: str = ""

    @property
    def key(self) -> tuple[str, str, float, int]:
        """Identifies it."""
        return self.task, self.method, self.rate, self.seed


Runs = dict[tuple[str, str, float, int], Run]


class Training:
    """A run under way."""

    def __init__(self, run: Run, task: Task, data: dict[str, tuple[Tensor, Tensor]]) -> None:
        self.run, self.task, self.data = run, task, data
        torch.manual_seed(run.seed)
        self.model, (self.x, self.y) = task.build(), data["train"]
        self.batches, self.done, self.clock = self._batches(), 0, 0.0
        start = time.process_time()
        self.step = METHODS[run.method].make(self.model, self.x[: task.batch], run.rate or None)
        run.compile_s = time.process_time() - start

    def _batches(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(self.run.seed)
        while True:
            for index in torch.randperm(len(self.y), generator=generator).split(self.task.batch):
                if len(index) == self.task.batch:
                    yield index

    def turn(self) -> None:
        """A few steps, timed, and an evaluation, not timed."""
        for _ in range(self.task.every):
            index = next(self.batches)
            x, y = self.x[index], self.y[index]
            start = time.process_time()
            try:
                finite = bool(self.step(x, y).isfinite())
            except (ArithmeticError, RuntimeError) as error:
                finite, self.run.ended = False, type(error).__name__
            self.clock += time.process_time() - start
            self.done += 1
            if not finite:
                self.run.ended = self.run.ended or "not finite"
                break
        self._evaluate()

    def _evaluate(self) -> None:
        run = self.run
        run.step_ms = 1e3 * self.clock / self.done
        if self.done >= self.task.steps:
            run.ended = run.ended or "steps"
        run.valid_loss, run.accuracy = score(self.model, *self.data["valid"])
        run.best_valid_loss = min(run.best_valid_loss, run.valid_loss)
        run.best_accuracy = max(run.best_accuracy, run.accuracy)
        if run.ended or math.isinf(run.steps_to):
            run.train_loss, _ = score(self.model, *(part[: self.task.sample or None] for part in self.data["train"]))
            if run.train_loss < TARGET and math.isinf(run.steps_to):
                run.steps_to, run.seconds_to = self.done, self.clock
                run.ended = run.ended or ("target" if run.seed == SWEEP_SEED else "")


@torch.no_grad()
def score(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss (infinite if it is not a number) and accuracy, in evaluation mode."""
    model.eval()
    outputs = torch.cat([model(part) for part in x.split(512)])
    model.train()
    loss = float(LOSS(outputs, y))
    return loss if math.isfinite(loss) else math.inf, float((outputs.argmax(1) == y).float().mean())


# --- many runs --------------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """Runs, kept in a file as they end.

    Attributes:
        path: the file; ``None``: nothing is kept.
        runs: all that are known.
    """

    path: Path | None
    console: Console
    runs: Runs

    def take_turns(self, task: Task, wanted: Sequence[tuple[Method, float, int]], again: bool = False) -> None:
        """Run them side by side, a turn each, until all have ended; what is known already is left out."""
        runs = [Run(task.name, method.name, rate, seed) for method, rate, seed in wanted]
        runs = [run for run in runs if again or run.key not in self.runs]
        if not runs:
            return
        images = task.load()
        side = math.isqrt(images.train[0][0].numel())
        parts = {"train": images.train, "valid": images.valid}
        data = {name: (x.view(-1, 1, side, side), y) for name, (x, y) in parts.items()}
        active, when, where = [Training(run, task, data) for run in runs], measured(), machine(1)
        while active:
            for training in list(active):
                training.turn()
                if training.done > self.limit(training.run):
                    training.run.ended = training.run.ended or "slower"
                if training.run.ended:
                    active.remove(training)
                    training.run.measured, training.run.machine = when, where
                    self.keep(training.run)

    def keep(self, run: Run) -> None:
        """A finished run."""
        self.runs[run.key] = run
        rate = f" lr {run.rate:g}" if run.rate else ""
        self.console.print(
            f"{run.task}: {run.method}{rate}, seed {run.seed}: {run.ended}; {run.steps_to:g} steps, "
            f"{run.seconds_to:.2f} s, loss {run.train_loss:.5f}, {run.accuracy:.1%} (best {run.best_accuracy:.1%}), "
            f"{run.step_ms:.1f} ms", soft_wrap=True, highlight=False,
        )  # fmt: skip
        if self.path is not None:
            with self.path.open("w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, [part.name for part in fields(Run)], lineterminator="\n")
                writer.writeheader()
                for found in sorted(self.runs.values(), key=place):
                    cells = {name: f"{v:.5g}" if isinstance(v, float) else v for name, v in asdict(found).items()}
                    writer.writerow(cells)

    def sweep(self, task: Task, methods: Sequence[Method]) -> None:
        """The grids' learning rates, then the best one's neighbours until none is missing."""
        wanted = [(method, rate, SWEEP_SEED) for method in methods for rate in method.rates]
        while wanted:
            self.take_turns(task, wanted)
            wanted = [
                (method, rate, SWEEP_SEED)
                for method in methods
                for rate in beside(tuned(self.runs, task, method))
                if (task.name, method.name, rate, SWEEP_SEED) not in self.runs
            ]

    def limit(self, run: Run) -> float:
        """Steps after which a run of a sweep is not the best; infinite for other runs."""
        found = swept(self.runs, run.task, run.method) if run.seed == SWEEP_SEED else []
        return min((other.steps_to for other in found), default=math.inf)

    def measure(self, task: Task, methods: Sequence[Method], seeds: int, again: bool = False) -> None:
        """A task: the sweep, then seed by seed all methods that are wanted."""
        self.sweep(task, [method for method in methods if method.rates])
        chosen = [(method, tuned(self.runs, task, method)) for method in methods]
        for seed in range(min(seeds, task.seeds)):
            here = [pair for pair in chosen if seed < SEEDS or pair[0] in (DEFAULT, *RIVALS)]
            self.take_turns(task, [(*pair, seed) for pair in here], again)


def swept(runs: Runs, task: str, method: str) -> list[Run]:
    """Runs of its sweep."""
    return [run for key, run in runs.items() if key[:2] == (task, method) and run.seed == SWEEP_SEED]


def tuned(runs: Runs, task: Task, method: Method) -> float:
    """The rate that reached the target in the fewest steps, or else has the lowest train loss; 0 without a sweep."""
    found = swept(runs, task.name, method.name)
    return min(found, key=lambda run: (run.steps_to, run.train_loss)).rate if found else 0.0


def beside(rate: float) -> tuple[float, ...]:
    """A learning rate's neighbours."""
    index = RATES.index(rate)
    return RATES[max(index - 1, 0) : index + 2]


def final(runs: Runs, task: Task, method: Method) -> list[Run]:
    """Its runs with the tuned rate, by seed."""
    rate = tuned(runs, task, method)
    found = [run for run in runs.values() if run.key[:3] == (task.name, method.name, rate) and run.seed != SWEEP_SEED]
    return sorted(found, key=lambda run: run.seed)


def load(path: Path) -> Runs:
    """What a file has."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{k: v if k in TEXT else int(v) if k == "seed" else float(v) for k, v in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip
    runs = [Run(**row) for row in rows]
    return {run.key: run for run in runs}


def place(run: Run) -> tuple[int, int, float, int]:
    """Where a row stands in the file."""
    return list(TASKS).index(run.task), list(METHODS).index(run.method), run.rate, run.seed
