"""An inverse problem: the diffusivity of the heat equation from noisy measurements of the temperature.

Nothing is given at the boundary; the measurements are a term like any other, and κ is a parameter beside the network's.
Less damping than the variance of the noise would fit the noise.

python examples/pde/coefficient.py [--noise 0.05]
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from heat import DIFFUSIVITY, exact
from solve import Problem, network, setting, solve
from torch import Tensor, nn

from gtddp_compile import Terms, pde


class Field(nn.Module):
    """The temperature at points (x, t), and κ, which begins at 1."""

    def __init__(self) -> None:
        super().__init__()
        self.u = network(2, 32, 32, 1)
        self.diffusivity = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, xt: Tensor) -> Tensor:
        return self.u(xt)  # type: ignore[no-any-return]


def equation(net: Any, xt: Tensor) -> Tensor:
    """``∂u/∂t - κ ∂²u/∂x²``, which is to be zero."""
    u = pde.taylor(net)(xt)
    return u.gradient[:, 0, 1] - net.diffusivity * u.hessian_diagonal[:, 0, 0]


def problem(noise: float = 0.01) -> Problem:
    """200 measurements, always the same, with errors of this standard deviation; 200 other points for the equation."""
    net, drawn = Field(), torch.Generator().manual_seed(5)
    places = torch.rand(200, 2, generator=drawn, dtype=torch.float64)
    measured = exact(places) + noise * torch.randn(200, generator=drawn, dtype=torch.float64)
    terms = Terms(net, {"equation": equation, "data": lambda net, xt: net(xt)})

    def points(drawn: torch.Generator) -> dict[str, tuple[Tensor, Tensor | float]]:
        inside = torch.rand(200, 2, generator=drawn, dtype=torch.float64)
        return {"equation": (inside, 0.0), "data": (places, measured)}

    def says() -> str:
        return f"κ = {float(net.diffusivity.detach()):.4f} (true: {DIFFUSIVITY})"

    where = torch.rand(4000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    return Problem(terms, points, where, exact(where), setting(max(noise**2, 1e-8)), says)


def main(steps: int = 150, noise: float = 0.01, out: Path = Path("coefficient.html")) -> None:
    """Find it and write a report."""
    torch.manual_seed(0)
    solve(problem(noise), steps, out)


if __name__ == "__main__":
    typer.run(main)
