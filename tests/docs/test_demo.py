"""The demo runs, with very few steps, and its report is complete and stands alone."""

import contextlib
import io
import math
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gtddp_compile.tools.demo import digits
from gtddp_compile.tools.demo.experiment import Experiment, Method, Run, Scale, chosen, findings, verdicts

DEMO = Path(__file__).parents[2] / "examples" / "digits.py"
STEPS, SEEDS = 3, 2
LABELS = ("Nesterov SGD", "Adam", "the paper's form", "the default")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What the demo printed, and the page, of a tenth of the images."""
    folder, said, all_images = tmp_path_factory.mktemp("demo"), io.StringIO(), digits.load_digits()
    few = SimpleNamespace(images=all_images.images[:180], target=all_images.target[:180])
    words = [str(DEMO), "--steps", str(STEPS), "--seeds", str(SEEDS), "--out", "out.html"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), pytest.raises(SystemExit) as ended:
        patch.chdir(folder)
        patch.setattr(sys, "argv", words)
        patch.setattr(digits, "load_digits", lambda: few)
        patch.setattr(digits, "TRAIN", 140)
        runpy.run_path(str(DEMO), run_name="__main__")
    assert not ended.value.code and [path.name for path in folder.iterdir()] == ["out.html"]
    return said.getvalue(), (folder / "out.html").read_text(encoding="utf-8")


def test_report_loads_nothing(made: tuple[str, str]) -> None:
    assert not re.search(r"""@import|url\((?!#)|(?:src|href)=["'](?!#)|<script""", made[1])


def test_report_is_complete(made: tuple[str, str]) -> None:
    assert made[1].count("<svg") >= 1 + 2 * 4  # the graph; loss and accuracy by steps and seconds at two batch sizes
    rows = [row.count("<td") for row in made[1].split("<tr")[1:] if "<td" in row]
    assert made[1].count("<table") == 2 + 1 and rows.count(8) == 2 * len(LABELS) and set(rows) == {8, 5}
    for text in (*LABELS, "conv2", "Eq. 9", f"Batch 8, {STEPS} steps", "Batch 128, 1 steps", "Compiling"):
        assert text.replace("'", "&#39;") in made[1], text


def test_terminal_shows_the_same_result(made: tuple[str, str]) -> None:
    for text in (*LABELS, "sweep", "ms/step", "batch 8", "batch 128", "out.html"):
        assert text in made[0], text


def run_of(method: str, losses: list[float], seconds: list[float]) -> Run:
    """A run that was evaluated every ten steps."""
    found = Run(method_of(method), SCALE, 0.1, 0, list(range(0, 10 * len(losses), 10)), seconds, losses)
    found.accuracies = [0.9] * len(losses)
    return found


def method_of(name: str) -> Method:
    return Method(name, f"method {name}", "", lambda model, images, lr: lambda images, labels: images)


SCALE = Scale(8, 30, 3)


def test_a_sweep_has_two_winners_where_speed_and_the_end_disagree() -> None:
    fast, low = run_of("sgd", [2.3, 0.04, 0.06], [0.0, 0.1, 0.2]), run_of("sgd", [2.3, 0.2, 0.01], [0.0, 0.1, 0.2])
    bad = run_of("sgd", [2.3, math.nan, math.nan], [0.0, 0.1, 0.2])
    assert chosen([bad, low, fast]) == [fast, low]
    assert chosen([bad, low]) == [low]


def test_it_says_who_won_and_who_lost() -> None:
    """The default is ahead by steps, behind by time, and level in accuracy; the paper's form never gets there."""
    runs = (
        run_of("sgd", [2.3, 0.2, 0.04, 0.01], [0.0, 0.1, 0.2, 0.3]),
        run_of("paper", [2.3, 2.0, math.nan, math.nan], [0.0, 1.0, 2.0, 3.0]),
        run_of("default", [2.3, 0.04, 0.03, 0.02], [0.0, 1.0, 2.0, 3.0]),
    )
    experiment = Experiment(tuple(run.method for run in runs), (SCALE,), (), runs, 1, 1.0, (100, 10))
    assert [(answer, first) for _, answer, first in verdicts(experiment, SCALE)] == [
        ("method default: 10; method sgd: 20, method paper: never", "first"),
        ("method sgd: 0.20 s; method default: 1.00 s, method paper: never", "behind"),
        ("method sgd: 0.01; method default: 0.02, method paper: not finite", "behind"),
        ("too close to call: method sgd: 90.0 %, method paper: 90.0 %, method default: 90.0 %", "close"),
    ]
    text = " ".join(findings(experiment))
    assert "is first by steps to train loss 0.05; is too close to another to call by validation accuracy" in text
    assert "is not first by processor time to train loss 0.05 and train loss at the end" in text
    assert "no better than guessing at the end: method paper with 1 of 1 seeds" in text
