"""Metrics of matrices: the Gram matrix of a layer's rows, of ``γ``, and the product, against explicit matrices."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import compile_optimizer, kernels
from gtddp_compile.kernels import Geometry, Layer, Turned

ROWS = (slice(0, 3), slice(3, 5))


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def layer(kind: str, bias: bool) -> tuple[Layer, Any, tuple[Tensor, ...]]:
    """A layer, its ``rows`` kernel and its per-sample gradients by automatic differentiation."""
    weight = (drawn(3, 4) if kind == "linear" else drawn(3, 2, 2, 1)).requires_grad_()
    shift = drawn(3).requires_grad_() if bias else None
    x = drawn(5, 6, 4) if kind == "linear" else drawn(5, 2, 4, 3)
    apply, how = (F.linear, None) if kind == "linear" else (F.conv2d, Geometry((1, 1), (0, 0), (1, 1)))
    h = apply(x, weight, shift)
    g, wanted = drawn(*h.shape), [p for p in (weight, shift) if p is not None]
    each = [torch.autograd.grad((h[i] * g[i]).sum(), wanted, retain_graph=True) for i in range(5)]
    gamma = tuple(map(torch.stack, zip(*each, strict=True)))
    made = Layer((x,), g, (weight.detach(), shift), (True, bias), how)
    return made, kernels.KERNELS[f"{kind}_rows"], gamma


def explicit(inverse: Any, shape: torch.Size) -> Tensor:
    """``M⁻¹`` of one parameter."""
    outputs, inputs = shape[0], shape[1:].numel()
    if not isinstance(inverse, Turned):
        return torch.diag((inverse * torch.ones(shape, dtype=torch.float64)).flatten())
    x = torch.eye(inputs, dtype=torch.float64) if inverse.x is None else inverse.x
    y = torch.eye(outputs, dtype=torch.float64) if inverse.g is None else inverse.g
    basis = torch.kron(y, x)
    return basis @ torch.diag((inverse.scale * torch.ones(outputs, inputs, dtype=torch.float64)).flatten()) @ basis.T


@pytest.mark.parametrize(("kind", "bias"), itertools.product(("linear", "conv"), (True, False)))
@pytest.mark.parametrize("sides", ["xg", "x", "g", ""])
@pytest.mark.parametrize("whole", [True, False])
def test_gram(kind: str, bias: bool, sides: str, whole: bool) -> None:
    torch.manual_seed(0)
    made, rows, gamma = layer(kind, bias)
    scale = drawn(3, 4).square() if whole else 0.7
    weight = Turned(drawn(4, 4) if "x" in sides else None, drawn(3, 3) if "g" in sides else None, scale)
    metric = (weight, *([drawn(3).square() if whole else Turned(None, drawn(3, 3), 0.3)] if bias else []))
    inverses = [explicit(inverse, own.shape[1:]) for inverse, own in zip(metric, gamma, strict=True)]
    flat = [own.flatten(1) for own in gamma]
    whole_gram = torch.stack([a @ m @ a.T for a, m in zip(flat, inverses, strict=True)]).sum(0)
    for found in (kernels.turned_gram(rows, made, metric, ROWS), kernels.joint_gram(gamma, metric, ROWS)):
        for block, row in zip(found, ROWS, strict=True):
            torch.testing.assert_close(block, whole_gram[row, row], rtol=1e-10, atol=1e-10)
    for inverse, own, matrix in zip(metric, gamma, inverses, strict=True):
        times = kernels.inverse_times(inverse, own[0])
        torch.testing.assert_close(times.flatten(), matrix @ own[0].flatten(), rtol=1e-10, atol=1e-10)


def test_a_groups_matrices_can_be_adamws() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3)).double()
    x, y = drawn(8, 4), torch.randint(3, (8,))
    opt = compile_optimizer(model, x, loss=torch.nn.CrossEntropyLoss(), curvature="muon", lr=0.1)
    opt.param_groups[-1]["matrices"] = False
    losses = [float(opt.step(x, y)) for _ in range(5)]
    assert losses[-1] < losses[0]
    first, last = opt.state[model[0].weight], opt.state[model[2].weight]
    assert "grad_avg" in first and "exp_avg_sq" not in first and "exp_avg_sq" in last
