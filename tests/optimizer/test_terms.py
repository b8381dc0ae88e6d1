"""A loss of several terms over several sets of points: one step for all, against the explicit one; what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap

from gtddp_compile import CompileError, Terms, compile_optimizer, pde


class Net(nn.Module):
    """A field of two components and a coefficient of the equation."""

    def __init__(self) -> None:
        super().__init__()
        self.f = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        self.k = nn.Parameter(torch.tensor(1.5, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.f(x)  # type: ignore[no-any-return]


def equations(net: Any, x: Tensor) -> Tensor:
    """Two equations at a point."""
    return pde.laplacian(net)(x) + net.k * net(x)


def boundary(net: Any, x: Tensor) -> Tensor:
    return net(x)[:, 0]  # type: ignore[no-any-return]


def terms(**weights: float) -> Terms:
    torch.manual_seed(0)
    return Terms(Net(), {"inside": equations, "boundary": boundary}, weights)


def sets(inside: int = 7, edge: int = 4) -> dict[str, Any]:
    torch.manual_seed(inside)
    x, b = torch.rand(inside, 2).double(), torch.rand(edge, 2).double()
    return {"inside": (x, torch.rand(inside, 2).double()), "boundary": (b, 0.5)}


def explicit(model: Terms, given: dict[str, Any], lam: float) -> Tensor:
    """Residuals one by one by torch.func, each scaled by the root of its term's weight over its number of points."""
    params = {name: p.detach() for name, p in model.net.named_parameters()}

    def inside(p: Any, x: Tensor) -> Tensor:
        u = lambda q: functional_call(model.net, p, (q,))  # noqa: E731
        return hessian(u)(x).diagonal(dim1=-2, dim2=-1).sum(-1) + p["k"] * u(x)

    def edge(p: Any, x: Tensor) -> Tensor:
        return functional_call(model.net, p, (x,))[:1]

    j, r = [], []
    for name, residual in (("inside", inside), ("boundary", edge)):
        x, right = given[name]
        scale = math.sqrt(model.weights[name] / len(x))
        r.append(scale * (vmap(residual, (None, 0))(params, x) - right).flatten())
        found = vmap(jacrev(residual), (None, 0))(params, x)
        j.append(scale * torch.cat([found[key].reshape(len(r[-1]), -1) for key in params], 1))
    jac, res = torch.cat(j), torch.cat(r)
    return -jac.T @ torch.linalg.solve(jac @ jac.T + lam * torch.eye(len(res), dtype=res.dtype), res)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("lam", [1.0, 1e-4])
@pytest.mark.parametrize(("weights", "sizes"), [({}, (7, 4)), ({"boundary": 10.0}, (1, 5)), ({"inside": 0.0}, (6, 1))])
def test_one_step_for_all_terms_is_the_explicit_one(weights: Any, sizes: Any, lam: float) -> None:
    model, given = terms(**weights), sets(*sizes)
    expected, before = explicit(model, given, lam), flat(model)
    value = sum(
        model.weights[name] * 0.5 * (term(model.net, x).reshape(len(x), -1) - right).square().sum(1).mean()
        for (name, (x, right)), term in zip(given.items(), (equations, boundary), strict=True)
    )
    opt = compile_optimizer(model, given, curvature="sgd", lr=1 / lam)
    torch.testing.assert_close(opt.step(given), value.detach(), rtol=1e-12, atol=0)
    close = {"rtol": 0, "atol": 1e-8 * float(expected.abs().max())}
    torch.testing.assert_close(flat(model) - before, expected, **close)


def test_other_sizes_later() -> None:
    model = terms()
    opt = compile_optimizer(model, sets(), curvature="sgd", lr=1.0)
    opt.step(sets())
    expected, before = explicit(model, sets(5, 3), 1.0), flat(model)
    opt.step(sets(5, 3))
    torch.testing.assert_close(flat(model) - before, expected, rtol=0, atol=1e-10)


def test_refusals_change_nothing_and_name_the_set() -> None:
    model, nan = terms(), float("nan")
    opt = compile_optimizer(model, sets(), curvature="sgd", lr=1.0)
    before, good = flat(model), sets()
    points, right = good["inside"]
    bad_points, bad_right = points.clone(), right.clone()
    bad_points[2, 1] = bad_right[4, 0] = nan
    for given, said in (
        ({**good, "boundary": (torch.zeros(0, 2).double(), 0.0)}, r"'boundary' has points of shape \(0, 2\)"),
        ({"inside": good["inside"]}, "'boundary' has points and no term, or no points"),
        ({**good, "inside": (bad_points, right)}, r"'inside' has points that are no numbers: \[2\]"),
        ({**good, "inside": (points, bad_right)}, r"'inside' has right-hand sides .* at the points \[4\]"),
        ({**good, "inside": (points, right[:, 0])}, r"2 equations at 7 points, and right-hand sides \(7,\)"),
    ):
        with pytest.raises(CompileError, match=said):
            opt.step(given)
        assert torch.equal(flat(model), before)
    with pytest.raises(CompileError, match="alone, or tensors"):
        opt.step(good, right)


def test_refusals_of_the_model() -> None:
    with pytest.raises(CompileError, match=r"no such term.*edge"):
        terms(edge=2.0)
    with pytest.raises(CompileError, match="weight is no number from 0 on: inside"):
        terms(inside=-1.0)
    with pytest.raises(CompileError, match="a loss of their own"):
        compile_optimizer(terms(), sets(), loss=nn.MSELoss())
