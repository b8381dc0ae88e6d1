"""Factors of a loss's Hessian in the network's outputs, ``H_i = S_i S_iᵀ`` (docs/theory.md#terminals).

All take the loss as a function ``per_sample(outputs, targets) -> φ``, shape (B,), and ``refuse``, which is called with
the eigenvalues (or what has their signs) and raises where one is negative.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PerSample = Callable[[Any, Any], Tensor]
Refuse = Callable[[Tensor], None]


def signs(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Independent ±1, by torch's own generator."""
    return torch.randint(0, 2, shape, device=like.device).to(like.dtype) * 2 - 1


def softmax_factor(logits: Tensor, total: Tensor, drawn: Tensor | None = None) -> Tensor:
    """``S`` of ``τ (diag(p) - p pᵀ)`` along axis 1, a position at a time.

    Args:
        logits: ``(B, C, *positions)``.
        total: ``τ``, ``(B, *positions)``.
        drawn: ``(k, B, C, *positions)``: columns ``S d / √k`` instead of ``S``.

    Returns:
        ``(C · positions, B, C, *positions)``, or ``(k, B, C, *positions)``.
    """
    p = logits.softmax(1)
    root, weight = p.sqrt(), total.sqrt().unsqueeze(1)
    if drawn is not None:
        columns = root * drawn - p * (root * drawn).sum(2, keepdim=True)
        return weight * columns / math.sqrt(drawn.shape[0])
    batch, classes = p.shape[:2]
    p, root, weight = (v.reshape(batch, v.shape[1], -1).mT for v in (p, root, weight))  # positions before classes
    blocks = weight.unsqueeze(-1) * (torch.diag_embed(root) - p.unsqueeze(-1) * root.unsqueeze(-2))
    positions = blocks.shape[1]
    factor = blocks.new_zeros(classes, positions, batch, classes, positions)
    index = torch.arange(positions, device=blocks.device)
    factor[:, index, :, :, index] = blocks.permute(1, 3, 0, 2)
    return factor.reshape(classes * positions, *logits.shape)


def diagonal_factor(diagonal: Tensor, drawn: Tensor | None = None) -> Tensor:
    """``S`` of a diagonal Hessian ``(B, …)``: ``(n, B, …)`` with one entry a column, or ``(k, B, …)`` sampled."""
    root = diagonal.sqrt()
    if drawn is not None:
        return root * drawn / math.sqrt(drawn.shape[0])
    flat = root.flatten(1) if root.dim() > 1 else root.unsqueeze(1)
    return torch.diag_embed(flat).transpose(0, 1).reshape(flat.shape[1], *diagonal.shape)


def cross_entropy_factor(
    per_sample: PerSample, refuse: Refuse, logits: Tensor, targets: Tensor, rank: int | None
) -> Tensor:
    """``S`` of cross-entropy, sampled if there is a rank.

    ``τ`` is read off the loss, with all its options: ``∂²φ/∂o_0² = τ (1/C - 1/C²)`` at uniform outputs.
    """
    classes = logits.shape[1]
    if classes == 1:
        return softmax_factor(logits, torch.zeros_like(logits[:, 0]), drawn_signs(rank, logits))
    uniform = torch.zeros_like(logits).requires_grad_()
    (g,) = torch.autograd.grad(per_sample(uniform, targets).sum(), uniform, create_graph=True)
    (curved,) = torch.autograd.grad(g[:, 0].sum(), uniform)
    total = curved[:, 0] * (classes**2 / (classes - 1))
    refuse(total)
    return softmax_factor(logits, total.clamp_min(0), drawn_signs(rank, logits))


def elementwise_factor(
    per_sample: PerSample, refuse: Refuse, outputs: Tensor, targets: Any, rank: int | None
) -> Tensor:
    """``S`` of a loss that is a sum over elements: its Hessian is diagonal."""
    phi = per_sample(outputs, targets)
    (g,) = torch.autograd.grad(phi.sum(), outputs, create_graph=True)
    (diagonal,) = torch.autograd.grad(g.sum(), outputs, materialize_grads=True, allow_unused=True)
    refuse(diagonal)
    return diagonal_factor(diagonal.clamp_min(0), drawn_signs(rank, outputs))


def sample_hessian(per_sample: PerSample, outputs: Any, targets: Any, leaves: tuple[Tensor, ...]) -> Tensor | None:
    """``∂²φ_i/∂o²``, ``(B, n, n)``, all leaves of a sample side by side; ``None`` if the loss is linear in them."""
    phi = per_sample(outputs, targets)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    g = side_by_side(torch.autograd.grad(phi.sum(), leaves, create_graph=True, **options))
    rows = [
        side_by_side(torch.autograd.grad(g[:, k].sum(), leaves, retain_graph=True, **options)).detach()
        for k in range(g.shape[1] if g.requires_grad else 0)
    ]
    return torch.stack(rows, 1) if rows else None


def eigenvector_factor(
    hessian: Tensor, refuse: Refuse, leaves: tuple[Tensor, ...], rank: int | None
) -> tuple[Tensor, ...]:
    """``S`` of any Hessian ``(B, n, n)``, a column an eigenvector, ``(r, B, *shape of the leaf)`` of every leaf."""
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    refuse(values)
    factor = vectors * values.clamp_min(0).sqrt().unsqueeze(1)  # (B, n, n), a column an eigenvector
    if rank is not None:
        factor = factor @ signs((*factor.shape[:2], rank), factor) / math.sqrt(rank)
    columns = factor.permute(2, 0, 1)
    pieces = columns.split([leaf[0].numel() for leaf in leaves], 2)
    return tuple(
        piece.reshape(columns.shape[0], *leaf.shape).to(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)
    )


def side_by_side(tensors: tuple[Tensor, ...]) -> Tensor:
    """``(B, n)``: every sample's elements of all tensors."""
    return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1)


def drawn_signs(rank: int | None, like: Tensor) -> Tensor | None:
    """Signs for ``rank`` columns; ``None`` where all columns are wanted."""
    return None if rank is None else signs((rank, *like.shape), like)


def clearly_negative(values: Tensor) -> float | None:
    """The lowest of a Hessian's eigenvalues (or of what has their signs) if it is negative beyond rounding.

    Rounding is forgiven: relative to the batch's largest, and a few units in the last place of 1, which is what
    differences such as ``p - p²`` leave where every sample is saturated.
    """
    lowest, size = float(values.detach().min()), float(values.detach().abs().max())
    eps = torch.finfo(values.dtype).eps
    return lowest if lowest < -(eps**0.75 * size + 32 * eps) else None
