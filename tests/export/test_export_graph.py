"""``.pt2``: the step as one graph of torch.export, loaded again and run."""

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import CompileError, UpdateProgram, compile_optimizer
from gtddp_compile.tools.export.tex import symbol_text
from support import networks
from support.architectures import EXAMPLES, Example
from support.exported import compiled, largest, named, pseudo_huber, run_alone, state_by_name, targets_for, torch_only
from support.networks import make
from support.stored import small


def normed() -> Example:
    """A strided convolution, a batch-norm with running statistics, a shortcut."""

    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return net.head(torch.relu(net.norm(net.a(x)) + x[..., ::2, ::2]).flatten(1))

    layers = {"a": lambda: nn.Conv2d(1, 2, 3, 2, 1), "norm": lambda: nn.BatchNorm2d(2), "head": (8, 3)}
    return Example(make(forward, **layers), (torch.randn(4, 1, 4, 4, dtype=torch.float64),))


CASES: dict[str, tuple[Callable[[], Example], dict[str, Any]]] = {
    "sgd": (normed, {"curvature": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": (small, {"curvature": "adam", "amsgrad": True, "weight_decay": 0.1, "coupling": "block"}),
}
SCRIPT = """
for name in {names!r}:
    loaded = torch.export.load(name + ".pt2")
    params, buffers, inputs, targets = torch.load(name + ".pt")
    _, _, state, *_ = loaded.example_inputs[0]
    step, losses = loaded.module(), []
    for _ in range(3):
        params, buffers, state, loss = step(params, buffers, state, inputs, targets)
        losses.append(loss)
    bad = step(params, buffers, state, (torch.full_like(inputs[0], torch.nan),), targets)
    torch.save((params, buffers, state, losses, bad), name + ".out")
"""


def test_three_steps_with_torch_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As ``opt.step`` in an environment with torch and nothing else; then one whose loss is not finite."""
    monkeypatch.chdir(tmp_path)
    optimizers = {}
    for name, (build, options) in CASES.items():
        example = build()
        targets = targets_for(3, example.inputs[0].shape[0])
        opt = compiled(example, **options)
        opt.program.export(f"{name}.json")
        UpdateProgram.load(f"{name}.json").export(f"{name}.pt2")
        torch.save((*named(example.model), example.inputs, targets), f"{name}.pt")
        optimizers[name] = (opt, example, targets)
    run_alone(SCRIPT.format(names=list(CASES)), torch_only(tmp_path / "site"))
    for name, (opt, example, targets) in optimizers.items():
        *after, losses, bad = torch.load(f"{name}.out")
        wanted = [float(opt.step(example.inputs, targets)) for _ in range(3)]
        assert max(abs(float(a) - b) for a, b in zip(losses, wanted, strict=True)) <= 1e-12
        expected = (*named(example.model), state_by_name(opt, example.model))
        assert all(largest(a, b) <= 1e-12 for a, b in zip(after, expected, strict=True))
        assert not bad[3].isfinite() and all(largest(a, b) == 0 for a, b in zip(bad[:3], after, strict=True))


def test_a_loss_of_ones_own_needs_example_targets(tmp_path: Path) -> None:
    """Targets of several numbers, so that the step looks ahead."""
    example = Example(make(lambda net, x: net.a(x), a=(4, 3)), (torch.randn(7, 4, dtype=torch.float64),))
    opt = compiled(example, loss=pseudo_huber, inertia=0.9, lookahead=0.7)
    with pytest.raises(CompileError, match=r"what targets the loss pseudo_huber takes is not known.*targets="):
        opt.program.export(tmp_path / "step.pt2")
    targets = torch.zeros(7, 3, dtype=torch.float64)
    opt.program.export(tmp_path / "step.pt2", targets=targets)
    loaded = torch.export.load(tmp_path / "step.pt2")
    (params, buffers), state = named(example.model), loaded.example_inputs[0][2]
    for _ in range(3):
        params, buffers, state, _ = loaded.module()(params, buffers, state, example.inputs, targets)
        opt.step(example.inputs, targets)
        assert largest(params, named(example.model)[0]) <= 1e-12


WEIGHT = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(WEIGHT), nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT * 3)])
def test_a_loss_s_weights_are_in_the_graph(loss: nn.Module, tmp_path: Path) -> None:
    example = Example(make(lambda net, x: net.a(x), a=(4, 3)), (torch.randn(7, 4, dtype=torch.float64),))
    opt = compiled(example, loss=loss)
    targets = torch.arange(7) % 3 if isinstance(loss, nn.CrossEntropyLoss) else torch.rand(7, 3).double()
    opt.program.export(tmp_path / "step.pt2")
    loaded = torch.export.load(tmp_path / "step.pt2")
    (params, buffers), state = named(example.model), loaded.example_inputs[0][2]
    for _ in range(3):
        params, buffers, state, _ = loaded.module()(params, buffers, state, example.inputs, targets)
        opt.step(example.inputs, targets)
        assert largest(params, named(example.model)[0]) <= 1e-12


REFUSED: dict[str, tuple[Callable[[], Example], dict[str, Any], str]] = {
    "kfac": (small, {"curvature": "kfac"}, r"cannot hold kfac: it decomposes matrices.*adamw"),
    "ggn": (small, {"terminal": "ggn"}, r"cannot hold terminal='ggn'.* use terminal='geometric'"),
    "dampening": (small, {"momentum": 0.9, "dampening": 0.5}, r"sgd with dampening.*dampening=0"),
    "dropout": (EXAMPLES["dropout_mlp"], {}, r"operation dropout.*cannot draw the same random numbers.*evaluation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_graph_cannot_hold_is_refused_by_name(name: str, tmp_path: Path) -> None:
    build, options, message = REFUSED[name]
    with pytest.raises(CompileError, match=message):
        compiled(build(), **options).program.export(tmp_path / "step.pt2")
    assert not (tmp_path / "step.pt2").exists()


# --- ``.tex``: a document with the derivation of every kind of stage; compiled where there is a pdflatex ---


def exported(path: Path) -> str:
    case = networks.projection()
    opt = compile_optimizer(
        case.model, case.batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1, weight_decay=0.1
    )
    opt.program.export(path)
    return path.read_text()


def test_symbols_of_the_field() -> None:
    shown = {"V'_xx": "V'_{xx}", "f^y_x": "f^{y}_{x}", "Q_û": r"Q_{\hat u}", "Lambda'": r"\Lambda'", "l_u": r"\ell_{u}"}
    assert {name: symbol_text(name) for name in shown} == shown


def test_the_document_of_a_residual_network(tmp_path: Path) -> None:
    text = exported(tmp_path / "net.tex")
    assert r"^{\mathsf{T}} K + Q_{xx} \tag{6, 10, 30}" in text and r"Q_{\hat u" in text
    assert text.count(r"\begin{") == text.count(r"\end{")
    assert not re.search(r"\^\{[^{}]*\}\^|'\^", text), "two superscripts on one symbol"
    assert text.isascii()
    assert r"\begin{longtable}" not in text, "a short table that may break leaves its heading alone"


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="needs pdflatex (Debian: texlive-latex-recommended)")
def test_pdflatex_compiles_it(tmp_path: Path) -> None:
    exported(tmp_path / "net.tex")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "net.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]
    wide = [float(points) for points in re.findall(r"Overfull \\hbox \(([\d.]+)pt", done.stdout)]
    assert all(points < 3 for points in wide)
