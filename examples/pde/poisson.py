"""Poisson's equation Δu = f on the unit cube of any dimension, u given on the boundary.

python examples/pde/poisson.py [--dimensions 10]
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import typer
from solve import SETTING, Problem, network, setting, solve
from torch import Tensor

from gtddp_compile import Terms, pde

FEW = setting(1e-3)
"""Where the points of a step say little about the others, it must not fit them closely."""


def plane(x: Tensor) -> Tensor:
    """``Π sin π x_d``, with ``Δu = -2 π² u`` on the square."""
    return torch.sin(math.pi * x).prod(1)


def harmonic(x: Tensor) -> Tensor:
    """``Σ x_{2k-1} x_{2k}``, with ``Δu = 0``."""
    return (x[:, ::2] * x[:, 1::2]).sum(1)


def boundary(drawn: torch.Generator, count: int, dimensions: int) -> Tensor:
    """Points on the faces of the unit cube, all as likely."""
    x = torch.rand(count, dimensions, generator=drawn, dtype=torch.float64)
    face = torch.randint(2 * dimensions, (count,), generator=drawn)
    x[torch.arange(count), face // 2] = (face % 2).double()
    return x


def problem(dimensions: int = 2, times: int = 1) -> Problem:
    """On the square as it is published (``times`` its points); in more dimensions (even) with few points."""
    square = dimensions == 2
    solution, (inside, edge) = (plane, (900 * times, 120 * times)) if square else (harmonic, (100, 50))
    net = network(dimensions, *((64, 64, 48, 48) if square else (256, 256, 128, 128)), 1)
    terms: dict[str, Any] = {"interior": lambda net, x: pde.laplacian(net)(x), "boundary": lambda net, x: net(x)}

    def points(drawn: torch.Generator) -> dict[str, tuple[Tensor, Tensor | float]]:
        x = torch.rand(inside, dimensions, generator=drawn, dtype=torch.float64)
        b = boundary(drawn, edge, dimensions)
        return {"interior": (x, -2 * math.pi**2 * plane(x) if square else 0.0), "boundary": (b, solution(b))}

    where = torch.rand(4000, dimensions, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Problem(Terms(net, terms), points, where, solution(where), SETTING if square else FEW,
                   averaged=not square)  # fmt: skip


def main(steps: int = 150, dimensions: int = 2, out: Path = Path("poisson.html")) -> None:
    """Solve it and write a report."""
    torch.manual_seed(0)
    solve(problem(dimensions), steps, out)


if __name__ == "__main__":
    typer.run(main)
