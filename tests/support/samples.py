"""Tensors for the tests of kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gtddp_compile import kernels

Params = tuple[Tensor | None, ...]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """A normal tensor in double precision."""
    generator = torch.Generator().manual_seed(seed + sum(shape) + 31 * len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def layer(
    prefix: str, operands: tuple[Tensor, ...], g: Tensor, params: Params, wants: tuple[bool, ...], **options: Any
) -> kernels.Layer:
    """What the kernels of ``prefix`` are called with."""
    kinds: dict[str, Any] = {"conv": kernels.Geometry, "norm": kernels.Norm, "generic": kernels.Operation}
    return kernels.Layer(operands, g, params, wants, kinds[prefix](**options) if prefix in kinds else None)
