"""Operations that mix samples: found whatever they are called, read sample by sample, and said to be."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, compile_optimizer
from support.compared import flat, torch_step
from support.networks import make

WIDTH = 6
MIXING: dict[str, tuple[Callable[[Tensor], Tensor], tuple[str, ...]]] = {
    "centred": (lambda h: h - h.mean(0), ("sub",)),
    "standardised": (lambda h: (h - h.mean(0)) / (h.std(0) + 1), ("sub", "div")),
    "softmax": (lambda h: torch.softmax(h, 0), ("softmax",)),
    "rolled": (lambda h: h + torch.roll(h, 1, 0), ("add",)),
    "attending": (lambda h: h + (h @ h.T) @ h / 8, ("matmul", "matmul_1")),
    "sorted": (lambda h: h + h.sort(0)[0], ("add",)),
    "running sum": (lambda h: h.cumsum(0), ("cumsum",)),
    "beside": (lambda h: torch.cat((h[:, :3], h[:, 3:].roll(1, 0)), 1), ("cat",)),
    "of the first": (lambda h: h * h[:1].tanh(), ("mul",)),
}
"""What is done to ``(B, n)``, and the operations that mix."""


LAYERS: dict[str, Any] = {"a": (5, WIDTH), "b": (WIDTH, WIDTH), "c": (WIDTH, 3)}


def network(between: Callable[[Tensor], Tensor]) -> nn.Module:
    net = make(lambda net, x: net.c(torch.tanh(net.b(net.between(torch.tanh(net.a(x)))))), **LAYERS)
    net.between = between.double() if isinstance(between, nn.Module) else between
    return net


def data(size: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(size, 5, generator=source, dtype=torch.float64), torch.randint(3, (size,), generator=source)


def trained(model: nn.Module, example: int = 4, size: int = 4, **options: Any) -> tuple[Tensor, Any]:
    model = copy.deepcopy(model)
    opt = compile_optimizer(model, data(example)[0], loss=nn.CrossEntropyLoss(), curvature="sgd", lr=1.0, **options)
    for step in range(2):
        opt.step(*data(size, step))
    return flat(model), opt


@pytest.mark.parametrize("name", MIXING)
def test_read_sample_by_sample(name: str) -> None:
    """As the dense backend reads them, which differs from what they are; and the program says so."""
    between, ops = MIXING[name]
    model = network(between)
    found, opt = trained(model)
    assert opt.graph.ops.mixing == ops
    for said in (str(opt.graph), opt.program.cost()):
        assert ", ".join(ops) in said
    torch.testing.assert_close(found, trained(model, backend="dense")[0], rtol=0, atol=1e-9)
    exact, opt = trained(model, backend="dense", mixing="exact")
    assert (found - exact).abs().max() > 1e-4
    assert "approximation" not in opt.program.cost()


@pytest.mark.parametrize(("example", "size"), [(1, 4), (WIDTH, 4), (4, WIDTH), (2, 3)])
@pytest.mark.parametrize("name", ["centred", "attending"])
def test_the_size_of_the_example_does_not_matter(name: str, example: int, size: int) -> None:
    """One sample has none to mix with, and ``WIDTH`` samples make the batch's mean look like one entry a sample."""
    model = network(MIXING[name][0])
    found, opt = trained(model, example, size)
    assert opt.graph.ops.mixing == MIXING[name][1]
    torch.testing.assert_close(found, trained(model, size, size, backend="dense")[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("between", [
    lambda h: h - h.mean(1, keepdim=True), lambda h: h - h.mean(0).detach(),
    lambda h: torch.stack([h, 2 * h], 0).sum(0), lambda h: h[[2, 0, 3, 1]][[1, 3, 0, 2]], lambda h: h * h.shape[0],
    lambda h: h + nn.functional.dropout(h, 0.5),
])  # fmt: skip
def test_what_does_not_mix(between: Callable[[Tensor], Tensor]) -> None:
    """A sample's own mean, a constant, and rows that come back in order: derivatives go to their own sample alone."""
    opt = trained(network(between))[1]
    assert opt.graph.ops.mixing == ()
    assert "mix" not in str(opt.graph) + opt.program.cost()


def test_a_scale_that_is_zero_for_now() -> None:
    """The last batch-norm of a block begins at zero, where its derivatives vanish."""
    norm = nn.BatchNorm1d(WIDTH)
    nn.init.zeros_(norm.weight)
    assert trained(network(norm))[1].graph.ops.mixing == ("between",)
    assert trained(network(norm.eval()).eval())[1].graph.ops.mixing == ()


@pytest.mark.parametrize("example", [4, WIDTH])
@pytest.mark.parametrize("away", [lambda h: h.flip(0), lambda h: h.mean(0)])
def test_a_layer_that_belongs_to_no_sample_is_refused(away: Callable[[Tensor], Tensor], example: int) -> None:
    """Rows go to another sample, or to all of them, beyond the next layer."""
    net = make(lambda net, x: net.c((h := torch.tanh(net.a(x))) + away(net.b(away(h)))), **LAYERS)
    with pytest.raises(CompileError, match=f"of the {example} samples") as caught:
        compile_optimizer(net, data(example)[0], loss=nn.CrossEntropyLoss(), curvature="sgd")
    assert caught.value.source and "test_mixing.py" in caught.value.source
    assert "whole batch" in str(caught.value)


def masked(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x))
    return net.c(torch.tanh(net.b(h - h.mean(0)) * (x[:, :1] > 0)))


def test_a_sample_that_nothing_but_others_reads() -> None:
    """Its own gradient is zero where others' go to it: no block of its own has them. The fast program has."""
    model, plain, (x, y) = make(masked, **LAYERS), make(masked, **LAYERS), data(4)
    with pytest.raises(CompileError, match=r"operation sub, .* \(sample \d\) is zero"):
        trained(model, backend="dense")
    torch_step(torch.optim.SGD(plain.parameters(), lr=1.0), nn.functional.cross_entropy(plain(x), y))
    compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=1.0, feedback=False).step(x, y)
    torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=0, atol=1e-12)


def twice(of: Callable[[Tensor, Tensor], Tensor]) -> nn.Module:
    """A value computed beside the first layer is read before the second and before the last."""

    def forward(net: Any, x: Tensor) -> Tensor:
        h = torch.tanh(net.a(x))
        read = of(x, h)
        return net.c(torch.tanh(net.b(h + read)) + read)

    return make(forward, a=(5, 5), b=(5, 5), c=(5, 3))


def test_only_what_moves_is_one_a_sample() -> None:
    """A mean over the batch crosses stages where no layer moves it, and is refused where one does."""
    model = twice(lambda x, h: x.mean(0))
    torch.testing.assert_close(trained(model)[0], trained(model, backend="dense")[0], rtol=0, atol=1e-9)
    with pytest.raises(CompileError, match="no matter of axes"):
        trained(twice(lambda x, h: h.mean(0)))


def test_the_gain_is_dead_where_nothing_before_has_moved() -> None:
    """The first layer reads data alone; every other reads what an earlier one moved."""
    _, opt = trained(twice(lambda x, h: h), rollout="nonlinear")
    assert "feedback gain dead at stage 0: nothing before it has moved" in opt.program.lowered.plan.removed
