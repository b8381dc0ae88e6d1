"""Out-of-place twins of in-place operations that have none in torch."""

from typing import Any

import torch
from torch import Tensor


def setitem(x: Tensor, index: Any, value: Any) -> Tensor:
    """What ``x`` is after ``x[index] = value``."""
    result = x.clone()
    result[index] = value
    return result


def copy_like_first(x: Tensor, value: Tensor, non_blocking: bool = False) -> Tensor:
    """What ``x`` is after ``x.copy_(value)``."""
    return torch.empty_like(x).copy_(value)


def zero_like_first(x: Tensor) -> Tensor:
    """What ``x`` is after ``x.zero_()``."""
    return torch.zeros_like(x)


def fill_like_first(x: Tensor, value: Any) -> Tensor:
    """What ``x`` is after ``x.fill_(value)``."""
    return torch.full_like(x, value) if not isinstance(value, Tensor) else torch.empty_like(x).copy_(value)


def bernoulli_like_first(x: Tensor, p: Any = 0.5, *, generator: Any = None) -> Tensor:
    """What ``x`` is after ``x.bernoulli_(p)``."""
    return torch.empty_like(x).bernoulli_(p, generator=generator)


def uniform_like_first(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """What ``x`` is after ``x.uniform_(…)``."""
    return torch.empty_like(x).uniform_(*args, **options)


def normal_like_first(x: Tensor, *args: Any, **options: Any) -> Tensor:
    """What ``x`` is after ``x.normal_(…)``."""
    return torch.empty_like(x).normal_(*args, **options)
