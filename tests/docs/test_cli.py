"""The command line: what it prints, writes and refuses, on models in a user's own files."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from gtddp_compile.errors import CompileError
from gtddp_compile.tools.cli import app, loading, terminal
from support.exported import load_module, named

USER_FILE = """\
import torch
from torch import nn

from beside import WIDTH


class Net(nn.Module):
    def __init__(self, hidden=WIDTH):
        super().__init__()
        self.first = nn.Linear(4, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, 3)

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.head(h + torch.tanh(self.second(h)))


def tokens():
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 3), nn.Flatten())


class Deciding(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.sum() > 0:
            y = 2 * y
        return y


def deciding():
    return Deciding(4, 3)


def broken():
    raise RuntimeError("no weights [here]")


def number():
    return 3


def absolute(outputs, targets):
    return (outputs - targets).abs().sum(1)


ready = tokens()
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory of the user's own, outside the package; what is imported from it is forgotten afterwards."""
    (tmp_path / "user_net.py").write_text(USER_FILE, encoding="utf-8")
    (tmp_path / "beside.py").write_text("WIDTH = 5\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("user_net", "beside"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setenv("COLUMNS", "110")
    return tmp_path


def run(*words: str) -> Result:
    done = CliRunner().invoke(app, list(words))
    for name in ("user_net", "beside"):
        sys.modules.pop(name, None)
    return done


@pytest.mark.parametrize("target", ["user_net:Net", "user_net.py:Net", "./user_net.py:Net"])
def test_inspect_prints_the_table(here: Path, target: str) -> None:
    done = run("inspect", target, "--input", "2,4")
    assert done.exit_code == 0, done.stderr
    assert "Control graph of Net" in done.stdout and "second: linear, 30" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("suffix", "says"), [("svg", "<svg "), ("mmd", "flowchart"), ("dot", "digraph"), ("txt", "Net")]
)
def test_inspect_writes(here: Path, suffix: str, says: str) -> None:
    done = run("inspect", "user_net:Net", "-i", "2,4", "--out", f"net.{suffix}")
    assert done.exit_code == 0 and done.stdout == "", done.stderr
    assert f"wrote net.{suffix}" in done.stderr
    text = (here / f"net.{suffix}").read_text(encoding="utf-8")
    assert says in text and "second" in text


def test_arguments_precision_and_schedule(here: Path) -> None:
    words = ("user_net:Net", "-i", "2,4", "--arg", "hidden=6", "--dtype", "float64", "--schedule", "sequential")
    done = run("inspect", *words, "-o", "net.json")
    assert done.exit_code == 0, done.stderr
    data = json.loads((here / "net.json").read_text(encoding="utf-8"))
    assert data["graph"]["schedule"] == "sequential"
    assert [player["size"] for player in data["graph"]["players"]] == [30, 42, 21]


def test_derive(here: Path) -> None:
    whole = run("derive", "user_net:Net", "-i", "2,4").stdout
    assert [f"stage {index}:" in whole for index in range(4)] == [True, True, True, False]
    one = run("derive", "user_net:Net", "-i", "2,4", "--stage", "1").stdout
    assert one.startswith("stage 1: second") and one.strip() in whole
    latex = run("derive", "user_net:Net", "-i", "2,4", "--stage", "1", "--format", "latex", "--out", "net.tex")
    assert latex.exit_code == 0 and "\\begin{align}" in (here / "net.tex").read_text(encoding="utf-8")


def test_options_reach_the_derivation(here: Path) -> None:
    words = ("derive", "user_net:Net", "-i", "2,4", "--stage", "0")
    paper = run(*words, "--coupling", "block", "--recursion", "printed", "--curvature", "rmsprop").stdout
    assert "printed form" in paper and "joint form" in run(*words).stdout
    assert run(*words, "--loss", "user_net:absolute").exit_code == 0
    assert "#columns)" not in run(*words).stdout and "#columns)" in run(*words, "--terminal", "2").stdout
    steep = run(*words, "--terminal", "steep")
    assert steep.exit_code == 1 and "terminal='steep' is not known" in steep.stderr
    assert run(*words, "--loss", "SmoothL1Loss").exit_code == 0


def test_export_writes_a_module_that_runs(here: Path) -> None:
    words = "-i 2,4 --loss mse --curvature adam --lr 0.01 --set eps=1e-6 --dtype float64 --out step.py"
    done = run("export", "user_net.py:Net", *words.split())
    assert done.exit_code == 0 and done.stdout == "", done.stderr
    assert "wrote step.py" in done.stderr
    module, model = load_module(here / "step.py"), loading.load_model("user_net.py:Net", [], "float64")
    params, _ = named(model)
    x, y = torch.ones(2, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)
    after, _, _, loss = module.step(params, {}, module.init_state(params), (x,), y)
    assert torch.allclose(loss, torch.nn.functional.mse_loss(model(x), y))
    assert all((after[name] - params[name]).abs().max() > 1e-4 for name in params)


def test_export_refuses_an_unknown_suffix(here: Path) -> None:
    done = run("export", "user_net:Net", "-i", "2,4", "--out", "step.exe")
    assert done.exit_code == 1 and ".exe" in done.stderr and not (here / "step.exe").exists()


@pytest.mark.parametrize(("words", "says"), [
    (("user_net:broken", "-i", "2,4"), ["no weights [here]", "RuntimeError", "user_net.py:36"]),
    (("user_net:number", "-i", "2,4"), ["gave int, not a torch.nn.Module"]),
    (("user_net:Missing", "-i", "2,4"), ["has no 'Missing'", "Net, tokens"]),
    (("not_there:Net", "-i", "2,4"), ["no module 'not_there'"]),
    (("not_there.py:Net", "-i", "2,4"), ["no file not_there.py"]),
    (("user_net:Net", "-i", "2,3"), ["user_net.py:15", "Pass inputs"]),
    (("user_net:Net", "-i", "2,4", "-a", "deep=1"), ["TypeError", "--arg KEY=VALUE"]),
    (("user_net:Net", "-i", "2,4", "-o", "nowhere/net.svg"), ["cannot be written"]),
    (("user_net:Net", "-i", "2,4", "--schedule", "later"), ["'later'", "asap"]),
])  # fmt: skip
def test_failures_are_readable_and_exit_1(here: Path, words: tuple[str, ...], says: list[str]) -> None:
    done = run("inspect", *words)
    assert done.exit_code == 1 and done.stdout == ""
    assert "failed" in done.stderr and "Traceback" not in done.stderr
    text = " ".join(done.stderr.split())
    assert all(part in text for part in says), done.stderr


@pytest.mark.parametrize("words", [
    ("inspect",), ("inspect", "user_net:Net"), ("inspect", "user_net", "-i", "2,4"),
    ("inspect", "user_net:Net", "-i", "2,wide"), ("inspect", "user_net:Net", "-i", "2,0"),
    ("inspect", "user_net:Net", "-i", "2,4:int7"), ("inspect", "user_net:Net", "-i", "2,4", "--dtype", "int64"),
    ("inspect", "user_net:Net", "-i", "2,4", "--arg", "hidden"),
    ("inspect", "user_net:Net", "-i", "2,4", "--out", "net.png"),
    ("derive", "user_net:Net", "-i", "2,4", "--format", "html"),
    ("derive", "user_net:Net", "-i", "2,4", "--loss", "tall"),
    ("derive", "user_net:Net", "-i", "2,4", "--feedback", "maybe"), ("export", "user_net:Net", "-i", "2,4"), ("fly",),
])  # fmt: skip
def test_usage_errors_exit_2(here: Path, words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.exit_code == 2, (done.stdout, done.stderr)
    assert "Usage" in done.stderr


def test_a_file_that_fails_says_where(here: Path) -> None:
    (here / "wrong.py").write_text("x = 1\nx.y\n", encoding="utf-8")
    with pytest.raises(CompileError, match=r"wrong\.py:2.*AttributeError"):
        loading.load_model("wrong.py:Net", [], "float32")
    (here / "worse.py").write_text("x = (\n", encoding="utf-8")
    with pytest.raises(CompileError, match=r"worse\.py:1.*SyntaxError"):
        loading.load_model("worse.py:Net", [], "float32")


def test_error_is_printed_in_three_parts(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.report(CompileError("it [is] so", "Do that", module="a.b", operation="linear", source="net.py:3"))
    lines = [line.strip() for line in capsys.readouterr().err.splitlines()]
    assert lines == ["failed: module a.b, operation linear, at net.py:3", "it [is] so.", "Do that."]


def test_demo_names_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtddp_compile.tools.cli.commands.util.find_spec", lambda name: None)
    done = run("demo", "digits")
    assert done.exit_code == 1 and "gtddp-compile[demo]" in done.stderr


def test_in_a_process_of_its_own(here: Path) -> None:
    """As a user runs it, from another directory: exit codes, and nothing but the result on stdout."""
    away = here / "away"
    away.mkdir()
    command = [sys.executable, "-m", "gtddp_compile", "inspect", "../user_net.py:Net", "--input", "2,4"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=away, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Control graph of Net") and done.stderr == ""


def test_a_schedule_by_hand(here: Path) -> None:
    words = ("user_net:Net", "-i", "2,4", "-o", "net.json")
    stages = [f"--schedule={name}={stage}" for name, stage in (("first", 0), ("second", 3), ("head", 7))]
    assert run("inspect", *words, *stages).exit_code == 0
    data = json.loads((here / "net.json").read_text(encoding="utf-8"))
    assert data["graph"]["schedule"] == "mapping"
    missing = run("inspect", *words, *stages[:2])
    assert missing.exit_code == 1 and "gives no stage to 'head'" in " ".join(missing.stderr.split())
    for wrong in (("--schedule", "asap", "--schedule", "first=1"), ("--schedule", "first=early")):
        assert run("inspect", *words, *wrong).exit_code == 2


def test_diff_of_a_file_and_a_model(here: Path) -> None:
    options = ("-i", "2,4", "--curvature", "adam")
    assert run("export", "user_net:Net", *options, "--out", "net.json").exit_code == 0
    same = run("diff", "net.json", "user_net.py:Net", *options)
    assert same.exit_code == 0 and "The programs do not differ." in same.stdout, same.stderr
    other = run("diff", "net.json", "user_net:Net", *options, "--arg", "hidden=6", "--lr", "0.5")
    assert "≠   adam.lr" in other.stdout and "players: 3 changed, 0 the same" in other.stdout
    page = run("diff", "net.json", "net.json", "--out", "diff.html")
    assert page.exit_code == 0 and page.stdout == "" and "<html" in (here / "diff.html").read_text(encoding="utf-8")
    assert run("diff", "net.json", "user_net:Net").exit_code == 2
    assert run("diff", "net.json", "net.json", "--out", "diff.pdf").exit_code == 2
    missing = run("diff", "net.json", "nowhere.json")
    assert missing.exit_code == 1 and "nowhere.json cannot be read" in missing.stderr
