"""Taylor mode against torch.func, without the compiler."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacrev, vmap

from gtddp_compile import pde
from support.networks import make

WEIGHT = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def mixed() -> nn.Module:
    """Shortcuts, products of values, quotients, a normalisation, bare parameters."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.sin(net.a(x))
        h = net.n(h + 0.5 * F.gelu(net.b(h)) * h) @ net.w / 2.0
        h = h / (1 + h**2)
        h = torch.cat([h, x[..., :1] * x[..., 1:2] - 3], -1)
        return net.c(h.softmax(-1) + h.exp() * 0.1)

    bare = {"n": lambda: nn.LayerNorm(7), "w": lambda: nn.Parameter(torch.rand(7, 7))}
    return make(forward, a=(3, 7), b=(7, 7), **bare, c=(8, 2))


FIELDS: dict[str, Callable[[Any], Any]] = {
    "tanh": torch.tanh,
    "sine": torch.sin,
    "gelu": F.gelu,
    "softplus": F.softplus,
    "power": lambda h: h**3,
    "reciprocal": lambda h: 1 / (h + 5),
    "exponent": lambda h: 2.0**h,
    "quotient": lambda h: h / (1 + h * h),
    "constant over": lambda h: torch.div(torch.ones(3).double(), h * h + 1),
    "scaled": lambda h: 2 * h / 3 - h,
    "matrix": lambda h: h @ WEIGHT,
    "linear": lambda h: F.linear(h, WEIGHT.T, WEIGHT[0]),
    "softmax": lambda h: h.softmax(-1),
    "layer norm": lambda h: F.layer_norm(h, (3,)),
    "norm": lambda h: h.norm(dim=-1, keepdim=True),
    "outer": lambda h: torch.einsum("...i,...j->...ij", h, h),
    "parts": lambda h: torch.cat([h[..., :1] * h[..., 1:2], h.flip(-1)], -1),
    "chunks": lambda h: torch.stack([a * b for a, b in zip(h.unbind(-1), h.square().unbind(-1), strict=True)], -1),
    "shaped": lambda h: (h.unsqueeze(-1) * h.unsqueeze(-2)).sum(-1),
    "scalar": lambda h: h.prod(-1),
    "nothing": lambda h: torch.ones(*h.shape[:-1], 2).double(),
}


def check(f: Callable[[Any], Any], x: Tensor) -> None:
    """Every function at every point, one after the other by torch.func."""
    points = x.reshape(-1, x.shape[-1])
    seconds = torch.stack([hessian(f)(p).diagonal(dim1=-2, dim2=-1) for p in points])
    firsts = torch.stack([jacrev(f)(p) for p in points])
    shape = (*x.shape[:-1], *firsts.shape[1:])
    found = pde.taylor(f)(x)
    assert found.value.shape == shape[:-1] and found.gradient.shape == found.hessian_diagonal.shape == shape
    close = {"rtol": 1e-10, "atol": 1e-10}
    torch.testing.assert_close(found.value, f(x), **close)
    torch.testing.assert_close(found.gradient, firsts.view(shape), **close)
    torch.testing.assert_close(found.hessian_diagonal, seconds.view(shape), **close)
    torch.testing.assert_close(pde.gradient(f)(x), found.gradient, **close)
    torch.testing.assert_close(pde.laplacian(f)(x), found.hessian_diagonal.sum(-1), **close)
    torch.testing.assert_close(pde.hessian_diagonal(f)(x), found.hessian_diagonal, **close)


@pytest.mark.parametrize("name", FIELDS)
def test_operations(name: str) -> None:
    check(FIELDS[name], torch.randn(4, 3, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3,), (5, 3), (2, 4, 3)])
def test_a_network_at_points_along_any_axes(shape: tuple[int, ...]) -> None:
    check(mixed(), torch.randn(shape, dtype=torch.float64))


def test_under_vmap() -> None:
    net, x = mixed(), torch.randn(5, 3, dtype=torch.float64)
    torch.testing.assert_close(vmap(pde.laplacian(net))(x), pde.laplacian(net)(x), rtol=0, atol=1e-12)


def test_parameters_get_the_gradient_of_the_derivatives() -> None:
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).double(), torch.randn(4, 3, dtype=torch.float64)
    found = torch.autograd.grad(pde.laplacian(net)(x).square().sum(), list(net.parameters())[:3])
    other = torch.stack([hessian(lambda q: net(q)[0])(p).trace() for p in x])
    expected = torch.autograd.grad(other.square().sum(), list(net.parameters())[:3])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_divergence() -> None:
    net, x = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(4, 3, dtype=torch.float64)
    expected = torch.stack([jacrev(net)(p).trace() for p in x])
    torch.testing.assert_close(pde.divergence(net)(x), expected, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"shape \(4,\) has no divergence in 3 coordinates"):
        pde.divergence(lambda p: net(p)[:, 0])(x)


def test_refusals() -> None:
    with pytest.raises(TypeError, match="floating-point tensor"):
        pde.laplacian(torch.tanh)(torch.arange(3))
    with pytest.raises(TypeError, match="tuple, not one tensor"):
        pde.taylor(lambda p: (p, p))(torch.rand(4, 3))  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"add_ changes a value .* in place: use add"):
        pde.gradient(lambda p: p.add_(1))(torch.rand(4, 3))
