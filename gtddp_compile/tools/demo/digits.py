"""The paper's DIGITS experiment (Sec. 5, appendix C.1): SGD and Adam, both tuned, the paper's form, and the default.

Run ``gtddp-compile demo digits``: it sweeps the learning rates of the base methods on a seed of its own, trains every
method from the same weights on the same batches, shows the runs as they go, prints a table and writes ``digits.html``,
one page that needs nothing else. Every figure in it was measured in that run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gtddp_compile.api import compile_optimizer
from gtddp_compile.tools.demo.experiment import (
    FIGURES,
    TARGET,
    Experiment,
    Method,
    Run,
    Scale,
    Step,
    chosen,
    findings,
    said,
)
from gtddp_compile.tools.demo.report import write_report

TRAIN = 1437
SPLIT_SEED = 2020
SWEEP_SEED = 1000
SWEEP_POINTS = 10
LADDER = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Learning rates of a sweep: by a factor of three."""


class DigitsNet(nn.Module):
    """One residual block of three 3x3 convolutions and a fully connected head, ReLU, no normalisation.

    The first convolution lifts the image to ``width`` channels, so the shortcut around the other two is the identity.
    The paper leaves the channels to a figure; 16 and one 2x2 pooling suit images of 8x8.
    """

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, width, 3, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(width * 4 * 4, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Scores of the ten digits."""
        shortcut = torch.relu(self.conv1(images))
        main = torch.relu(self.conv2(shortcut))
        merged = torch.relu(self.conv3(main) + shortcut)
        scores: Tensor = self.head(self.pool(merged).flatten(1))
        return scores


# --- what is compared -------------------------------------------------------------------------------------------------


def _torchs(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module, Tensor, float], Step]:
    """Torch's own optimizer in the usual loop, so that its time is what its users see."""

    def make(model: nn.Module, _: Tensor, lr: float) -> Step:
        optimizer, criterion = kind(model.parameters(), lr=lr, **options), nn.CrossEntropyLoss()  # type: ignore[call-arg]

        def step(images: Tensor, labels: Tensor) -> Tensor:
            optimizer.zero_grad()
            loss: Tensor = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    return make


def _papers(model: nn.Module, images: Tensor, lr: float) -> Step:
    return compile_optimizer(
        model, images, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=lr, coupling="block", recursion="substituted",
        on_nonfinite="skip",
    ).step  # fmt: skip


def _default(model: nn.Module, images: Tensor, _: float) -> Step:
    return compile_optimizer(model, images, loss=nn.CrossEntropyLoss()).step


METHODS = (
    Method("sgd", "Nesterov SGD", "torch.optim.SGD(momentum=0.9, nesterov=True), lr tuned",
           _torchs(torch.optim.SGD, momentum=0.9, nesterov=True), (0.01, 0.03, 0.1)),
    Method("adam", "Adam", "torch.optim.Adam, lr tuned", _torchs(torch.optim.Adam), (1e-3, 3e-3, 0.01, 0.03)),
    Method("paper", "the paper's form", "coupling='block', recursion='substituted', sgd at its own lr 0.01",
           _papers, (0.01,)),
    Method("default", "the default", "compile_optimizer(model, x, loss=loss), nothing tuned", _default),
)  # fmt: skip


# --- training ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Images and labels, split once and for all."""

    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]

    @classmethod
    def load(cls) -> Data:
        """scikit-learn's digits, scaled to [0, 1]: 1437 images to train on, 360 to validate on."""
        bunch = load_digits()
        images = torch.tensor(bunch.images / 16.0, dtype=torch.float32).unsqueeze(1)
        labels = torch.tensor(bunch.target)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
        train, valid = order[:TRAIN], order[TRAIN:]
        return cls((images[train], labels[train]), (images[valid], labels[valid]))

    def batches(self, scale: Scale, seed: int) -> Tensor:
        """Indices of the batches of a run: epochs in random order, the rest of an epoch left out."""
        generator = torch.Generator().manual_seed(seed)
        an_epoch = TRAIN // scale.batch
        epochs = [
            torch.randperm(TRAIN, generator=generator)[: an_epoch * scale.batch].view(an_epoch, scale.batch)
            for _ in range(-(-scale.steps // an_epoch))
        ]
        return torch.cat(epochs)[: scale.steps]


@torch.no_grad()
def _evaluate(run: Run, model: nn.Module, data: Data) -> None:
    losses, accuracies = [], []
    for images, labels in (data.train, data.valid):
        scores = torch.cat([model(part) for part in images.split(512)])
        losses.append(float(nn.functional.cross_entropy(scores, labels)))
        accuracies.append(float((scores.argmax(1) == labels).float().mean()))
    run.losses.append(losses[0])
    run.accuracies.append(accuracies[1])


def _side_by_side(runs: list[Run], data: Data, points: int) -> Iterator[int]:
    """Train runs of one batch size and seed, taking turns of a few steps, so that they share the machine's moods.

    Yields the number of steps just made (of all runs together). The clock is the processor's; evaluation is not on it.
    """
    scale, seed = runs[0].scale, runs[0].seed
    batches = data.batches(scale, seed)
    models: list[nn.Module] = []
    step: list[Step] = []
    for run in runs:
        torch.manual_seed(seed)
        models.append(DigitsNet())
        started = time.process_time()
        step.append(run.method.make(models[-1], data.train[0][: scale.batch], run.rate))
        run.compile_seconds = time.process_time() - started
        run.steps, run.seconds = [0], [0.0]
        _evaluate(run, models[-1], data)
    stretch = max(1, scale.steps // points)
    for number, start in enumerate(range(0, scale.steps, stretch)):
        chunk = batches[start : start + stretch]
        for turn in range(len(runs)):
            which = (number + turn) % len(runs)
            run = runs[which]
            started = time.process_time()
            for index in chunk:
                step[which](data.train[0][index], data.train[1][index])
            run.seconds.append(run.seconds[-1] + time.process_time() - started)
            run.steps.append(start + len(chunk))
            _evaluate(run, models[which], data)
            yield len(chunk)


# --- the experiment ---------------------------------------------------------------------------------------------------


class _Show:
    """The live display: progress, and the runs as they stand."""

    def __init__(self, console: Console, data: Data) -> None:
        self.data = data
        self.progress = Progress(
            TextColumn("[bold]{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("steps"),
            TimeElapsedColumn(), console=console, expand=True,
        )  # fmt: skip
        self._task = self.progress.add_task("DIGITS", total=0)
        self.live = Live(self.progress, console=console, refresh_per_second=4)

    def expect(self, runs: list[Run]) -> None:
        """Runs that are to come."""
        total = self.progress.tasks[0].total or 0
        self.progress.update(self._task, total=total + sum(run.scale.steps for run in runs))

    def train(self, runs: list[Run], board: list[Run], what: str, points: int) -> None:
        """Train runs side by side, with so many evaluations; ``board``: those to show."""
        self.progress.update(self._task, description=what)
        for made in _side_by_side(runs, self.data, points):
            self.progress.advance(self._task, made)
            self.live.update(Group(_board(board), self.progress))


def _sweep(show: _Show, method: Method, scale: Scale) -> list[Run]:
    """Runs at the method's rates on the sweep's seed, and beyond them while one of the best is at an end."""
    done: list[Run] = []
    rates = list(method.rates)
    while rates:
        runs = [Run(method, scale, rate, SWEEP_SEED) for rate in rates]
        show.expect(runs)
        show.train(runs, [*done, *runs], f"sweep: {method.label}, batch {scale.batch}", SWEEP_POINTS)
        done = [*done, *runs]
        tried, best = ([LADDER.index(run.rate) for run in some] for some in (done, chosen(done)))
        beside = [end + by for end, by in ((min(tried), -1), (max(tried), 1)) if end in best]
        rates = [LADDER[place] for place in beside if 0 <= place < len(LADDER)]
    return done


def run_experiment(steps: int, seeds: int, console: Console) -> Experiment:
    """The sweeps, then every method at every batch size with every seed, shown live."""
    started = time.perf_counter()
    scales = (Scale(8, steps, 40), Scale(128, max(1, steps // 12), 40))
    show, sweep = _Show(console, Data.load()), list[Run]()
    with show.live:
        rates: dict[tuple[Method, Scale], list[float]] = {}
        for scale in scales:
            for method in METHODS:
                found = _sweep(show, method, scale) if len(method.rates) > 1 else []
                rates[method, scale] = [run.rate for run in chosen(found)] if found else [*method.rates] or [0.0]
                sweep += found
        groups = [
            [Run(method, scale, rate, seed) for method in METHODS for rate in rates[method, scale]]
            for scale in scales
            for seed in range(seeds)
        ]
        runs = [run for group in groups for run in group]
        show.expect(runs)
        for group in groups:
            scale, seed = group[0].scale, group[0].seed
            show.train(group, runs, f"batch {scale.batch}, seed {seed}", scale.points)
        show.progress.update(show.progress.tasks[0].id, description="all runs")
    images = (len(show.data.train[1]), len(show.data.valid[1]))
    return Experiment(METHODS, scales, tuple(sweep), tuple(runs), seeds, time.perf_counter() - started, images)


# --- terminal ---------------------------------------------------------------------------------------------------------

LOOKS = {"sgd": "cyan", "adam": "magenta", "paper": "yellow", "default": "bold green"}


def _board(runs: list[Run]) -> Table:
    """The runs as they stand: one row a batch size, method and rate, one column a seed."""
    table = Table(title="train loss, as it goes", title_justify="left")
    for column in ("batch", "method", "lr"):
        table.add_column(column)
    for seed in sorted({run.seed for run in runs}):
        table.add_column(f"seed {seed}", justify="right", min_width=9)
    rows: dict[tuple[int, Method, float], list[Text]] = {}
    for run in runs:
        cell = Text("·", style="dim")
        if run.losses:
            bad = run.lost and run.steps[-1] > 0
            cell = Text(said(run.losses[-1], "{:.2g}", "not finite"), "bold red" if bad else LOOKS[run.method.name])
        rows.setdefault((run.scale.batch, run.method, run.rate), []).append(cell)
    for (batch, method, rate), cells in rows.items():
        table.add_row(str(batch), Text(method.label, LOOKS[method.name]), f"{rate:g}" if rate else "–", *cells)
    return table


def _table(title: str, left: int, *columns: str) -> Table:
    """A table whose columns but for the first ``left`` hold figures."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < left else "right", no_wrap=index < left)
    return table


def _swept(experiment: Experiment) -> Table:
    """What the sweeps found at every rate, the chosen one marked."""
    title = f"the sweep, on seed {SWEEP_SEED}; * chosen: by steps, and by the train loss"
    table = _table(title, 2, "batch", "method", "lr  ", f"steps to {TARGET:g}", "train loss")
    for runs in experiment.swept():
        for batch, method, rate, steps, loss, best in runs:
            table.add_row(batch, method, f"{rate} {'*' if best else ' '}", steps, loss)
        table.add_section()
    return table


def _result(experiment: Experiment, scale: Scale) -> Table:
    """The table of the report, for the terminal."""
    title = f"DIGITS, batch {scale.batch}, {scale.steps} steps: medians of {experiment.seeds} seeds, processor time"
    table = _table(title, 1, "method", "lr", *(column for column, _, _ in FIGURES.values()))
    for row in experiment.summaries(scale):
        medians = [median for median, _ in row.cells]
        table.add_row(Text(row.method.label, LOOKS[row.method.name]), row.rate, *medians)
    return table


def main(steps: int, seeds: int, out: Path) -> None:
    """Train the paper's DIGITS network with tuned SGD and Adam, the paper's form and the default; write a report."""
    torch.set_num_threads(1)
    console = Console()
    experiment = run_experiment(steps, seeds, console)
    console.print(_swept(experiment))
    for scale in experiment.scales:
        console.print(_result(experiment, scale))
    optimizer = compile_optimizer(DigitsNet(), torch.zeros(8, 1, 8, 8), loss=nn.CrossEntropyLoss())
    with console.status("writing the report"):
        write_report(out, experiment, optimizer)
    for sentence in findings(experiment):
        console.print(f"• {sentence}", highlight=False)
    console.print(f"report: [bold]{out.resolve()}[/bold]", soft_wrap=True)
