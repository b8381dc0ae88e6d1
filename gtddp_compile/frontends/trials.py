"""Other inputs than the example's: one sample of them changed, or another number of samples.

A changed sample looks like the others, since a model may refuse what does not: words that its tables have, numbers near
its own, and last such a small change that every decision on values stays what it was.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.graph import OpGraph

REPEATS, COPIES = 2, 3
"""How often a sample is changed, and of how many samples one is made if there is no other."""


class _Failed:
    """The value of an operation that a changed input does not let through, and of all that read it."""


FAILED = _Failed()


def is_stopped(values: Iterable[Any]) -> bool:
    """Whether one of the inputs has not been let through on the way to an operation's values."""
    return any(value is FAILED for value in values)


@dataclass(frozen=True)
class Trial:
    """The example inputs, and variants of them in which one sample each is another.

    Attributes:
        batch: how many samples.
        inputs: the example inputs.
        variants: the same with one sample changed.
        changed: which, in each variant.
        inside: the inputs are left alone, and what a table holds for their words is changed a little instead, so that
            every decision on values (which expert serves a token) stays what it was.
    """

    batch: int
    inputs: tuple[Any, ...]
    variants: tuple[tuple[Any, ...], ...]
    changed: tuple[int, ...]
    inside: bool = False


def trials(graph: OpGraph, inputs: tuple[Any, ...], batch: int) -> Iterator[Trial]:
    """What to try, in order: words are changed boldly, then only to what other samples have, then not at all."""
    if batch == 1 and graph.frontend != "fx":
        return
    count = batch if batch > 1 else COPIES
    pairs = [(sample, seed) for sample in (0, count - 1) for seed in range(REPEATS)]
    changed = tuple(sample for sample, _ in pairs)
    for bold in (True, False):
        base = inputs if batch > 1 else tuple(several(value, bold=bold) for value in inputs)
        variants = [tuple(other(value, sample, count, seed, bold=bold) for value in base) for sample, seed in pairs]
        yield Trial(count, base, tuple(variants), changed)
    if batch > 1:
        variants = [tuple(nudged(value, sample, count, seed) for value in inputs) for sample, seed in pairs]
        yield Trial(count, inputs, tuple(variants), changed, inside=True)


def several(value: Any, *, bold: bool) -> Any:
    """An input of one sample as one of several, all different."""
    if not _has_samples(value, 1):
        return value
    return torch.cat([value, *(like(value[0], value, seed, bold=bold)[None] for seed in range(1, COPIES))])


def some(value: Any, batch: int, count: int) -> Any:
    """``count`` samples of an input, repeated if there are fewer."""
    if not _has_samples(value, batch):
        return value
    return value[torch.arange(count, device=value.device) % batch]


def other(value: Any, sample: int, batch: int, seed: int, *, bold: bool) -> Any:
    """The input with one sample replaced: by another of the batch, then by ones that look like them."""
    if not _has_samples(value, batch):
        return value
    changed, own = value.detach().clone(), value.detach()[sample]
    changed[sample] = value.detach()[batch - 1 - sample]
    if seed or torch.equal(changed[sample], own):
        changed[sample] = like(own, value.detach(), 1 + seed, bold=bold)
    return changed


def like(own: Tensor, value: Tensor, seed: int, *, bold: bool) -> Tensor:
    """Another sample, such as the input could hold: a little beside it, or of words that the input has."""
    source = torch.Generator().manual_seed(seed)
    if own.is_floating_point() or own.is_complex():
        noise = torch.rand(own.shape, generator=source, dtype=torch.float64)
        return own + (0.5 + noise).to(own.device, own.dtype)
    if own.dtype == torch.bool:
        return ~own
    picked = torch.randint(value.numel(), own.shape, generator=source)
    found = value.flatten()[picked.to(value.device)]
    if torch.equal(found, own):
        found = own + (1 if int(value.min()) == 0 else -1) * int(bold)
    return found


def nudged(value: Any, sample: int, batch: int, seed: int) -> Any:
    """A value with one sample moved a little, so that what is decided on it stays as it was; whole numbers as they are.

    The fourth root of what rounding is: far above that, and far below what tells two samples apart.
    """
    if not _has_samples(value, batch) or not value.is_floating_point():
        return value
    source = torch.Generator().manual_seed(seed)
    noise = torch.rand(value.shape[1:], generator=source, dtype=torch.float64).to(value.device, value.dtype)
    size = torch.finfo(value.dtype).eps ** 0.25 * float(value.detach().abs().nan_to_num(0, 0, 0).max())
    changed = value.detach().clone()
    changed[sample] += size * (0.5 + noise)
    return changed


def _has_samples(value: Any, batch: int) -> bool:
    """Whether an input has ``batch`` samples, and something of each."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == batch and value.numel() > 0
