"""The page of ``digits.py``: who won, tables, training curves, the sweep, control graph, one stage's derivation.

Everything on it comes from the experiment and the optimizer it is given; it loads nothing from elsewhere.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import io
import os
import platform
import re
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from gtddp_compile.optimizer import CompiledOptimizer
from gtddp_compile.tools.demo.experiment import TARGET, Experiment, Method, Scale, Summary, Verdict, findings, verdicts
from gtddp_compile.tools.page import page

# Okabe and Ito's colours: apart for colour-blind eyes; dashes tell them apart without colour. The page replaces them by
# its own, so that they change with its scheme.
LOOKS: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#4d4d4d", "linestyle": (0, (5, 2))},
    "adam": {"color": "#009e73", "linestyle": (0, (5, 1.5, 1, 1.5))},
    "paper": {"color": "#d55e00", "linestyle": (0, (1, 1.4))},
    "default": {"color": "#0072b2", "linestyle": "-"},
}
INK, RULE = "#3a4556", "#e6eaf0"
COLOURS = {INK: "var(--ink)", RULE: "var(--rule)"} | {look["color"]: f"var(--{name})" for name, look in LOOKS.items()}
NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
TOP = 30.0
FLOOR = 80.0
"""The lowest validation accuracy that is drawn, in per cent."""
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 11, "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "text.color": INK,
    "svg.fonttype": "path", "svg.hashsalt": "digits",
}  # fmt: skip


def write_report(path: Path, experiment: Experiment, optimizer: CompiledOptimizer) -> None:
    """Write the page."""
    stage = _inside(optimizer)
    text = page(
        "demo/digits.html.j2",
        experiment=experiment,
        findings=findings(experiment),
        results=[_result(experiment, scale) for scale in experiment.scales],
        sweeps=experiment.swept(),
        graph=optimizer.graph.to_svg(),
        stage=stage,
        players=", ".join(optimizer.graph.stages[stage].players),
        derivation=_lines(str(optimizer.program.derivation(stage=stage, format="text"))),
        made=_made(experiment),
        target=f"{TARGET:g}",
        top=TOP,
        floor=FLOOR,
    )
    path.write_text(text, encoding="utf-8")


def _result(experiment: Experiment, scale: Scale) -> tuple[Scale, list[Verdict], list[Summary], list[str]]:
    """All of one batch size: who won, rows of the table, curves."""
    drawn = [(what, along) for what in ("losses", "accuracies") for along in ("steps", "seconds")]
    curves = [_curve(experiment, scale, *which) for which in drawn]
    return scale, verdicts(experiment, scale), experiment.summaries(scale), curves


# --- figures ----------------------------------------------------------------------------------------------------------


def _curve(experiment: Experiment, scale: Scale, what: str, along: str) -> str:
    """Train loss or validation accuracy at one batch size, median and range over seeds, as an SVG element."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 3.6), layout="constrained")
        axes = figure.add_subplot()
        drawn: set[Method] = set()
        for row in experiment.summaries(scale):
            values = np.array([getattr(run, what) for run in row.runs])
            values = np.nan_to_num(values, nan=TOP, posinf=TOP).clip(max=TOP) if what == "losses" else 100 * values
            across, look = np.median([getattr(run, along) for run in row.runs], axis=0), LOOKS[row.method.name]
            axes.fill_between(across, values.min(0), values.max(0), color=look["color"], alpha=0.16, linewidth=0)
            axes.plot(across, np.median(values, axis=0), linewidth=1.1 if row.method in drawn else 2.2, **look)
            drawn.add(row.method)
        if what == "losses":
            axes.axhline(TARGET, color=INK, linewidth=0.9, linestyle=(0, (2, 3)), zorder=0)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(10))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(FLOOR, 100.3)
        axes.set_xlim(left=0)
        axes.grid(axis="y", color=RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.set_ylabel("train loss" if what == "losses" else "validation accuracy, %")
        axes.set_xlabel("step" if along == "steps" else "processor seconds of training")
        stream = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    label = f"{axes.get_ylabel()} by {axes.get_xlabel()}, batch {scale.batch}"
    return _inline(stream.getvalue(), f"batch{scale.batch}-{what}-{along}", label)


def _inline(text: str, prefix: str, what: str) -> str:
    """The ``<svg>`` element alone, scaling with the page, in its colours, its ids apart from other figures'."""
    element = text[text.index("<svg") :]
    element = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{prefix}-", element)
    opening = rf'<svg viewBox="\1" role="img" aria-label="{what}" {NAMESPACES}>'
    element = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', opening, element, count=1)
    for colour, variable in COLOURS.items():
        element = element.replace(colour, variable)
    return re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)


# --- words ------------------------------------------------------------------------------------------------------------


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
        (
            "runs",
            f"{len(experiment.runs)}, and {len(experiment.sweep)} of the sweep; {experiment.seconds:.0f} s in all",
        ),
        ("data", "scikit-learn's digits: {} images to train, {} to validate, one split".format(*experiment.images)),
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
