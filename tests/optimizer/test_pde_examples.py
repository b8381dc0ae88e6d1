"""The problems of examples/pde: their joint step is Gauss-Newton's, and each runs."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev

from gtddp_compile import compile_optimizer
from support.least_squares import Equation, gauss_newton

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "pde"
NAMES = ("poisson", "heat", "coefficient")


@pytest.fixture(autouse=True)
def examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def value(u: Any, p: Any, x: Tensor) -> Tensor:
    return u(x)  # type: ignore[no-any-return]


def laplace(u: Any, p: Any, x: Tensor) -> Tensor:
    return hessian(u)(x)[0].trace()[None]  # type: ignore[no-any-return]


def heat(u: Any, p: Any, x: Tensor) -> Tensor:
    return jacrev(u)(x)[:, 1] - p.get("diffusivity", 0.25) * hessian(u)(x)[:, 0, 0]  # type: ignore[no-any-return]


EQUATIONS: dict[str, dict[str, Equation]] = {
    "poisson": {"interior": laplace, "boundary": value}, "heat": {"equation": heat, "known": value},
    "coefficient": {"equation": heat, "data": value},
}  # fmt: skip


@pytest.mark.parametrize("lam", [1e-6, 1e-2])
@pytest.mark.parametrize("name", NAMES)
def test_the_joint_step_is_gauss_newton_s(name: str, lam: float) -> None:
    torch.manual_seed(1)
    problem = import_module(name).problem()
    drawn = problem.points(torch.Generator().manual_seed(2))
    points = {  # some of them
        key: (x[:: len(x) // 20], y[:: len(x) // 20] if isinstance(y, Tensor) else y) for key, (x, y) in drawn.items()
    }
    expected = gauss_newton(problem.terms, EQUATIONS[name], points, lam)
    before = torch.cat([p.detach().flatten() for p in problem.terms.parameters()])
    compile_optimizer(problem.terms, points, curvature="sgd", lr=1 / lam).step(points)
    found = torch.cat([p.detach().flatten() for p in problem.terms.parameters()]) - before
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / f"{name}.html"
    import_module(name).main(steps=2, out=report)
    page = report.read_text(encoding="utf-8")
    assert "2/2" in capsys.readouterr().out and "2 steps" in page and page.rstrip().endswith("</svg>")
