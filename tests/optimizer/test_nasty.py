"""Plausible models and loops that a compiler may get wrong in silence: as torch.optim without feedback, as the dense
derivation with it. What was refused instead is in docs/errors.md."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError, compile_optimizer
from support import nasty
from support.compared import assert_base, assert_equal, torch_step
from support.networks import make
from support.recorded import batch
from support.refused import refused

X, Y = batch(6), torch.arange(6) % 3


@pytest.mark.filterwarnings("ignore:the path through the model depends on values")
@pytest.mark.parametrize("name", [*nasty.RUN, *nasty.MODULES])
def test_models(name: str) -> None:
    case = nasty.case(name)
    assert_base(case, curvature="sgd", lr=0.1, momentum=0.9)
    assert_equal(case, steps=2, curvature="sgd", lr=0.1, gram="exact")


INPUTS: dict[str, Callable[[int], Tensor]] = {
    "transposed": lambda step: torch.randn(4, 6).double().t(),
    "one sample six times": lambda step: torch.randn(1, 4).double().expand(6, 4),
    "one column four times": lambda step: torch.randn(6, 1).double().expand(6, 4),
    "requiring grad": lambda step: torch.randn(6, 4).double().requires_grad_(),
    "of another size": lambda step: torch.randn(6 - 2 * step, 4).double(),
}


def two() -> Any:
    return make(lambda net, x: net.b(torch.tanh(net.a(x))), a=(4, 5), b=(5, 3))


def follow(net: Any, opt: Any, loss: Any, between: Callable[[Any], Any], steps: int = 3, inputs: Any = None) -> None:
    """A loop beside torch.optim's, with something done to both models between the steps."""
    plain = copy.deepcopy(net)
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    for step in range(steps):
        x = X if inputs is None else inputs(step)
        opt.step(x, Y[: len(x)])
        torch_step(theirs, loss(plain(x), Y[: len(x)]))
        torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
        between(net), between(plain)


def base(net: Any, loss: Any) -> Any:
    return compile_optimizer(net, X, loss=loss, curvature="sgd", lr=0.1, feedback=False)


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(kind: str) -> None:
    net, loss = two(), nn.CrossEntropyLoss()
    torch.manual_seed(0)
    follow(net, base(net, loss), loss, lambda model: None, inputs=INPUTS[kind])


def thawed(layer: nn.Module, requires: bool) -> None:
    for parameter in layer.requires_grad_(requires).parameters():
        parameter.grad = None


BETWEEN: dict[str, Callable[[Any], Any]] = {
    "data written": lambda net: net.a.weight.data.mul_(2),
    "data replaced": lambda net: setattr(net.a.weight, "data", net.a.weight.data * 2),
    "frozen and thawed": lambda net: thawed(net.a, not net.a.bias.requires_grad),
    "a hook added": lambda net: net.a.register_forward_hook(lambda module, given, value: value / 2),
}  # fmt: skip


@pytest.mark.parametrize("kind", BETWEEN)
def test_what_is_done_between_steps(kind: str) -> None:
    net, loss = two(), nn.CrossEntropyLoss()
    follow(net, base(net, loss), loss, BETWEEN[kind])


def test_options_of_a_loss_that_change() -> None:
    net, loss = two(), nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 3.0]).double())
    changes = iter([lambda: setattr(loss, "label_smoothing", 0.2), lambda: loss.weight.mul_(Y[:3] + 1)] * 2)
    opt, once = base(net, loss), iter(range(9))
    follow(net, opt, loss, lambda model: next(changes)() if next(once) % 2 else None)
    loss.reduction = "sum"
    refused(lambda: opt.step(X, Y), "the reduction of the loss CrossEntropyLoss was changed to 'sum'")


def test_steps_of_several_threads_are_made_one_after_the_other() -> None:
    net = two()
    opt, plain = base(net, nn.CrossEntropyLoss()), copy.deepcopy(net)
    threads = [threading.Thread(target=lambda: [opt.step(X, Y) for _ in range(8)]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    theirs = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(24):
        torch_step(theirs, F.cross_entropy(plain(X), Y))
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def test_hooks_on_gradients_of_modules_are_pointed_out() -> None:
    net = two()
    net.a.register_full_backward_hook(lambda module, given, value: None)
    with pytest.warns(UserWarning, match="gradient hooks of 'a' do not run"):
        base(net, nn.CrossEntropyLoss())


KINDS = ["register_full_backward_hook", "register_full_backward_pre_hook", "register_backward_hook"]


def deciding() -> Any:
    return make(lambda net, x: net.b(torch.tanh(y) if (y := net.a(x)).sum() > -1e9 else y), a=(4, 5), b=(5, 3))


@pytest.mark.filterwarnings("ignore:gradient hooks", "ignore:the path through the model depends on values")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [two, deciding])
def test_hooks_that_look_at_gradients_change_nothing(kind: str, model: Callable[[], Any]) -> None:
    """They do not run, whichever front end records the model."""
    net = model()
    plain = copy.deepcopy(net)
    seen: list[Any] = []
    getattr(net.a, kind)(lambda module, *gradients: seen.append(gradients))
    opt = base(net, nn.CrossEntropyLoss())
    seen.clear()
    opt.step(X, Y)
    torch_step(torch.optim.SGD(plain.parameters(), lr=0.1), F.cross_entropy(plain(X), Y))
    torch.testing.assert_close(net.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)
    assert not seen and len(net.a._backward_hooks) + len(net.a._backward_pre_hooks) == 1


@pytest.mark.filterwarnings("ignore:gradient hooks")
def test_a_hook_that_changes_gradients_is_named() -> None:
    net = two()
    net.a.register_full_backward_hook(lambda module, given, value: None)
    net.b.register_full_backward_hook(lambda module, given, value: tuple(2 * g for g in given))
    with pytest.raises(CompileError, match=r"module 'b', operation Linear: .*hook changes gradients.*Function"):
        base(net, nn.CrossEntropyLoss())


@pytest.mark.parametrize("write", [lambda w: w.data.clamp_(-9, 9), lambda w: w.detach().view(-1).clamp_(-9, 9)])
def test_a_parameter_written_through_another_tensor(write: Callable[[Tensor], Any]) -> None:
    """Today it changes nothing; no recording may leave it out."""
    net = make(lambda net, x: (write(net.a.weight), net.b(torch.tanh(net.a(x))))[1], a=(4, 5), b=(5, 3))
    with pytest.raises(CompileError, match=r"writes .*parameter 'a.weight'"):
        base(net, nn.CrossEntropyLoss())
