"""The loss as one number a sample, ``φ`` with ``J = (1/B) Σ φ_i`` or ``J = Σ φ_i`` (docs/theory.md#value-function)."""

import torch
from torch import Tensor


def sample_means(elements: Tensor) -> Tensor:
    """``φ``, ``(B,)``: the mean over all axes but the batch."""
    return elements.flatten(1).mean(1) if elements.dim() > 1 else elements


def sample_sums(elements: Tensor) -> Tensor:
    """``φ``, ``(B,)``: the sum over all axes but the batch."""
    return elements.flatten(1).sum(1) if elements.dim() > 1 else elements


def class_mean_scale(outputs: Tensor, targets: Tensor, weight: Tensor | None, ignore_index: int) -> Tensor | float:
    """``B`` over what cross-entropy's mean divides by: the weights of the targets that count.

    Label smoothing divides by the same (aten: cross_entropy_loss_label_smoothing), probabilities by the
    number of positions, whatever the weights (aten: cross_entropy_loss_prob_target).
    """
    batch = outputs.shape[0]
    if targets.shape == outputs.shape:
        return batch * outputs.shape[1] / outputs.numel()
    counts = torch.ne(targets, ignore_index)
    if weight is None:
        return counts.sum().to(outputs.dtype).reciprocal() * batch
    chosen = weight[targets.masked_fill(~counts, 0).long()]
    return torch.where(counts, chosen, 0.0).sum().reciprocal() * batch


def least_cross_entropy(parts: Tensor, dim: int) -> Tensor:
    """The least of ``-Σ_c q_c log p_c`` over probabilities ``p``: at ``p`` in proportion to ``q``."""
    whole = parts.sum(dim)
    found: Tensor = torch.special.xlogy(whole, whole) - torch.special.xlogy(parts, parts).sum(dim)
    return found


def smoothed_least(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, ignore_index: int
) -> Tensor:
    """The least of cross-entropy with smoothed classes, ``(B, …)``, of which there is one a class."""
    weights = outputs.new_ones(outputs.shape[1]) if weight is None else weight.to(outputs.dtype)
    others = weights * (smoothing / len(weights))
    own, entropies = others + (1.0 - smoothing) * weights, torch.special.xlogy(others, others)
    whole = others.sum() - others + own
    of_class = torch.special.xlogy(whole, whole) - torch.special.xlogy(own, own) - (entropies.sum() - entropies)
    counts = torch.ne(targets, ignore_index)
    return torch.where(counts, of_class[targets.masked_fill(~counts, 0).long()], 0.0)


def poisson_excess(rates: Tensor, targets: Tensor, eps: float | None) -> Tensor:
    """What a Poisson distribution's loss is above its least, ``y (e^d - 1 - d)`` with ``d = log(rate / y)``.

    As a difference of two losses nothing would be left of it where counts are large. ``eps``: of rates; ``None``: they
    are given by their logarithms.
    """
    logarithms = rates if eps is None else (rates + eps).log()
    apart = logarithms - targets.log()
    return torch.where(targets == 0, logarithms.exp(), targets * (apart.expm1() - apart))


OPEN_ENDED = 0.15
"""Of losses that may be negative, as the logarithm of a density: a lower one than the least of a batch may be in reach
or not, and a step that asks for much drives a variance to nothing (docs/research.md#losses-that-may-be-negative)."""


def terminal(
    phi: Tensor, reduction: str, kind: str, aim: float = 1.0, own: float = 0.0, half: float = 0.0,
    group: int | None = None,
) -> tuple[Tensor, Tensor, float]:  # fmt: skip
    """Ones and the aim, ``(B,)`` each, and ``α_T``: 1/B for a mean loss, 1 for a sum.

    ``V_xx = α_T ∇φ ∇φᵀ / aim`` (``V_x V_xᵀ`` in the paper's own recursions): the quadratic model of a sample's loss is
    least where it has fallen by the aim. For ``"gradient"`` (Proposition 5) that is 1, whatever the loss; for
    ``"geometric"`` it is the loss itself: the second-order expansion of a loss whose logarithm is linear in the
    outputs, which cross-entropy tends to where a sample is nearly fitted; or it is ``aim b / (b + half) + own / b``
    times the loss in groups of b samples (``None``: all of them). A loss of zero counts as 1. In a group with a
    negative one nothing is known of how far losses can fall, and ``OPEN_ENDED`` of a sample's distance from the least
    of them counts as its loss (of a sample alone, 1). Losses below 10⁻⁴ of the mean are held there, so that fitted
    samples do not make the value function singular, and what is negative by less is zero, rounded; not with an aim of
    2, Gauss-Newton on ``√(2φ)``, which is exact for every residual.
    """
    dtype = phi.dtype if phi.dtype in (torch.float32, torch.float64) else torch.float32
    ones = torch.ones(phi.shape[0], dtype=dtype, device=phi.device)
    start = 1.0 / phi.shape[0] if reduction == "mean" else 1.0
    if kind == "gradient":
        return ones, ones, start
    values = phi.detach().to(dtype)
    together = min(group or phi.shape[0], phi.shape[0])
    parts = values.split(together)
    least = values.min() if len(parts) == 1 else torch.cat([part.min().expand(len(part)) for part in parts])
    return ones, terminal_aims(values, values.abs().mean(), least, (aim, own, half), together), start


def terminal_aims(
    values: Tensor, mean: Tensor, least: Tensor, weight: tuple[float, float, float], together: int
) -> Tensor:
    """The aims of :func:`terminal`, ``(B,)``, by ``φ``, the batch's mean of ``|φ|`` (0-d) and ``(aim, own, half)``.

    ``least``: of the losses in a sample's group, ``(B,)`` or 0-d. ``together``: samples in a group.
    """
    aim, own, half = weight
    share = torch.finfo(values.dtype).eps ** 2 if weight == (2.0, 0.0, 0.0) else 1e-4
    floor = mean.mul(share).clamp_min_(torch.finfo(values.dtype).tiny)
    instead = OPEN_ENDED * (values - least) if together > 1 else torch.ones_like(values)
    aims = torch.where(least < -floor, instead, torch.threshold(values, 0.0, 1.0)).clamp_min_(floor)
    return aims if weight == (1.0, 0.0, 0.0) else aims * (aim * together / (together + half) + own / together)
