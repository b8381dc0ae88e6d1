"""The page of ``digits.py``: control graph, one stage's derivation, training curves, table, and what they say.

Everything on it comes from the experiment and the optimizer it is given; it loads nothing from elsewhere.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import math
import os
import platform
import re
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from jinja2 import Environment, StrictUndefined
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from gtddp_compile.optimizer import CompiledOptimizer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from gtddp_compile.demo.digits import Experiment, Run, Setting, Summary

# Okabe and Ito's colours: apart for colour-blind eyes; dash and marker tell them apart without colour
LOOKS: dict[str, dict[str, Any]] = {
    "base": {"color": "#4d4d4d", "linestyle": (0, (5, 2)), "marker": "s"},
    "paper": {"color": "#d55e00", "linestyle": (0, (1, 1.4)), "marker": "^"},
    "default": {"color": "#0072b2", "linestyle": "-", "marker": "o"},
}
TEMPLATE = Path(__file__).with_name("digits.html.j2")
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
TOP = 30.0
GUESSING = math.log(10)
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#8a94a3", "axes.labelcolor": "#3a4556", "xtick.color": "#3a4556", "ytick.color": "#3a4556",
    "svg.fonttype": "path", "svg.hashsalt": "digits",
}  # fmt: skip


def write_report(path: Path, experiment: Experiment, optimizer: CompiledOptimizer) -> list[str]:
    """Write the page; the sentences that the data allow are on it and are returned."""
    said = findings(experiment)
    stage = _inside(optimizer)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        experiment=experiment,
        rows=[_row(row) for row in experiment.summaries()],
        findings=said,
        graph=optimizer.graph.to_svg(),
        stage=stage,
        players=", ".join(optimizer.graph.stages[stage].players),
        derivation=_lines(str(optimizer.program.derivation(stage=stage, format="text"))),
        curves=[
            (setting, _curve(experiment, setting, "steps"), _curve(experiment, setting, "seconds"))
            for setting in experiment.settings
        ],
        keys=[(method, _key(method.name)) for method in experiment.methods],
        made=_made(experiment),
        guessing=GUESSING,
        top=TOP,
    )
    path.write_text(page, encoding="utf-8")
    return said


def _row(row: Summary) -> dict[str, object]:
    """One row of the table, in words."""
    percent = tuple(100 * value for value in row.accuracy)
    return {
        "setting": row.setting.name,
        "method": row.method,
        "loss": said_spread(row.final, "{:.2g}"),
        "accuracy": said_spread(percent, "{:.1f}"),  # type: ignore[arg-type]
        "ms": f"{row.ms:.2f}" if math.isfinite(row.ms) else "–",
        "diverged": row.diverged,
        "runs": len(row.runs),
    }


# --- figures ----------------------------------------------------------------------------------------------------------


def _curve(experiment: Experiment, setting: Setting, along: str) -> str:
    """Train loss of one setting, median and range over seeds, as an SVG element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.9), layout="constrained")
        axes = figure.add_subplot()
        lowest, highest = math.inf, GUESSING
        for method in experiment.methods:
            runs = experiment.summary(setting, method.name).runs
            losses = np.nan_to_num(np.array([run.losses for run in runs]), nan=TOP, posinf=TOP).clip(max=TOP)
            across = np.median([getattr(run, along) for run in runs], axis=0)
            _line(axes, across, losses, method.name)
            lowest, highest = min(lowest, losses.min()), max(highest, losses.max())
        axes.axhline(GUESSING, color="#8a94a3", linewidth=0.9, linestyle=(0, (2, 3)), zorder=0)
        axes.text(
            1.015, GUESSING, "guessing", transform=axes.get_yaxis_transform(), va="center", color="#667284", fontsize=10
        )
        axes.set_yscale("log")
        axes.set_ylim(lowest * 0.7, highest * 1.4)
        axes.yaxis.set_major_locator(LogLocator(10))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_xlim(left=0)
        axes.grid(axis="y", color="#e6eaf0", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylabel("train loss")
        axes.set_xlabel("step" if along == "steps" else "seconds of training")
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    what = f"Train loss over {'steps' if along == 'steps' else 'wall-clock time'}, {setting.name}"
    return _inline(stream.getvalue(), f"{setting.curvature}-{setting.lr:g}-{along}".replace(".", "_"), what)


def _line(axes: Axes, across: np.ndarray, losses: np.ndarray, method: str) -> None:
    look = LOOKS[method]
    axes.fill_between(across, losses.min(0), losses.max(0), color=look["color"], alpha=0.16, linewidth=0)
    axes.plot(across, np.median(losses, axis=0), linewidth=2, markersize=5, markevery=[-1], clip_on=False, **look)


def _inline(text: str, prefix: str, what: str) -> str:
    """The ``<svg>`` element alone, scaling with the page, its ids apart from other figures'."""
    element = text[text.index("<svg") :]
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", element)
    opening = rf'<svg viewBox="\1" role="img" aria-label="{what}" {NAMESPACES}>'
    element = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, element, count=1)
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)


def _key(method: str) -> str:
    """A legend's swatch."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(0.62, 0.26))
        axes = figure.add_axes((0, 0, 1, 1))
        axes.axis("off")
        axes.set(xlim=(0, 1), ylim=(-1, 1))
        axes.fill_between([0, 1], -0.7, 0.7, color=LOOKS[method]["color"], alpha=0.16, linewidth=0)
        axes.plot([0.03, 0.85], [0, 0], linewidth=2, markersize=5, markevery=[-1], **LOOKS[method])
        stream = io.StringIO()
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
    return _inline(stream.getvalue(), f"key-{method}", method)


# --- words ------------------------------------------------------------------------------------------------------------


def typical_ms(runs: Iterable[Run]) -> float:
    """The median over the stretches in which the loss stayed finite; nan if there was none."""
    found = [ms for run in runs for ms in run.chunk_ms]
    return statistics.median(found) if found else math.nan


def said(value: float, form: str) -> str:
    """A figure for the reader: what is not finite is called so."""
    return form.format(value) if math.isfinite(value) else "not finite"


def said_spread(values: tuple[float, float, float], form: str) -> tuple[str, str]:
    """Median, and range: two texts."""
    median, least, greatest = (said(value, form) for value in values)
    return median, "" if least == greatest else f"{least}–{greatest}"


def findings(experiment: Experiment) -> list[str]:
    """What the measurements say, for and against, in sentences made from them."""
    said = []
    for setting in experiment.settings:
        rows = sorted(
            (experiment.summary(setting, method.name) for method in experiment.methods), key=lambda row: row.final[0]
        )
        order = ", then ".join(f"{row.method} ({_loss(row)})" for row in rows)
        said.append(
            f"{setting.name} ({setting.label}): lowest final train loss, median over seeds: {order}. {_lost(rows)}"
        )
        said.append(_duel(experiment, setting))
    return [*said, *_costs(experiment)]


def _loss(row: Summary) -> str:
    return "diverged" if row.diverged * 2 > len(row.runs) else f"{row.final[0]:.2g}"


def _lost(rows: list[Summary]) -> str:
    lost = [f"{row.method} with {row.diverged} of {len(row.runs)} seeds" for row in rows if row.diverged]
    return f"Diverged: {', '.join(lost)}." if lost else "No run diverged."


def _duel(experiment: Experiment, setting: Setting) -> str:
    """The default against the base method at one setting: by steps, seed by seed, then by time."""
    base, ours = (experiment.summary(setting, name) for name in ("base", "default"))
    pairs = [
        (mine, theirs) for mine, theirs in zip(ours.runs, base.runs, strict=True) if not (mine.lost and theirs.lost)
    ]
    below = sum(theirs.lost or (not mine.lost and mine.losses[-1] < theirs.losses[-1]) for mine, theirs in pairs)
    above, count = len(pairs) - below, len(ours.runs)
    verdict = "wins against" if below > above else "loses to" if below < above else "draws with"
    drawn = f", both diverged on {count - len(pairs)}" if len(pairs) < count else ""
    limit = statistics.median(run.seconds[-1] for run in base.runs)
    by_then = statistics.median(
        float(np.interp(limit, run.seconds, np.nan_to_num(run.losses, nan=TOP, posinf=TOP))) for run in ours.runs
    )
    place = "below" if by_then < base.final[0] else "above" if by_then > base.final[0] else "level with"
    return (
        f"{setting.name}: at equal steps the default {verdict} the base method (lower on {below} of {count} seeds, "
        f"higher on {above}{drawn}); at equal time, the {limit:.2g} s of a base run, its median loss is {by_then:.2g}, "
        f"{place} the {base.final[0]:.2g} of the base method."
    )


def _costs(experiment: Experiment) -> list[str]:
    """What a step costs, and what the validation images tell."""
    ms = {
        method.name: typical_ms(run for run in experiment.runs if run.method == method.name)
        for method in experiment.methods
    }
    others = ", ".join(
        f"of {name} {ms[name]:.2f} ms ({ms[name] / ms['base']:.1f} times)"
        for name in ms
        if name != "base" and math.isfinite(ms[name])
    )
    one = 1 / experiment.images[1]
    best = "; ".join(
        f"{setting.name}: "
        + ", ".join(f"{row.method} {row.accuracy[0]:.1%}" for row in experiment.summaries() if row.setting == setting)
        for setting in experiment.settings
    )
    return [
        f"A step of base takes {ms['base']:.2f} ms, {others}.",
        f"Median validation accuracy at {best}. Each of the {experiment.images[1]} images counts for {one:.1%}.",
    ]


def _compile_seconds(experiment: Experiment) -> str:
    compiled = [run.compile_seconds for run in experiment.runs if run.method != "base"]
    return f"{statistics.median(compiled):.2f} s (the first {compiled[0]:.2f} s)"


def _made(experiment: Experiment) -> list[tuple[str, str]]:
    libraries = ("gtddp-compile", "torch", "scikit-learn", "matplotlib")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in libraries)
    threads = torch.get_num_threads()
    machine = f"{_processor()}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}"
    return [
        ("date", datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")),
        ("command", " ".join(["python", "examples/digits.py", *sys.argv[1:]])),
        ("machine", f"{machine}; {threads} thread{'s' if threads > 1 else ''} used"),
        ("versions", f"{versions}, Python {platform.python_version()}"),
        ("seeds", f"{experiment.seeds}, numbered from 0: initial weights and batch order, the same for every method"),
        ("training", f"{experiment.steps} steps a run, {len(experiment.runs)} runs, {experiment.seconds:.0f} s in all"),
        (
            "data",
            "scikit-learn's digits, {} images to train, {} to validate, one fixed split".format(*experiment.images),
        ),
        ("compile time", f"{_compile_seconds(experiment)} an optimizer, not in the curves"),
    ]


def _processor() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.processor() or platform.machine()


def _inside(optimizer: CompiledOptimizer) -> int:
    """The first stage whose state is the running value and one that waits for the merge."""
    stages = optimizer.graph.stages
    return next((stage.index for stage in stages if len(stage.live) > 1), len(stages) - 1)


def _lines(text: str) -> list[tuple[int, str]]:
    """Lines with their indentation in characters: the page indents, so that a long line wraps under itself."""
    return [(len(line) - len(line.lstrip()), line.strip()) for line in text.splitlines()]
