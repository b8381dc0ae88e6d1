"""What the coupling of samples gives: the default, groups of eight samples, and one weight for all of a batch.

python benchmarks/coupling.py     what coupling.csv has not, then the table in docs/research.md

Metric, inertia, look-ahead and aim are the default's. One weight: of all ``w = c 1`` the least of the same model,
``c = Σ y / 1ᵀ Λ_0 1``, a step along ``M⁻¹ ∇J`` of the best length.
"""

from __future__ import annotations

import itertools
import math
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import DOCS, Row, machines, markdown, measure_missing, write_section
from study_runs import number
from study_tasks import TASKS
from torch import Tensor

from gtddp_compile import compile_optimizer, kernels

FORMS = ("default", "groups of 8", "one weight")
LIMITS = {"digits-128": 60, "digits-32": 120, "digits-8": 400, "residual-mlp-64": 120, "mnist-bn-64": 234,
          "mnist-plain-64": 312, "vit-64": 320, "tanh-40-64": 200, "adding-64": 120, "denoise-64": 264,
          "autoencoder-128": 80, "characters-16": 200}  # fmt: skip
"""Steps after which a run is given up."""
SEEDS = range(3)
RAW = Path(__file__).with_suffix(".csv")


FACTOR, SOLVE = kernels.KERNELS["factor"], kernels.KERNELS["solve"]


class Kernels:
    """``factor`` and ``solve`` of a batch that is one group, which look at both answers and give one of them.

    Attributes:
        shares: of every step's predicted decrease ``yᵀ w / 2``, what one weight promises.
    """

    def __init__(self, form: str) -> None:
        self.one, self.shares = form == "one weight", list[float]()

    def factor(self, grams: tuple[Tensor, ...], information: Tensor) -> Any:
        """Besides the factor ``Λ_0`` itself."""
        (kept,) = (gram.clone() for gram in grams)
        factors, lifted = FACTOR(grams, information)
        return (factors, kept), lifted

    def solve(self, known: Any, y: Tensor) -> Tensor:
        """``Λ_0⁻¹ y``, or ``c 1``."""
        factors, gram = known
        coupled, c = SOLVE(factors, y), y.sum() / gram.sum()
        self.shares.append(float(c * y.sum() / (y @ coupled)))
        return c.expand(len(y)).contiguous() if self.one else coupled


def run(name: str, form: str, seed: int) -> tuple[float, float]:
    """Steps to the task's target, looked at as often as in the study, infinitely many where it is not reached; the
    median share of the predicted decrease that one weight has.
    """
    task, data = TASKS[name], TASKS[name].load()
    torch.manual_seed(seed)
    model, batches = task.build(), data.batches(task.batch, seed)
    grouped, own, reached = form == "groups of 8", Kernels(form), math.inf
    options: dict[str, Any] = {"coupling": 8} if grouped else {}
    with ExitStack() as stack:
        if not grouped:
            stack.enter_context(patch.dict(kernels.KERNELS, factor=own.factor, solve=own.solve))
        first = next(data.batches(task.batch, seed))[0]
        optimizer = compile_optimizer(model, first, loss=task.loss, on_nonfinite="skip", **options)
        part = task.parts(data)[task.watch == "valid"]
        for k in range(1, LIMITS[name] + 1):
            optimizer.step(*next(batches))
            if k % task.every == 0 and task.score(model, part)[0] <= task.target:
                reached = float(k)
                break
    return reached, statistics.median(own.shares or [math.nan])


def text(rows: list[Row]) -> str:
    """The table of the rows."""

    def cell(*key: str) -> str:
        found = sorted(float(row["steps_to"]) for row in rows if (row["task"], row["form"]) == key)
        if not found or math.isinf(found[0]):
            return "–" if found else ""
        return f"{number(statistics.median(found))} ({number(found[0])} to {number(found[-1])})"

    def share(name: str) -> str:
        own = [float(row["share"]) for row in rows if (row["task"], row["form"]) == (name, "default")]
        return f"{statistics.median(own):.0%}"

    columns = ("task, batch", *FORMS, "given up after", "one weight's part of the predicted decrease")
    table = [(name, *(cell(name, form) for form in FORMS), str(limit), share(name)) for name, limit in LIMITS.items()]
    return f"{markdown(columns, table)}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = [key for key in itertools.product(LIMITS, FORMS, SEEDS) if key[0] != "digits-8" or key[1] != FORMS[1]]
    rows = measure_missing(RAW, ("task", "form", "seed"), ("steps_to", "share"), wanted, run)
    write_section("coupling", text(rows), DOCS / "research.md")


if __name__ == "__main__":
    main()
