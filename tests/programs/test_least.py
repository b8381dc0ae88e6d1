"""The aim is a share of what a loss can fall by: of torch's own losses the least that the targets leave is known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile.methods.losses import split
from support import networks
from support.compared import assert_equal, assert_exported, assert_union, flat, optimizer, trained
from support.networks import Case

WEIGHT = torch.tensor([0.5, 1.0, 3.0]).double()
Draw = Callable[[torch.Generator, int], Tensor]


def classes(source: torch.Generator, size: int) -> Tensor:
    return torch.randint(3, (size,), generator=source)


def shares(source: torch.Generator, size: int) -> Tensor:
    """Between 0 and 1; some are."""
    return (1.5 * torch.rand(size, 3, generator=source).double() - 0.25).clamp(0, 1)


def mixtures(source: torch.Generator, size: int) -> Tensor:
    """Probabilities of three classes, some of which are 0."""
    return F.normalize((torch.rand(size, 3, generator=source).double() - 0.3).clamp(0) + 1e-9, p=1.0)


def counts(source: torch.Generator, size: int) -> Tensor:
    return torch.poisson(2 * torch.rand(size, 3, generator=source), generator=source).double()


KINDS: dict[str, tuple[nn.Module, Draw]] = {
    "smoothed": (nn.CrossEntropyLoss(label_smoothing=0.2), classes),
    "smoothed, weighted, ignored": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2, ignore_index=1), classes),
    "smoothed, summed": (nn.CrossEntropyLoss(label_smoothing=0.1, reduction="sum"), classes),
    "probabilities": (nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1), mixtures),
    "shares": (nn.BCEWithLogitsLoss(weight=WEIGHT, pos_weight=WEIGHT), shares),
    "counts": (nn.PoissonNLLLoss(full=True), counts),
}
OTHERS: dict[str, tuple[nn.Module, Draw]] = {
    "of probabilities": (nn.BCELoss(), shares),
    "rates": (nn.PoissonNLLLoss(log_input=False), counts),
    "at positions": (
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.2, ignore_index=0),
        lambda source, size: torch.randint(3, (size, 4), generator=source),
    ),
}


def case(draw: Draw) -> Case:
    found = networks.residual()

    def drawn(seed: int, size: int) -> tuple[Any, Tensor]:
        source = torch.Generator().manual_seed(seed)
        return torch.randn(size, *found.shape, dtype=torch.float64, generator=source), draw(source, size)

    found.draw = drawn
    return found


@pytest.mark.parametrize("name", KINDS | OTHERS)
def test_no_outputs_have_less(name: str) -> None:
    """Found by going down from where nothing is known, however the least is told."""
    module, draw = (KINDS | OTHERS)[name]
    loss, targets = split(module), draw(torch.Generator().manual_seed(0), 6)
    shape = (6, 3, 4) if name == "at positions" else (6, 3)
    assert loss.excess is not None
    free = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    squash: Callable[[Tensor], Tensor] = {"of probabilities": torch.sigmoid, "rates": torch.exp}.get(name, lambda v: v)
    lbfgs = torch.optim.LBFGS(
        [free], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        lbfgs.zero_grad()
        (value := loss.per_sample(squash(free), targets).sum()).backward()
        return value

    lbfgs.step(closure)
    least, other = loss.per_sample(squash(free), targets).detach(), squash(torch.randn(shape).double())
    phi = loss.per_sample(other, targets)
    torch.testing.assert_close(loss.excess(phi, other, targets), phi - least, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("name", "dtype"), [
    ("shares", torch.float16), ("shares", torch.float32), ("counts", torch.float16), ("counts", torch.int64),
])  # fmt: skip
def test_targets_of_another_precision_are_as_good(name: str, dtype: torch.dtype) -> None:
    module, draw = nn.BCEWithLogitsLoss() if name == "shares" else nn.PoissonNLLLoss(), KINDS[name][1]
    targets = draw(torch.Generator().manual_seed(0), 6).to(dtype)
    loss, outputs = split(module), torch.randn(6, 3).double()
    assert loss.excess is not None
    phi = loss.per_sample(outputs, targets.double())  # torch's own of shares has the precision of the targets
    found, wanted = (loss.excess(phi, outputs, y) for y in (targets, targets.double()))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_of_large_counts_rounding_leaves_something() -> None:
    loss, y = split(nn.PoissonNLLLoss()), torch.tensor([[1000.0, 5000.0]])
    outputs = y.log() + 1e-2
    assert loss.excess is not None
    found, exact = (loss.excess(loss.per_sample(o, t), o, t) for o, t in ((outputs, y), (outputs.double(), y.double())))
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=0)


def test_a_fitted_sample_is_no_loss_that_may_be_negative() -> None:
    loss, y = split(nn.BCEWithLogitsLoss()), torch.rand(512, 3).clamp(0.1, 0.9)
    outputs = torch.logit(y)
    phi = loss.per_sample(outputs, y)
    assert loss.excess is not None and (loss.excess(phi, outputs, y) > 0).all()


@pytest.mark.parametrize(("module", "targets"), [
    (nn.BCEWithLogitsLoss(), torch.tensor([[1.1, 0.5], [0.2, -0.1]])),
    (nn.PoissonNLLLoss(), torch.tensor([[-1.0, 2.0], [3.0, -2.0]])),
    (nn.CrossEntropyLoss(), torch.tensor([[-0.5, 1.5], [1.2, -0.2]])),
])  # fmt: skip
def test_without_a_least_it_is_the_loss(module: nn.Module, targets: Tensor) -> None:
    loss, outputs = split(module), torch.randn(2, 2)
    phi = loss.per_sample(outputs, targets)
    assert loss.excess is not None
    torch.testing.assert_close(loss.excess(phi, outputs, targets), phi, rtol=0, atol=0)


def test_outputs_that_targets_share_cannot_reach_each() -> None:
    loss, outputs, targets = split(nn.PoissonNLLLoss()), torch.zeros(4, 1), torch.rand(4, 3) * 9
    phi = loss.per_sample(outputs, targets)
    assert loss.excess is not None and torch.equal(loss.excess(phi, outputs, targets), phi)


def test_class_indices_of_any_type() -> None:
    loss, outputs, y = split(nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.3)), torch.randn(3, 3).double(), [0, 2, 1]
    assert loss.excess is not None
    found = [loss.excess(loss.per_sample(outputs, t), outputs, t) for t in (torch.tensor(y), torch.tensor(y).byte())]
    torch.testing.assert_close(*found, rtol=0, atol=0)


def entropy(share: Tensor) -> Tensor:
    return -torch.special.xlogy(share, share)


def smoothed(outputs: Tensor, targets: Tensor) -> Tensor:
    """Less the entropy of the smoothed target, which changes no gradient."""
    share = 0.8 * F.one_hot(targets, 3).double() + 0.2 / 3
    return -(share * outputs.log_softmax(1)).sum(1) - entropy(share).sum(1)


def shared(outputs: Tensor, targets: Tensor) -> Tensor:
    losses = F.binary_cross_entropy_with_logits(outputs, targets, reduction="none")
    return (losses - entropy(targets) - entropy(1 - targets)).mean(1)


def counted(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs.exp() - targets * outputs - targets + torch.special.xlogy(targets, targets)).mean(1)


@pytest.mark.parametrize(("module", "own", "draw"), [
    (nn.CrossEntropyLoss(label_smoothing=0.2), smoothed, classes),
    (nn.BCEWithLogitsLoss(), shared, shares),
    (nn.PoissonNLLLoss(), counted, counts),
])  # fmt: skip
@pytest.mark.parametrize("options", [
    {}, {"coupling": 2}, {"rollout": "nonlinear", "curvature": "sgd", "lr": 0.3}, {"backend": "dense"},
    {"terminal": "gradient"}, {"terminal": "ggn"},
], ids=str)  # fmt: skip
def test_is_the_step_of_the_loss_without_it(module: nn.Module, own: Any, draw: Draw, options: dict[str, Any]) -> None:
    given = case(draw)
    found, wanted = (trained(given, 3, loss=loss, **options) for loss in (module, own))
    assert (found - flat(given.model)).abs().max() > 1e-4
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_fast_equals_dense_and_is_exported(name: str, tmp_path: Path) -> None:
    module, draw = KINDS[name]
    given = case(draw)
    assert_exported(given, assert_equal(given, loss=module), tmp_path)


@pytest.mark.parametrize("name", ["smoothed", "shares", "counts", "smoothed, summed"])
def test_micro_batches(name: str) -> None:
    module, draw = KINDS[name]
    assert_union(case(draw), 3, loss=module)


def test_half_precision_and_a_compiled_step() -> None:
    module, draw = nn.BCEWithLogitsLoss(), shares
    given, (x, y) = case(draw), case(draw).batch(0, 6)
    _, opt = optimizer(Case(given.model.float(), loss=module, draw=lambda *_: (x.float(), y.float())))
    with torch.autocast("cpu", torch.bfloat16):
        losses = [float(opt.step(x.float(), y.float())) for _ in range(8)]
    floor = float((entropy(y) + entropy(1 - y)).mean())
    assert floor < losses[-1] < losses[0]
    given = case(draw)
    torch._dynamo.reset()
    options: dict[str, Any] = {"loss": module, "curvature": "sgd", "lr": 0.3}
    found, wanted = (trained(given, 3, **options, **how) for how in ({"compile": {"backend": "eager"}}, {}))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
