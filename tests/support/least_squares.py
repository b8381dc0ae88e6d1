"""The Gauss-Newton step of several sets of residuals, written down by torch.func: an oracle for the joint step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from gtddp_compile import Terms

Equation = Callable[[Callable[[Tensor], Tensor], Mapping[str, Tensor], Tensor], Tensor]
"""``(field, parameters, one point (D,)) -> (m,)``."""


def gauss_newton(
    model: Terms, equations: Mapping[str, Equation], sets: Mapping[str, Any], lam: float, start: Tensor | None = None
) -> Tensor:
    """``-Jᵀ (J Jᵀ + λ)⁻¹ r``, flat; ``start``: what the step is regularised towards in place of zero."""
    jac, res = linearised(model, equations, sets)
    first = torch.zeros_like(jac[0]) if start is None else start
    return first - jac.T @ torch.linalg.solve(
        jac @ jac.T + lam * torch.eye(len(res), dtype=res.dtype), res + jac @ first
    )


def linearised(model: Terms, equations: Mapping[str, Equation], sets: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """``J`` and ``r``, each residual scaled by the root of its term's weight over its number of points.

    Of ``model`` the network, its parameters and the weights are read, not the terms.
    """
    params = {name: p.detach() for name, p in model.net.named_parameters()}
    j, r = [], []
    for name, equation in equations.items():
        points, right = sets[name]

        def residual(p: Any, x: Tensor, equation: Equation = equation) -> Tensor:
            return equation(lambda q: functional_call(model.net, p, (q,)), p, x)

        scale = math.sqrt(model.weights[name] / len(points))
        values = vmap(residual, (None, 0))(params, points)
        r.append(scale * (values - (right.reshape(values.shape) if isinstance(right, Tensor) else right)).flatten())
        found = vmap(jacrev(residual), (None, 0))(params, points)
        j.append(scale * torch.cat([found[key].reshape(len(r[-1]), -1) for key in params], 1))
    return torch.cat(j), torch.cat(r)
