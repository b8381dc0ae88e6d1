"""Where does feedback help? Its forms over depth, batch, learning rate, shortcuts, activations and step length.

A residual network of linear layers on digits, SGD's metric. One setting at a time is moved away from the middle one;
within a setting and seed all forms have the same weights and batches. In the nonlinear rollout's runs the error of the
linearisation is measured at every step and stage.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from shared import SETTINGS, Row, figure, load, markdown, paired, save, train, where
from torch import Tensor, nn

from gtddp_compile import Geometric

RESULTS = "feedback"
MIDDLE = {"depth": "6", "batch": "32", "lr": "0.1", "shortcuts": "all", "activation": "relu", "aim": "1"}
AXES = {
    "lr": ("0.03", "0.1", "0.3", "1", "3"),
    "depth": ("2", "6", "12", "24"),
    "batch": ("8", "32", "128"),
    "shortcuts": ("none", "half", "all"),
    "activation": ("relu", "hardtanh", "tanh", "gelu"),
    "aim": ("0.1", "0.3", "1", "3"),
}
FORMS: dict[str, dict[str, Any]] = {
    "none": {"feedback": False},
    "open": {"feedback": "open"},
    "linear": {"rollout": "linear"},
    "nonlinear": {"rollout": "nonlinear"},
    "groups": {"rollout": "linear", "coupling": 0.25},
    "block": {"coupling": "block"},
    "paper": {"coupling": "block", "recursion": "substituted"},
}
"""No feedback; open gains alone; the two rollouts; groups of a quarter of the batch; every sample for itself, with its
own curvature in the stage's Hessian, and without (the paper's)."""
AIMLESS = ("none", "paper")
"""Forms without the geometric terminal, whose aim is the length of a step."""
COMPARED = ("nonlinear", "open", "block", "groups")
"""With the linear rollout too."""
WIDTH, GUESSING = 32, math.log(10)


class Net(nn.Module):
    """Layers ``x + σ(W x)`` between a first and a last one; without a shortcut ``σ(W x)``."""

    def __init__(self, depth: int, shortcuts: str, activation: str) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, WIDTH), nn.Linear(WIDTH, 10)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth))
        self.shortcuts = {"none": 0, "half": depth // 2, "all": depth}[shortcuts]
        self.activation = activation
        for block in self.blocks[self.shortcuts :]:  # He's weights, by which values keep their size without a shortcut
            nn.init.kaiming_normal_(block.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        act = getattr(nn.functional, self.activation) if self.activation != "tanh" else torch.tanh
        x = act(self.first(images.flatten(1)))
        for index, block in enumerate(self.blocks):
            x = x + act(block(x)) if index < self.shortcuts else act(block(x))
        return self.last(x)


def settings() -> list[dict[str, str]]:
    """The middle one, and those that differ from it in one thing."""
    moved = [{**MIDDLE, axis: value} for axis, values in AXES.items() for value in values]
    return [dict(items) for items in dict.fromkeys(tuple(each.items()) for each in moved)]


def jobs(rows: Sequence[Row]) -> list[Row]:
    """Every setting and form, seed by seed."""
    steps, seeds = (20, 3) if SETTINGS.quick else (60, min(SETTINGS.seeds, 5))
    return [{**setting, "form": form, "seed": str(seed), "steps": str(steps)}
            for seed in range(seeds) for setting in settings() for form in FORMS
            if form not in AIMLESS or setting["aim"] == MIDDLE["aim"]]  # fmt: skip


def work(job: Row) -> Row:
    """One training run; the linearisation's error by stage, mean over the steps."""
    batch, options = int(job["batch"]), dict(FORMS[job["form"]])
    if options.get("coupling") == 0.25:
        options["coupling"] = batch // 4
    if job["form"] not in AIMLESS:
        options["terminal"] = Geometric(float(job["aim"]))
    errors: list[list[float]] = []
    found = train(
        lambda: Net(int(job["depth"]), job["shortcuts"], job["activation"]), load("digits"), batch, int(job["steps"]),
        int(job["seed"]), (lambda o: errors.append(linearisation(o))) if job["form"] == "nonlinear" else None,
        curvature="sgd", lr=float(job["lr"]), **options,
    )  # fmt: skip
    means = [statistics.fmean(values) for values in zip(*errors, strict=True)]
    return {**found, "errors": " ".join(f"{value:.3g}" for value in means)}


def linearisation(optimizer: Any) -> list[float]:
    """``‖c - ĉ‖ / ‖ĉ‖`` from the second stage on, of the step's own figures: ``c`` is the change of the samples' losses
    that the stages before have caused, seen at the stage's states, ``ĉ = -Σ Γ_s w_s`` what linearised dynamics say.
    """
    figures = optimizer._diagnostics._kept
    predicted, found = torch.zeros(()), []
    for stage in sorted(index for index, kept in figures.items() if "weights" in kept):
        if "predicted" in figures[stage]:
            size = float(predicted.norm())
            found.append(float((figures[stage]["predicted"] - predicted).norm()) / size if size else 0.0)
        for (gamma,) in figures[stage]["gammas"].values():
            predicted = predicted - gamma @ figures[stage]["weights"]
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def ended(rows: Sequence[Row], setting: dict[str, str], form: str) -> dict[str, float]:
    """Logarithm of the train loss by seed; a run that diverged counts as guessing. What has no aim has one run."""
    own = {**setting, "aim": MIDDLE["aim"]} if form in AIMLESS else setting
    found = where(rows, **own, form=form)
    return {row["seed"]: math.log(max(min(float(row["train_loss"]), GUESSING), 1e-12)) for row in found}


def against(rows: Sequence[Row], setting: dict[str, str], form: str, other: str) -> tuple[float, float]:
    """Ratio of the train losses in logarithms, paired over seeds, and half of its interval."""
    return paired(ended(rows, setting, form), ended(rows, setting, other))[:2]


def sign(middle: float, half: float) -> str:
    """Whether a form is lower or higher, where the interval tells."""
    return ("↓" if middle < 0 else "↑") if abs(middle) > half else ""


def cell(rows: Sequence[Row], setting: dict[str, str], form: str) -> str:
    """Geometric mean of the train loss; an arrow where it differs from no feedback's."""
    return f"{mean(rows, setting, form):.3f} {sign(*against(rows, setting, form, 'none'))}".strip()


def mean(rows: Sequence[Row], setting: dict[str, str], form: str) -> float:
    """Geometric mean of the train loss."""
    return math.exp(statistics.fmean(ended(rows, setting, form).values() or [math.nan]))


def ratio(middle: float, half: float) -> str:
    """A ratio with its interval; bold where it is not 1."""
    text = f"{math.exp(middle):.3f} ({math.exp(middle - half):.3f}–{math.exp(middle + half):.3f})"
    return f"**{text}**" if abs(middle) > half else text


def table(rows: Sequence[Row], axis: str) -> str:
    """A line a value of the axis: every form, and the nonlinear rollout over the linear one."""
    at = {value: {**MIDDLE, axis: value} for value in AXES[axis]}
    lines = [(value, *(cell(rows, setting, form) for form in FORMS),
              ratio(*against(rows, setting, "nonlinear", "linear"))) for value, setting in at.items()]  # fmt: skip
    return markdown((axis, *FORMS, "nonlinear / linear"), lines)


def errors(rows: Sequence[Row]) -> str:
    """The linearisation's error by stage, median over seeds."""
    lines = []
    for axis, value in ((name, v) for name in ("activation", "lr", "aim", "shortcuts") for v in AXES[name]):
        found = [row["errors"].split() for row in where(rows, **{**MIDDLE, axis: value}, form="nonlinear")]
        medians = [statistics.median(map(float, column)) for column in zip(*found, strict=True)]
        lines.append((f"{axis} {value}", *(f"{median:.2f}" for median in medians)))
    stages = max(len(line) for line in lines)
    return markdown(("setting", *(f"stage {n}" for n in range(1, stages))), lines)


def counts(rows: Sequence[Row]) -> list[str]:
    """In how many settings a form is lower or higher than none, and some than the linear rollout."""
    found = []
    for form, other in [*((form, "none") for form in list(FORMS)[1:]), *((form, "linear") for form in COMPARED)]:
        signs = [sign(*against(rows, setting, form, other)) for setting in settings()
                 if form not in AIMLESS or setting["aim"] == MIDDLE["aim"]]  # fmt: skip
        lower, higher = signs.count("↓"), signs.count("↑")
        found.append(f"- `{form}` ends below `{other}` in {lower} of {len(signs)} settings, above it in {higher}.")
    return found


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """A table an axis, a plot over the learning rate, the errors."""
    made, axes = figure(2)
    for axis, name in zip(axes[0], ("lr", "depth"), strict=True):
        for form in FORMS:
            means = [statistics.fmean(ended(rows, {**MIDDLE, name: v}, form).values()) for v in AXES[name]]
            axis.plot(
                [float(v) for v in AXES[name]], [math.exp(mean) for mean in means], "o-", label=form, markersize=3
            )
        axis.set(xscale="log", yscale="log", xlabel=name, ylabel="train loss")
        axis.set_xticks([float(value) for value in AXES[name]], AXES[name])
        axis.tick_params(axis="x", which="minor", bottom=False, labelbottom=False)
    axes[0][0].legend(fontsize=7)
    tables = "\n\n".join(f"### Over {axis}\n\n{table(rows, axis)}" for axis in AXES)
    seeds, middle = len({row["seed"] for row in rows}), ", ".join(f"{name} {value}" for name, value in MIDDLE.items())
    return {
        "feedback setting": f"{rows[0]['steps']} steps, {seeds} seeds; the middle setting: {middle}",
        "feedback counts": "\n".join(counts(rows)),
        "feedback": f"{save(made, folder, 'feedback')}\n\n{tables}",
        "feedback errors": errors(rows),
    }
