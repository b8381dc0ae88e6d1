"""A friction curve from noisy measurements by a network of 31 parameters, where Levenberg-Marquardt is what people use.

λ is ``1 / lr``, so its rule is the loop's own: down where the line search takes the whole step, up where it shortens
it. The same network, start and data with ``scipy.optimize.least_squares(method="lm")``.

python examples/pde/friction.py [--steps 100]
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
import typer
from scipy.optimize import least_squares
from solve import network
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

from gtddp_compile import Terms, compile_optimizer


def friction(v: Tensor) -> Tensor:
    """Stribeck's curve: static friction that gives way to Coulomb's, and what grows with the velocity."""
    return (1.0 + 0.5 * torch.exp(-((v / 0.4) ** 2))) * torch.tanh(v / 0.1) + 0.2 * v


def measured(count: int = 300, noise: float = 0.02) -> tuple[Tensor, Tensor]:
    """Velocities ``(n, 1)`` and forces ``(n,)``."""
    v = torch.linspace(-3, 3, count, dtype=torch.float64)
    return v.unsqueeze(1), friction(v) + noise * torch.randn(count, generator=torch.Generator().manual_seed(3)).double()


def rms(net: nn.Module, v: Tensor, force: Tensor) -> float:
    """Root of the mean squared residual."""
    with torch.no_grad():
        return float((net(v)[:, 0] - force).square().mean().sqrt())


def ours(net: nn.Module, v: Tensor, force: Tensor, steps: int) -> float:
    """Gauss-Newton steps with a λ that follows them; processor seconds of the steps."""
    points = {"force": (v, force)}
    terms = Terms(net, {"force": lambda net, v: net(v)})
    opt = compile_optimizer(terms, points, curvature="sgd", lr=1e2, line_search=(1.0, 0.3, 0.1))
    start = time.process_time()
    for _ in range(steps):
        opt.step(points)
        factor = 3.0 if opt.diagnostics["step_length"] == 1.0 else 1 / 3
        for group in opt.param_groups:
            group["lr"] = min(max(group["lr"] * factor, 1.0), 1e8)
    return time.process_time() - start


def levenberg_marquardt(net: nn.Module, v: Tensor, force: Tensor, steps: int) -> float:
    """scipy's, which is MINPACK's, with the exact Jacobian; processor seconds."""
    began = time.process_time()
    shapes = {name: p.shape for name, p in net.named_parameters()}

    def split(u: Tensor) -> dict[str, Tensor]:
        parts = u.split([shape.numel() for shape in shapes.values()])
        return {name: part.reshape(shape) for part, (name, shape) in zip(parts, shapes.items(), strict=True)}

    def residual(u: Tensor, v: Tensor, force: Tensor) -> Tensor:
        return functional_call(net, split(u), (v,))[0] - force  # type: ignore[no-any-return]

    every: Any = vmap(residual, (None, 0, 0))
    slopes: Any = vmap(jacrev(residual), (None, 0, 0))
    start = torch.cat([p.detach().flatten() for p in net.parameters()]).numpy()
    found = least_squares(
        lambda u: every(torch.from_numpy(np.asarray(u)), v, force).numpy(), start,
        lambda u: slopes(torch.from_numpy(np.asarray(u)), v, force).numpy(), method="lm", max_nfev=steps,
    )  # fmt: skip
    net.load_state_dict(split(torch.from_numpy(found.x)))
    return time.process_time() - began


def main(steps: int = 100) -> None:
    """Fit by both; print residuals, distances from the true curve, and seconds."""
    v, force = measured()
    for name, fit in (("joint step", ours), ("Levenberg-Marquardt", levenberg_marquardt)):
        torch.manual_seed(0)
        net = network(1, 10, 1)
        seconds = fit(net, v, force, steps)
        print(f"{name}: residual {rms(net, v, force):.4f}, from the true curve {rms(net, v, friction(v[:, 0])):.4f}, "
              f"{seconds:.2f} s")  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
