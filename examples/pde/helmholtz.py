"""The Helmholtz equation Δu + k² u = f on the unit square, u = 0 on its edge: python examples/pde/helmholtz.py"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import typer
from poisson import boundary
from solve import Problem, network, setting, solve
from torch import Tensor

from gtddp_compile import Terms, pde

WAVES, NUMBER = (1, 3), 4.0
"""Half waves along each axis, and k."""


def exact(x: Tensor) -> Tensor:
    """``sin a π x sin b π y``."""
    return torch.sin(math.pi * x * torch.tensor(WAVES, dtype=x.dtype)).prod(1)


def equation(net: Any, x: Tensor) -> Tensor:
    """``Δu + k² u``."""
    u = pde.taylor(net)(x)
    return u.hessian_diagonal[:, 0].sum(-1) + NUMBER**2 * u.value[:, 0]


def points(drawn: torch.Generator) -> dict[str, tuple[Tensor, Tensor | float]]:
    """900 points inside, 120 on the edge."""
    x = torch.rand(900, 2, generator=drawn, dtype=torch.float64)
    right = (NUMBER**2 - math.pi**2 * sum(n**2 for n in WAVES)) * exact(x)
    return {"inside": (x, right), "edge": (boundary(drawn, 120, 2), 0.0)}


def problem() -> Problem:
    """With the network of the Poisson example."""
    terms = Terms(network(2, 64, 64, 48, 48, 1), {"inside": equation, "edge": lambda net, x: net(x)})
    where = torch.rand(4000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Problem(terms, points, where, exact(where), setting(1e-8))  # more modes than columns would spare


def main(steps: int = 150, out: Path = Path("helmholtz.html")) -> None:
    """Solve it and write a report."""
    torch.manual_seed(0)
    solve(problem(), steps, out)


if __name__ == "__main__":
    typer.run(main)
