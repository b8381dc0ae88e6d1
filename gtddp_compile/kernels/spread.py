"""Values that every sample gets a copy of."""

from torch import Tensor


def spread(x: Tensor, value: Tensor) -> Tensor:
    """``value`` for each of the samples of ``x``, ``(B, *value.shape)``."""
    return value.expand(x.shape[0], *value.shape)
