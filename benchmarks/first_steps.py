"""How much greater the aim and the reach of the first steps are: forms that were tried, steps to the study's targets.

python benchmarks/first_steps.py     what first_steps.csv has not, then the table in docs/research.md

A form is a factor of the default's aim, by what share of the loss that is and the step's number k, and what the reach
is more. The default's own is taken out for it.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import DOCS, Row, machines, markdown, measure_missing, write_section
from study_runs import number
from study_tasks import TASKS
from torch import Tensor

from gtddp_compile import compile_optimizer, kernels
from gtddp_compile.options import SUGGESTED
from gtddp_compile.runtime.method import BaseMethod

Form = tuple[Callable[[float, int], float], Callable[[int], float]]
FORMS: dict[str, Form] = {
    "as later": (lambda share, k: 1.0, lambda k: 0.0),
    "aim times 1 + 1/k": (lambda share, k: 1 + 1 / k, lambda k: 0.0),
    "reach and 1/k": (lambda share, k: 1.0, lambda k: 1 / k),
    "default: both": (lambda share, k: 1 + 1 / k, lambda k: 1 / k),
    "aim times 1 + 3/k, reach and 1/k": (lambda share, k: 1 + 3 / k, lambda k: 1 / k),
    "1/k more of the loss, reach and 1/k": (lambda share, k: min(1.0, share + 1 / k) / share, lambda k: 1 / k),
}
LIMITS = {"digits-128": 20, "digits-32": 50, "autoencoder-128": 40, "tanh-40-64": 120, "residual-mlp-64": 80}
"""Steps after which a run is given up."""
TERMINAL, REACHED = BaseMethod.terminal, kernels.KERNELS["reached"]
PLAIN = replace(SUGGESTED["foof"]["terminal"], early=0.0)
SEEDS = range(3)
RAW = Path(__file__).with_suffix(".csv")


def run(name: str, said: str, seed: int) -> tuple[float]:
    """Steps to the task's target, looked at as often as in the study; infinitely many where it is not reached."""
    task, data, form = TASKS[name], TASKS[name].load(), FORMS[said]
    torch.manual_seed(seed)
    model, batches, k = task.build(), data.batches(task.batch, seed), 0

    def terminal(m: BaseMethod, phi: Tensor, kind: str, aim: float, own: float, half: float, *group: Any) -> Any:
        ones, aims, start = TERMINAL(m, phi, kind, aim, own, half, *group)
        return ones, aims * form[0](aim * len(phi) / (len(phi) + half), k), start

    def reached(grams: Any, information: Tensor, reach: float, targets: Any) -> Any:
        return REACHED(grams, information, reach + form[1](k), targets)

    with patch.object(BaseMethod, "terminal", terminal), patch.dict(kernels.KERNELS, reached=reached):
        optimizer = compile_optimizer(model, next(data.batches(task.batch, seed))[0], loss=task.loss, terminal=PLAIN,
                                      on_nonfinite="skip")  # fmt: skip
        for k in range(1, LIMITS[name] + 1):
            optimizer.step(*next(batches))
            if k % task.every == 0 and task.score(model, task.parts(data)[0])[0] < task.target:
                return (float(k),)
    return (math.inf,)


def text(rows: list[Row]) -> str:
    """The table of the rows."""

    def cell(*key: str) -> str:
        found = sorted(float(row["steps_to"]) for row in rows if (row["task"], row["form"]) == key)
        return f"{number(statistics.median(found))} ({number(found[0])}–{number(found[-1])})"

    table = markdown(("in the k-th step", *LIMITS), [(said, *(cell(name, said) for name in LIMITS)) for said in FORMS])
    return f"{table}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = itertools.product(LIMITS, FORMS, SEEDS)
    rows = measure_missing(RAW, ("task", "form", "seed"), ("steps_to",), wanted, run)
    write_section("first steps", text(rows), DOCS / "research.md")


if __name__ == "__main__":
    main()
