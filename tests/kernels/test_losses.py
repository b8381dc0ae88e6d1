"""``φ`` adds up to the user's own loss, gradient included, and does not mix samples."""

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.fits import check
from gtddp_compile.methods.functions import MODULES
from gtddp_compile.methods.losses import split

B, C = 6, 4
WEIGHT = torch.tensor([0.3, 1.0, 2.5, 0.0], dtype=torch.float64)
REDUCTIONS = ("mean", "sum")

Build = Callable[..., nn.Module]
Data = tuple[Any, Tensor]


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 0.9 + 0.05


def signs(*shape: int) -> Tensor:
    return torch.randint(0, 2, shape).to(torch.float64) * 2 - 1


def classes(*shape: int) -> Tensor:
    return torch.randint(0, C, shape)


def class_pair(positions: tuple[int, ...], ignored: int) -> Data:
    targets = classes(B, *positions)
    targets.view(-1)[::3] = ignored
    return real(B, C, *positions), targets


def probability_pair(positions: tuple[int, ...]) -> Data:
    return real(B, C, *positions), real(B, C, *positions).softmax(1)


def positive_pair(shape: tuple[int, ...]) -> Data:
    return real(*shape), real(*shape).abs()


def gaussian_pair(width: int) -> Data:
    return (real(B, C), unit(B, width)), real(B, C)


def cases() -> Iterator[Any]:
    """``(build, data)``: a loss for a reduction, and a function that draws outputs and targets."""

    def case(name: str, build: Build, data: Callable[[], Data]) -> Any:
        return pytest.param(build, data, id=name)

    elementwise: dict[str, Build] = {
        "l1": nn.L1Loss, "mse": nn.MSELoss, "smooth-l1": partial(nn.SmoothL1Loss, beta=0.4),
        "huber": partial(nn.HuberLoss, delta=0.7), "poisson": nn.PoissonNLLLoss,
    }  # fmt: skip
    for (name, build), shape in itertools.product(elementwise.items(), [(B,), (B, C), (B, C, 2, 3)]):
        yield case(f"{name}-{len(shape)}d", build, partial(positive_pair, shape))
    yield case("mse-one-row", nn.MSELoss, lambda: (real(B, C, 3), real(B, 1, 3)))
    full_poisson = partial(nn.PoissonNLLLoss, log_input=False, full=True)
    yield case("poisson-full", full_poisson, lambda: (unit(B, C), unit(B, C) * 3))
    yield case("soft-margin", nn.SoftMarginLoss, lambda: (real(B, C), signs(B, C)))
    yield case("hinge", partial(nn.HingeEmbeddingLoss, margin=0.5), lambda: (real(B, C), signs(B, C)))
    yield case("bce", nn.BCELoss, lambda: (unit(B, C), unit(B, C)))
    yield case("bce-weight", partial(nn.BCELoss, WEIGHT), lambda: (unit(B, C), unit(B, C)))
    logits = nn.BCEWithLogitsLoss
    yield case("logits", logits, lambda: (real(B), unit(B)))
    yield case("logits-weight", partial(logits, WEIGHT), lambda: (real(B, C), unit(B, C)))
    yield case("logits-pos", partial(logits, pos_weight=WEIGHT), lambda: (real(B, C), unit(B, C)))
    yield case("kl", nn.KLDivLoss, lambda: (real(B, C).log_softmax(1), unit(B, C)))
    yield case("kl-log", partial(nn.KLDivLoss, log_target=True), lambda: (real(B, C, 2), real(B, C, 2)))
    for full, width in itertools.product((False, True), (1, C)):
        gaussian = partial(nn.GaussianNLLLoss, full=full)
        yield case(f"gaussian-{full}-{width}", gaussian, partial(gaussian_pair, width))
    for p, weight in itertools.product((1, 2), (None, WEIGHT)):
        margin = partial(nn.MultiMarginLoss, p, 0.7, weight)
        yield case(f"multi-margin-{p}-{weight is None}", margin, lambda: (real(B, C), classes(B)))
    many = torch.tensor([[0, 2, -1, -1], [1, -1, 0, 0], [3, 2, 1, 0]] * 2)
    yield case("multilabel-margin", nn.MultiLabelMarginLoss, lambda: (real(B, C), many))
    soft = partial(nn.MultiLabelSoftMarginLoss, WEIGHT)
    yield case("multilabel-soft", soft, lambda: (real(B, C), (unit(B, C) > 0.5).double()))
    for weight, index, positions in itertools.product((None, WEIGHT), (-100, 1), ((), (3,), (2, 3))):
        tail, data = f"{weight is None}-{index}-{len(positions)}", partial(class_pair, positions, index)
        yield case(f"nll-{tail}", partial(nn.NLLLoss, weight, ignore_index=index), data)
        for smoothing in (0.0, 0.2):
            entropy = partial(nn.CrossEntropyLoss, weight, ignore_index=index, label_smoothing=smoothing)
            yield case(f"entropy-{tail}-{smoothing}", entropy, data)
    for weight, smoothing, positions in itertools.product((None, WEIGHT), (0.0, 0.2), ((), (3,), (2, 3))):
        entropy = partial(nn.CrossEntropyLoss, weight, label_smoothing=smoothing)
        name = f"probabilities-{weight is None}-{smoothing}-{len(positions)}"
        yield case(name, entropy, partial(probability_pair, positions))


CASES = list(cases())

pytestmark = pytest.mark.filterwarnings("ignore:Using a target size", "ignore:reduction. 'mean' divides")


def drawn(data: Callable[[], Data]) -> tuple[Any, Tensor, tuple[Tensor, ...]]:
    torch.manual_seed(3)
    outputs, targets = data()
    leaves = outputs if isinstance(outputs, tuple) else (outputs,)
    for leaf in leaves:
        leaf.requires_grad_()
    return outputs, targets, leaves


def value(module: nn.Module, outputs: Any, targets: Tensor) -> Tensor:
    arguments = (outputs[0], targets, outputs[1]) if isinstance(outputs, tuple) else (outputs, targets)
    return module(*arguments)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("build", "data"), CASES)
def test_adds_up_and_samples_are_independent(build: Build, data: Callable[[], Data], reduction: str) -> None:
    module = build(reduction=reduction)
    outputs, targets, leaves = drawn(data)
    loss = split(module)
    assert loss.reduction == reduction and loss.name == type(module).__name__ and loss.module is module
    check(loss, outputs, targets)
    phi = loss.per_sample(outputs, targets)
    assert phi.shape == (B,) and module.reduction == reduction
    theirs = value(module, outputs, targets)
    torch.testing.assert_close(loss.total(phi), theirs, rtol=1e-12, atol=1e-12)
    mine = torch.autograd.grad(loss.total(phi), leaves, retain_graph=True)
    torch.testing.assert_close(mine, torch.autograd.grad(theirs, leaves), rtol=1e-12, atol=1e-12)
    for i in range(B):
        for gradient in torch.autograd.grad(phi[i], leaves, retain_graph=True):
            assert not gradient[torch.arange(B) != i].any()


def functions() -> Iterator[Any]:
    """``(function, data)``: of torch's, and one with options."""
    bare = {
        F.l1_loss: "l1-2d", F.mse_loss: "mse-4d", F.smooth_l1_loss: "smooth-l1-2d", F.huber_loss: "huber-2d",
        F.poisson_nll_loss: "poisson-2d", F.soft_margin_loss: "soft-margin", F.binary_cross_entropy: "bce",
        F.binary_cross_entropy_with_logits: "logits", F.kl_div: "kl", F.multi_margin_loss: "multi-margin-1-True",
        F.multilabel_margin_loss: "multilabel-margin", F.multilabel_soft_margin_loss: "multilabel-soft",
        F.nll_loss: "nll-True--100-1", F.cross_entropy: "entropy-True--100-2-0.0",
    }  # fmt: skip
    data = {case.id: case.values[1] for case in CASES}
    assert bare.keys() == MODULES.keys()
    for function, name in bare.items():
        yield pytest.param(function, data[name], id=name)
        yield pytest.param(partial(function, reduction="sum"), data[name], id=name + "-sum")
    weighted = partial(F.cross_entropy, weight=WEIGHT, label_smoothing=0.2, ignore_index=1)
    yield pytest.param(weighted, data["entropy-False-1-1-0.2"], id="options")
    yield pytest.param(partial(F.kl_div, reduction="batchmean"), data["kl"], id="batchmean")


@pytest.mark.parametrize(("function", "data"), functions())
def test_functions_of_torch(function: Any, data: Callable[[], Data]) -> None:
    outputs, targets, leaves = drawn(data)
    loss, theirs = split(function), function(outputs, targets)
    check(loss, outputs, targets)
    mine = loss.total(loss.per_sample(outputs, targets))
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(value, leaves) for value in (mine, theirs))
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("options", [{"reduction": "none"}, {"reduce": False}, {"reduction": "none", "weight": None}])
def test_a_function_without_reduction_is_one_loss_a_sample(options: dict[str, Any]) -> None:
    loss = split(partial(F.cross_entropy, **options))
    outputs, targets = real(B, C), classes(B)
    assert loss.module is None and loss.per_sample(outputs, targets).shape == (B,)


def test_batchmean() -> None:
    module = nn.KLDivLoss(reduction="batchmean")
    outputs, targets = real(B, C, 3).log_softmax(1), unit(B, C, 3)
    loss = split(module)
    check(loss, outputs, targets)
    assert loss.reduction == "mean"
    found = loss.total(loss.per_sample(outputs, targets))
    torch.testing.assert_close(found, module(outputs, targets), rtol=1e-12, atol=0)


class Focal(nn.CrossEntropyLoss):
    """A user's loss with ``reduction``."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        entropy = F.cross_entropy(input, target, reduction="none")
        found = (1 - (-entropy).exp()) ** 2 * entropy
        return found if self.reduction == "none" else found.mean() if self.reduction == "mean" else found.sum()


class Stubborn(nn.MSELoss):
    """Ignores ``reduction`` in part: its mean is half of the elements' mean."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) * (1.0 if self.reduction == "none" else 0.5)


class PerSample(nn.Module):
    """A user's loss without ``reduction``."""

    def forward(self, outputs: Any, targets: Tensor) -> Tensor:
        first, second = outputs["a"], outputs["b"][0]
        return torch.sum((first - targets) ** 2, 1) + torch.sum(second.abs(), 1)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_module_of_the_users_own(reduction: str) -> None:
    module = Focal(reduction=reduction)
    outputs, targets = real(B, C), classes(B)
    loss = split(module)
    check(loss, outputs, targets)
    torch.testing.assert_close(loss.total(loss.per_sample(outputs, targets)), module(outputs, targets))


def test_mismatch() -> None:
    with pytest.raises(CompileError, match=r"the loss Stubborn is .*, but its samples add up to"):
        check(split(Stubborn()), real(B, C), real(B, C))


def test_callables() -> None:
    outputs = {"a": real(B, C).requires_grad_(), "b": [real(B, 2)]}
    loss = split(PerSample())
    assert (loss.name, loss.reduction, loss.module) == ("PerSample", "mean", None)
    check(loss, outputs, real(B, C))
    assert loss.per_sample(outputs, real(B, C)).shape == (B,)

    def entropy(outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    assert split(entropy).name.endswith("entropy")
    assert split(entropy).per_sample(real(1, C), classes(1)).shape == (1,)


@pytest.mark.parametrize(("loss", "message"), [
    (nn.MSELoss(reduction="batchmean"), r"MSELoss has reduction='batchmean'"),
    (nn.AdaptiveLogSoftmaxWithLoss(4, 10, [5]), r"trainable parameters: head.weight.*Make them part of the model"),
])  # fmt: skip
def test_refused_at_once(loss: Any, message: str) -> None:
    """More of them, and of those at the first step: tests/docs/test_errors_page.py."""
    with pytest.raises(CompileError, match="(?s)" + message):
        split(loss)


@pytest.mark.parametrize(("loss", "outputs", "targets", "message"), [
    (nn.MSELoss(), real(B, C), real(B - 1, C), r"outputs \(6, 4\) and targets \(5, 4\) differ in batch size"),
    (nn.MSELoss(), real(B, 1), real(B), r"elements \(6, 6\).*they mix samples.*same batch axis"),
    (nn.MSELoss(), real(B), real(B, 1), r"they mix samples"),
    (nn.MSELoss(), real(B, C), real(B, C + 1), r"MSELoss refuses outputs \(6, 4\) and targets \(6, 5\): "),
    (nn.MSELoss(), real(0, C), real(0, C), r"the batch is empty"),
    (nn.MSELoss(), torch.tensor(1.0), torch.tensor(1.0), r"shape \(\), without a batch axis. Make it \(B, …\)"),
    (nn.MSELoss(), (real(B), real(B)), real(B), r"outputs are a tuple. Pass a callable"),
    (nn.GaussianNLLLoss(), real(B), real(B), r"needs two outputs.*\(mean, variance\)"),
    (nn.CrossEntropyLoss(), real(C), torch.tensor(1), r"without a batch axis. Make it \(B, C, …\)"),
    (nn.CrossEntropyLoss(ignore_index=9), real(2, C), torch.tensor([9, -100]), r"class target -100 at \[1\]"),
    (nn.NLLLoss(), real(1, C, 2), torch.tensor([[1, 7]]), r"class target 7 at \[0, 1\]"),
    (nn.MultiMarginLoss(), real(1, C), torch.tensor([5]), r"class target 5.*from 0 to 3\.$"),
    (nn.CrossEntropyLoss(), real(2, 3, C), torch.full((2, 3), 3), r"there are 3 classes.*o.transpose\(1, -1\), y,"),
    (nn.CrossEntropyLoss(), real(2, 3, C), classes(2, 3) % 3, r"refuses outputs \(2, 3, 4\).*lie along axis 1"),
])  # fmt: skip
def test_refused_at_the_first_step(loss: Any, outputs: Any, targets: Any, message: str) -> None:
    with pytest.raises(CompileError, match="(?s)" + message):
        check(split(loss), outputs, targets)


def test_everything_ignored_is_not_finite() -> None:
    loss = split(nn.CrossEntropyLoss(ignore_index=0))
    outputs, targets = real(B, C), torch.zeros(B, dtype=torch.int64)
    check(loss, outputs, targets)
    assert loss.total(loss.per_sample(outputs, targets)).isnan()
