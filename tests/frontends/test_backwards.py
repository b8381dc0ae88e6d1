"""Functions of the user's own whose backward is not linear in the gradient are refused; others are torch's."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from gtddp_compile import compile_optimizer
from support.compared import torch_step
from support.recorded import batch
from support.refused import TARGETS, compiled, model, refused


class Passing(torch.autograd.Function):
    """The first argument, whatever is asked of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *rest: Any) -> Tensor:
        return x.clone()


class Clipped(Passing):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.clamp(-0.01, 0.01)


class ClippedFarOut(Passing):
    """At a hundred times a usual gradient."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.clamp(-100, 100)


class Floored(Passing):
    """Gradients of next to nothing are none."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * (g.abs() > 1e-5)


class Normalised(Passing):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g / g.norm()


class Absolute(Passing):
    """Homogeneous, not additive."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g.abs()


class WithAux(Passing):
    """A term of the loss that no one sees, as mixtures of experts balance their load by."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g, torch.ones(1, dtype=g.dtype)


class Reversed(Passing):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return -0.3 * g


class Masked(torch.autograd.Function):
    """It draws."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.kept = torch.rand_like(x) < 0.7
        return x * ctx.kept

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return g * ctx.kept


def with_aux(layer: Any, x: Tensor) -> Any:
    y = layer.fc(x)
    return WithAux.apply(y, y.softmax(-1).mean(0).square().sum().view(1))


@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("function", [Clipped, ClippedFarOut, Floored, Normalised, Absolute, WithAux])
def test_a_backward_that_is_not_linear_is_refused(function: Any, feedback: bool) -> None:
    def forward(layer: Any, x: Tensor) -> Any:
        return function.apply(layer.fc(x))

    used = with_aux if function is WithAux else forward
    error = refused(lambda: compiled(model(used), feedback=feedback), "not linear in the gradient", "into the loss")
    assert (error.module, error.operation) == ("block.0", function.__name__)
    assert error.source == f"test_backwards.py:{used.__code__.co_firstlineno + (2 if function is WithAux else 1)}"


def test_it_is_refused_where_torch_fx_does_not_see_it() -> None:
    refused(lambda: compiled(model(lambda layer, x: Clipped.apply(layer.fc(x)) / len(x))), "not linear")
    refused(lambda: compiled(model(lambda layer, x: F.linear(x, Clipped.apply(layer.fc.weight)))), "not linear")
    inside = model(lambda layer, x: checkpoint(lambda y: Clipped.apply(layer.fc(y)), x, use_reentrant=False))
    refused(lambda: compiled(inside), "not linear")


@pytest.mark.parametrize("function", [Reversed, Masked])
def test_a_linear_one_is_torchs(function: Any) -> None:
    net = model(lambda layer, x: function.apply(layer.fc(x)))
    own, twin, state = vars(torch.autograd.Function)["apply"], copy.deepcopy(net), torch.get_rng_state()
    opt = compiled(net, lr=0.5, feedback=False)
    assert vars(torch.autograd.Function)["apply"] is own and torch.equal(torch.get_rng_state(), state)
    opt.step(batch(6), TARGETS)
    torch.set_rng_state(state)
    torch_step(torch.optim.SGD(twin.parameters(), lr=0.5), F.cross_entropy(twin(batch(6)), TARGETS))
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=1e-12)


def test_a_function_in_the_loss_is_asked_too() -> None:
    def clipped(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(Clipped.apply(y), t, reduction="none")

    def turned(y: Tensor, t: Tensor) -> Tensor:
        return F.cross_entropy(Reversed.apply(y), t, reduction="none")

    net = nn.Linear(4, 3).double()
    opt = compile_optimizer(net, batch(6), loss=clipped, curvature="sgd")
    before = net.weight.clone()
    error = refused(lambda: opt.step(batch(6), TARGETS), "not linear in the gradient")
    assert error.operation == "Clipped" and torch.equal(net.weight, before)
    compile_optimizer(net, batch(6), loss=turned, curvature="sgd").step(batch(6), TARGETS)
    assert not torch.equal(net.weight, before)
