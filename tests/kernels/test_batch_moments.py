"""Batch-norm from moments that are found apart: torch's own values, buffers and derivatives."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels import batch_moments, batch_norm

ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x, "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "a slice": lambda x: torch.cat([x, x], 3)[..., : x.shape[3]], "one axis": lambda x: x.flatten(2),
    "no axis": lambda x: x[:, :, 0, 0],
}  # fmt: skip


def make(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``x``, the gradient of its normalisation, weight and bias."""
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=dtype) for shape in ((5, 3, 4, 2), (5, 3, 4, 2), (3,), (3,)))  # type: ignore[return-value]


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
def test_moments_are_the_batchs(arrange: Callable[[Tensor], Tensor]) -> None:
    x = arrange(make()[0])
    axes = (0, *range(2, x.dim()))
    mean, var = batch_moments(x.requires_grad_())
    assert not mean.requires_grad and not var.requires_grad
    torch.testing.assert_close(mean, x.detach().mean(axes), rtol=0, atol=1e-12)
    torch.testing.assert_close(var, x.detach().var(axes, correction=0), rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_far_from_zero(dtype: torch.dtype) -> None:
    """Two passes: no difference of large squares, and in float32 at least."""
    x = (make(torch.float32)[0] + 1000).to(dtype)
    mean, var = batch_moments(x)
    assert mean.dtype == var.dtype == torch.float32
    exact = x.double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-6, atol=0)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-4, atol=0)


@pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_values_buffers_and_gradients(arrange: Callable[[Tensor], Tensor], affine: bool) -> None:
    x, g, weight, bias = make()
    x, g = arrange(x), arrange(g)
    own = (weight, bias) if affine else (None, None)
    found, expected = [], []
    for moments, results in ((batch_moments(x), found), (None, expected)):
        leaves = [value.detach().requires_grad_() for value in (x, *own) if value is not None]
        params = leaves[1:] if affine else own
        buffers = torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype), torch.tensor(0)
        h = batch_norm(leaves[0], *buffers, *params, training=True, momentum=0.3, moments=moments)
        columns = torch.stack([g, g.cos()])
        pulled = torch.autograd.grad(h, leaves, columns, is_grads_batched=True, retain_graph=True)
        (slope,) = torch.autograd.grad(h.sin().sum(), leaves[0], create_graph=True)
        curved = torch.autograd.grad((slope * g).sum(), leaves)
        results += [h.detach(), *buffers, *pulled, *curved]
    for ours, torchs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=0, atol=1e-10)


def test_forward_mode_and_vmap() -> None:
    x, g, weight, bias = make()

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm(x, None, None, None, weight, bias, training=True, moments=batch_moments(x))

    def torchs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, weight, bias, True)

    values, moved = (x, weight, bias), (g, weight.cos(), bias.sin())
    for one, other in zip(torch.func.jvp(ours, values, moved), torch.func.jvp(torchs, values, moved), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)
    many = torch.stack([x, g])
    found = (torch.func.vmap(f, (0, None, None))(many, weight, bias) for f in (ours, torchs))
    torch.testing.assert_close(*found, rtol=0, atol=1e-10)
