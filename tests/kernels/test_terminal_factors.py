"""``H_i = S_i S_iᵀ`` against ``torch.func.hessian`` of the user's loss; unbiased sampling over every sign pattern."""

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian

from gtddp_compile import CompileError, MonteCarlo, compile_optimizer
from gtddp_compile.kernels import hessian as factors
from gtddp_compile.methods.losses import split
from gtddp_compile.methods.terminal import check_terminal, terminal_factors

B, C = 3, 3
WEIGHT = torch.tensor([0.5, 2.0, 1.25], dtype=torch.float64)


def real(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def unit(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64) * 0.8 + 0.1


def quartic(outputs: Tensor, targets: Tensor) -> Tensor:
    """A user's own convex loss, its Hessian neither diagonal nor constant."""
    return (outputs - targets).pow(4).flatten(1).sum(1) + outputs.flatten(1).logsumexp(1)


CASES: dict[str, tuple[Any, Callable[[], tuple[Tensor, Tensor]]]] = {
    "entropy": (nn.CrossEntropyLoss(), lambda: (real(B, C), torch.tensor([0, 2, 1]))),
    "entropy-options": (nn.CrossEntropyLoss(WEIGHT, ignore_index=1, label_smoothing=0.2),
                        lambda: (real(B, C, 2), torch.tensor([[0, 1], [2, 0], [1, 1]]))),
    "entropy-probabilities": (nn.CrossEntropyLoss(WEIGHT, reduction="sum", label_smoothing=0.1),
                              lambda: (real(B, C, 2, 1), unit(B, C, 2, 1))),
    "one-class": (nn.CrossEntropyLoss(), lambda: (real(B, 1), torch.zeros(B, dtype=torch.int64))),
    "squared": (nn.MSELoss(), lambda: (real(B, C), real(B, C))),
    "squared-flat": (nn.MSELoss(reduction="sum"), lambda: (real(B), real(B))),
    "logits": (nn.BCEWithLogitsLoss(WEIGHT, pos_weight=WEIGHT), lambda: (real(B, C), unit(B, C))),
    "probability": (nn.BCELoss(), lambda: (unit(B, C), unit(B, C))),
    "huber": (nn.HuberLoss(delta=0.5), lambda: (real(B, C), real(B, C))),
    "poisson": (nn.PoissonNLLLoss(), lambda: (real(B, C), real(B, C).abs())),
    "soft-margin": (nn.MultiLabelSoftMarginLoss(WEIGHT), lambda: (real(B, C), unit(B, C).round())),
    "own": (quartic, lambda: (real(B, C), real(B, C))),
}  # fmt: skip


def drawn_of(name: str) -> tuple[Any, Tensor, Tensor, Tensor]:
    """A loss, outputs, targets, and outputs that require a gradient."""
    torch.manual_seed(3)
    loss, data = CASES[name]
    outputs, targets = data()
    return loss, outputs, targets, outputs.clone().requires_grad_()


def users_value(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean or sum as the user's loss says."""
    return loss(outputs, targets) if isinstance(loss, nn.Module) else loss(outputs, targets).mean()


def products(columns: Tensor) -> Tensor:
    flat = columns.reshape(*columns.shape[:2], -1)
    return torch.einsum("rbi,rbj->bij", flat, flat)


def expected(loss: Any, outputs: Tensor, targets: Tensor) -> Tensor:
    """``H_i``: blocks of the Hessian of the user's loss, times the batch size where it is a mean."""
    scale = 1 if getattr(loss, "reduction", "mean") == "sum" else B
    whole = hessian(lambda o: users_value(loss, o, targets))(outputs).reshape(B, outputs[0].numel(), B, -1)
    assert all(not whole[i, :, j].any() for i, j in itertools.permutations(range(B), 2))
    return scale * torch.stack([whole[i, :, i] for i in range(B)])


@pytest.mark.parametrize("name", CASES)
def test_the_factor_is_the_exact_hessian(name: str) -> None:
    loss, outputs, targets, leaf = drawn_of(name)
    (columns,) = terminal_factors(split(loss), leaf, targets, (leaf,), "ggn")
    torch.testing.assert_close(products(columns), expected(loss, outputs, targets), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["entropy", "logits", "own"])
def test_sampling_is_unbiased(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of ``S Sᵀ`` over every pattern of signs a sample, which are equally likely, is ``H``."""
    loss, outputs, targets, leaf = drawn_of(name)
    total = torch.zeros(B, C, C, dtype=torch.float64)
    patterns = list(itertools.product((-1.0, 1.0), repeat=2 * C))
    for pattern in patterns:
        drawn = torch.tensor(pattern, dtype=torch.float64).reshape(2, 1, C)

        def fixed(shape: tuple[int, ...], like: Tensor, drawn: Tensor = drawn) -> Tensor:
            return drawn.expand(2, B, C) if shape[0] == 2 else drawn[:, 0].T.expand(B, C, 2)

        monkeypatch.setattr(factors, "signs", fixed)
        (columns,) = terminal_factors(split(loss), leaf, targets, (leaf,), MonteCarlo(2))
        assert columns.shape == (2, B, C)
        total += products(columns) / len(patterns)
    torch.testing.assert_close(total, expected(loss, outputs, targets), rtol=0, atol=1e-12)


def test_signs_are_fair_and_independent() -> None:
    torch.manual_seed(0)
    drawn = factors.signs((4000, 2, 2), torch.zeros((), dtype=torch.float64)).flatten(1)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    covariance = drawn.T @ drawn / len(drawn)
    assert (covariance - torch.eye(4)).abs().max() < 6 / 4000**0.5 and drawn.mean(0).abs().max() < 6 / 4000**0.5


def test_several_outputs() -> None:
    """Any structure of outputs, through a callable: one explicit Hessian over all of them."""
    torch.manual_seed(3)
    first, second, targets = real(B, 2).requires_grad_(), real(B, 1, 2).requires_grad_(), real(B, 2)

    def loss(outputs: Any, targets: Tensor) -> Tensor:
        joined = outputs["a"] + outputs["b"][0][:, 0]
        return (joined - targets).square().sum(1) + outputs["a"].logsumexp(1)

    found = terminal_factors(split(loss), {"a": first, "b": [second]}, targets, (first, second), "ggn")
    joined = torch.cat([part.reshape(part.shape[0], B, -1) for part in found], 2)

    def flat(o: Tensor) -> Tensor:
        return loss({"a": o[:, :2], "b": [o[:, None, 2:]]}, targets).sum()

    whole = hessian(flat)(torch.cat([first, second[:, 0]], 1).detach()).detach()
    blocks = torch.stack([whole[i, :, i] for i in range(B)])
    torch.testing.assert_close(products(joined.detach()), blocks, rtol=0, atol=1e-12)


def test_saturated_samples_are_not_refused() -> None:
    """Rounding leaves negative eigenvalues where every probability is 0 or 1."""

    def own(outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets, reduction="none")

    for dtype in (torch.float32, torch.float64):
        outputs = (50 * torch.eye(3, dtype=dtype) + torch.rand(3, 3, dtype=dtype)).requires_grad_()
        (columns,) = terminal_factors(split(own), outputs, torch.tensor([1, 1, 2]), (outputs,), "ggn")
        assert columns.isfinite().all()


@pytest.mark.parametrize(("loss", "targets"), [
    (nn.CrossEntropyLoss(torch.tensor([1.0, -3.0, 1.0]).double()), torch.tensor([0, 1, 2])),
    (lambda o, t: -(o.square().sum(1)), torch.zeros(3)), (lambda o, t: o.sum(1), torch.zeros(3)),
], ids=["negative-weight", "concave", "linear"])  # fmt: skip
def test_refused_at_the_step(loss: Any, targets: Tensor) -> None:
    leaf = real(B, C).requires_grad_()
    with pytest.raises(CompileError, match=r"not convex in the network's outputs|its Hessian is zero"):
        terminal_factors(split(loss), leaf, targets, (leaf,), "ggn")


def test_refused_at_once() -> None:
    for loss in (nn.L1Loss(), nn.NLLLoss(), nn.KLDivLoss(reduction="batchmean"), nn.MultiMarginLoss()):
        with pytest.raises(CompileError, match="linear in the network's outputs"):
            check_terminal(split(loss), "ggn")
        check_terminal(split(loss), "gradient")
    check_terminal(split(nn.MultiMarginLoss(p=2)), "ggn")


def test_a_loss_of_the_users_own_trains() -> None:
    """Without a formula: through its explicit Hessian, Newton's method on a linear model."""
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    opt = compile_optimizer(model, loss=quartic, curvature="sgd", terminal="ggn", lr=1e6)
    x, y = real(6, 4), real(6, 3)
    losses = [float(opt.step(x, y)) for _ in range(12)]
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(quartic(model(x), y).mean(), model.parameters())])
    assert losses[1] < losses[0] and gradient.norm() < 1e-4
