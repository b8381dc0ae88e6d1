"""Models that differentiate themselves: however a derivative is written, the same joint step, and the explicit one."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from gtddp_compile import Geometric, compile_optimizer, pde
from gtddp_compile.errors import CompileError
from gtddp_compile.frontends import trace_derivatives
from support.compared import assert_equal, flat
from support.laplacians import WAYS, Equation, Model, forward_twice, tanh_net
from support.networks import Case, make


def waves() -> nn.Module:
    """Fourier features from a buffer, a shortcut, no last bias."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        z = x @ net.frequencies
        h = F.silu(net.a(torch.cat([torch.sin(z), torch.cos(z)], -1)))
        return net.c(h + torch.sin(net.b(h)))

    return make(forward, frequencies=lambda: torch.randn(2, 3), a=(6, 5), b=(5, 5), c=(5, 1, False))


def squared(outputs: Any, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets) ** 2  # type: ignore[no-any-return]


def step(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, Any]:
    """What one joint step adds to all parameters, and the optimizer."""
    before = flat(model)
    opt = compile_optimizer(model, x, loss=squared, curvature="sgd", lr=1.0, gram="exact", terminal=Geometric(aim=2.0))
    opt.step(x, y)
    return flat(model) - before, opt


def explicit(j: Tensor, r: Tensor, lam: float) -> Tensor:
    """``-Jᵀ (J Jᵀ + λ)⁻¹ r``, of a mean of squares."""
    j, r = j / math.sqrt(len(r)), r / math.sqrt(len(r))
    return -j.T @ torch.linalg.solve(j @ j.T + lam * torch.eye(len(r)), r)


@pytest.fixture(autouse=True)
def double() -> Any:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("way", WAYS)
def test_every_way_is_the_explicit_step(way: str) -> None:
    """The oracle differentiates the Laplacian of a function of parameters; one residual is nearly, one is exactly 0."""
    model, x, y = Model(WAYS[way]), torch.rand(20, 2), torch.rand(20)
    names = dict(model.net.named_parameters())

    def laplace(p: dict[str, Tensor], point: Tensor) -> Tensor:
        return hessian(lambda q: functional_call(model.net, p, (q,))[0])(point).trace()

    params = {name: p.detach() for name, p in names.items()}
    values = vmap(laplace, (None, 0))(params, x)
    y[3] = values[3] + 1e-6
    j = vmap(jacrev(laplace), (None, 0))(params, x)
    rows, start = torch.cat([j[name].flatten(1) for name in names], 1), copy.deepcopy(model.state_dict())
    found, opt = step(model, x, y)
    torch.testing.assert_close(found, explicit(rows, values - y, 1.0), rtol=0, atol=1e-10)
    model.load_state_dict(start)
    before, expected = flat(model), explicit(rows, values - y, 1e-6)
    for group in opt.param_groups:
        group["lr"] = 1e6
    opt.step(x, y)
    torch.testing.assert_close(flat(model) - before, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
    rules = {use.rule.name for layer in opt.program.lowered.plan.layers.values() for use in layer.uses}
    assert rules <= ({"linear", "shift"} if way == "by hand, stacked" else {"linear", "transposed"})


def heat(m: Model, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_(True)
    value = m.net(x)
    ones = torch.ones_like(value)
    (g,) = torch.autograd.grad(value, x, grad_outputs=ones, create_graph=True, retain_graph=True)
    (second,) = torch.autograd.grad(g[:, 0], x, torch.ones_like(g[:, 0]), create_graph=True)
    return g[:, 1] - second[:, 0] + value[:, 0] ** 2


def heat_forward(m: Model, x: Tensor) -> Tensor:
    t = pde.taylor(m.u)(x)
    return t.gradient[:, 1] - t.hessian_diagonal[:, 0] + t.value**2


def third(m: Model, x: Tensor) -> Tensor:
    return vmap(lambda p: jacfwd(jacrev(grad(m.u)))(p)[0, 0, 0])(x) + vmap(m.u)(x)


def pulled(m: Model, x: Tensor) -> Tensor:
    value, pull = vjp(m.u, x)
    return (pull(torch.ones_like(value))[0] ** 2).sum(-1)


def determinant(m: Model, x: Tensor) -> Tensor:
    j = vmap(jacrev(m.net))(x)
    return j[:, 0, 0] * j[:, 1, 1] - j[:, 0, 1] * j[:, 1, 0]


def functional(m: Model, x: Tensor) -> Tensor:
    params = dict(m.net.named_parameters())
    return vmap(lambda p: hessian(lambda q: functional_call(m.net, params, (q,))[0])(p)[0, 1])(x)


def plain_matrices(m: Any, x: Tensor) -> Tensor:
    return vmap(lambda p: hessian(lambda q: (m.w2 @ torch.tanh(m.w1 @ q + m.b1)).sum())(p).trace())(x)


def detached(m: Model, x: Tensor) -> Tensor:
    x = x.requires_grad_()
    value = m.u(x)
    return value * torch.autograd.grad(value.sum(), x, create_graph=True)[0].detach().sum(-1)


def matrices() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in (("w1", (4, 2)), ("w2", (3, 4)), ("b1", (4,)))}


def normed(act: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(2, 6), nn.LayerNorm(6), act, nn.Linear(6, 1))


EQUATIONS: dict[str, Callable[[], Model]] = {
    "heat": lambda: Model(heat),
    "heat, forward": lambda: Model(heat_forward),
    "heat of waves": lambda: Model(heat, waves()),
    "laplacian of waves": lambda: Model(WAYS["pde.laplacian"], waves()),
    "coefficient": lambda: Model(lambda m, x: pde.laplacian(m.u)(x) + m.k * m.u(x), k=nn.Parameter(torch.tensor(2.0))),
    "layer norm": lambda: Model(WAYS["pde.laplacian"], normed(nn.GELU())),
    "third": lambda: Model(third),
    "vjp": lambda: Model(pulled),
    "vmap": lambda: Model(lambda m, x: vmap(m.u)(x)),
    "determinant": lambda: Model(determinant, tanh_net(2)),
    "divergence": lambda: Model(lambda m, x: pde.divergence(m.net)(x), tanh_net(2)),
    "functional_call": lambda: Model(functional),
    "plain matrices": lambda: Model(plain_matrices, nn.Identity(), **matrices()),
    "detached": lambda: Model(detached),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_equations_are_the_explicit_step(name: str) -> None:
    """The oracle takes the model's own residuals and their gradients, row by row."""
    model, x, y = EQUATIONS[name](), torch.rand(7, 2), torch.rand(7)
    residuals = model(x.clone())
    rows = [torch.autograd.grad(r, list(model.parameters()), retain_graph=True, materialize_grads=True,
                                allow_unused=True) for r in residuals]  # fmt: skip
    j = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    expected = explicit(j, residuals.detach() - y, 1.0)
    found, _ = step(model, x, y)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("way", "options"), [
    ("torch.autograd.grad", {"curvature": "sgd", "lr": 0.1, "rollout": "nonlinear"}),
    ("pde.laplacian", {"curvature": "sgd", "lr": 0.1, "coupling": 4, "inertia": 0.9, "max_step": 0.1}),
    ("torch.autograd.grad", {"curvature": "adam", "lr": 0.01}),
    ("pde.laplacian", {"curvature": "foof", "lr": 1.0}),
    ("torch.autograd.grad", {"curvature": "kfac", "lr": 0.1, "rollout": "nonlinear"}),
])  # fmt: skip
def test_fast_equals_dense(way: str, options: dict[str, Any]) -> None:
    x, y = torch.rand(7, 2), torch.rand(7)
    case = Case(Model(WAYS[way]), loss=squared, draw=lambda seed, size: (x, y))
    assert_equal(case, gram="exact", **options)


def test_another_number_of_points() -> None:
    """Sizes are built in: a batch of another size is compiled again."""
    model, other = Model(WAYS["vmap(hessian)"]), Model(WAYS["pde.laplacian"])
    other.load_state_dict(model.state_dict())
    opts = [compile_optimizer(m, torch.rand(7, 2), loss=squared, curvature="sgd", lr=1.0) for m in (model, other)]
    for size in (7, 5):
        x, y = torch.rand(size, 2), torch.rand(size)
        for opt in opts:
            opt.step(x, y)
    torch.testing.assert_close(flat(model), flat(other), rtol=0, atol=1e-10)


def test_zero_tangents_and_repeats_are_gone() -> None:
    """Of 20 products that torch records, those of a layer with the value and with each direction are left."""
    traced = trace_derivatives(Model(forward_twice), (torch.rand(7, 2),))
    used = [call.args[1].name for call in traced.calls if call.target is F.linear]
    # Value and two directions; in between, the second derivative of each as well; at the end those alone.
    assert [used.count(f"net.{i}.weight") for i in (0, 2, 4)] == [3, 5, 2]
    assert not any("zero" in str(call.target) for call in traced.calls)


def inner_step(m: Model, x: Tensor) -> Any:
    params = list(m.net.parameters())
    found = torch.autograd.grad(m.net(x).square().mean(), params, create_graph=True)
    named = {name: p - 0.1 * g for (name, p), g in zip(m.net.named_parameters(), found, strict=True)}
    return functional_call(m.net, named, (x,))[:, 0]


def inner_gradient(m: Model, x: Tensor) -> Any:
    params = dict(m.net.named_parameters())
    found = vmap(grad(lambda p, point: functional_call(m.net, p, (point,)).sum()), (None, 0))(params, x)
    return sum(g.flatten(1).sum(1) for g in found.values())


def inner_direction(m: Model, x: Tensor) -> Any:
    params = dict(m.net.named_parameters())
    return jvp(lambda p: functional_call(m.net, p, (x,)), (params,), (params,))[1][:, 0]


def cut_off(m: Model, x: Tensor) -> Any:
    x = x.requires_grad_()
    value = m.u(x)
    return value + torch.autograd.grad(value.sum(), x, retain_graph=True)[0].sum(-1)


def deciding(m: Model, x: Tensor) -> Any:
    found = vmap(grad(m.u))(x)
    return found.sum(-1) if found.mean() > 100 else found[:, 0]


def writing(m: Any, x: Tensor) -> Any:
    m.net.frequencies.add_(1.0)
    return vmap(grad(m.u))(x)[:, 0]


REFUSED: dict[str, tuple[Equation, Callable[[], nn.Module], str]] = {
    "inner step": (inner_step, tanh_net, r"grad, at test_derivatives.*parameter 'net.0.weight' \(meta-learning\)"),
    "inner gradient": (inner_gradient, tanh_net, r"parameter 'net.0.weight' \(meta-learning\)"),
    "inner direction": (inner_direction, tanh_net, r"parameter 'net.0.weight' \(meta-learning\)"),
    "cut off": (cut_off, tanh_net, "without create_graph=True.*Pass create_graph=True"),
    "deciding": (deciding, tanh_net, "the path through the model depends on values"),
    "writing": (writing, waves, "writes the buffer 'net.frequencies'"),
    # torch's own gradient of a second derivative through layer_norm is wrong
    "fused": (heat, lambda: normed(nn.Tanh()), "third derivatives of a fused operation"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_and_why(name: str) -> None:
    equation, net, said = REFUSED[name]
    with pytest.raises(CompileError, match=said):
        step(Model(equation, net()), torch.rand(7, 2), torch.rand(7))
