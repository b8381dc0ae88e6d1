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


def best_classes(outputs: Tensor, shares: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Logits at which cross-entropy with probabilities as targets is least, ``(B, C, …)``.

    The loss is ``-Σ_c q_c log p_c`` with ``q`` the target smoothed, times the classes' weights: least at ``p`` in
    proportion to ``q``.
    """
    share = shares.to(outputs.dtype) * (1.0 - smoothing) + smoothing / outputs.shape[1]
    if weight is not None:
        share = share * weight.to(outputs.dtype).reshape(-1, *(1 for _ in outputs.shape[2:]))
    return _logarithm(share)


def smoothed_least(
    outputs: Tensor, targets: Tensor, weight: Tensor | None, smoothing: float, ignore_index: int
) -> Tensor:
    """The least of cross-entropy with smoothed classes, ``(B, …)``: by class, ``Σq log Σq - Σ_c q_c log q_c``."""
    w = outputs.new_ones(outputs.shape[1]) if weight is None else weight.to(outputs.dtype)
    others = w * (smoothing / len(w))
    own = others + (1.0 - smoothing) * w
    rest, whole = torch.special.xlogy(others, others), others.sum() - others + own
    by_class = torch.special.xlogy(whole, whole) - torch.special.xlogy(own, own) - (rest.sum() - rest)
    counts = torch.ne(targets, ignore_index)
    return torch.where(counts, by_class[targets.masked_fill(~counts, 0).long()], 0.0)


def best_logits(targets: Tensor, pos_weight: Tensor | None) -> Tensor:
    """Logits at which binary cross-entropy is least."""
    share = targets.clamp(0.0, 1.0)
    return _logarithm(share if pos_weight is None else share * pos_weight) - _logarithm(1.0 - share)


def best_shares(targets: Tensor) -> Tensor:
    """Probabilities at which it is."""
    return targets.clamp(0.0, 1.0)


def best_rates(targets: Tensor, log_input: bool) -> Tensor:
    """Rates, or their logarithms, at which a Poisson distribution's loss is least."""
    return _logarithm(targets) if log_input else targets.clamp_min(0.0)


def _logarithm(share: Tensor) -> Tensor:
    """Of 0 what is as good as minus infinity, and can be computed with."""
    return share.clamp_min(0.0).log().clamp_min(-80.0)


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
