"""Proposition 4 as a contract: with the gradient in both places, a curvature is torch.optim's own step."""

import itertools
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import SGD, Adam, AdamW, Curvature, RMSprop, resolve
from support.compared import TORCH

SHAPES = [(), (7,), (4, 3)]

RATE = torch.tensor(0.03, dtype=torch.float64)
GRIDS: dict[str, dict[str, list[Any]]] = {
    "sgd": {"lr": [0.1, RATE], "momentum": [0.0, 0.9], "dampening": [0.0, 0.3], "weight_decay": [0.0, 0.1],
            "nesterov": [False, True]},
    "rmsprop": {"lr": [1e-2, RATE], "alpha": [0.99, 0.5], "eps": [1e-2], "weight_decay": [0.0, 0.1],
                "momentum": [0.0, 0.9], "centered": [False, True]},
    "adam": {"lr": [1e-3, RATE], "betas": [(0.9, 0.999), (0.5, 0.7)], "eps": [1e-2], "weight_decay": [0.0, 0.1],
             "amsgrad": [False, True], "decoupled_weight_decay": [False, True]},
    "adamw": {"lr": [1e-3, RATE], "betas": [(0.9, 0.999), (0.0, 0.0)], "weight_decay": [0.0, 0.3],
              "amsgrad": [False, True]},
    "adagrad": {"lr": [1e-2, RATE], "lr_decay": [0.0, 0.2], "eps": [1e-2], "weight_decay": [0.0, 0.1],
                "initial_accumulator_value": [0.0, 0.3]},
}  # fmt: skip


def combinations() -> Iterator[Any]:
    """All of a grid, the rate in turn a number and a tensor."""
    for name, grid in GRIDS.items():
        for number, values in enumerate(itertools.product(*list(grid.values())[1:])):
            options = dict(zip(grid, (grid["lr"][number % 2], *values), strict=True))
            if not options.get("nesterov") or (options["momentum"] and not options["dampening"]):
                yield pytest.param(name, options, id=name + "-" + "-".join(map(str, options.values())))


def one_step(c: Curvature, param: Tensor, gradient: Tensor, state: Any, group: Any) -> tuple[Tensor, dict[str, Any]]:
    """Of which nothing that is given is modified."""
    before = pickle.dumps((param, gradient, state, group))
    linear = c.linear_term(param, group)
    g = gradient if linear is None else gradient + linear
    observed = c.observe(param, g if c.needs_statistics else None, state, group)
    middle = pickle.dumps(observed)
    c.inverse_metric(param, observed, group)
    delta, after = c.apply(param, g, observed, group)
    assert before == pickle.dumps((param, gradient, state, group)) and middle == pickle.dumps(observed)
    assert observed is not state and after is not observed
    return delta, after


@pytest.mark.parametrize(("name", "options"), list(combinations()))
def test_equals_torch(name: str, options: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(1)
    c = resolve(name, **options)
    assert c.name == name
    theirs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in SHAPES]
    ours = [p.detach().clone() for p in theirs]
    optimizer = TORCH[name](theirs, **options)
    group = c.defaults()
    states: list[dict[str, Any]] = [c.init_state(p, group) for p in ours]
    for _ in range(5):
        for i, p in enumerate(theirs):
            p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            delta, states[i] = one_step(c, ours[i], p.grad.clone(), states[i], group)
            assert delta.shape == p.shape and delta.dtype == p.dtype
            ours[i] = ours[i] + delta
        optimizer.step()
    for mine, p, state in zip(ours, theirs, states, strict=True):
        torch.testing.assert_close(mine, p.detach(), rtol=1e-12, atol=1e-12)
        reference = {key: value for key, value in optimizer.state[p].items() if value is not None}
        torch.testing.assert_close(state, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("name", "options"), list(combinations()))
def test_delta_is_preconditioned_gradient(name: str, options: dict[str, Any]) -> None:
    """``δu = -M⁻¹ ĝ`` at the first step, where moments are the gradient; the metric has its shape."""
    c = resolve(name, **{**options, "weight_decay": 0.0})
    group, param = c.defaults(), torch.randn(4, 3, dtype=torch.float64)
    g = torch.randn_like(param)
    state = c.observe(param, g, c.init_state(param, group), group)
    inverse = c.inverse_metric(param, state, group)
    assert c.metric != "diagonal" or (isinstance(inverse, Tensor) and inverse.shape == param.shape)
    assert c.metric == "diagonal" or not isinstance(inverse, Tensor) or inverse.dim() == 0
    scale = 1 + options["momentum"] if options.get("nesterov") else 1.0
    torch.testing.assert_close(c.apply(param, g, state, group)[0], -inverse * g * scale, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", TORCH)
def test_defaults_are_torchs(name: str) -> None:
    theirs = TORCH[name]([torch.zeros(1)]).defaults
    ours = resolve(name).defaults()
    assert ours.items() <= theirs.items()
    assert theirs.keys() - ours.keys() <= {"foreach", "fused", "capturable", "differentiable"}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_parameters(name: str, dtype: torch.dtype) -> None:
    c = resolve(name, lr=torch.tensor(0.1, dtype=torch.float64), weight_decay=0.1)
    group = c.defaults()
    for shape in SHAPES:
        param = torch.randn(shape).to(dtype)
        delta, state = one_step(c, param, torch.randn(shape).to(dtype), c.init_state(param, group), group)
        assert delta.dtype == dtype
        assert all(value.dtype == dtype for key, value in state.items() if key != "step")


def test_first_moment_and_statistics_are_kept_apart() -> None:
    param, stat, hat = torch.zeros(3), torch.full((3,), 2.0), torch.full((3,), 5.0)
    adam = Adam()
    group = adam.defaults()
    _, state = adam.apply(param, hat, adam.observe(param, stat, adam.init_state(param, group), group), group)
    torch.testing.assert_close(state["exp_avg"], 0.1 * hat)
    torch.testing.assert_close(state["exp_avg_sq"], 0.001 * stat**2)
    centered = RMSprop(centered=True)
    group = centered.defaults()
    state = centered.observe(param, stat, centered.init_state(param, group), group)
    torch.testing.assert_close(state["grad_avg"], 0.01 * stat)


@pytest.mark.parametrize("c", [RMSprop(), Adam(), AdamW()])
def test_statistics_need_a_gradient(c: Curvature) -> None:
    group, param = c.defaults(), torch.zeros(3)
    with pytest.raises(ValueError, match="needs g_stat"):
        c.observe(param, None, c.init_state(param, group), group)


@pytest.mark.parametrize("c", [SGD(lr=0.5), RMSprop(), Adam(), AdamW()])
def test_objects(c: Curvature) -> None:
    assert resolve(c) is c
    assert pickle.loads(pickle.dumps(c)) == c
    with pytest.raises(CompileError, match=r"'lr' were given beside the curvature object"):
        resolve(c, lr=1.0)


@pytest.mark.parametrize(("name", "options", "message"), [
    ("adamw", {"decoupled_weight_decay": False}, r"no option 'decoupled_weight_decay'"),
    ("sgd", {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, r"zero dampening"),
    ("shampoo", {"stat_decay": 1.5}, r"Shampoo: stat_decay is 1.5. Give stat_decay a value in \[0, 1\]"),
    ("shampoo", {"refresh": 0}, r"refresh is 0. Give refresh an integer that is at least 1"),
    ("shampoo", {"root": 0}, r"root is 0"),
    ("soap", {"shampoo_beta": 1.0}, r"shampoo_beta is 1.0"),
    ("soap", {"max_precond_dim": 0.5}, r"max_precond_dim is 0.5"),
    ("muon", {"momentum": 1.0}, r"momentum is 1.0"),
    ("muon", {"adjust_lr_fn": "wide"}, r"adjust_lr_fn is wide. Give adjust_lr_fn one of"),
    ("muon", {"adamw_ratio": 0}, r"adamw_ratio is 0"),
    ("rmsprop", {"eps": -1e-8}, r"eps is -1e-08"),
    (torch.optim.SGD([torch.zeros(1)]), {}, r"neither a name nor a Curvature object"),
])  # fmt: skip
def test_errors(name: Any, options: dict[str, Any], message: str) -> None:
    """More of them, and that nothing has changed then: tests/docs/test_errors_page.py."""
    with pytest.raises(CompileError, match="(?s)" + message):
        resolve(name, **options)


@pytest.mark.parametrize("name", TORCH)
def test_group_options_are_checked(name: str) -> None:
    c = resolve(name)
    with pytest.raises(CompileError, match="lr is -1"):
        c.init_state(torch.zeros(1), {**c.defaults(), "lr": -1})
