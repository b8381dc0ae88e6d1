"""Terminal factors: the loss's Hessian in the network's outputs, ``H_i = S_i S_iᵀ`` (docs/theory.md#terminals).

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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError
from gtddp_compile.kernels.hessian import (
    clearly_negative,
    cross_entropy_factor,
    eigenvector_factor,
    elementwise_factor,
    sample_hessian,
)
from gtddp_compile.methods.losses import Loss, is_kind

ELEMENTWISE = (
    nn.MSELoss, nn.BCEWithLogitsLoss, nn.BCELoss, nn.SmoothL1Loss, nn.HuberLoss, nn.PoissonNLLLoss, nn.SoftMarginLoss,
    nn.MultiLabelSoftMarginLoss,
)  # fmt: skip
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


FactorKind = Literal["cross_entropy", "elementwise", "explicit"]


@dataclass(frozen=True)
class Geometric:
    """``"geometric"`` with another aim: ``H = ∇φ ∇φᵀ / (κ φ)``, ``κ = aim b / (b + half) + own / b``, b samples.

    The model of a sample's loss is least where it has fallen by ``κ φ``, and ``feedback_clip`` is in units of that. A
    greater κ holds a step back less. Up to 2 the model never promises a negative loss; ``aim=2`` is Gauss-Newton on the
    residual ``√(2φ)``, exact for squared error. ``own`` answers to small batches: of the B² entries of a Gram matrix B
    are of a sample with itself, which in a large batch do not count; where a sample's gradient is ``1 + own`` times as
    much like itself as like another's, ``κ = 1 + own / b`` leaves the batch's own direction as it is in a large batch.

    Do not use a κ above 1 at learning rates that the base method does not bear: nothing else holds the step back
    (docs/robustness.md has the figures).

    Args:
        aim: part of κ for every batch.
        own: part of κ that counts one over the size of the batch, or of the groups of ``coupling``.
        half: size at which the aim is half: few samples say little about the others, and are not to be fitted at once.
        reach: of the joint step: least ratio of ``Γ``'s diagonal to that of ``P_T⁻¹``, each the mean over a group (0:
            none). A loss that is small in itself, a mean over many outputs say, makes the one small in the other's
            measure: every learning rate is then a small one. Where the ratio is less, the loss counts as often as is
            missing, at most as often as a sample's target has numbers, which is the learning rate raised by as much;
            never lowered, and not beside coupled weight decay, which would be left behind.
        deep: layers in a row, with neither a normalisation nor a shortcut between them, from which on the aim falls as
            one over their number (0: never): what all of them change together is further from linear. On a way over
            shortcuts, as one over the root of their number. A compiled program has the aim that comes of it, and
            ``deep`` 0.
        early: in the k-th step κ is ``1 + early / k`` times as great, and the reach ``early / k`` more: the first steps
            have no steps before them to take further, nor a batch that they could forget. Counted with inertia; 0 where
            no parameter group has any.

    Raises:
        CompileError: the aim is not positive, or ``own``, ``half``, ``reach``, ``deep`` or ``early`` is negative.
    """

    aim: float = 1.0
    own: float = 0.0
    half: float = 0.0
    reach: float = 0.0
    deep: float = 0.0
    early: float = 0.0

    def __post_init__(self) -> None:
        for option, value in vars(self).items():
            allowed = value > 0 if option == "aim" else value >= 0
            if isinstance(value, bool) or not allowed or math.isinf(value):
                raise CompileError(f"Geometric has {option}={value!r}", "Give aim > 0, the others >= 0, all finite")


Terminal = Literal["geometric", "gradient", "ggn"] | MonteCarlo | Geometric


def at_depth(terminal: Terminal | None, unbroken: int, depth: int) -> Terminal | None:
    """The same with the aim that it has where so many layers follow each other, without shortcuts and with them."""
    if not isinstance(terminal, Geometric) or not terminal.deep:
        return terminal
    share = min(1.0, terminal.deep / max(1, unbroken), (terminal.deep / max(1, depth)) ** 0.5)
    return replace(terminal, aim=terminal.aim * share, deep=0.0)


def is_rank_one(terminal: Terminal) -> bool:
    """Whether the factor is along the gradient itself, with a weight (``gtddp_compile.kernels.terminal``)."""
    return isinstance(terminal, Geometric) or terminal in ("geometric", "gradient")


def geometric_of(terminal: Terminal) -> Geometric:
    """It, or where it is another one without ``reach`` and ``early``."""
    return terminal if isinstance(terminal, Geometric) else Geometric()


def terminal_weight(terminal: Terminal) -> tuple[str, float, float, float]:
    """What the weight of a sample's gradient is made of: its kind, and the options of :class:`Geometric`."""
    if isinstance(terminal, Geometric):
        return "geometric", terminal.aim, terminal.own, terminal.half
    return ("geometric" if terminal == "geometric" else "gradient"), 1.0, 0.0, 0.0


def check_terminal(loss: Loss, terminal: Terminal) -> None:
    """Refuse at once, by name, the losses that have no curvature."""
    module = loss.module
    margin = module is not None and is_kind(module, nn.MultiMarginLoss) and module.p == 1
    if not is_rank_one(terminal) and module is not None and (is_kind(module, *_PIECEWISE_LINEAR) or margin):
        raise CompileError(
            f"the loss {loss.name} is (piecewise) linear in the network's outputs: its Hessian, which"
            f" terminal={terminal!r} asks for, is zero",
            "Use CrossEntropyLoss on the logits, or terminal='gradient'" if is_kind(module, nn.NLLLoss) else _REMEDY,
        )


def terminal_factors(
    loss: Loss, outputs: Any, targets: Any, leaves: tuple[Tensor, ...], terminal: Terminal
) -> tuple[Tensor, ...]:
    """The columns ``S`` of every output, ``(r, B, *shape of the leaf)``, for ``"ggn"`` or :class:`MonteCarlo`.

    ``leaves``: the outputs that players move, ``(B, …)`` each; ``outputs`` are differentiable functions of them.

    Raises:
        CompileError: the Hessian has a negative eigenvalue, or cannot be computed.
    """
    rank = rank_of(terminal)
    refuse = partial(refuse_negative, loss)
    with torch.enable_grad():
        kind = factor_kind(loss, one_output=len(leaves) == 1 and outputs is leaves[0])
        if kind == "cross_entropy":
            return (cross_entropy_factor(loss.per_sample, refuse, outputs.detach(), targets, rank),)
        if kind == "elementwise":
            return (elementwise_factor(loss.per_sample, refuse, outputs, targets, rank),)
        return eigenvector_factor(explicit_hessian(loss, outputs, targets, leaves), refuse, leaves, rank)


def rank_of(terminal: Terminal) -> int | None:
    """Number of sampled columns; ``None`` for all of them."""
    return terminal.rank if isinstance(terminal, MonteCarlo) else None


def factor_kind(loss: Loss, *, one_output: bool) -> FactorKind:
    """How the loss's Hessian is factored; ``one_output``: the loss takes one tensor, and players move it."""
    if loss.module is not None and one_output:
        if is_kind(loss.module, nn.CrossEntropyLoss):
            return "cross_entropy"
        if is_kind(loss.module, *ELEMENTWISE):
            return "elementwise"
    return "explicit"


def explicit_hessian(loss: Loss, outputs: Any, targets: Any, leaves: tuple[Tensor, ...]) -> Tensor:
    """``∂²φ_i/∂o²``, ``(B, n, n)``, all leaves of a sample side by side.

    Raises:
        CompileError: the loss is linear, or an operation of it has no second derivative.
    """
    try:
        hessian = sample_hessian(loss.per_sample, outputs, targets, leaves)
    except RuntimeError as error:
        raise CompileError(f"the loss {loss.name} has no second derivative: {error}", _REMEDY) from error
    if hessian is None:
        raise CompileError(f"the loss {loss.name} is linear in the network's outputs: its Hessian is zero", _REMEDY)
    return hessian


def refuse_negative(loss: Loss, values: Tensor) -> None:
    """The Hessian's eigenvalues (or what has their signs) must not be negative, but for rounding."""
    lowest = clearly_negative(values)
    if lowest is not None:
        raise CompileError(
            f"the loss {loss.name} is not convex in the network's outputs here: its Hessian has the eigenvalue"
            f" {lowest:.3g}, so that it has no factor",
            _REMEDY,
        )
