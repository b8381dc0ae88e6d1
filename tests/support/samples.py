"""Tensors for the tests of kernels."""

from __future__ import annotations

import torch
from torch import Tensor

Params = tuple[Tensor | None, ...]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """A normal tensor in double precision."""
    generator = torch.Generator().manual_seed(seed + sum(shape) + 31 * len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)
