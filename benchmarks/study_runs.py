"""Runs of the studies: side by side, with sweeps of the learning rate, kept in one file as they end."""

from __future__ import annotations

import csv
import fcntl
import io
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from common import in_process, machine, measured
from study_methods import DEFAULT, METHODS, RATES, RIVALS, Method
from study_tasks import TASKS, Batch, Data, Task

RAW, COLD = (Path(__file__).with_name(name) for name in ("study.csv", "cold.py"))
SWEEP_SEED = 100
SEEDS = 3
"""Of methods that only decide something."""
TEXT = ("task", "method", "schedule", "ended", "measured", "machine")
Key = tuple[str, str, float, str, int]
Wanted = tuple[Method, float, str, int]
"""A method with its rate, schedule and seed."""


# --- one run ----------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A row of the results.

    Attributes:
        task, method, rate, schedule, seed: which run; ``rate`` is 0 where nothing is tuned. The sweep's have their own
            seed.
        cold_s: processor time to make the step in a new process (:func:`cold_seconds`); 0 where it was not looked at.
        compile_s: the same in the study's process, without the import.
        step_ms: mean processor time of a step.
        steps_to, seconds_to: steps and their processor time at the first evaluation with a loss below the target;
            infinite if there is none.
        train_loss, valid_loss, accuracy: at the end, in evaluation mode; accuracy is validation's.
        best_valid_loss, best_accuracy: over all evaluations.
        ended: why it ended: "steps", "target" (the sweep) or what went wrong.
        measured, machine: when, which commit, where.
    """

    task: str
    method: str
    rate: float
    schedule: str
    seed: int
    cold_s: float = 0.0
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
    def key(self) -> Key:
        """Identifies it."""
        return self.task, self.method, self.rate, self.schedule, self.seed

    @property
    def loss(self) -> float:
        """What the target is of, at the last evaluation before it was reached."""
        return self.valid_loss if TASKS[self.task].watch == "valid" else self.train_loss


Runs = dict[Key, Run]


def cold_seconds(run: Run) -> float:
    """Import and compiling in a new process, beyond torch.optim's own: the faster of two, the first writes bytecode."""
    return min(in_process(str(COLD), run.task, run.method)["cold_s"] for _ in range(2))


class Training:
    """A run under way."""

    def __init__(self, run: Run, task: Task, data: Data) -> None:
        self.run, self.task, self.parts = run, task, task.parts(data)
        torch.manual_seed(run.seed)
        self.model, method = task.build(), METHODS[run.method]
        self.batches, self.done, self.clock = data.batches(task.batch, run.seed), 0, 0.0
        if method.whole:
            self.batches = self._whole(data)
        example: Batch = next(data.batches(task.batch, run.seed))
        start = time.process_time()
        self.step, self.tell = method.make(self.model, task, example[0], run)
        run.compile_s = time.process_time() - start

    def _whole(self, data: Data) -> Iterator[Batch]:
        batch = next(data.batches(self.task.batch, self.run.seed)) if data.draw else data.train
        while True:
            yield batch

    def turn(self) -> None:
        """A few steps, timed, and an evaluation, not timed."""
        for _ in range(self.task.every):
            batch = next(self.batches)
            start = time.process_time()
            try:
                finite = bool(self.step(*batch).isfinite())
            except (ArithmeticError, RuntimeError) as error:  # what goes wrong is told in the row
                finite, self.run.ended = False, type(error).__name__
            self.clock += time.process_time() - start
            self.done += 1
            if not finite:
                self.run.ended = self.run.ended or "not finite"
                break
        self.tell(False)
        self._evaluate()
        self.tell(True)

    def _evaluate(self) -> None:
        run, task = self.run, self.task
        run.step_ms = 1e3 * self.clock / self.done
        if self.done >= task.steps:
            run.ended = run.ended or "steps"
        late = run.seed == SWEEP_SEED and task.watch == "train"  # a sweep is validated at the target alone
        if not late:
            self._validate()
        if run.ended or math.isinf(run.steps_to):
            run.train_loss, _ = task.score(self.model, self.parts[0])
            if run.loss < task.target and math.isinf(run.steps_to):
                run.steps_to, run.seconds_to = self.done, self.clock
                run.ended = run.ended or ("target" if run.seed == SWEEP_SEED else "")
        if late and run.ended:
            self._validate()

    def _validate(self) -> None:
        run = self.run
        run.valid_loss, run.accuracy = self.task.score(self.model, self.parts[1])
        run.best_valid_loss = min(run.best_valid_loss, run.valid_loss)
        run.best_accuracy = max(run.best_accuracy, run.accuracy)


# --- many runs --------------------------------------------------------------------------------------------------------


class Spent(Exception):
    """The time for the study is over."""


@dataclass
class Study:
    """Runs, kept in a file as they end.

    Attributes:
        path: the file; ``None``: nothing is kept.
        runs: all that are known.
        say: told what goes on.
        until: from when on nothing is begun (``time.monotonic``).
        cosine: whether schedules are swept.
    """

    path: Path | None
    runs: Runs
    say: Callable[[str], None] = print
    until: float = math.inf
    cosine: bool = True

    def take_turns(self, task: Task, wanted: Sequence[Wanted], again: bool = False) -> None:
        """Run them side by side, a turn each, until all have ended; what is known already is left out.

        Raises:
            Spent: the time is over.
        """
        runs = [Run(task.name, method.name, *rest) for method, *rest in wanted]
        runs = [run for run in runs if again or run.key not in self.runs]
        if not runs:
            return
        if time.monotonic() > self.until:
            raise Spent
        data, when, where = task.load(), measured(), machine(1)
        active = []
        for run in runs:
            run.measured, run.machine = when, where
            if METHODS[run.method].ours and run.seed == 0 and self.path is not None:
                run.cold_s = cold_seconds(run)
            active.append(Training(run, task, data))
        while active:
            for training in list(active):
                training.turn()
            ended = [training.run.ended or self.hopeless(training, active) for training in active]
            for training, why in zip(list(active), ended, strict=True):
                if why:
                    training.run.ended = why
                    active.remove(training)
                    self.keep(training.run)
            said = ", ".join(f"{training.run.method} {training.done}" for training in active[:3])
            self.say(f"{task.name}: {len(active)} under way of {task.steps} steps: {said}")

    def keep(self, run: Run) -> None:
        """A finished run, beside what other processes have kept."""
        self.runs[run.key] = run
        if self.path is None:
            return
        with self.path.open("a+", encoding="utf-8", newline="") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            self.runs = {**load(self.path), run.key: run}
            whole = io.StringIO()  # what goes wrong before it is whole leaves the file as it is
            writer = csv.DictWriter(whole, [part.name for part in fields(Run)], lineterminator="\n")
            writer.writeheader()
            for found in sorted(self.runs.values(), key=place):
                writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in asdict(found).items()})
            file.truncate(0)
            file.write(whole.getvalue())

    def sweep(self, task: Task, methods: Sequence[Method]) -> None:
        """The grids' learning rates with every schedule, then the best one's neighbours until none is missing."""
        kinds = ("constant", "cosine") if self.cosine else ("constant",)
        wanted = [(method, rate, kind, SWEEP_SEED) for method in methods if len(method.rates) > 1
                  for kind in kinds[: 1 + method.cosine] for rate in method.rates]  # fmt: skip
        while wanted:
            self.take_turns(task, wanted)
            best = [(method, tuned(self.runs, task, method)) for method in methods if len(method.rates) > 1]
            wanted = [(method, rate, kind, SWEEP_SEED) for method, (middle, kind) in best for rate in beside(middle)
                      if (task.name, method.name, rate, kind, SWEEP_SEED) not in self.runs]  # fmt: skip

    def hopeless(self, training: Training, active: Sequence[Training]) -> str:
        """Why a run of a sweep cannot be the best: slower than one that is done, or behind two from a quarter on."""
        run = training.run
        if run.seed != SWEEP_SEED:
            return ""
        if training.done > min((other.steps_to for other in swept(self.runs, run.task, run.method)), default=math.inf):
            return "slower"
        ahead = [other for other in active if (other.run.method, other.run.schedule) == (run.method, run.schedule)
                 and other.run.loss < run.loss]  # fmt: skip
        return "behind" if 4 * training.done >= training.task.steps and len(ahead) > 1 else ""

    def measure(self, task: Task, methods: Sequence[Method], seeds: Sequence[int], again: bool = False) -> None:
        """A task: the sweep, then seed by seed all methods that are wanted.

        Raises:
            Spent: the time is over.
        """
        methods = [method for method in methods if not method.only or task.name in method.only]
        self.sweep(task, methods)
        chosen = [(method, *tuned(self.runs, task, method)) for method in methods]
        for seed in seeds:
            here = [(*one, seed) for one in chosen if seed < SEEDS or one[0] in (DEFAULT, *RIVALS)]
            self.take_turns(task, here if seed < task.seeds else [], again)


def swept(runs: Runs, task: str, method: str) -> list[Run]:
    """Runs of its sweep."""
    return [run for key, run in runs.items() if key[:2] == (task, method) and run.seed == SWEEP_SEED]


def tuned(runs: Runs, task: Task, method: Method) -> tuple[float, str]:
    """The rate and schedule that reached the target in the fewest steps, or else have the lowest loss."""
    found = swept(runs, task.name, method.name)
    if not found:
        return (method.rates[0] if method.rates else 0.0), "constant"
    seen = "best_valid_loss" if task.watch == "valid" else "train_loss"
    best = min(found, key=lambda run: (run.steps_to, getattr(run, seen)))
    return best.rate, best.schedule


def beside(rate: float) -> tuple[float, ...]:
    """A learning rate's neighbours."""
    index = RATES.index(rate)
    return RATES[max(index - 1, 0) : index + 2]


def final(runs: Runs, task: Task, method: Method) -> list[Run]:
    """Its runs with the tuned rate, by seed."""
    best = (task.name, method.name, *tuned(runs, task, method))
    found = [run for run in runs.values() if run.key[:4] == best and run.seed != SWEEP_SEED]
    return sorted(found, key=lambda run: run.seed)


def median(runs: Sequence[Run], name: str) -> float:
    """Of a figure over runs."""
    return statistics.median(getattr(run, name) for run in runs)


def number(value: float, form: str = "g", unit: str = "") -> str:
    """A dash for what was not reached."""
    return format(value, form) + unit if math.isfinite(value) else "–"


def load(path: Path = RAW) -> Runs:
    """What a file has."""
    if not path.exists():
        return {}
    with path.open(encoding="utf-8", newline="") as file:
        rows = [{k: v if k in TEXT else int(v) if k == "seed" else float(v) for k, v in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip
    runs = [Run(**row) for row in rows]
    return {run.key: run for run in runs}


def place(run: Run) -> tuple[int, int, float, str, int]:
    """Where a row stands in the file."""
    return list(TASKS).index(run.task), list(METHODS).index(run.method), run.rate, run.schedule, run.seed
