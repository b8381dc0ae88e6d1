"""The heat equation ∂u/∂t = κ ∂²u/∂x² on the unit interval, t from 0 to 1: python examples/pde/heat.py"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import typer
from solve import Problem, network, solve
from torch import Tensor

from gtddp_compile import Terms, pde

DIFFUSIVITY = 0.25


def exact(xt: Tensor) -> Tensor:
    """``exp(-κ π² t) sin π x`` at points (x, t)."""
    return torch.exp(-DIFFUSIVITY * math.pi**2 * xt[:, 1]) * torch.sin(math.pi * xt[:, 0])


def equation(net: Any, xt: Tensor) -> Tensor:
    """``∂u/∂t - κ ∂²u/∂x²``, which is to be zero."""
    u = pde.taylor(net)(xt)
    return u.gradient[:, 0, 1] - DIFFUSIVITY * u.hessian_diagonal[:, 0, 0]


def known(net: Any, xt: Tensor) -> Tensor:
    """``u``, which is given at the beginning and at both ends."""
    return net(xt)[:, 0]  # type: ignore[no-any-return]


def points(drawn: torch.Generator) -> dict[str, tuple[Tensor, Tensor | float]]:
    """900 points inside; of 120 with known values half at the beginning, a quarter at each end."""
    inside, edge = torch.rand(1020, 2, generator=drawn, dtype=torch.float64).split((900, 120))
    edge[:60, 1], edge[60:90, 0], edge[90:, 0] = 0.0, 0.0, 1.0
    return {"equation": (inside, 0.0), "known": (edge, exact(edge))}


def problem() -> Problem:
    """With the network of the Poisson example."""
    terms = Terms(network(2, 64, 64, 48, 48, 1), {"equation": equation, "known": known})
    where = torch.rand(4000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Problem(terms, points, where, exact(where))


def main(steps: int = 150, out: Path = Path("heat.html")) -> None:
    """Solve it and write a report."""
    torch.manual_seed(0)
    solve(problem(), steps, out)


if __name__ == "__main__":
    typer.run(main)
