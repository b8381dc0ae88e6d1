"""What the demo compares and measures: methods, runs, and what all seeds of a method say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn

TARGET = 0.05
"""The train loss that a user waits for."""
GUESSING = math.log(10)
DIVERGED = 0.95 * GUESSING
Step = Callable[[Tensor, Tensor], Tensor]
Spread = tuple[float, float, float]
Verdict = tuple[str, str, str]
"""What was measured, who won and how far the others are, and the default's place: "first", "close" or "behind"."""


@dataclass(frozen=True)
class Method:
    """A way to update the weights: ``make(model, images, lr)`` returns the function of one step.

    Attributes:
        name: short, for the program.
        label: for the reader.
        says: how the user writes it.
        rates: learning rates to begin the sweep with; one is taken as it is, none means nothing to choose.
    """

    name: str
    label: str
    says: str
    make: Callable[[nn.Module, Tensor, float], Step]
    rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Scale:
    """A batch size, how many steps a run makes, and how many evaluations (but for the sweep's)."""

    batch: int
    steps: int
    points: int


@dataclass
class Run:
    """One training run; the lists hold one entry an evaluation, the first before any step."""

    method: Method
    scale: Scale
    rate: float
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0

    @property
    def lost(self) -> bool:
        """No better than guessing at the last evaluation (not finite included): whether it diverged or never began."""
        return not self.losses[-1] < DIVERGED

    def until_target(self, along: list[int] | list[float]) -> float:
        """Steps or seconds to the first evaluation at :data:`TARGET`; infinite if there was none."""
        return next((at for at, loss in zip(along, self.losses, strict=True) if loss <= TARGET), math.inf)

    @property
    def final(self) -> float:
        """Train loss after the last step; what is not finite counts as infinite."""
        return self.losses[-1] if math.isfinite(self.losses[-1]) else math.inf


def chosen(sweep: list[Run]) -> list[Run]:
    """The best of a sweep: by steps to the target, and by the final loss where that is another."""
    fastest = min(sweep, key=lambda run: (run.until_target(run.steps), run.final))
    lowest = min(sweep, key=lambda run: run.final)
    return [fastest] if fastest is lowest else [fastest, lowest]


@dataclass(frozen=True)
class Summary:
    """All seeds of a method at a batch size and rate: medians, with the least and the greatest value."""

    method: Method
    scale: Scale
    runs: tuple[Run, ...]

    @property
    def steps(self) -> Spread:
        """Steps to the target."""
        return spread(run.until_target(run.steps) for run in self.runs)

    @property
    def seconds(self) -> Spread:
        """Processor seconds of training to the target, compiling not included."""
        return spread(run.until_target(run.seconds) for run in self.runs)

    @property
    def final(self) -> Spread:
        """Train loss after the last step."""
        return spread(run.final for run in self.runs)

    @property
    def accuracy(self) -> Spread:
        """Validation accuracy after the last step, in per cent."""
        return spread(100 * run.accuracies[-1] for run in self.runs)

    @property
    def ms(self) -> float:
        """Processor milliseconds a step."""
        return spread(1e3 * run.seconds[-1] / run.steps[-1] for run in self.runs)[0]

    @property
    def compile_seconds(self) -> float:
        """Processor seconds of making the optimizer."""
        return spread(run.compile_seconds for run in self.runs)[0]

    @property
    def diverged(self) -> int:
        """How many seeds ended no better than guessing."""
        return sum(run.lost for run in self.runs)

    @property
    def rate(self) -> str:
        """The learning rate as it is printed."""
        return f"{self.runs[0].rate:g}" if self.method.rates else "–"

    @property
    def label(self) -> str:
        """The method, with its rate if that was tuned."""
        return f"{self.method.label} (lr {self.rate})" if len(self.method.rates) > 1 else self.method.label


@dataclass(frozen=True)
class Experiment:
    """All that the report needs."""

    methods: tuple[Method, ...]
    scales: tuple[Scale, ...]
    sweep: tuple[Run, ...]
    runs: tuple[Run, ...]
    seeds: int
    seconds: float
    images: tuple[int, int]

    def summaries(self, scale: Scale) -> list[Summary]:
        """Every row of the table of one batch size."""
        rows: dict[tuple[Method, float], list[Run]] = {}
        for run in self.runs:
            if run.scale == scale:
                rows.setdefault((run.method, run.rate), []).append(run)
        return [Summary(method, scale, tuple(runs)) for (method, _), runs in rows.items()]

    def swept(self, scale: Scale, method: Method) -> list[Run]:
        """Runs of the sweep, by learning rate."""
        found = [run for run in self.sweep if (run.method, run.scale) == (method, scale)]
        return sorted(found, key=lambda run: run.rate)


def spread(values: Iterable[float]) -> Spread:
    """Median, least, greatest; what is not finite counts as infinite."""
    finite = [value if math.isfinite(value) else math.inf for value in values]
    return statistics.median(finite), min(finite), max(finite)


def said(value: float, form: str, otherwise: str = "–") -> str:
    """A figure for the reader."""
    return form.format(value) if math.isfinite(value) else otherwise


# --- who won ----------------------------------------------------------------------------------------------------------

MEASURES: tuple[tuple[str, Callable[[Summary], Spread], str], ...] = (
    (f"steps to train loss {TARGET:g}", lambda row: row.steps, "{:.0f}"),
    (f"processor time to train loss {TARGET:g}", lambda row: row.seconds, "{:.2f} s"),
    ("train loss at the end", lambda row: row.final, "{:.2g}"),
    ("validation accuracy at the end", lambda row: (-row.accuracy[0], -row.accuracy[2], -row.accuracy[1]), "{:.1f} %"),
)
"""What a user asks, how a row answers (median, best and worst seed; less is better), and how the answer is written."""


def verdicts(experiment: Experiment, scale: Scale) -> list[Verdict]:
    """The answer of one batch size to every measure. A median inside the range of the best is too close to call."""
    found: list[Verdict] = []
    for what, measure, form in MEASURES:
        rows = sorted(experiment.summaries(scale), key=measure)
        best, _, worst = measure(rows[0])
        if not math.isfinite(best):
            found.append((what, "nobody got there", "behind"))
            continue
        lost = "never" if "to train" in what else "not finite"
        texts = [(row, f"{row.label}: {said(abs(measure(row)[0]), form, lost)}") for row in rows]
        level = [row for row in rows if measure(row)[0] <= (worst if math.isfinite(worst) else best)]
        ahead = ", ".join(text for row, text in texts if row in level)
        others = ", ".join(text for row, text in texts if row not in level)
        place = "behind" if all(row.method.name != "default" for row in level) else "close" if level[1:] else "first"
        close = "too close to call: " if level[1:] else ""
        found.append((what, f"{close}{ahead}{'; ' if others else ''}{others}", place))
    return found


PLACES = {"first": "is first by", "close": "is too close to another to call by", "behind": "is not first by"}


def findings(experiment: Experiment) -> list[str]:
    """What the measurements say, for and against, in sentences made from them."""
    said_so = []
    for scale in experiment.scales:
        answers = verdicts(experiment, scale)
        places = {place: [what for what, _, found in answers if found == place] for place in PLACES}
        parts = [f"{PLACES[place]} {_listed(what)}" for place, what in places.items() if what]
        said_so.append(f"Batch {scale.batch}: the default, with nothing tuned, {'; '.join(parts)}.")
        said_so += [f"Batch {scale.batch}, {what}. {answer}." for what, answer, _ in answers]
        bad = [f"{row.label} with {row.diverged} of {len(row.runs)} seeds"
               for row in experiment.summaries(scale) if row.diverged]  # fmt: skip
        said_so += [f"Batch {scale.batch}, no better than guessing at the end: {', '.join(bad)}."] if bad else []
    return [*said_so, _beside_training(experiment)]


def _beside_training(experiment: Experiment) -> str:
    """What the clock of the curves leaves out."""
    compiled = statistics.median(run.compile_seconds for run in experiment.runs if run.method.name == "default")
    first = max(run.compile_seconds for run in experiment.runs)
    sweeps = " and ".join(
        f"{sum(run.seconds[-1] for run in experiment.sweep if run.method == method):.1f} s for {method.label}"
        for method in experiment.methods
        if any(run.method == method for run in experiment.sweep)
    )
    return (
        f"Processor time is that of training. Compiling the default comes on top, {compiled:.2f} s (up to "
        f"{first:.2f} s for what a process compiles first); so do the sweeps, {sweeps}."
    )


def _listed(words: list[str]) -> str:
    return ", ".join(words[:-1]) + " and " + words[-1] if len(words) > 1 else words[0]
