"""What the demo compares and measures: methods, runs, and what all seeds of a method say together."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from gtddp_compile.graph import grouped

TARGET = 0.05
"""The train loss that a user waits for."""
GUESSING = math.log(10)
DIVERGED = 0.95 * GUESSING
Step = Callable[[Tensor, Tensor], Tensor]
Spread = tuple[float, float, float]
Verdict = tuple[str, str, str]
"""What was measured, who won and how far the others are, and the default's place: "first", "close" or "behind"."""
Tried = tuple[str, str, str, str, str, bool]
"""A run of a sweep in words: batch, method, rate, steps to the target, final loss; and whether it was chosen."""


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


FIGURES: Mapping[str, tuple[str, str, Callable[[Run], float]]] = {
    "steps": (f"steps to {TARGET:g}", "{:.0f}", lambda run: run.until_target(run.steps)),
    "seconds": (f"s to {TARGET:g}", "{:.2f}", lambda run: run.until_target(run.seconds)),
    "final": ("train loss", "{:.2g}", lambda run: run.final),
    "accuracy": ("valid. %", "{:.1f}", lambda run: 100 * run.accuracies[-1]),
    "ms": ("ms/step", "{:.2f}", lambda run: 1e3 * run.seconds[-1] / run.steps[-1]),
    "compile": ("compile s", "{:.2f}", lambda run: run.compile_seconds),
}
"""Columns of the tables: title, form and figure. Seconds are the processor's, of training but for ``compile``."""


@dataclass(frozen=True, eq=False)
class Summary:
    """All seeds of a method at a batch size and rate."""

    method: Method
    scale: Scale
    runs: tuple[Run, ...]

    def spread(self, figure: str) -> Spread:
        """Median, least, greatest over the seeds; what is not finite counts as infinite."""
        values = [FIGURES[figure][2](run) for run in self.runs]
        finite = [value if math.isfinite(value) else math.inf for value in values]
        return statistics.median(finite), min(finite), max(finite)

    @property
    def cells(self) -> list[tuple[str, str]]:
        """Every figure as two texts: median, and range."""
        found = []
        for name, (_, form, _) in FIGURES.items():
            median, least, greatest = (said(value, form) for value in self.spread(name))
            found.append((median, "" if least == greatest else f"{least} to {greatest}"))
        return found

    @property
    def diverged(self) -> str:
        """How many seeds ended no better than guessing, where any did."""
        count = sum(run.lost for run in self.runs)
        return f"{count} of {len(self.runs)}" if count else ""

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
        rows = grouped((run for run in self.runs if run.scale == scale), lambda run: (run.method, run.rate))
        return [Summary(method, scale, tuple(runs)) for (method, _), runs in rows.items()]

    def swept(self) -> list[list[Tried]]:
        """The sweeps as rows of a table, one list a batch size and method, by learning rate."""
        groups = grouped(sorted(self.sweep, key=lambda run: run.rate), lambda run: (run.scale, run.method))
        order = [(scale, method) for scale in self.scales for method in self.methods if (scale, method) in groups]
        return [[_tried(run, chosen(groups[key])) for run in groups[key]] for key in order]


def _tried(run: Run, best: list[Run]) -> Tried:
    steps, loss = said(run.until_target(run.steps), "{:.0f}"), said(run.final, "{:.2g}", "not finite")
    return str(run.scale.batch), run.method.label, f"{run.rate:g}", steps, loss, run in best


def said(value: float, form: str, otherwise: str = "–") -> str:
    """A figure for the reader."""
    return form.format(value) if math.isfinite(value) else otherwise


# --- who won ----------------------------------------------------------------------------------------------------------

MEASURES = (
    (f"steps to train loss {TARGET:g}", "steps", "{:.0f}", "never"),
    (f"processor time to train loss {TARGET:g}", "seconds", "{:.2f} s", "never"),
    ("train loss at the end", "final", "{:.2g}", "not finite"),
    ("validation accuracy at the end", "accuracy", "{:.1f} %", "not finite"),
)
"""What a user asks, the figure that answers, how the answer is written, and what is said where there is none."""


def verdicts(experiment: Experiment, scale: Scale) -> list[Verdict]:
    """The answer of one batch size to every measure. A median inside the range of the best is too close to call."""
    found: list[Verdict] = []
    for what, figure, form, lost in MEASURES:
        sign = -1 if figure == "accuracy" else 1
        medians = {row: sign * row.spread(figure)[0] for row in experiment.summaries(scale)}
        worst = {row: max(sign * end for end in row.spread(figure)[1:]) for row in medians}
        rows = sorted(medians, key=lambda row: (medians[row], worst[row]))
        best = medians[rows[0]]
        if not math.isfinite(best):
            found.append((what, "nobody got there", "behind"))
            continue
        limit = worst[rows[0]] if math.isfinite(worst[rows[0]]) else best
        level = [row for row in rows if medians[row] <= limit]
        texts = {row: f"{row.label}: {said(abs(medians[row]), form, lost)}" for row in rows}
        ahead = ", ".join(texts[row] for row in level)
        others = ", ".join(texts[row] for row in rows if row not in level)
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
        bad = [f"{row.label} with {row.diverged} seeds" for row in experiment.summaries(scale) if row.diverged]
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
