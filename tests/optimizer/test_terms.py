"""A loss of several terms over several sets of points: one step for all, against the explicit one; what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacrev

from gtddp_compile import CompileError, Terms, compile_optimizer, pde
from support.compared import flat
from support.least_squares import gauss_newton
from support.networks import make


def field() -> nn.Module:
    """Of two components, and a coefficient of the equation."""
    layers = {"a": (2, 6), "b": (6, 2), "k": lambda: nn.Parameter(torch.tensor(1.5))}
    return make(lambda net, x: net.b(torch.tanh(net.a(x))), **layers)


def equations(net: Any, x: Tensor) -> Tensor:
    """Two equations at a point."""
    return pde.laplacian(net)(x) + net.k * net(x)


def boundary(net: Any, x: Tensor) -> Tensor:
    return net(x)[:, 0]  # type: ignore[no-any-return]


def terms(**weights: float) -> Terms:
    return Terms(field(), {"inside": equations, "boundary": boundary}, weights)


def sets(inside: int = 7, edge: int = 4) -> dict[str, Any]:
    torch.manual_seed(inside)
    x, b = torch.rand(inside, 2).double(), torch.rand(edge, 2).double()
    return {"inside": (x, torch.rand(inside, 2).double()), "boundary": (b, 0.5)}


def explicit(model: Terms, given: dict[str, Any], lam: float) -> Tensor:
    """By torch.func, of the equations as they are written here."""

    def inside(u: Any, p: Any, x: Tensor) -> Tensor:
        return hessian(u)(x).diagonal(dim1=-2, dim2=-1).sum(-1) + p["k"] * u(x)

    return gauss_newton(model, {"inside": inside, "boundary": lambda u, p, x: u(x)[:1]}, given, lam)


@pytest.mark.parametrize("lam", [1.0, 1e-4])
@pytest.mark.parametrize(
    ("weights", "sizes"), [({}, (7, 4)), ({"boundary": 10.0}, (1, 5)), ({"inside": 0.0}, (6, 1)), ({}, (1, 1))]
)
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
        ({**good, "boundary": (points, nan)}, r"'boundary' has right-hand sides .* at the points \[0, 1, 2, 3, 4\]"),
        ({**good, "inside": (points, right[:, 0])}, r"2 equations at 7 points, and right-hand sides \(7,\)"),
    ):
        with pytest.raises(CompileError, match=said):
            opt.step(given)
        assert torch.equal(flat(model), before)
    with pytest.raises(CompileError, match="alone, or tensors"):
        opt.step(good, right)


def test_points_at_which_a_term_has_no_value_are_named_and_nothing_changes() -> None:
    """One of its own set, in two ways, and one of another's."""
    inside = {"inside": lambda net, x: net(x)[:, 0] / x[:, 0], "boundary": lambda net, x: net(x)[:, 1] * x[:, 1].log()}
    model = Terms(field(), inside)
    good = {name: (x, 0.5) for name, (x, _) in sets().items()}
    opt = compile_optimizer(model, good, curvature="sgd", lr=1.0, inertia=0.9)
    opt.step(good)
    for name, coordinate, value, said in (
        ("inside", 0, 0.0, r"the term 'inside' is not finite at the points \[3\]\. Leave"),
        ("boundary", 1, -1.0, r"the term 'boundary' is not finite at the points \[3\]\. Leave"),
        ("inside", 1, -1.0, r"the term 'boundary' is not finite at the points \[3\] of 'inside', where all"),
    ):
        bad = good[name][0].clone()
        bad[3, coordinate] = value
        before, state = flat(model), copy.deepcopy(opt.state_dict()["state"])
        with pytest.raises(CompileError, match=said):
            opt.step({**good, name: (bad, 0.5)})
        assert torch.equal(flat(model), before)
        torch.testing.assert_close(opt.state_dict()["state"], state, rtol=0, atol=0)
    assert opt.step(good).isfinite() and not torch.equal(flat(model), before)


def test_without_a_cholesky_factor_the_step_is_that_of_the_resolved_eigenvalues() -> None:
    """Every point eight times, and λ below rounding: the step of least norm that solves the linearised equations."""
    model, given = terms(), {name: (x.repeat(8, 1), 0.5) for name, (x, _) in sets(5, 3).items()}
    once, before = {name: (x[: len(x) // 8], right) for name, (x, right) in given.items()}, flat(model)
    expected = explicit(model, once, 1e-13)
    opt = compile_optimizer(model, given, curvature="sgd", lr=1e25)
    with pytest.warns(RuntimeWarning, match="its eigenvalues below eps trace"):
        opt.step(given)
        assert opt.diagnostics["lifted_grams"] == 1
    torch.testing.assert_close(flat(model) - before, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


def test_a_term_may_take_derivatives_by_autograd() -> None:
    def slope(net: Any, x: Tensor) -> Tensor:
        x = x.requires_grad_(True)
        (found,) = torch.autograd.grad(net(x)[:, 0].sum(), x, create_graph=True)
        return found

    torch.manual_seed(0)
    model, given = Terms(field(), {"slope": slope}), {"slope": (torch.rand(5, 2).double(), 1.0)}
    expected, before = gauss_newton(model, {"slope": lambda u, p, x: jacrev(u)(x)[0]}, given, 0.1), flat(model)
    compile_optimizer(model, given, curvature="sgd", lr=10.0).step(given)
    torch.testing.assert_close(flat(model) - before, expected, rtol=0, atol=1e-9)


def test_refusals_of_the_model() -> None:
    with pytest.raises(CompileError, match=r"no such term.*edge"):
        terms(edge=2.0)
    with pytest.raises(CompileError, match="weight is no number from 0 on: inside"):
        terms(inside=-1.0)
    with pytest.raises(CompileError, match="a loss of their own"):
        compile_optimizer(terms(), sets(), loss=nn.MSELoss())
