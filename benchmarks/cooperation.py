"""gt-ekfac against ekfac on the architecture of Fig. 7a, on scikit-learn's digits.

    python benchmarks/cooperation.py     what cooperation.csv has not, then docs/cooperation.md

Three convolution modules of two parallel players each, a fully connected one, a last layer; tanh, batches of 12. All
methods run without feedback and with it; learning rate and damping of each are the best of a grid, on seeds of their
own.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import DOCS, Row, machines, markdown, measure_missing
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gtddp_compile import EKFAC, SGD, Curvature, compile_optimizer

BATCH, STEPS, SEEDS = 12, 240, range(10)
POINTS = [STEPS * k // 4 for k in (1, 2, 3, 4)]
RAW, WORDS = Path(__file__).with_suffix(".csv"), Path(__file__).with_suffix(".md.in")
PAGE = DOCS / "cooperation.md"
KEYS, LOSSES = ("method", "lr", "damping", "seed"), tuple(f"loss_{point}" for point in POINTS)
VALUES = (*LOSSES, "accuracy", "seconds")
RATES, DAMPINGS = (0.01, 0.03, 0.1, 0.3, 1.0), (0.01, 0.1, 1.0)
SCREENED, TUNED, KEPT = 100, (101, 102), 4
"""Every candidate runs on the seed ``SCREENED``, the best ``KEPT`` of them on ``TUNED`` too."""

Metric = tuple[Tensor | float, Tensor | None]


@dataclass(frozen=True)
class Rescaled(EKFAC):
    """Corollary 7 read as a rescaling alone: ``Q̃⁻¹ Q_u``, without the others' ``Q_uv Q_vv⁻¹ Q_v`` of Eq. 16."""

    def scales(self, kind: Any, state: Any, group: Any, players: int) -> Metric:
        """``1 / (λ̃ + γ)`` for players of the same rows, and nothing between them."""
        if kind != "shared":
            return super().scales(kind, state, group, players)
        damping, moment = group["damping"], state["moment"]
        shrunk = damping * moment / (damping + (players - 1) * moment)
        return (shrunk + damping).reciprocal(), torch.zeros_like(moment)


@dataclass(frozen=True)
class Method:
    """A base method and whether its layers cooperate and answer; one candidate a setting of its grid."""

    says: str
    build: Callable[[float, float], Curvature]
    feedback: bool = False
    cooperative: bool = False
    dampings: tuple[float, ...] = DAMPINGS
    rates: tuple[float, ...] = RATES

    @property
    def candidates(self) -> list[tuple[float, float]]:
        """Learning rates with dampings."""
        return [(rate, damping) for damping in self.dampings for rate in self.rates]


def ekfac(rate: float, damping: float) -> Curvature:
    return EKFAC(lr=rate, damping=damping)


def rescaled(rate: float, damping: float) -> Curvature:
    return Rescaled(lr=rate, damping=damping)


METHODS: dict[str, Method] = {
    "sgd": Method("no curvature", lambda rate, _: SGD(lr=rate), dampings=(1.0,), rates=(0.03, 0.1, 0.3, 1.0, 3.0)),
    "ekfac": Method("every layer alone", ekfac),
    "gt-ekfac": Method("Corollary 7 with the gain of Eq. 16", ekfac, cooperative=True),
    "gt-ekfac, rescaling": Method("Corollary 7 as a rescaling alone", rescaled, cooperative=True),
    "gt-ddp-ekfac": Method("ekfac, feedback", ekfac, feedback=True),
    "gt-ddp-gt-ekfac": Method("gt-ekfac, feedback", ekfac, feedback=True, cooperative=True),
}
PAIRS = (("ekfac", "gt-ekfac"), ("ekfac", "gt-ekfac, rescaling"), ("gt-ddp-ekfac", "gt-ddp-gt-ekfac"))


class Module(nn.Module):
    """Two players of the same input whose outputs are added (Fig. 7a)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.u, self.v = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.u(x) + self.v(x))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def conv(channels: int, outputs: int, stride: int) -> Module:
        return Module(*(nn.Conv2d(channels, outputs, 3, stride, padding=1) for _ in range(2)))

    return nn.Sequential(
        conv(1, 6, 1), conv(6, 8, 2), conv(8, 8, 2), nn.Flatten(),
        Module(nn.Linear(32, 24), nn.Linear(32, 24)), nn.Linear(24, 10),
    )  # fmt: skip


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,500 images to train, the rest to test; pixels standardised by one mean and deviation."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x, y = (x - x[:1500].mean()) / x[:1500].std(), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


# --- runs -------------------------------------------------------------------------------------------------------------

Run = tuple[list[float], float, float]


def run(name: str, rate: float, damping: float, seed: int, steps: int = STEPS) -> tuple[float, ...]:
    """Training loss (all images) at four points on the way, test accuracy, CPU seconds."""
    (x, y), (test_x, test_y) = data()
    method, model, loss = METHODS[name], network(seed), nn.CrossEntropyLoss()
    opt = compile_optimizer(model, x[:BATCH], loss=loss, curvature=method.build(rate, damping),
                            feedback=method.feedback, cooperative=method.cooperative,
                            on_nonfinite="skip")  # fmt: skip
    source, curve, begin = torch.Generator().manual_seed(seed), [], time.process_time()
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (BATCH,), generator=source)
        opt.step(x[batch], y[batch])
        if step % (steps // 4) == 0:
            with torch.no_grad():
                curve.append(float(loss(model(x), y)))
    seconds = time.process_time() - begin
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    return *(value if value == value else float("inf") for value in curve), accuracy, seconds


class Runs:
    """Runs by method, setting and seed."""

    def __init__(self, rows: list[Row]) -> None:
        self._found = {(row["method"], *(float(row[name]) for name in KEYS[1:])): row for row in rows}

    def __call__(self, name: str, setting: tuple[float, float], seed: int) -> Run:
        row = self._found[(name, *setting, float(seed))]
        return [float(row[point]) for point in LOSSES], float(row["accuracy"]), float(row["seconds"])

    def speed(self, name: str, setting: tuple[float, float], *seeds: int) -> float:
        """The mean of the four losses, over seeds: how fast it trains."""
        return statistics.mean(statistics.mean(self(name, setting, seed)[0]) for seed in seeds)


def screened(runs: Runs, name: str) -> list[tuple[float, float]]:
    """The settings that train fastest on the seed that screens."""
    return sorted(METHODS[name].candidates, key=lambda setting: runs.speed(name, setting, SCREENED))[:KEPT]


def best(runs: Runs, name: str) -> tuple[float, float]:
    """The setting that trains fastest, on seeds that are not among the reported ones."""
    return min(screened(runs, name), key=lambda setting: runs.speed(name, setting, SCREENED, *TUNED))


STAGES: tuple[Callable[[Runs, str], Iterable[tuple[tuple[float, float], int]]], ...] = (
    lambda _, name: product(METHODS[name].candidates, (SCREENED,)),
    lambda runs, name: product(screened(runs, name), TUNED),
    lambda runs, name: product([best(runs, name)], SEEDS),
)
"""Settings and seeds to run, by what was found before."""


def measure() -> list[Row]:
    """All rows, after what is missing of them is run."""
    rows: list[Row] = []
    for stage in STAGES:
        runs = Runs(rows)
        wanted = [(name, *setting, seed) for name in METHODS for setting, seed in stage(runs, name)]
        rows = measure_missing(RAW, KEYS, VALUES, wanted, run)
    return rows


# --- report -----------------------------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}"


def text(rows: list[Row]) -> str:
    """The page of the rows."""
    runs, found, lines = Runs(rows), {}, []
    for name, method in METHODS.items():
        setting = best(runs, name)
        found[name] = [runs(name, setting, seed) for seed in SEEDS]
        losses = [spread([run[0][k] for run in found[name]]) for k in range(len(POINTS))]
        accuracy = spread([100 * run[1] for run in found[name]])
        cost = 1000 * statistics.median(run[2] for run in found[name]) / STEPS
        shown = f"{setting[1]:g}" if len(method.dampings) > 1 else "-"
        lines.append([name, method.says, f"{setting[0]:g}", shown, *losses, accuracy, f"{cost:.1f}"])
    heading = ["method", "what it is", "lr", "damping", *(f"loss at {p}" for p in POINTS), "test %", "CPU ms a step"]
    made = {
        "{made}": f"Written by `benchmarks/cooperation.py`: batches of {BATCH}, {STEPS} steps, {len(SEEDS)} seeds, mean"
        f" ± standard deviation. {machines(rows)}.",
        "{table}": markdown(heading, lines),
        "{verdicts}": "\n".join(f"- {verdict(found, base, other)}" for base, other in PAIRS),
        "{ahead}": ahead(runs),
        "{grids}": "\n\n".join(grid(runs, name) for name in METHODS),
    }
    page = WORDS.read_text(encoding="utf-8")
    for mark, value in made.items():
        page = page.replace(mark, value)
    return page


def verdict(found: dict[str, list[Run]], base: str, other: str) -> str:
    """How often, seed by seed, the cooperative method is ahead, early and at the end."""
    pairs = list(zip(found[base], found[other], strict=True))
    first, last = [sum(theirs[0][k] <= mine[0][k] for mine, theirs in pairs) for k in (0, 3)]
    return (
        f"`{other}` has a training loss at most that of `{base}` on {first} of {len(pairs)} seeds after a quarter of"
        f" the steps, on {last} of {len(pairs)} at the end."
    )


def ahead(runs: Runs) -> str:
    """At how many settings with a learning rate below the best one gt-ekfac is ahead of ekfac, and above it."""
    counts = {"below": [0, 0], "above": [0, 0]}
    for damping in DAMPINGS:
        own = {rate: runs.speed("ekfac", (rate, damping), SCREENED) for rate in RATES}
        top = min(own, key=lambda rate: own[rate])
        for rate in (rate for rate in RATES if rate != top):
            found = counts["below" if rate < top else "above"]
            found[0] += runs.speed("gt-ekfac", (rate, damping), SCREENED) < own[rate]
            found[1] += 1
    return ", ".join(f"at {got} of {of} settings {where} ekfac's best rate" for where, (got, of) in counts.items())


def grid(runs: Runs, name: str) -> str:
    """Mean of the four losses over the grid, on the seed that screens."""
    method = METHODS[name]
    rows = []
    for damping in method.dampings:
        values = [runs.speed(name, (rate, damping), SCREENED) for rate in method.rates]
        shown = f"{damping:g}" if len(method.dampings) > 1 else "-"
        rows.append([shown, *(f"{value:.3f}" for value in values)])
    return markdown([f"{name}: damping", *(f"lr {rate:g}" for rate in method.rates)], rows)


def main() -> None:
    """Run what is missing; write the page."""
    torch.set_num_threads(1)
    PAGE.write_text(text(measure()), encoding="utf-8")


if __name__ == "__main__":
    main()
