"""Terminal factors: the loss's Hessian in the network's outputs, ``H_i = S_i S_iᵀ`` (theory: section 2).

With the ordinary gradient as its only column, ``S_i = ∇φ_i`` is the paper's choice (Prop. 5). Here are the others: the
exact Hessian, factored (``"ggn"``, rank = outputs a sample), and a sampled factor of chosen rank, ``S_i E_i / √k`` with
independent signs ``E_i``, so that its expectation is the exact one (:class:`MonteCarlo`).

Three kinds of losses, found by what they are:

* cross-entropy: ``τ (diag(p) - p pᵀ)`` a position, ``S = √τ (diag(√p) - p √pᵀ)``, where ``τ`` is the total weight that
  class weights, smoothing, probabilities and ``ignore_index`` give the position;
* elementwise losses (squared error, logits, Huber …): a diagonal Hessian, by differentiating twice;
* any other: an explicit Hessian a sample, output by output, and its eigenvalues, which must not be negative.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError
from gtddp_compile.losses import Loss, is_kind

_ELEMENTWISE = (
    nn.MSELoss,
    nn.BCEWithLogitsLoss,
    nn.BCELoss,
    nn.SmoothL1Loss,
    nn.HuberLoss,
    nn.PoissonNLLLoss,
    nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
)
_PIECEWISE_LINEAR = (nn.L1Loss, nn.NLLLoss, nn.KLDivLoss, nn.HingeEmbeddingLoss, nn.MultiLabelMarginLoss)
_REMEDY = "Use terminal='gradient', which needs no second derivative"


@dataclass(frozen=True)
class MonteCarlo:
    """A terminal factor of ``rank`` sampled columns, unbiased: ``E[S Sᵀ] = H``; drawn every step by torch's generator.

    Choose it where ``"ggn"`` (as many columns as the network has outputs) costs too much; rank 1 costs about what
    ``"gradient"`` does, whose column vanishes with the loss where this one does not.

    Raises:
        CompileError: the rank is not a positive integer.
    """

    rank: int = 1

    def __post_init__(self) -> None:
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise CompileError(f"MonteCarlo rank {self.rank!r} is not a positive integer", "Give a number of columns")


Terminal = Literal["geometric", "gradient", "ggn"] | MonteCarlo
RANK_ONE = ("geometric", "gradient")
"""Terminal factors along the gradient itself; they differ in its weight (``gtddp_compile.kernels.terminal``)."""


def check_terminal(loss: Loss, terminal: Terminal) -> None:
    """Refuse at once, by name, the losses that have no curvature.

    Raises:
        CompileError: the loss is piecewise linear and ``terminal`` asks for its Hessian.
    """
    module = loss.module
    margin = module is not None and is_kind(module, nn.MultiMarginLoss) and module.p == 1
    if terminal not in RANK_ONE and module is not None and (is_kind(module, *_PIECEWISE_LINEAR) or margin):
        raise CompileError(
            f"the loss {loss.name} is (piecewise) linear in the network's outputs: its Hessian, which"
            f" terminal={terminal!r} asks for, is zero",
            "Use CrossEntropyLoss on the logits, or terminal='gradient'" if is_kind(module, nn.NLLLoss) else _REMEDY,
        )


def terminal_factors(
    loss: Loss, outputs: Any, targets: Any, leaves: tuple[Tensor, ...], terminal: Terminal
) -> tuple[Tensor, ...]:
    """The columns ``S`` of every output: ``(r, B, *shape of the leaf)``.

    Args:
        loss: split by samples.
        outputs: the network's outputs, differentiable functions of ``leaves``.
        targets: of the batch.
        leaves: outputs that players move, ``(B, …)`` each.
        terminal: ``"ggn"`` or :class:`MonteCarlo`.

    Raises:
        CompileError: the Hessian has a negative eigenvalue, or cannot be computed.
    """
    rank = terminal.rank if isinstance(terminal, MonteCarlo) else None
    with torch.enable_grad():
        if loss.module is not None and len(leaves) == 1 and outputs is leaves[0]:
            if is_kind(loss.module, nn.CrossEntropyLoss):
                return (_cross_entropy(loss, outputs.detach(), targets, rank),)
            if is_kind(loss.module, *_ELEMENTWISE):
                return (_elementwise(loss, outputs, targets, rank),)
        return _any(loss, outputs, targets, leaves, rank)


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


def _cross_entropy(loss: Loss, logits: Tensor, targets: Tensor, rank: int | None) -> Tensor:
    """``τ`` is read off the loss, with all its options: ``∂²φ/∂o_0² = τ (1/C - 1/C²)`` at uniform outputs."""
    classes = logits.shape[1]
    if classes == 1:
        return softmax_factor(logits, torch.zeros_like(logits[:, 0]), _drawn(rank, logits))
    uniform = torch.zeros_like(logits).requires_grad_()
    (g,) = torch.autograd.grad(loss.per_sample(uniform, targets).sum(), uniform, create_graph=True)
    (curved,) = torch.autograd.grad(g[:, 0].sum(), uniform)
    total = curved[:, 0] * (classes**2 / (classes - 1))
    refuse_negative(loss, total)
    return softmax_factor(logits, total.clamp_min(0), _drawn(rank, logits))


def _elementwise(loss: Loss, outputs: Tensor, targets: Any, rank: int | None) -> Tensor:
    phi = loss.per_sample(outputs, targets)
    (g,) = torch.autograd.grad(phi.sum(), outputs, create_graph=True)
    (diagonal,) = torch.autograd.grad(g.sum(), outputs, materialize_grads=True, allow_unused=True)
    refuse_negative(loss, diagonal)
    return diagonal_factor(diagonal.clamp_min(0), _drawn(rank, outputs))


def explicit_hessian(loss: Loss, outputs: Any, targets: Any, leaves: tuple[Tensor, ...]) -> Tensor:
    """``∂²φ_i/∂o²``, ``(B, n, n)``, all leaves of a sample side by side.

    Raises:
        CompileError: an operation of the loss has no second derivative.
    """
    phi = loss.per_sample(outputs, targets)
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    try:
        g = _side_by_side(torch.autograd.grad(phi.sum(), leaves, create_graph=True, **options))
        rows = [
            _side_by_side(torch.autograd.grad(g[:, k].sum(), leaves, retain_graph=True, **options)).detach()
            for k in range(g.shape[1] if g.requires_grad else 0)
        ]
    except RuntimeError as error:
        raise CompileError(f"the loss {loss.name} has no second derivative: {error}", _REMEDY) from error
    if not rows:
        raise CompileError(f"the loss {loss.name} is linear in the network's outputs: its Hessian is zero", _REMEDY)
    return torch.stack(rows, 1)


def _any(loss: Loss, outputs: Any, targets: Any, leaves: tuple[Tensor, ...], rank: int | None) -> tuple[Tensor, ...]:
    hessian = explicit_hessian(loss, outputs, targets, leaves)
    values, vectors = torch.linalg.eigh((hessian + hessian.mT) / 2)
    refuse_negative(loss, values)
    factor = vectors * values.clamp_min(0).sqrt().unsqueeze(1)  # (B, n, n), a column an eigenvector
    if rank is not None:
        factor = factor @ signs((*factor.shape[:2], rank), factor) / math.sqrt(rank)
    columns = factor.permute(2, 0, 1)
    pieces = columns.split([leaf[0].numel() for leaf in leaves], 2)
    return tuple(
        piece.reshape(columns.shape[0], *leaf.shape).to(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)
    )


def _side_by_side(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(t.shape[0], -1) for t in tensors], 1)


def _drawn(rank: int | None, like: Tensor) -> Tensor | None:
    return None if rank is None else signs((rank, *like.shape), like)


def refuse_negative(loss: Loss, values: Tensor) -> None:
    """The Hessian's eigenvalues (or what has their signs) must not be negative.

    Rounding is forgiven: relative to the batch's largest, and a few units in the last place of 1, which is what
    differences such as ``p - p²`` leave where every sample is saturated.
    """
    lowest, size = float(values.detach().min()), float(values.detach().abs().max())
    eps = torch.finfo(values.dtype).eps
    if lowest < -(eps**0.75 * size + 32 * eps):
        raise CompileError(
            f"the loss {loss.name} is not convex in the network's outputs here: its Hessian has the eigenvalue"
            f" {lowest:.3g}, so that it has no factor",
            _REMEDY,
        )
