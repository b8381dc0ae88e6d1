"""The paper's DIGITS experiment (Sec. 5, appendix C.1): the base method, the paper's form and the compiled default.

Run ``gtddp-compile demo digits``: it trains every method from the same weights on the same batches, shows the runs as
they go, prints a table and writes ``digits.html``, one page that needs nothing else. Every figure in it was measured in
that run.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gtddp_compile.api import compile_optimizer
from gtddp_compile.demo.report import said, said_spread, typical_ms, write_report

BATCH = 8
TRAIN = 1437
SPLIT_SEED = 2020
POINTS = 30
GUESSING = math.log(10)
DIVERGED = 0.95 * GUESSING
Step = Callable[[Tensor, Tensor], Tensor]


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


@dataclass(frozen=True)
class Setting:
    """One curvature at one learning rate."""

    curvature: str
    lr: float
    label: str

    @property
    def name(self) -> str:
        """As it is printed."""
        return f"{self.curvature}, lr {self.lr:g}"


@dataclass(frozen=True)
class Method:
    """A way to update the weights: ``make(model, images, setting)`` returns the function of one step."""

    name: str
    says: str
    make: Callable[[nn.Module, Tensor, Setting], Step]


def _base(model: nn.Module, _: Tensor, setting: Setting) -> Step:
    """Torch's own optimizer in the usual loop, so that its time is what its users see."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop}
    optimizer = kinds[setting.curvature](model.parameters(), lr=setting.lr)
    criterion = nn.CrossEntropyLoss()

    def step(images: Tensor, labels: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = criterion(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def _compiled(**options: Any) -> Callable[[nn.Module, Tensor, Setting], Step]:
    def make(model: nn.Module, images: Tensor, setting: Setting) -> Step:
        optimizer = compile_optimizer(
            model, images, loss=nn.CrossEntropyLoss(), curvature=setting.curvature, lr=setting.lr, **options
        )
        return optimizer.step

    return make


SETTINGS = (Setting("sgd", 0.1, "moderate"), Setting("sgd", 0.5, "high"))
METHODS = (
    Method("base", "torch.optim, no feedback", _base),
    Method("paper", "coupling='block', recursion='substituted'", _compiled(coupling="block", recursion="substituted")),
    Method("default", "compile_optimizer as it comes: coupling='full'", _compiled()),
)


# --- what is measured -------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """One training run; the lists hold one entry an evaluation, the first before any step."""

    method: str
    setting: Setting
    seed: int
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    chunk_ms: list[float] = field(default_factory=list)
    compile_seconds: float = 0.0
    accuracy: float = math.nan

    @property
    def lost(self) -> bool:
        """No better than guessing at the last evaluation (not finite included): at the end, this is "diverged"."""
        return not self.losses[-1] < DIVERGED


@dataclass(frozen=True)
class Summary:
    """All seeds of a method at a setting: medians, with the least and the greatest value."""

    setting: Setting
    method: str
    runs: tuple[Run, ...]

    @property
    def final(self) -> tuple[float, float, float]:
        """Train loss after the last step."""
        return spread([run.losses[-1] for run in self.runs])

    @property
    def accuracy(self) -> tuple[float, float, float]:
        """Validation accuracy after the last step."""
        return spread([run.accuracy for run in self.runs])

    @property
    def ms(self) -> float:
        """Milliseconds a step: the median over the stretches between two evaluations, of all seeds; nan if none."""
        return typical_ms(self.runs)

    @property
    def diverged(self) -> int:
        """How many seeds ended no better than guessing."""
        return sum(run.lost for run in self.runs)


@dataclass(frozen=True)
class Experiment:
    """All that the report needs."""

    methods: tuple[Method, ...]
    settings: tuple[Setting, ...]
    runs: tuple[Run, ...]
    steps: int
    seeds: int
    seconds: float
    images: tuple[int, int]

    def summary(self, setting: Setting, method: str) -> Summary:
        """One row of the table."""
        runs = tuple(run for run in self.runs if run.setting == setting and run.method == method)
        return Summary(setting, method, runs)

    def summaries(self) -> list[Summary]:
        """Every row of the table."""
        return [self.summary(setting, method.name) for setting in self.settings for method in self.methods]


def spread(values: list[float]) -> tuple[float, float, float]:
    """Median, least, greatest; what is not finite counts as infinite."""
    finite = [value if math.isfinite(value) else math.inf for value in values]
    return statistics.median(finite), min(finite), max(finite)


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

    def batches(self, steps: int, seed: int) -> Tensor:
        """Indices of ``steps`` batches: epochs in random order, the rest of an epoch left out."""
        generator = torch.Generator().manual_seed(seed)
        an_epoch = TRAIN // BATCH
        epochs = [
            torch.randperm(TRAIN, generator=generator)[: an_epoch * BATCH].view(an_epoch, BATCH)
            for _ in range(-(-steps // an_epoch))
        ]
        return torch.cat(epochs)[:steps]


@torch.no_grad()
def _evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    scores = torch.cat([model(images) for images in data[0].split(256)])
    accuracy = (scores.argmax(1) == data[1]).float().mean()
    return float(nn.functional.cross_entropy(scores, data[1])), float(accuracy)


def _side_by_side(runs: list[Run], methods: tuple[Method, ...], data: Data, steps: int) -> Iterator[int]:
    """Train all methods of one setting and seed, taking turns of a few steps, so that they share the machine's moods.

    Yields the number of steps just made (of all methods together). Evaluation is not on the clock.
    """
    batches = data.batches(steps, runs[0].seed)
    models: list[nn.Module] = []
    step: list[Step] = []
    for run, method in zip(runs, methods, strict=True):
        torch.manual_seed(run.seed)
        models.append(DigitsNet())
        started = time.perf_counter()
        step.append(method.make(models[-1], data.train[0][:BATCH], run.setting))
        run.compile_seconds = time.perf_counter() - started
        run.steps, run.seconds, run.losses = [0], [0.0], [_evaluate(models[-1], data.train)[0]]
    stretch = max(1, steps // POINTS)
    for number, start in enumerate(range(0, steps, stretch)):
        chunk = batches[start : start + stretch]
        for turn in range(len(runs)):
            which = (number + turn) % len(runs)
            run = runs[which]
            started = time.perf_counter()
            for index in chunk:
                step[which](data.train[0][index], data.train[1][index])
            elapsed = time.perf_counter() - started
            run.steps.append(start + len(chunk))
            run.seconds.append(run.seconds[-1] + elapsed)
            run.losses.append(_evaluate(models[which], data.train)[0])
            if math.isfinite(run.losses[-1]):  # a step whose loss is not finite is given up half-way: no time of a step
                run.chunk_ms.append(1e3 * elapsed / len(chunk))
            yield len(chunk)
    for run, model in zip(runs, models, strict=True):
        run.accuracy = _evaluate(model, data.valid)[1]


# --- terminal ---------------------------------------------------------------------------------------------------------

LOOKS = {"base": "cyan", "paper": "yellow", "default": "green"}


def _board(runs: list[Run], seeds: int) -> Table:
    """The runs as they stand: one row a method and setting, one column a seed."""
    table = Table(title="train loss, as it goes", title_justify="left")
    table.add_column("setting")
    table.add_column("method")
    for seed in range(seeds):
        table.add_column(f"seed {seed}", justify="right", min_width=9)
    rows: dict[tuple[str, str], list[Text]] = {}
    for run in runs:
        cell = Text("·", style="dim")
        if run.losses:
            said = f"{run.losses[-1]:.2g}" if math.isfinite(run.losses[-1]) else "not finite"
            bad = run.lost and run.steps[-1] > 0
            cell = Text(said, style="bold red" if bad else LOOKS[run.method])
        rows.setdefault((run.setting.name, run.method), []).append(cell)
    before = ""
    for (setting, method), cells in rows.items():
        if before and setting != before:
            table.add_section()
        table.add_row("" if setting == before else setting, Text(method, style=LOOKS[method]), *cells)
        before = setting
    return table


def _result(experiment: Experiment) -> Table:
    """The table of the report, for the terminal."""
    title = f"DIGITS, {experiment.steps} steps of batch {BATCH}: median of {experiment.seeds} seeds, least–greatest"
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("setting", no_wrap=True)
    table.add_column("method", no_wrap=True)
    for column in ("train loss", "valid. %", "ms/step", "diverged"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in experiment.summaries():
        table.add_row(
            row.setting.name,
            Text(row.method, style=LOOKS[row.method]),
            "  ".join(said_spread(row.final, "{:.2g}")).rstrip(),
            "  ".join(said_spread(tuple(100 * value for value in row.accuracy), "{:.1f}")).rstrip(),  # type: ignore[arg-type]
            said(row.ms, "{:.2f}") if math.isfinite(row.ms) else "–",
            Text(f"{row.diverged} of {len(row.runs)}", style="bold red" if row.diverged else ""),
            end_section=row.method == experiment.methods[-1].name,
        )
    return table


def run_experiment(steps: int, seeds: int, console: Console) -> Experiment:
    """Every method at every setting with every seed, shown live."""
    started = time.perf_counter()
    data = Data.load()
    groups = [[Run(method.name, setting, seed) for method in METHODS] for seed in range(seeds) for setting in SETTINGS]
    runs = sorted(
        (run for group in groups for run in group),
        key=lambda run: (SETTINGS.index(run.setting), [method.name for method in METHODS].index(run.method), run.seed),
    )
    progress = Progress(
        TextColumn("[bold]{task.description}"), BarColumn(None), MofNCompleteColumn(), TextColumn("steps"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, expand=True,
    )  # fmt: skip
    task = progress.add_task("DIGITS", total=steps * len(runs))
    with Live(Group(_board(runs, seeds), progress), console=console, refresh_per_second=4) as live:
        for group in groups:
            progress.update(task, description=f"{group[0].setting.name}, seed {group[0].seed}")
            for made in _side_by_side(group, METHODS, data, steps):
                progress.advance(task, made)
                live.update(Group(_board(runs, seeds), progress))
        progress.update(task, description="all runs")
    images = (len(data.train[1]), len(data.valid[1]))
    return Experiment(METHODS, SETTINGS, tuple(runs), steps, seeds, time.perf_counter() - started, images)


def main(
    steps: Annotated[int, typer.Option(min=1, help="Steps of batch 8 a run.")] = 1440,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: weights and batch order.")] = 4,
    out: Annotated[Path, typer.Option(dir_okay=False, help="The report to write.")] = Path("digits.html"),
) -> None:
    """Train the paper's DIGITS network with the base method, the paper's form and the default; write a report."""
    torch.set_num_threads(1)
    console = Console()
    experiment = run_experiment(steps, seeds, console)
    console.print(_result(experiment))
    optimizer = compile_optimizer(
        DigitsNet(), torch.zeros(BATCH, 1, 8, 8), loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1
    )
    with console.status("writing the report"):
        sentences = write_report(out, experiment, optimizer)
    for sentence in sentences:
        console.print(f"• {sentence}", highlight=False)
    console.print(f"report: [bold]{out.resolve()}[/bold]", soft_wrap=True)
