"""``.tex``: a document with the derivation of every kind of stage; compiled where there is a pdflatex."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from torch import nn

from gtddp_compile import compile_optimizer
from gtddp_compile.tools.export.tex import symbol_text
from support import networks


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
