"""``backward`` of the user's own Functions: a compiled step calls it with gradients that are not the mean loss's.

Those of torch's own functions are linear in the gradient, so gradients of each sample's loss, in another scale and
summed later, give what one pass over the mean gives. A user's may clip the gradient, divide it by its norm or add one
of its own (a term of the loss that no one sees): what it makes of a sample's gradient is then another thing altogether.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils import _pytree as pytree

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.traced import module_paths, users_line

CLOSE = 2.0**-6
"""What a gradient may be off, in its largest entry: some are rounded to half precision on the way."""
APART = {torch.float64: 2.0**20, torch.float32: 2.0**20}
"""How much greater and smaller gradients are tried, without rounding; others by 64."""


@contextmanager
def linear_backwards(model: nn.Module | None) -> Iterator[None]:
    """Refuse, at its end, a Function applied in the block whose ``backward`` is not linear in the gradient.

    ``model``: whose modules are named; ``None``: what runs is a loss.
    """
    own = vars(Function)["apply"]
    found: list[CompileError] = []
    trying: list[type] = []

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        call = own.__get__(None, cls)
        if trying or found or not torch.is_grad_enabled() or not _is_plain(args):
            return call(*args, **kwargs)
        before = kernels.random_state()
        result = call(*args, **kwargs)
        after = kernels.random_state()
        trying.append(cls)
        try:
            if not _is_linear(call, args, before):
                found.append(_refusal(cls, None if model is None else stack[-1], users_line()))
        except Exception as error:  # the user's own code, which may raise anything
            warnings.warn(
                f"whether the backward of {cls.__name__} is linear in the gradient, as a compiled step needs it, "
                f"cannot be tried: {type(error).__name__}: {error}",
                stacklevel=2,
            )
        finally:
            trying.clear()
            kernels.restore_random_state(after)
        return result

    with nullcontext([""]) if model is None else module_paths(model) as stack:
        Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
        try:
            yield
        finally:
            Function.apply = own  # type: ignore[method-assign]
    if found:
        raise found[0]


def _refusal(cls: type[Function], module: str | None, source: str) -> CompileError:
    return CompileError(
        "the backward of this Function is not linear in the gradient that it is given (it clips or normalises it, or "
        "adds a gradient of its own): a compiled step calls it with gradients of each sample's loss, not of the mean, "
        "and would make another step of them than torch.optim",
        "Write the term that it stands for into the loss, clip by max_grad_norm=..., or make backward linear in the "
        "gradient",
        module=module,
        operation=cls.__name__,
        source=source or None,
    )


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def _is_plain(args: tuple[Any, ...]) -> bool:
    """Whether it can be called on copies: it is given no function, which would use what it has around it."""
    leaves = pytree.tree_leaves(args)
    return any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves) and not any(map(callable, leaves))


def _is_linear(call: Callable[..., Any], args: tuple[Any, ...], state: list[Tensor]) -> bool:
    """Whether the gradients of the arguments are homogeneous and additive in those of the results, at these values."""

    def result() -> tuple[list[Tensor], list[Tensor]]:
        kernels.restore_random_state(state)
        leaves = [leaf.detach().requires_grad_(leaf.requires_grad) for leaf in _tensors(args)]
        copies = iter(leaves)
        given = pytree.tree_map(lambda leaf: next(copies) if isinstance(leaf, Tensor) else leaf, args)
        found = [value for value in _tensors(call(*given)) if value.requires_grad]
        return [leaf for leaf in leaves if leaf.requires_grad], found

    def pulled(a: float, b: float) -> list[Tensor]:
        """Gradients of the arguments, of ``a`` times some of the results' and ``b`` times others; by a graph of its
        own, which backward may take to pieces.
        """
        leaves, values = result()
        cotangents = [a * _drawn(value, 0) + b * _drawn(value, 1) for value in values]
        return list(torch.autograd.grad(values, leaves, cotangents, materialize_grads=True))

    first, second = pulled(1, 0), pulled(0, 1)
    far = APART.get(first[0].dtype, 2.0**6)
    return all(
        _close(found, a * one + b * two)
        for a, b in ((1, 1), (2, 0), (far, 0), (1 / far, 0))
        for found, one, two in zip(pulled(a, b), first, second, strict=True)
    )


def _drawn(value: Tensor, seed: int) -> Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(value.shape, generator=source, dtype=torch.float64).to(value.device, value.dtype)


def _close(found: Tensor, expected: Tensor) -> bool:
    """Up to rounding; what is not finite tells nothing."""
    if not found.numel() or not bool((found.isfinite() & expected.isfinite()).all()):
        return True
    size = max(float(found.abs().max()), float(expected.abs().max()))
    return float((found - expected).abs().max()) <= CLOSE * size
