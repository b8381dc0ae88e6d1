"""The joint step without a Gram matrix: the explicit one, and the one with it; what is refused."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian

from gtddp_compile import CompileError, NonFiniteError, Nystrom, Terms, UpdateProgram, compile_optimizer, pde
from gtddp_compile.kernels.nystrom import ENOUGH, _chosen, joint_columns
from support.compared import flat, trained
from support.exported import load_module, named
from support.least_squares import gauss_newton
from support.networks import Case, make

CLOSE = 1e-11
EQUATIONS: dict[str, Any] = {
    "inside": lambda u, p, x: hessian(u)(x).diagonal(dim1=-2, dim2=-1).sum(-1),
    "edge": lambda u, p, x: u(x),
}


def problem(inside: int = 9) -> tuple[Terms, dict[str, Any]]:
    """Of two terms, with its points."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    model = Terms(net, {"inside": lambda net, x: pde.laplacian(net)(x), "edge": lambda net, x: net(x)})
    return model, {"inside": (torch.rand(inside, 2).double(), 1.0), "edge": (torch.rand(5, 2).double(), 0.5)}


@pytest.mark.parametrize(("columns", "lam", "close"), [(1, 1.0, 1e-9), (6, 1e-2, 1e-9), (100, 1.0, 1e-9),
                                                       (12, 1e-5, 1e-6)])  # fmt: skip
def test_it_is_the_explicit_step(columns: int, lam: float, close: float) -> None:
    """With inertia, which the second and third step remember, below its ramp."""
    model, sets = problem()
    gram = Nystrom(columns, CLOSE)
    opt = compile_optimizer(model, sets, curvature="sgd", lr=1 / lam, inertia=0.1, gram=gram)
    last = torch.zeros_like(flat(model))
    for _ in range(3):
        expected, before = gauss_newton(model, EQUATIONS, sets, lam, 0.1 * last), flat(model)
        opt.step(sets)
        last = flat(model) - before
        torch.testing.assert_close(last, expected, rtol=0, atol=close * float(expected.abs().max()))
        assert opt.diagnostics["products"] > 0 and opt.diagnostics["lifted_grams"] == 0


def test_few_products_are_needed_where_the_columns_say_it_all() -> None:
    model, sets = problem(200)
    found = {}
    for columns in (2, 60):
        own = copy.deepcopy(model)
        opt = compile_optimizer(own, sets, curvature="sgd", lr=1e6, gram=Nystrom(columns, 1e-6))
        opt.step(sets)
        found[columns] = opt.diagnostics["products"]
    assert found[60] <= 8 < found[2]  # which was given more columns


def test_of_samples_that_say_the_same_one_is_chosen() -> None:
    torch.manual_seed(0)
    kinds, count = torch.randn(5, 40, dtype=torch.float64) * 1e3, 60
    kind = torch.arange(count) % 5
    chosen = _chosen([(joint_columns, (kinds[kind],), (1.0,))], torch.ones(count, dtype=torch.float64), 20, ENOUGH)
    assert sorted(kind[chosen].tolist()) == [0, 1, 2, 3, 4]
    assert len(_chosen([(joint_columns, (kinds[kind],), (1.0,))], kinds.new_ones(count), 20, 0.0).unique()) == 20


def test_the_cap_is_a_norm_in_the_metric() -> None:
    model, sets = problem()
    before = flat(model)
    compile_optimizer(model, sets, curvature="sgd", lr=1e4, max_step=1e-3, gram=Nystrom(6, CLOSE)).step(sets)
    assert float((flat(model) - before).norm()) == pytest.approx(0.1, rel=1e-7)


def uses(net: Any, x: Tensor) -> Tensor:
    """A convolution, a norm, a weight that is used twice and once transposed, positions, and a bare parameter."""
    h = torch.tanh(net.norm(net.conv(x))).flatten(2)
    h = torch.tanh(net.shared(torch.tanh(net.shared(h)))) @ net.shared.weight
    return net.out(h.flatten(1)) * net.gain


@pytest.mark.parametrize("columns", [3, 7])
@pytest.mark.parametrize("curvature", ["sgd", "rmsprop", "adam"])
def test_it_is_the_step_of_the_gram_matrix_whatever_the_layers(curvature: str, columns: int) -> None:
    layers = {"conv": lambda: nn.Conv2d(1, 3, 3), "norm": lambda: nn.GroupNorm(1, 3), "shared": (4, 4), "out": (12, 3),
              "gain": lambda: nn.Parameter(torch.rand(3))}  # fmt: skip
    case, options = Case(make(uses, **layers), (1, 4, 4)), {"size": 7, "curvature": curvature, "lr": 1e-2}
    found = (trained(case, gram=gram, **options) for gram in ("exact", Nystrom(columns, CLOSE)))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def test_a_step_that_overflows_changes_nothing() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4) * 1e15, torch.randint(3, (6,))
    with torch.no_grad():
        model[1].weight.mul_(1e8)
    before = flat(model)
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1, gram=Nystrom(3))
    with pytest.warns(RuntimeWarning, match="not definite"), pytest.raises(NonFiniteError, match="matrix of gradients"):
        opt.step(x, y)
    assert torch.equal(flat(model), before)


def test_it_is_stored_and_carried_with_the_program(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model, given = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double(), Nystrom(4, 1e-6)
    x, y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    opt = compile_optimizer(model, x, loss=nn.MSELoss(), curvature="sgd", lr=0.1, gram=given)
    for suffix in ("json", "py"):
        opt.program.export(tmp_path / f"step.{suffix}")
    loaded = UpdateProgram.load(tmp_path / "step.json")
    assert loaded.options.gram == given and loaded.code == opt.program.code
    carried, (before, _) = load_module(tmp_path / "step.py"), named(model)
    torch.manual_seed(1)
    after, *_ = carried.step(before, {}, carried.init_state(before), (x,), y)
    torch.manual_seed(1)
    opt.step(x, y)
    torch.testing.assert_close(after, dict(model.named_parameters()), rtol=0, atol=1e-12)
    with pytest.raises(CompileError, match="Nystrom"):
        opt.program.export(tmp_path / "step.pt2")


@pytest.mark.parametrize("options", [{"compile": True}, {"curvature": "kfac"}, {"curvature": "muon"}, {"coupling": 4},
                                     {"memory": "recompute"}, {"rollout": "nonlinear"}, {"backend": "dense"},
                                     {"terminal": "ggn"}, {"feedback": False}])  # fmt: skip
def test_refusals(options: dict[str, Any]) -> None:
    x = torch.randn(5, 2)
    given = {"loss": nn.CrossEntropyLoss(), "curvature": "sgd", "gram": Nystrom()}
    with pytest.raises(CompileError, match="Nystrom"):
        compile_optimizer(nn.Linear(2, 3), x, **given | options)
    opt = compile_optimizer(nn.Linear(2, 3), x, **given)
    with pytest.raises(CompileError, match="one batch"):
        opt.accumulate(x, torch.zeros(5, dtype=torch.long))


@pytest.mark.parametrize("wrong", [{"columns": 0}, {"tolerance": 0.0}, {"tolerance": 2}])
def test_refused_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(CompileError, match=next(iter(wrong))):
        Nystrom(**wrong)
