"""Numbers that a model reads from values: followed and checked at every step, or refused; never kept as they were."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.frontends import trace_derivatives, trace_export
from gtddp_compile.frontends.traced import Untraceable
from support.compared import assert_equal, torch_step
from support.exported import load_module, named
from support.networks import Case
from support.recorded import batch, net

LR, SIZE = 0.01, 6
Forward = Callable[[Any, Tensor], Tensor]
TARGETS = torch.randn(SIZE, 3, generator=torch.Generator().manual_seed(9)).double()
SCALES = (1.0, 5.0, 9.0, 0.1, 5.0)
"""Batches, some of which lead elsewhere than the first."""


def halved(m: Any, h: Tensor, condition: Any) -> Tensor:
    return m.b(h * 0.5 if condition else h)  # type: ignore[no-any-return]


def clipped(m: Any, h: Tensor, x: Tensor) -> Tensor:
    norm = h.norm().item()
    return m.b(h * (3 / norm) if norm > 3 else h)  # type: ignore[no-any-return]


def shrunk(m: Any, h: Tensor, x: Tensor) -> Tensor:
    while h.mean().item() > 0.5:
        h = h * 0.5
    return m.b(h)  # type: ignore[no-any-return]


def repeated(m: Any, h: Tensor, x: Tensor) -> Tensor:
    for _ in range(int(h.sum().item()) % 3):
        h = h * 0.5
    return m.b(h)  # type: ignore[no-any-return]


def each_column(m: Any, h: Tensor, x: Tensor) -> Tensor:
    for mean in h.mean(0).tolist():
        if mean > 1:
            h = h * 0.9
    return m.b(h)  # type: ignore[no-any-return]


def arithmetic(m: Any, h: Tensor, x: Tensor) -> Tensor:
    top, mean = h.max().item(), h.mean().item()
    scale = 2.0 / (1 + abs(-top)) ** 2 + top % 1 - np.float64(0.5) * mean // 1
    return m.b((scale * h).clamp(max=mean * 2) + torch.full_like(h, mean) + torch.tensor([top, mean]).sum())  # type: ignore[no-any-return]


DECIDES: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "item": lambda m, h, x: halved(m, h, h.mean().item() > 0.5),
    "item on the left": lambda m, h, x: halved(m, h, not h.mean().item() <= 0.5),
    "item of a condition": lambda m, h, x: halved(m, h, (h.mean() > 0.5).item()),
    "tolist": lambda m, h, x: halved(m, h, h.mean().tolist() > 0.5),
    "elements of a list": each_column,
    "the loop's end": shrunk,
    "the loop's count": repeated,
    "a whole part": lambda m, h, x: m.b(h * 0.9 ** int(x.abs().max().item())),
    "added": lambda m, h, x: m.b(h + int(h.sum().item()) % 3),
    "rounded": lambda m, h, x: m.b(h * 0.9 ** len(range(round(h.max().item()) + round(x.mean().item())))),
    "floor and ceiling": lambda m, h, x: m.b(
        h * 0.9 ** len(range(math.floor(h.max().item()) + math.ceil(x.max().item())))
    ),
    "whether it is whole": lambda m, h, x: halved(m, h, (x[:, 0] * 2).round().sum().mul(0.5).item().is_integer()),
    "truth": lambda m, h, x: halved(m, h, (x > 4).double().sum().item()),
    "a maximum of numbers": lambda m, h, x: m.b(h / max(h.mean().item(), 0.5)),
    "clipping by the norm": clipped,
    "a whole number": lambda m, h, x: halved(m, h, (x > 2).sum().item() > 1),
    "int of a tensor": lambda m, h, x: halved(m, h, int(h.sum()) % 2),
    "a set": lambda m, h, x: halved(m, h, int(h.sum().item()) % 3 in {0, 2}),
    "a table": lambda m, h, x: m.b(h * {0: 1.0, 1: 2.0}.get((x > 2).sum().item(), 3.0)),
    "a parameter": lambda m, h, x: halved(m, h, m.a.weight.norm().item() > m.limit),
    "a parameter out of sight": lambda m, h, x: halved(m, h, next(m.parameters()).norm().item() > m.limit),
    "a list of parameters out of sight": lambda m, h, x: halved(m, h, m.hidden[0].tolist()[0][0] > m.entry),
}
ENTERS: dict[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "a factor": lambda m, h, x: m.b(h * h.max().item()),
    "a factor of what is decided": lambda m, h, x: halved(m, h * h.max().item(), h.mean().item() < 100),
    "rounded and multiplied": lambda m, h, x: m.b(
        h * 0.9 ** (math.floor(h.max().item()) + math.ceil(h.mean().item()) + round(x.max().item()))
    ),
    "a whole factor": lambda m, h, x: m.b(h * (x > 2).sum().item()),
    "arithmetic": arithmetic,
}


def in_a_derivative(m: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    u = m.b(torch.tanh(m.a(x)))
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u * 2 if slope.mean(0).tolist()[0] > 0 else u  # type: ignore[no-any-return]


REFUSED: dict[str, tuple[Callable[[Any, Tensor, Tensor], Any], str]] = {
    "float()": (lambda m, h, x: m.b(h / float(h.detach().max())), r"built in.*float\(\)"),
    "float() of a number": (lambda m, h, x: halved(m, h, float(h.mean().item()) > 0.5), "built in"),
    "math": (lambda m, h, x: halved(m, h, math.isnan(h.sum().item())), "built in"),
    "a text": (lambda m, h, x: halved(m, h, str(h.mean().item()) > "0.5" and h.mean().item() < 9), "built in"),
    "a format": (lambda m, h, x: halved(m, h, float(f"{h.mean():.3f}") > 0.5), "out of torch"),
    "a key": (lambda m, h, x: m.b(h * {0.5: 1.0}.get(h.mean().item(), 2.0)), "built in"),
    "a complex number": (lambda m, h, x: halved(m, h, h.mean().to(torch.complex128).item() == 0), "built in"),
    "numpy": (lambda m, h, x: halved(m, h, h.detach().numpy().mean() > 0.5), "out of torch"),
    "an array": (lambda m, h, x: halved(m, h, np.asarray(h.detach()).mean() > 0.5), "out of torch"),
    "a parameter as an array": (lambda m, h, x: halved(m, h, m.hidden[0].detach().numpy().mean() > 0), "out of torch"),
    "numpy of a number": (lambda m, h, x: m.b(h * np.sqrt(h.mean().item() if h.mean().item() > 0 else 1)), "torch's"),
}


def model_of(forward: Callable[[Any, Tensor, Tensor], Tensor]) -> Any:
    model: Any = net(lambda m, x: forward(m, m.a(x).relu(), x))
    model.limit, model.entry = model.a.weight.norm().item() + 1e-3, model.a.weight[0, 0].item() - 1e-3
    object.__setattr__(model, "hidden", (model.a.weight,))
    return model


def compiled(model: nn.Module, **options: Any) -> Any:
    return compile_optimizer(model, loss=nn.MSELoss(), lr=LR, **options)


@pytest.mark.filterwarnings("ignore:.*depends on values")
@pytest.mark.parametrize("given", [True, False], ids=["example", "first step"])
@pytest.mark.parametrize("name", [*DECIDES, *ENTERS])
def test_a_step_without_feedback_is_torchs(name: str, given: bool) -> None:
    forward = {**DECIDES, **ENTERS}[name]
    model, x = model_of(forward), batch(SIZE)
    opt = compiled(model, **({"example_inputs": x} if given else {}), curvature="sgd", feedback=False)
    for scale in SCALES:
        plain = copy.deepcopy(model)
        loss = nn.MSELoss()(plain(scale * x), TARGETS)
        torch_step(torch.optim.SGD(plain.parameters(), lr=LR), loss)
        found = opt.step(scale * x, TARGETS)
        torch.testing.assert_close(found, loss.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(dict(model.named_parameters()), dict(plain.named_parameters()), rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:.*depends on values")
@pytest.mark.parametrize("name", [*DECIDES, *ENTERS])
def test_with_feedback_a_step_is_that_of_a_program_for_its_batch(name: str) -> None:
    model, x = model_of({**DECIDES, **ENTERS}[name]), batch(SIZE)
    opt, first = compiled(model, example_inputs=x), copy.deepcopy(model.state_dict())
    for scale in SCALES:
        model.load_state_dict(first)
        other = copy.deepcopy(model)
        opt.load_state_dict(compiled(other).state_dict())
        expected = compiled(other, example_inputs=scale * x).step(scale * x, TARGETS)
        torch.testing.assert_close(opt.step(scale * x, TARGETS), expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", DECIDES)
def test_a_decision_is_guarded_and_said(name: str) -> None:
    with pytest.warns(UserWarning, match=r"depends on values \(at test_numbers_read\.py:\d+"):
        opt = compiled(model_of(DECIDES[name]), example_inputs=batch(SIZE))
    assert opt.graph.ops.frontend == "eager" and opt.graph.guards


@pytest.mark.filterwarnings("ignore:.*depends on values")
@pytest.mark.parametrize("name", ["clipping by the norm", "elements of a list", *ENTERS])
def test_fast_equals_dense(name: str) -> None:
    model = model_of({**DECIDES, **ENTERS}[name])
    assert_equal(Case(model, loss=nn.MSELoss(), draw=lambda seed, size: (batch(SIZE), TARGETS)), lr=LR)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    forward, why = REFUSED[name]
    with pytest.raises(
        CompileError, match=rf"(?s)test_numbers_read\.py:\d+.*{why}.*by \.item\(\) and torch's functions"
    ):
        compiled(model_of(forward), example_inputs=batch(SIZE))


def test_a_list_of_derivatives_is_refused() -> None:
    with pytest.raises(CompileError, match="with its derivatives: the path through the model depends on values"):
        compiled(net(in_a_derivative), example_inputs=batch(SIZE))
    with pytest.raises(Untraceable):
        trace_derivatives(model_of(DECIDES["a list of parameters out of sight"]), (batch(SIZE),))


@pytest.mark.parametrize("name", ["item", "the loop's count", "a whole part", "a list of parameters out of sight"])
def test_torch_export_takes_no_decision(name: str) -> None:
    with pytest.raises(Untraceable, match=r"torch\.export"):
        trace_export(model_of(DECIDES[name]), (batch(SIZE),))


def test_what_depends_on_nothing_is_a_constant() -> None:
    """Numbers of constants are read as before: recorded by torch.fx, without a guard."""

    def forward(m: Any, x: Tensor) -> Tensor:
        widths = torch.linspace(0, 1, 3).tolist()
        return m.b(torch.tanh(m.a(x)) * (1 + widths[1])) * torch.arange(4).sum().item()  # type: ignore[no-any-return]

    graph = compiled(net(forward), example_inputs=batch(SIZE)).graph
    assert graph.ops.frontend == "fx" and not graph.guards


@pytest.mark.filterwarnings("ignore:.*depends on values")
def test_an_exported_program_computes_with_the_present_number(tmp_path: Any) -> None:
    model = model_of(clipped)
    opt = compiled(model, example_inputs=5 * batch(SIZE), curvature="sgd")
    opt.program.export(tmp_path / "step.py")
    written, (params, _) = load_module(tmp_path / "step.py"), named(model)
    found = written.step(params, {}, written.init_state(params), 6 * batch(SIZE), TARGETS)[0]
    opt.step(6 * batch(SIZE), TARGETS)
    torch.testing.assert_close(dict(model.state_dict()), found, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="another path"):
        written.step(params, {}, written.init_state(params), 0.1 * batch(SIZE), TARGETS)
