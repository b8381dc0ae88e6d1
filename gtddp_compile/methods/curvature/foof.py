"""FOOF (Benzing 2022): the input factor of K-FAC alone. Not in the paper; the default of ``compile_optimizer``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.bundle import Joined, Layer
from gtddp_compile.kernels.channels import channel_factor, channel_filters, channel_pixels, channel_signs
from gtddp_compile.kernels.kronecker import Rows, inputs_apart, kronecker_factors, rows_together
from gtddp_compile.methods.curvature.base import Group, State
from gtddp_compile.methods.curvature.kfac import inverse, inverse_and_root, inverse_root
from gtddp_compile.methods.curvature.kronecker import BlockKind, Kronecker, renew
from gtddp_compile.methods.curvature.numbers import Scalar


@dataclass(frozen=True)
class FOOF(Kronecker):
    """``M = ((1 - ρ) A + (ρ + λ) ā I) ⊗ I / lr + ν I``: ``A = E[x xᵀ]`` of a layer's inputs, ``ā`` its mean eigenvalue.

    The curvature of a step measured by how far it moves every layer's outputs: K-FAC's input factor (homogeneous inputs
    summed over positions, running averages), without its gradient factor. Cheaper than :class:`KFAC`: no gradient
    statistics and one inverse a layer. With feedback off, no decay and no shrinkage it is the published method, ``δW =
    -lr G (A + λ ā I)⁻¹``.

    ``A`` is estimated, from few rows at first, and directions that they have not shown would have the greatest steps.
    ``ρ = s r / (s r + N)`` draws it to a multiple of the identity, the less the more rows N the average is of; ``r =
    (tr A)² / tr A²`` is its effective rank, 1 where inputs are much alike, the width where they have nothing in common,
    as words in a text (after Chen et al. 2010).

    A convolution's ``A`` is the covariance of its input channels at a pixel, for every element of the kernel
    (spatially uncorrelated: Grosse and Martens 2016): steps to a target are those of whole patches
    (docs/robustness.md), at a hundredth of the price. A linear layer at many positions of a sample (tokens) is a
    convolution of one-element kernels: its ``A`` is of the inputs at a position, the bias apart.

    Linear layers whose outputs are added up decide as the one layer that they are, of the inputs side by side (Theorem
    3 with ``B = I``); others have nothing to do with each other. Parameters that are no layer's weight (normalisations,
    embeddings, bare ones) have the input 1 at the P positions of a sample at which they are used: ``M = P (1 + λ) I /
    lr``.

    Do not use it where layers' outputs differ by orders of magnitude in how much the loss depends on them (very deep
    networks without normalisation): :class:`KFAC`.

    Args:
        lr: learning rate ``η``. In the joint step it hardly matters, as the aim bounds the step; without feedback it
            does.
        damping: ``λ``, relative to the mean eigenvalue.
        shrinkage: ``s``; 0: none.
        stat_decay: weight of the past in the running average of ``A``.
        refresh: steps between two inversions.
        stat_every: steps between two updates of the average.
        early: in so many first steps both are made more often, at steps 1, 2, 3, 5, …
        widest: inputs of a linear layer up to which ``A`` is one matrix; a wider layer's is block-diagonal, in as many
            equal blocks as are needed. An inversion takes the cube of the width. Blocks are no wider than the layer
            has outputs either, from 128 outputs on, and at many positions from 128 inputs on.
        momentum: as torch.optim.SGD's, of the preconditioned gradient; not beside ``inertia``.
        weight_decay: coupled decay ``ν u``, part of the gradient, whose own curvature ``ν I`` is part of ``M``: a
            step takes off no more than a parameter is, however small ``A``.
        maximize: not available: negate the loss.

    Raises:
        CompileError: an option is out of range.
    """

    lr: Scalar = 3.0
    damping: float = 0.1
    shrinkage: float = 3.0
    early: int = 5
    widest: int = 1024

    name = "foof"
    nonnegative = (*Kronecker.nonnegative, "shrinkage")
    inputs_alone = True
    later = ("shrinkage",)

    def observe_uniform(self, state: State, positions: float) -> dict[str, Any]:
        """Step count of a parameter without rows, and the positions at which a sample uses it."""
        return {**self._stepped(state), "positions": positions}

    def divisor(self, state: State, group: Group) -> Any:
        """``P (1 + λ)``, and ``η ν`` of a decay ``ν``."""
        return state["positions"] * (1.0 + group["damping"]) + group["lr"] * group["weight_decay"]

    def observe_channels(
        self, layer: Layer, positions: float, states: Sequence[State], group: Group,
        sketch: tuple[int, int] | None = None, blocks: int = 1, joined: Joined | None = None,
    ) -> list[dict[str, Any]]:  # fmt: skip
        """States of a layer's parameters after its channels' covariance.

        Args:
            layer: its inputs; of its weight the shape is read.
            positions: of the output, in a sample.
            states: of its parameters, the weight's first.
            group: their options.
            sketch: columns and seed of the random filters that ``Γ`` is made by; ``None``: it is made by others.
            blocks: of a linear layer's inputs.
            joined: ``layer`` has a part of the batch, and the covariance is of all of it.
        """
        found = [{**self._stepped(state), "positions": positions} for state in states]
        weight, groups = layer.params[0], blocks if layer.how is None else layer.how.groups
        assert weight is not None  # its metric is asked for
        width = weight.shape[1] // (blocks if layer.how is None else 1)

        def factors(old: State | None, keep: float) -> dict[str, Tensor]:
            before, pixels = None if old is None else old["factor_x"], channel_pixels(layer, blocks)
            found = channel_factor(pixels, positions, before, keep, joined)
            rows = pixels.shape[2]
            if joined is not None:
                rows = rows // len(layer.g) * joined.samples_all
            return _with_doubt(found, rank_of(found, whole=True), rows, old, keep)

        due = self._running(found[0], group, {"factor_x": (groups, width, width)}, factors)
        if due or ("map_x" if sketch is None else "filters") not in found[0]:  # another program may have had the other
            shape, factor = tuple(weight.shape[1:]), found[0]["factor_x"]
            of = None if sketch is None else channel_signs(factor, shape, *sketch)
            made = self.refreshed("channels", found[0], group, of)
            if sketch is not None:
                made["filters"] = channel_filters(made.pop("map_x"), shape)
            renew(found[0], made)
        return found

    def factor_keys(self) -> tuple[str, ...]:
        """``A`` alone, and of every block ``1 / N`` and ``r / N``."""
        return ("factor_x", "spread", "doubt")

    def factors(
        self, layers: Sequence[Rows], start: float, old: State | None, keep: float, biased: Sequence[bool],
        *, apart: bool = False,
    ) -> dict[str, Tensor]:  # fmt: skip
        """The running ``A``; the input of a bias, a 1, says nothing about how much alike the others are."""
        (found,) = kronecker_factors(layers, start, (None if old is None else old["factor_x"],), keep)
        rank = rank_of(found, inputs_apart(found, layers, biased, blocks=not apart), whole=not apart)
        return _with_doubt(found, rank, rows_together(layers), old, keep)

    def refreshed(self, kind: BlockKind, state: State, group: Group, of: Tensor | None = None) -> dict[str, Any]:
        """``X Xᵀ = (A + (λ ā + η ν) I)⁻¹``, or of a ``"dual"`` block the inverse itself; ``Y = I`` is not kept.

        ``of``: columns, of a ``"channels"`` block; then ``X`` times them is in its place.
        """
        x, share = state["factor_x"], group["shrinkage"] * state["doubt"]
        share, mean = share / (1.0 + share), _mean_eigenvalues(x)
        x = x * (1.0 - share).view(-1, 1, 1) if group["shrinkage"] else x
        damping = (group["damping"] + share) * mean + group["lr"] * group["weight_decay"]
        found: dict[str, Any] = {}
        if kind == "dual":
            found["inverse_x"], failed = inverse(x, damping)
        elif kind == "channels":
            found["inverse_x"], found["map_x"], failed = inverse_and_root(x, damping, of)
        else:
            found["map_x"], failed = inverse_root(x, damping)
        return {**found, "fallbacks": state.get("fallbacks", 0) + failed}


def rank_of(factor: Tensor, inputs: Tensor | None = None, *, whole: bool) -> Tensor:
    """``(tr A)² / tr A²`` of every block ``(G,)``, of some inputs ``(G, N)``.

    ``whole``: they are one layer's, and have its rank.
    """
    own, least = factor.diagonal(dim1=1, dim2=2), torch.finfo(factor.dtype).tiny
    sizes = (own if inputs is None else own * inputs).sum(1, keepdim=True)
    sizes = sizes.sum().expand_as(sizes) if whole else sizes
    unit = sizes.clamp_min(least).rsqrt().expand_as(own)  # squares of what comes in may be more than a float32 holds
    unit = unit if inputs is None else unit * inputs
    square = (factor * unit.unsqueeze(1) * unit.unsqueeze(2)).square().sum((1, 2))
    square = square.sum().expand_as(square) if whole else square
    most = own.numel() if whole else own.shape[1]  # more is of rounding alone
    return torch.where(square > 0, 1.0 / square, 0.0).clamp(max=most)


def _with_doubt(factor: Tensor, rank: Tensor, rows: int, old: State | None, keep: float) -> dict[str, Tensor]:
    """The state of a factor that so many rows went into.

    An average with weights ``w`` of means over n rows each is worth ``N = 1 / Σ w² / n`` rows.
    """
    fresh = factor.new_full((len(factor),), 1.0 / rows)
    spread = fresh if old is None else keep**2 * old["spread"] + (1.0 - keep) ** 2 * fresh
    return {"factor_x": factor, "spread": spread, "doubt": rank * spread}


def _mean_eigenvalues(factor: Tensor) -> Tensor:
    """``ā`` of every block. Where nothing has come in, as behind dead units, it says nothing: the layer's, or 1."""
    own, info = factor.diagonal(dim1=1, dim2=2).mean(1), torch.finfo(factor.dtype)
    whole = own.mean()
    whole = torch.where(whole > info.tiny / info.eps, whole, 1.0)
    return torch.where(own > info.eps**2 * whole, own, whole)
