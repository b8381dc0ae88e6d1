"""A network and an equation of it, and the Laplacian in every way of writing it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from gtddp_compile import pde

Equation = Callable[[Any, Tensor], Any]


class Model(nn.Module):
    """A network and an equation of it; further modules and parameters by name."""

    def __init__(self, equation: Equation, net: nn.Module | None = None, **more: Any) -> None:
        super().__init__()
        self.net = net or tanh_net()
        self.equation = equation
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Any:
        return self.equation(self, x)

    def u(self, x: Tensor) -> Tensor:
        return self.net(x)[..., 0]  # type: ignore[no-any-return]


def tanh_net(outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


def by_hand(m: Model, x: Tensor) -> Tensor:
    """Value, first derivatives and Laplacian side by side through every layer."""
    z = torch.cat([x[:, None], torch.eye(2).expand(len(x), 2, 2), torch.zeros_like(x)[:, None]], 1)
    for layer in m.net:
        if isinstance(layer, nn.Linear):
            z = F.linear(z, layer.weight)
            z = torch.cat([z[:, :1] + layer.bias, z[:, 1:]], 1)
        else:
            y, first = torch.tanh(z[:, :1]), z[:, 1:-1]
            slope = 1 - y * y
            bend = slope * z[:, -1:] - 2 * y * slope * (first * first).sum(1, keepdim=True)
            z = torch.cat([y, slope * first, bend], 1)
    return z[:, -1, 0]


def forward_twice(m: Model, x: Tensor) -> Tensor:
    found = torch.zeros(len(x))
    for axis in range(2):
        e = torch.zeros_like(x)
        e[:, axis] = 1
        found = found + jvp(lambda y, e=e: jvp(m.u, (y,), (e,))[1], (x,), (e,))[1]
    return found


def by_autograd(m: Model, x: Tensor) -> Tensor:
    x = x.requires_grad_(True)
    (g,) = torch.autograd.grad(m.u(x).sum(), x, create_graph=True)
    rows = (torch.autograd.grad(g[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2))
    return sum(rows, torch.zeros(len(x)))


WAYS: dict[str, Equation] = {
    "by hand, stacked": by_hand,
    "pde.laplacian": lambda m, x: pde.laplacian(m.net)(x)[:, 0],
    "pde.hessian_diagonal": lambda m, x: pde.hessian_diagonal(m.u)(x).sum(-1),
    "vmap(hessian)": lambda m, x: vmap(lambda p: hessian(m.u)(p).trace())(x),
    "jvp of jvp": forward_twice,
    "vmap(jacfwd(grad))": lambda m, x: vmap(lambda p: jacfwd(grad(m.u))(p).trace())(x),
    "vmap(jacrev(grad))": lambda m, x: vmap(lambda p: jacrev(grad(m.u))(p).trace())(x),
    "vmap(jacfwd(jacfwd))": lambda m, x: vmap(lambda p: jacfwd(jacfwd(m.u))(p).trace())(x),
    "torch.autograd.grad": by_autograd,
}
