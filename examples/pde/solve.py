"""What the problems of this folder share: a network, a training loop with a line of progress, a report."""

from __future__ import annotations

import io
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from gtddp_compile import Nystrom, Terms, compile_optimizer


def setting(damping: float) -> dict[str, Any]:
    """Options for ``λ``, with steps of norm 1 in the parameters at most, ``√λ`` in the metric."""
    return {"curvature": "sgd", "lr": 1 / damping, "inertia": 0.9, "max_step": damping**0.5}


SETTING = setting(1e-8) | {"gram": Nystrom()}
"""Where nothing else is said: points of few dimensions, so many that they say the same."""


@dataclass(frozen=True)
class Problem:
    """A differential equation, and what is known of its solution.

    Attributes:
        terms: the network with its equations.
        points: draws the sets of one step.
        where: points at which the error is measured, ``(n, D)``.
        exact: the solution there, ``(n,)``.
        setting: options of the optimizer.
        says: what else the line of progress tells.
        averaged: whether the solution is the average of the steps' networks, the later the heavier.
    """

    terms: Terms
    points: Callable[[torch.Generator], dict[str, tuple[Tensor, Tensor | float]]]
    where: Tensor
    exact: Tensor
    setting: dict[str, Any] = field(default_factory=lambda: SETTING)
    says: Callable[[], str] = str
    averaged: bool = False

    @cached_property
    def mean(self) -> AveragedModel:
        """The average of networks; after n, the share of the next is ``9 / (n + 9)`` (Shamir and Zhang 2013)."""
        return AveragedModel(self.terms.net, avg_fn=lambda mean, new, n: torch.lerp(mean, new, 9 / (float(n) + 9)))

    def follow(self) -> None:
        """Take the network after a step in."""
        if self.averaged:
            self.mean.update_parameters(self.terms.net)

    def found(self) -> Tensor:
        """The network's solution at the points of the test, ``(n,)``."""
        with torch.no_grad():
            values: Tensor = (self.mean if self.averaged else self.terms.net)(self.where)[:, 0]
        return values

    def error(self) -> float:
        """Relative L2 error there."""
        return float((self.found() - self.exact).norm() / self.exact.norm())


def network(*sizes: int) -> nn.Sequential:
    """Linear layers with tanh between them, float64."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def solve(problem: Problem, steps: int, report: Path | None = None) -> list[tuple[float, float]]:
    """Train with points drawn anew for every step; seconds and error after each."""
    drawn = torch.Generator().manual_seed(0)
    opt = compile_optimizer(problem.terms, problem.points(drawn), **problem.setting)
    history, start = [], time.perf_counter()
    columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        for _ in progress.track(range(steps), description=""):
            opt.step(problem.points(drawn))
            problem.follow()
            history.append((time.perf_counter() - start, problem.error()))
            said = f"{history[-1][0]:.0f} s, relative L2 error {history[-1][1]:.1e} {problem.says()}"
            progress.update(progress.task_ids[0], description=said)
    if report is not None:
        report.write_text(page(problem, history), encoding="utf-8")
        print(f"written: {report}")
    return history


def page(problem: Problem, history: list[tuple[float, float]]) -> str:
    """One self-contained HTML page: the field, its error where it has two coordinates, error over time."""
    plane = problem.where.shape[1] == 2
    figure = Figure(figsize=(14 if plane else 5, 4), layout="constrained")
    curve, *fields = figure.subplots(1, 3 if plane else 1, squeeze=False)[0]
    curve.semilogy(*zip(*history, strict=True))
    curve.set(xlabel="seconds", ylabel="relative L2 error")
    found = problem.found()
    for axes, title, values in zip(fields, ("u", "|u - exact|"), (found, (found - problem.exact).abs()), strict=False):
        drawn = axes.tricontourf(*problem.where.T.numpy(), values.numpy(), 30)
        drawn.set_rasterized(True)
        axes.set_title(title)
        figure.colorbar(drawn)
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    said = f"{len(history)} steps, {history[-1][0]:.0f} s, relative L2 error {history[-1][1]:.1e} {problem.says()}"
    return f"<!doctype html><meta charset=utf-8><title>{said}</title><p>{said}</p>{stream.getvalue()}"
