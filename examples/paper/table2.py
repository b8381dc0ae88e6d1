"""Table 2: four base methods, the paper's form of each and ours, train loss and validation accuracy over seeds.

Within a data set and base method all forms have the same hyper-parameters, weights and batches. The learning rate is
the base method's own best of a grid by factors of 3, on a seed that is not reported; Fig. 8 adds a tenth and three
times of it, over which the table is repeated.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from shared import BASES, DATA, FORMS, SETTINGS, Row, interval, load, markdown, paired, train, where

RESULTS = "runs"
GRIDS = {
    "sgd": (0.01, 0.03, 0.1, 0.3),
    "rmsprop": (1e-4, 3e-4, 1e-3, 3e-3, 0.01),
    "adam": (3e-4, 1e-3, 3e-3, 0.01),
    "ekfac": (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03),
}
SWEEP_SEED, FACTORS = 100, (1, 0.1, 3)
PAPER = {
    "digits": ((0.0053, 0.0247, 0.0182, 0.0514), (0.0050, 0.0124, 0.0081, 0.0514),
               (96.09, 95.61, 95.81, 95.31), (96.10, 95.92, 95.84, 95.55)),
    "mnist": ((0.0250, 0.0284, 0.0330, 0.0290), (0.0240, 0.0282, 0.0312, 0.0291),
              (98.59, 98.52, 98.51, 98.56), (98.62, 98.53, 98.51, 98.56)),
    "svhn": ((0.2755, 0.2670, 0.2544, 0.2049), (0.2692, 0.2637, 0.2517, 0.2047),
             (88.58, 88.96, 89.20, 88.75), (89.90, 89.02, 89.22, 89.91)),
    "cifar10": ((0.0296, 0.0107, 0.0127, 0.0922), (0.0284, 0.0069, 0.0096, 0.0907),
                (74.69, 70.88, 72.51, 74.33), (74.69, 70.97, 72.68, 74.18)),
    "cifar100": ((0.0075, 0.0058, 0.0055, 0.0120), (0.0075, 0.0058, 0.0054, 0.0125),
                 (71.78, 71.65, 71.96, 71.95), (72.06, 71.91, 72.19, 72.24)),
}  # fmt: skip
"""Table 2 of the paper: train loss of the four bases, of their GT-DDP; validation accuracy of both, in percent."""


def key(dataset: str, base: str, form: str, lr: str, seed: int) -> Row:
    """What a run is known by."""
    steps = 24 if SETTINGS.quick and dataset != "digits" else 120 if SETTINGS.quick else DATA[dataset].steps
    return {"dataset": dataset, "base": base, "form": form, "lr": lr, "seed": str(seed), "steps": str(steps)}


def rate(rows: Sequence[Row], dataset: str, base: str, factor: float = 1) -> str:
    """The base method's rate with the lowest train loss at the end of the sweep, or so many times it."""
    swept = where(rows, dataset=dataset, base=base, form="base", seed=SWEEP_SEED)
    best = min(((float(row["train_loss"]), float(row["lr"])) for row in swept), default=(math.nan, math.nan))[1]
    return f"{best * factor:.3g}"


def jobs(rows: Sequence[Row], factors: Sequence[float] = (1,), seeds: int | None = None) -> list[Row]:
    """The sweep; once it is done, every form by seeds."""
    sweep = [key(name, base, "base", f"{lr:g}", SWEEP_SEED) for name in SETTINGS.datasets for base in BASES
             for lr in GRIDS[base]]  # fmt: skip
    if any(not any(job.items() <= row.items() for row in rows) for job in sweep):
        return sweep
    wanted = [(seed, name, base, factor) for seed in range(seeds or SETTINGS.seeds) for name in SETTINGS.datasets
              for base in BASES for factor in factors]  # fmt: skip
    return [key(name, base, form, rate(rows, name, base, factor), seed)
            for seed, name, base, factor in wanted for form in FORMS]  # fmt: skip


def work(job: Row) -> Row:
    """One training run."""
    name, form = job["dataset"], FORMS[job["form"]]
    return train(DATA[name].build, load(name, SETTINGS.root), DATA[name].batch, int(job["steps"]), int(job["seed"]),
                 curvature=job["base"], lr=float(job["lr"]), **form)  # fmt: skip


# --- the page ---------------------------------------------------------------------------------------------------------


def by_seed(rows: Sequence[Row], figure: str) -> dict[str, float]:
    """A figure of the runs that did not diverge."""
    return {row["seed"]: float(row[figure]) for row in rows if not diverged(row)}


def diverged(row: Row) -> bool:
    """Whether a run ended no better than guessing."""
    return not float(row["train_loss"]) < math.log(DATA[row["dataset"]].classes)


def reported(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Runs of a setting, without the sweep."""
    return [row for row in where(rows, **wanted) if row["seed"] != str(SWEEP_SEED)]


def line(rows: Sequence[Row], name: str, base: str, lr: str) -> list[str] | None:
    """A base method at a rate: means, and paired differences of both forms; the paper's differences beside them."""
    runs = {form: reported(rows, dataset=name, base=base, form=form, lr=lr) for form in FORMS}
    if not all(runs.values()):
        return None
    cells = [base, lr, str(len(runs["ours"]))]
    for at, (figure, scale, shape) in enumerate((("train_loss", 1, ".4f"), ("accuracy", 100, ".2f"))):
        own = {form: {seed: scale * v for seed, v in by_seed(found, figure).items()} for form, found in runs.items()}
        mean = sum(own["base"].values()) / len(own["base"]) if own["base"] else math.nan
        cells.append(f"{mean:{shape}}")
        for form in ("paper", "ours"):
            middle, half, count = paired(own[form], own["base"])
            lost = sum(map(diverged, runs[form]))
            text = interval(middle, half, f"+{shape}") if count else ""
            cells.append(text + f" ({lost} of {len(runs[form])} diverged)" * bool(lost))
        published = PAPER[name.removesuffix("-5k")]
        before, after = (published[2 * at + which][BASES.index(base)] for which in (0, 1))
        cells.append(f"{before:{shape}}, {after - before:+{shape}}")
    return cells


FORMS_OF = ("paper's form", "ours", "in the paper")
HEADER = ("base", "lr", "seeds", "train loss", *FORMS_OF, "validation %", *FORMS_OF)


def table(rows: Sequence[Row], name: str, factor: float = 1) -> str:
    """A data set at the bases' best rate, or at a part of it."""
    lines = [line(rows, name, base, rate(rows, name, base, factor)) for base in BASES]
    return markdown(HEADER, [each for each in lines if each])


def verdict(rows: Sequence[Row], form: str, factors: Sequence[float]) -> str:
    """In how many pairs a form is better, worse or not to be told from its base method, by train loss."""
    count = {"better": 0, "worse": 0, "not to be told apart": 0, "diverged in some seed": 0}
    for name, base, factor in itertools.product({row["dataset"] for row in rows}, BASES, factors):
        lr = rate(rows, name, base, factor)
        mine, theirs = (reported(rows, dataset=name, base=base, form=f, lr=lr) for f in (form, "base"))
        if mine and theirs:
            middle, half, _ = paired(by_seed(mine, "train_loss"), by_seed(theirs, "train_loss"))
            sign = "not to be told apart" if not abs(middle) > half else "better" if middle < 0 else "worse"
            count["diverged in some seed" if any(map(diverged, mine)) else sign] += 1
    return ", ".join(f"{said} {number}" for said, number in count.items())


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """The tables, and what they say in one line a form."""
    found = []
    for name in dict.fromkeys(row["dataset"] for row in rows):
        steps = sorted({row["steps"] for row in where(rows, dataset=name)})
        found.append(f"### {name}\n\n{DATA[name].batch} samples a step, {', '.join(steps)} steps.")
        tables = {factor: table(rows, name, factor) for factor in FACTORS}
        found += [text if factor == 1 else f"At {factor:g} times these rates:\n\n{text}"
                  for factor, text in tables.items() if text.count("\n") > 1]  # fmt: skip
    verdicts = {f"{form} verdict": verdict(rows, form, FACTORS) for form in ("paper", "ours")}
    return {"table2": "\n\n".join(found), **verdicts}
