"""Batch-norm in normal form: its buffers are arguments, advanced in place where they are given."""

import torch.nn.functional as F
from torch import Tensor


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool = False,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """``h = (x - mean) / √(var + eps) ∘ w + b`` over axis 1, as ``torch.nn.BatchNorm1d`` to ``3d`` compute it.

    In training mode the batch's own statistics normalise and the buffers that are not ``None`` advance by
    ``momentum`` (``None``: cumulative average); the second forward sweep passes ``None``. In evaluation mode the
    running statistics normalise, or the batch's own where there are none.
    """
    if not training:
        own = running_mean is None
        return F.batch_norm(x, running_mean, running_var, weight, bias, own, 0.0, eps)
    factor = 0.0 if momentum is None else momentum
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None:
            factor = float(num_batches_tracked.reciprocal())
    mean = None if running_mean is None else running_mean.detach()
    var = None if running_var is None else running_var.detach()
    return F.batch_norm(x, mean, var, weight, bias, True, factor, eps)
