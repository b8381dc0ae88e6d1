"""Samples that do not lie along the leading axis: the same game as the network written so that they do."""

from __future__ import annotations

import copy
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
from support.exported import largest, load_module, named
from support.networks import make

SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.3},
    "rmsprop": {"curvature": "rmsprop", "lr": 5e-3},
    "adam, groups": {"curvature": "adam", "lr": 1e-2, "coupling": 3},
    "substituted": {"curvature": "sgd", "lr": 0.05, "coupling": "block", "recursion": "substituted"},
    "ggn": {"curvature": "sgd", "lr": 0.1, "terminal": "ggn"},
}


def parameters(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def trained(
    model: nn.Module, case: Arranged, steps: int = 3, size: int = 4, example: int = 4, **options: Any
) -> Tensor:
    model = copy.deepcopy(model)
    before = parameters(model)
    opt = compile_optimizer(
        model, case.batch(0, example)[0], loss=nn.CrossEntropyLoss(), **{"curvature": "sgd", **options}
    )
    for step in range(steps):
        opt.step(*case.batch(step, size))
    after = parameters(model)
    assert (after - before).abs().max() > 1e-3
    return after


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_same_as_with_samples_leading(name: str, setting: str) -> None:
    case = NETWORKS[name]
    folded, plain = case.models()
    found, expected = (trained(model, case, **SETTINGS[setting]) for model in (folded, plain))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_fast_equals_dense(name: str, setting: str) -> None:
    case = NETWORKS[name]
    model, _ = case.models()
    found = [trained(model, case, steps=2, backend=backend, **SETTINGS[setting]) for backend in ("fast", "dense")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_feedback_off_is_torch(name: str) -> None:
    case = NETWORKS[name]
    model, theirs = case.models()[0], case.models()[0]
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9)
    for step in range(3):
        x, y = case.batch(step)
        reference.zero_grad()
        nn.CrossEntropyLoss()(theirs(x), y).backward()
        reference.step()
    found = trained(model, case, curvature="sgd", lr=0.1, momentum=0.9, feedback=False)
    torch.testing.assert_close(found, parameters(theirs), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_layouts_are_found(name: str) -> None:
    case = NETWORKS[name]
    graph = compile_optimizer(case.models()[0], case.batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd").graph
    found = {str(op.layout) for op in graph.ops.ops if op.layout is not None and (op.shape or ())[1:]}
    assert all(any(word in text for text in found) for word in case.layouts), found


@pytest.mark.parametrize("name", NETWORKS)
def test_the_quick_answer_is_the_long_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that lies as its operands do is told by comparing bits; element by element says the same."""
    case = NETWORKS[name]

    def layouts() -> dict[str, Layout | None]:
        graph = compile_optimizer(case.models()[0], case.batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd").graph
        return {op.name: op.layout for op in graph.ops.ops}

    asked: list[bool] = []
    quick = samples.lies_as
    monkeypatch.setattr(samples, "lies_as", lambda *given: asked.append(quick(*given)) or asked[-1])
    found = layouts()
    assert any(asked)
    monkeypatch.setattr(samples, "lies_as", lambda *given: False)
    assert layouts() == found


class WordsThatOccur(nn.Module):
    """Every word that occurs moves all tokens: other inputs have fewer, and the recording fails on them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).flatten(0, 1)
        for word in (nn.functional.one_hot(x.flatten(), 6).sum(0) > 0).nonzero():
            rows = rows + 0.1 * word
        return torch.tanh(self.mix(rows)).view(len(x), -1, 3).sum(1)


class SureOf(nn.Module):
    """The only candidate has the probability 1, whatever the input: where it goes does not show in a change."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.score, self.mix = nn.Embedding(6, 3), nn.Linear(3, 1), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).flatten(0, 1)
        order = x.flatten().argsort(stable=True)
        weights = self.score(rows).softmax(-1)[order]
        found = torch.tanh(self.mix(rows[order])) * weights
        return found[order.argsort(stable=True)].view(len(x), -1, 3).sum(1)


class OneExpert(nn.Module):
    """All tokens go to one expert, whatever the input; how many go to each is counted in numbers with a point."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.experts = nn.Embedding(6, 3), nn.Parameter(torch.randn(2, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        rows = self.embed(x).flatten(0, 1)
        chosen = torch.stack((rows.tanh() + 3, rows.tanh()), -1).mean(1).argmax(-1)
        order = chosen.argsort(stable=True)
        ends = chosen.float().histc(2, 0, 1).cumsum(0)
        expert = torch.searchsorted(ends, torch.arange(len(rows)).float(), right=True)
        found = torch.where(expert.unsqueeze(1) == 0, rows[order] @ self.experts[0], rows[order] @ self.experts[1])
        return torch.tanh(found[order.argsort(stable=True)]).view(len(x), -1, 3).sum(1)


@pytest.mark.filterwarnings("ignore:the path through the model depends on values")
@pytest.mark.parametrize("kind", [WordsThatOccur, SureOf, OneExpert])
@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_what_a_changed_input_does_not_tell(kind: type[nn.Module], backend: str) -> None:
    torch.manual_seed(0)
    ours = kind().double()
    theirs = copy.deepcopy(ours)
    x, targets = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 3, 1]]), torch.tensor([0, 2, 1])
    options = {"loss": nn.CrossEntropyLoss(), "curvature": "sgd", "lr": 0.1}
    graph = compile_optimizer(theirs, x, **options).graph
    assert INNER in {str(op.layout)[-len(INNER) :] for op in graph.ops.ops}
    compile_optimizer(ours, x, **options, backend=backend, feedback=False).step(x, targets)
    reference = torch.optim.SGD(theirs.parameters(), lr=0.1)
    nn.CrossEntropyLoss()(theirs(x), targets).backward()
    reference.step()
    torch.testing.assert_close(list(ours.parameters()), list(theirs.parameters()), rtol=0, atol=1e-12)
    both = [copy.deepcopy(ours), copy.deepcopy(ours)]
    for model, way in zip(both, ("fast", "dense"), strict=True):
        compile_optimizer(model, x, **options, backend=way).step(x, targets)
    torch.testing.assert_close(*(list(model.parameters()) for model in both), rtol=0, atol=1e-9)


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


# --- curvatures of players, other batches, other front ends -----------------------------------------------------------

RECORDED = ("time first", "heads", "frames", "views")


@pytest.mark.parametrize("name", ["experts", "time first", "frames", "views"])
@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_kronecker_factors(curvature: str, name: str) -> None:
    case = NETWORKS[name]
    model, plain = case.models()
    options: dict[str, Any] = {"curvature": curvature, "lr": 0.01, "damping": 0.1}
    options["steps"] = 1 if curvature == "ekfac" else 2  # factors of four samples have no one eigenbasis
    found = [trained(model, case, backend=backend, **options) for backend in ("fast", "dense")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    if name != "frames":  # which the other network writes with parameter expressions, in other blocks
        torch.testing.assert_close(found[0], trained(plain, case, **options), rtol=0, atol=1e-9)


@pytest.mark.parametrize("curvature", ["kfac", "ekfac"])
def test_cross_terms_of_layers_that_lie_differently(curvature: str) -> None:
    """Theorem 3 pairs a sample's rows of one layer with those of another, wherever the model has them."""
    folded, plain = COALITION.models()
    options: dict[str, Any] = {"curvature": curvature, "lr": 0.01, "damping": 0.1, "steps": 1}
    found = [trained(folded, COALITION, backend=backend, **options) for backend in ("fast", "dense")]
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)
    torch.testing.assert_close(found[0], trained(plain, COALITION, **options), rtol=0, atol=1e-9)
    opt = compile_optimizer(folded, COALITION.batch(0)[0], loss=nn.CrossEntropyLoss(), curvature=curvature)
    blocks = [{p.name for p in block.players} for stage in opt.program.derived.stages for block in stage.blocks]
    assert {"listed", "first", "image", "apart"} in blocks and {"once"} in blocks


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("name", NETWORKS)
def test_batches_of_another_size(name: str, size: int) -> None:
    case = NETWORKS[name]
    found, expected = (trained(model, case, size=size, curvature="sgd", lr=0.1) for model in case.models())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", NETWORKS)
def test_example_of_one_sample(name: str) -> None:
    """Nothing can be told from one sample: two are tried where the recording allows it."""
    case, options = NETWORKS[name], {"curvature": "sgd", "lr": 0.1}
    found = []
    for model in case.models():
        opt = compile_optimizer(
            model, case.batch(0, 1)[0], loss=nn.CrossEntropyLoss(), **{"curvature": "sgd", **options}
        )  # type: ignore[arg-type]
        for step, size in enumerate((1, 5)):
            opt.step(*case.batch(step, size))
        found.append(parameters(model))
    torch.testing.assert_close(*found, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "size"), [*((name, size) for name in RECORDED for size in (1, 4)), ("rows sorted by expert", 4)]
)
def test_under_torch_export(name: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, options = NETWORKS[name], {"curvature": "rmsprop", "lr": 0.01}
    model, plain = case.models()
    expected = trained(plain, case, size=size, **options)
    monkeypatch.setattr(normalisation, "FRONT_ENDS", FRONT_ENDS[1:])
    monkeypatch.setattr(normalisation.normalise, "__defaults__", (FRONT_ENDS[1:],))
    found = trained(model, case, size=size, example=size, **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


class Encoder(nn.Module):
    """torch's own attention with time first, around it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=False)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 2) to (B, 3)."""
        h = torch.tanh(self.first(x)).transpose(0, 1)
        return self.head(self.norm(h + self.attention(h, h, h, need_weights=False)[0]).mean(0))


def test_attention_with_time_first() -> None:
    torch.manual_seed(0)
    model = Encoder().double()
    case = NETWORKS["time first"]
    fast, dense = (trained(model, case, curvature="sgd", lr=0.1, backend=name) for name in ("fast", "dense"))
    torch.testing.assert_close(fast, dense, rtol=0, atol=1e-9)
    model.attention.batch_first = True
    turned = copy.deepcopy(model)
    turned.forward = lambda x: turned.head(  # type: ignore[method-assign]
        turned.norm((h := torch.tanh(turned.first(x))) + turned.attention(h, h, h, need_weights=False)[0]).mean(1)
    )
    before = parameters(turned)
    opt = compile_optimizer(turned, case.batch(0)[0], loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1)
    for step in range(3):
        opt.step(*case.batch(step))
    assert (parameters(turned) - before).abs().max() > 1e-3
    torch.testing.assert_close(parameters(turned), fast, rtol=0, atol=1e-9)


# --- exported programs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["experts", "rows sorted by expert", "time first", "frames", "views", "layers by the generic rule"]
)
def test_exported(name: str, tmp_path: Path) -> None:
    """The module and the stored program take the steps that the optimizer takes; a batch of another size included."""
    case = NETWORKS[name]
    model, again = case.models()[0], case.models()[0]
    options: dict[str, Any] = {"curvature": "sgd", "lr": 0.1}
    opt = compile_optimizer(model, case.batch(0)[0], loss=nn.CrossEntropyLoss(), **{"curvature": "sgd", **options})
    opt.program.export(tmp_path / "step.py")
    opt.program.export(tmp_path / "program.json")
    stored = UpdateProgram.load(tmp_path / "program.json")
    assert stored.code == opt.program.code and stored.graph.ops == opt.graph.ops
    other = compile_optimizer(again, program=stored)
    module, (params, buffers) = load_module(tmp_path / "step.py"), named(model)
    state = module.init_state(params)
    for step, size in enumerate((4, 3)):
        x, y = case.batch(step, size)
        opt.step(x, y)
        other.step(x, y)
        params, buffers, state, _ = module.step(params, buffers, state, x, y)
    assert largest(named(model)[0], params) < 1e-12
    assert largest(named(model)[0], named(again)[0]) == 0


@pytest.mark.parametrize("backend", ["fast", "dense"])
def test_as_many_losses_as_samples(backend: Any) -> None:
    """Tokens of all samples in one list: losses are made a sample by a function, not by the module."""
    net = make(lambda net, x: net.b(torch.tanh(net.a(x))).flatten(0, 1), a=(4, 5), b=(5, 3))
    leading = make(lambda net, x: net.b(torch.tanh(net.a(x))), a=(4, 5), b=(5, 3))

    def by_sample(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none").unflatten(0, (6, 2)).mean(1)

    x, y = torch.randn(6, 2, 4, dtype=torch.float64), torch.arange(12) % 3
    opt = compile_optimizer(net, x, loss=nn.CrossEntropyLoss(), curvature="sgd", backend=backend)
    with pytest.raises(CompileError, match=r"makes 12 losses of outputs \(12, 3\), but the batch has 6 samples"):
        opt.step(x, y)
    for model, loss in (
        (net, by_sample),
        (leading, lambda outputs, targets: by_sample(outputs.flatten(0, 1), targets)),
    ):
        opt = compile_optimizer(model, x, loss=loss, curvature="sgd", lr=0.5, backend=backend)
        opt.step(x, y)
        opt.step(x, y)
    assert float((parameters(net) - parameters(leading)).abs().max()) < 1e-12
