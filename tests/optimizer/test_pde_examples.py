"""The problems of examples/pde: their joint step is Gauss-Newton's, and each runs."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jacrev

from gtddp_compile import compile_optimizer
from support.compared import flat
from support.least_squares import Equation, gauss_newton

FOLDER = Path(__file__).resolve().parents[2] / "examples" / "pde"
NAMES = ("poisson", "heat", "helmholtz", "coefficient")


@pytest.fixture(autouse=True)
def examples_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def value(u: Any, p: Any, x: Tensor) -> Tensor:
    return u(x)  # type: ignore[no-any-return]


def laplace(u: Any, p: Any, x: Tensor) -> Tensor:
    return hessian(u)(x)[0].trace()[None]  # type: ignore[no-any-return]


def helmholtz(u: Any, p: Any, x: Tensor) -> Tensor:
    return laplace(u, p, x) + 16.0 * u(x)  # type: ignore[no-any-return]


def heat(u: Any, p: Any, x: Tensor) -> Tensor:
    return jacrev(u)(x)[:, 1] - p.get("diffusivity", 0.25) * hessian(u)(x)[:, 0, 0]  # type: ignore[no-any-return]


EQUATIONS: dict[str, dict[str, Equation]] = {
    "poisson": {"interior": laplace, "boundary": value}, "heat": {"equation": heat, "known": value},
    "helmholtz": {"inside": helmholtz, "edge": value}, "coefficient": {"equation": heat, "data": value},
}  # fmt: skip


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """An example, with narrow layers in place of its own."""
    made = import_module("solve").network
    monkeypatch.setattr(import_module(request.param), "network", lambda *sizes: made(sizes[0], 8, 8, sizes[-1]))
    return str(request.param)


def test_the_joint_step_is_gauss_newton_s(name: str) -> None:
    torch.manual_seed(1)
    problem = import_module(name).problem()
    drawn = problem.points(torch.Generator().manual_seed(2))
    points = {  # some of them
        key: (x[:: len(x) // 20], y[:: len(x) // 20] if isinstance(y, Tensor) else y) for key, (x, y) in drawn.items()
    }
    opt = compile_optimizer(problem.terms, points, curvature="sgd")
    for lam in (1e-5, 1e-2):
        expected, before = gauss_newton(problem.terms, EQUATIONS[name], points, lam), flat(problem.terms)
        for group in opt.param_groups:
            group["lr"] = 1 / lam
        opt.step(points)
        found = flat(problem.terms) - before
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))


def test_it_runs(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / f"{name}.html"
    import_module(name).main(steps=2, out=report)
    page = report.read_text(encoding="utf-8")
    assert "2/2" in capsys.readouterr().out and "2 steps" in page and page.rstrip().endswith("</svg>")


def test_averaged_networks_are_what_is_shown() -> None:
    """After n steps the share of the next is ``9 / (n + 9)``."""
    problem = import_module("poisson").problem(10)
    weights, net = [], problem.terms.net
    for _ in range(3):
        weights.append(net[0].weight.detach().clone())
        problem.follow()
        with torch.no_grad():
            net[0].weight.add_(1.0)
    expected = weights[0] + 0.9 + (2 - 0.9) * 9 / 11
    torch.testing.assert_close(problem.mean.module[0].weight, expected)
    with torch.no_grad():
        torch.testing.assert_close(problem.found(), problem.mean(problem.where)[:, 0])


def test_the_curve_fit_is_as_good_as_levenberg_marquardt_s() -> None:
    friction = import_module("friction")
    v, force = friction.measured()
    found = []
    for fit in (friction.ours, friction.levenberg_marquardt):
        torch.manual_seed(0)
        net = import_module("solve").network(1, 10, 1)
        fit(net, v, force, 60)
        found.append(friction.rms(net, v, force))
    assert found[0] < 1.05 * found[1] < 0.03
