"""Samples that do not lie along the leading axis: the same game as the network written so that they do."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError, UpdateProgram, compile_optimizer, kernels
from gtddp_compile.frontends import samples
from gtddp_compile.graph import Layout
from gtddp_compile.passes import p01_normalise as normalisation
from gtddp_compile.passes.p01_normalise import FRONT_ENDS
from support.arranged import COALITION, INNER, NETWORKS, Arranged
from support.compared import assert_base, assert_equal, assert_exported, flat, optimizer, train, trained
from support.networks import Case, make

SETTINGS: dict[str, dict[str, Any]] = {
    "rmsprop": {"curvature": "rmsprop", "lr": 5e-3},
    "adam, groups": {"curvature": "adam", "lr": 1e-2, "coupling": 3},
    "substituted": {"curvature": "sgd", "lr": 0.05, "coupling": "block", "recursion": "substituted"},
    "ggn": {"curvature": "sgd", "lr": 0.1, "terminal": "ggn"},
}
names = pytest.mark.parametrize("name", NETWORKS)


def assert_same(case: Arranged, steps: int = 3, size: int = 4, **options: Any) -> None:
    """The folded network's step is the plain one's, whose programs are those of every other test."""
    folded, plain = case.cases()
    found, expected = (trained(one, steps, size, **options) for one in (folded, plain))
    assert (found - flat(folded.model)).abs().max() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@names
def test_same_as_with_samples_leading(name: str) -> None:
    """In groups by adam, and by one of the others in turn; by sgd: batches of another size, below."""
    turn = ("rmsprop", "substituted", "ggn")[list(NETWORKS).index(name) % 3]
    for setting in ("adam, groups", turn):
        assert_same(NETWORKS[name], **SETTINGS[setting])


@names
def test_feedback_off_is_torch_and_the_dense_backend_reads_layouts_too(name: str) -> None:
    case = NETWORKS[name].cases()[0]
    assert_base(case, curvature="sgd", lr=0.1, momentum=0.9)
    assert_equal(case, steps=2, size=4, curvature="sgd", lr=0.3)


@names
def test_layouts_are_found_and_the_quick_answer_is_the_long_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that lies as its operands do is told by comparing bits; element by element says the same."""

    def layouts() -> dict[str, Layout | None]:
        graph = optimizer(NETWORKS[name].cases()[0], 4, curvature="sgd")[1].graph
        return {op.name: op.layout for op in graph.ops.ops if op.layout is not None and (op.shape or ())[1:]}

    asked: list[bool] = []
    quick = samples.lies_as
    monkeypatch.setattr(samples, "lies_as", lambda *given: asked.append(quick(*given)) or asked[-1])
    found = layouts()
    assert any(asked)
    assert all(any(word in str(layout) for layout in found.values()) for word in NETWORKS[name].layouts)
    monkeypatch.setattr(samples, "lies_as", lambda *given: False)
    assert layouts() == found


@pytest.mark.parametrize(("example", "sizes"), [(4, (1, 3, 7)), (1, (1, 5))])
@names
def test_batches_of_another_size(name: str, example: int, sizes: tuple[int, ...]) -> None:
    """Nothing can be told from an example of one sample: two are tried where the recording allows it."""
    found = []
    for case in NETWORKS[name].cases():
        model, opt = optimizer(case, example, curvature="sgd", lr=0.1)
        for step, size in enumerate(sizes):
            opt.step(*case.batch(step, size))
        found.append(flat(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


def words_that_occur(net: Any, x: Tensor) -> Tensor:
    """Every word that occurs moves all tokens: other inputs have fewer, and the recording fails on them."""
    rows = net.embed(x).flatten(0, 1)
    for word in (nn.functional.one_hot(x.flatten(), 6).sum(0) > 0).nonzero():
        rows = rows + 0.1 * word
    return torch.tanh(net.mix(rows)).view(len(x), -1, 3).sum(1)


def sure_of(net: Any, x: Tensor) -> Tensor:
    """The only candidate has the probability 1, whatever the input: where it goes does not show in a change."""
    rows = net.embed(x).flatten(0, 1)
    order = x.flatten().argsort(stable=True)
    weights = net.score(rows).softmax(-1)[order]
    found = torch.tanh(net.mix(rows[order])) * weights
    return found[order.argsort(stable=True)].view(len(x), -1, 3).sum(1)


def one_expert(net: Any, x: Tensor) -> Tensor:
    """All tokens go to one expert, whatever the input; how many go to each is counted in numbers with a point."""
    rows = net.embed(x).flatten(0, 1)
    chosen = torch.stack((rows.tanh() + 3, rows.tanh()), -1).mean(1).argmax(-1)
    order = chosen.argsort(stable=True)
    ends = chosen.float().histc(2, 0, 1).cumsum(0)
    expert = torch.searchsorted(ends, torch.arange(len(rows)).float(), right=True)
    found = torch.where(expert.unsqueeze(1) == 0, rows[order] @ net.experts[0], rows[order] @ net.experts[1])
    return torch.tanh(found[order.argsort(stable=True)]).view(len(x), -1, 3).sum(1)


UNTOLD: dict[Any, dict[str, Any]] = {
    words_that_occur: {"mix": (3, 3)}, sure_of: {"score": (3, 1), "mix": (3, 3)},
    one_expert: {"experts": lambda: nn.Parameter(torch.randn(2, 3, 3))},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:the path through the model depends on values")
@pytest.mark.parametrize("forward", UNTOLD, ids=lambda f: f.__name__)
def test_what_a_changed_input_does_not_tell(forward: Any) -> None:
    words = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 3, 1]])
    model = make(forward, embed=lambda: nn.Embedding(6, 3), **UNTOLD[forward])
    case = Case(model, draw=lambda seed, size: (words, torch.tensor([0, 2, 1])))
    run = assert_base(case, steps=1, curvature="sgd", lr=0.1)
    assert INNER in {str(op.layout)[-len(INNER) :] for op in run.optimizer.graph.ops.ops}
    assert_equal(case, steps=1, curvature="sgd", lr=0.1)


@pytest.mark.parametrize(
    "layout", [Layout(1), Layout(0, "inner"), Layout(0, "outer"), Layout(2, "inner"), Layout(1, "outer")], ids=str
)
@pytest.mark.parametrize("behind", [1, 2])
@pytest.mark.parametrize("ordered", [False, True])
def test_apart_and_together(layout: Layout, behind: int, ordered: bool) -> None:
    """Entry by entry: sample i gets what the layout says is its own; the way back is the inverse."""
    shape = [5, 2, 3]
    shape[layout.axis] = 12 if layout.fold else 4
    value = torch.arange(torch.Size(shape).numel()).reshape(shape)
    order = torch.randperm(shape[layout.axis], generator=torch.Generator().manual_seed(0)) if ordered else None
    found = kernels.apart(value, 4, layout.axis, layout.fold, behind, order)
    rank = torch.arange(shape[layout.axis]) if order is None else torch.argsort(order)
    for position in range(shape[layout.axis]):
        place = int(rank[position])
        owner = {"": place, "inner": place // 3, "outer": place % 4}[layout.fold]
        assert set(value.select(layout.axis, position).flatten().tolist()) <= set(found[owner].flatten().tolist())
    assert torch.equal(kernels.together(found, layout.axis, layout.fold, behind, order), value)
    assert tuple(found.shape[1:]) == layout.sample_shape(tuple(shape), 4) or (behind == 2 and layout.fold)


def test_samples_with_different_numbers_of_rows_are_refused() -> None:
    index = torch.tensor([0, 3, 1, 2])
    assert kernels.order_of_rows(index, 4, 2).tolist() == [0, 2, 3, 1]
    with pytest.raises(ValueError, match="no equal number for each of 2 samples"):
        kernels.order_of_rows(torch.tensor([0, 3, 1, 1]), 4, 2)


RECORDED = ("time first", "heads", "frames", "views")


@pytest.mark.parametrize("name", ["experts", "time first", "frames", "views"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_kronecker_factors(curvature: str, name: str) -> None:
    options: dict[str, Any] = {"curvature": curvature, "lr": 0.01, "damping": 0.1, "size": 4}
    options["steps"] = 1 if curvature == "ekfac" else 2  # factors of four samples have no one eigenbasis
    assert_equal(NETWORKS[name].cases()[0], **options)
    if name != "frames":  # which the other network writes with parameter expressions, in other blocks
        assert_same(NETWORKS[name], **options)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_cross_terms_of_layers_that_lie_differently(curvature: str) -> None:
    """Theorem 3 pairs a sample's rows of one layer with those of another, wherever the model has them."""
    options: dict[str, Any] = {"curvature": curvature, "lr": 0.01, "damping": 0.1, "steps": 1, "size": 4}
    opt = assert_equal(COALITION.cases()[0], **options).optimizer
    assert_same(COALITION, **options)
    blocks = [{p.name for p in block.players} for stage in opt.program.derived.stages for block in stage.blocks]
    assert {"listed", "first", "image", "apart"} in blocks and {"once"} in blocks


BY_EXPORT = [*itertools.product(RECORDED, (1, 4)), ("rows sorted by expert", 4)]


@pytest.mark.parametrize(("name", "size"), BY_EXPORT)
def test_under_torch_export(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    folded, plain = NETWORKS[name].cases()
    expected = trained(plain, size=size, curvature="rmsprop", lr=0.01)
    monkeypatch.setattr(normalisation, "FRONT_ENDS", FRONT_ENDS[1:])
    monkeypatch.setattr(normalisation.normalise, "__defaults__", (FRONT_ENDS[1:],))
    found = trained(folded, size=size, curvature="rmsprop", lr=0.01)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ["rows sorted by expert", "time first", "frames", "layers by the generic rule"])
def test_exported(name: str, tmp_path: Path) -> None:
    case = NETWORKS[name].cases()[0]
    run = train(case, curvature="sgd", lr=0.1)
    assert_exported(case, run, tmp_path)
    run.optimizer.program.export(tmp_path / "program.json")
    assert UpdateProgram.load(tmp_path / "program.json").code == run.optimizer.program.code


@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_as_many_losses_as_samples(backend: Any) -> None:
    """Tokens of all samples in one list: losses are made a sample by a function, not by the module."""
    net = make(lambda net, x: net.b(torch.tanh(net.a(x))).flatten(0, 1), a=(4, 5), b=(5, 3))
    leading = make(lambda net, x: net.b(torch.tanh(net.a(x))), a=(4, 5), b=(5, 3))

    def by_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        losses = F.cross_entropy(outputs.reshape(12, 3), targets, reduction="none")
        return losses.unflatten(0, (6, 2)).mean(1)

    x, y = torch.randn(6, 2, 4, dtype=torch.float64), torch.arange(12) % 3
    opt = compile_optimizer(net, x, loss=nn.CrossEntropyLoss(), curvature="sgd", backend=backend)
    with pytest.raises(CompileError, match=r"makes 12 losses of outputs \(12, 3\), but the batch has 6 samples"):
        opt.step(x, y)
    cases = (Case(model, loss=by_sample, draw=lambda seed, size: (x, y)) for model in (net, leading))
    found = (trained(case, curvature="sgd", lr=0.5, backend=backend) for case in cases)
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


def dropped(x: Tensor, training: bool, axis: int = 0) -> Tensor:
    """Most samples left out."""
    shape = [len(x) if axis == 0 else 1, x.shape[1] if axis == 1 else 1, *[1] * (x.dim() - 2)]
    return x * torch.empty(shape, dtype=x.dtype).bernoulli_(0.05) if training else x


@torch.fx.wrap
def named_otherwise(x: Tensor, training: bool, axis: int = 0) -> Tensor:
    return dropped(x, training, axis)


def windows(net: Any, x: Tensor) -> Tensor:
    """Samples shared by an axis of windows between two drops."""
    h = torch.tanh(net.a(x))
    w = net.b(net.drop(h, net.training).reshape(-1, 2, 5))
    h = h + net.drop(net.drop(w, net.training).reshape(h.shape), net.training)
    return net.c(h.mean(1))


def time_first(net: Any, x: Tensor) -> Tensor:
    h = torch.tanh(net.a(x)).transpose(0, 1)
    h = net.drop(net.b(h) + h, net.training, 1)
    return net.c(torch.tanh(net.b(h.reshape(-1, 5))).reshape(h.shape).mean(0))


@pytest.mark.parametrize("forward", [windows, time_first])
@pytest.mark.parametrize("drop", [dropped, named_otherwise, lambda x, training, axis=0: F.dropout(x, 0.95, training)])
def test_places_do_not_depend_on_what_is_drawn(forward: Any, drop: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make(forward, a=(4, 5), b=(5, 5), c=(5, 3))
    net.drop, x = drop, torch.randn(2, 4, 4).double()

    def places() -> set[tuple[str, Any, Any]]:
        return {(op.kind, op.shape, op.layout) for op in normalisation.normalise(net, (x,)).ops if op.is_differentiable}

    net.eval()
    expected = {place for place in places() if place[0] in ("linear", "tanh", "reshape", "add", "mean")}
    net.train()
    for seed in range(6):
        monkeypatch.setattr(samples, "SEED", seed)
        assert expected <= places()


def test_a_function_that_draws_is_known_to() -> None:
    """Whatever it is called: both sweeps have to draw the same."""
    net = make(lambda net, x: net.b(named_otherwise(torch.tanh(net.a(x)), net.training)), a=(4, 5), b=(5, 3))
    opt = compile_optimizer(net, torch.randn(2, 4).double(), loss=nn.CrossEntropyLoss(), curvature="sgd")
    assert [op.kind for op in opt.graph.ops.ops if op.random] == ["named_otherwise"]
