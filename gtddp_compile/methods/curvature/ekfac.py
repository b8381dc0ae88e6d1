"""EK-FAC (George et al. 2018): K-FAC's eigenbasis with its own scaling (Table 1, Eq. 55; Corollary 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.kronecker import Rows, kronecker_moment, kronecker_widths
from gtddp_compile.methods.curvature.base import Group, State
from gtddp_compile.methods.curvature.kronecker import BlockKind, Kronecker, split_maps
from gtddp_compile.methods.curvature.numbers import out_of_range


@dataclass(frozen=True)
class EKFAC(Kronecker):
    """``M = (U_A ⊗ U_B) (diag(s) + λ I) (U_A ⊗ U_B)ᵀ / lr`` (Table 1, Eq. 55 of the paper; docs/theory.md#curvatures).

    ``U_A``, ``U_B`` are the eigenbases of K-FAC's factors (see :class:`KFAC` for these and for other layers), ``s =
    E[((U_A ⊗ U_B)ᵀ γ)²]`` the second moments of the per-sample gradients in that basis, ``γ`` weighted as ``V_h`` is.
    At every refresh ``s`` starts again from the products of the eigenvalues, then it is a running average (the
    authors' variant "ra"; ``stat_decay=0``: of the batch alone). With feedback off it is EK-FAC as published
    (Proposition 4).

    Where a factor is rank-deficient (fewer rows than it is wide) the eigenvectors of its null space are arbitrary, and
    until the next refresh rows have components in it. ``s`` is therefore the mean over a null space (eigenvalues up to
    ``n · eps`` of the largest, as torch.linalg.matrix_rank has it): the same in every basis, and the published
    method wherever that is defined. Eigenvalues above that which are equal are left as they come.

    Players that decide together have the eigenbases of the joint factors (Eq. 50). Where they share input and output
    derivative the compiler uses Corollary 7 instead: with ``n`` players ``Q̃_uu = U (λ̃ + γ I) Uᵀ``, ``λ̃ = γ s / (γ +
    (n - 1) s)``, Eq. 24 for two, ``γ`` being the damping. Its steps go up to ``1/γ`` in every direction of large
    curvature, so choose ``damping`` (and ``lr``) with that in mind.

    Do not use it where eigendecompositions are slow (wide layers on a GPU): :class:`KFAC`.

    Args:
        lr, stat_decay, momentum, weight_decay, small, maximize: as :class:`KFAC`.
        damping: ``λ``, added to ``s``.
        refresh: steps between two eigendecompositions.
        stat_every: steps between two updates of the factors' averages; ``s`` is updated every step.
        early: in so many first steps both are made more often, at steps 1, 2, 3, 5, 9, …

    Raises:
        CompileError: an option is out of range.
    """

    small: int = 256

    name = "ekfac"
    shares = True
    rescales = True

    def check(self, options: Group) -> None:
        """Refuse options out of range; no damping at all (directions without curvature would have no bound)."""
        super().check(options)
        if not options["damping"] > 0:
            raise out_of_range("EKFAC", "damping", options["damping"], "a positive number")

    def refreshed(self, kind: BlockKind, state: State, group: Group) -> dict[str, Any]:
        """Eigenbases, and ``s`` from the eigenvalues."""
        values_x, basis_x = torch.linalg.eigh(state["factor_x"])
        values_g, basis_g = torch.linalg.eigh(state["factor_g"])
        found = {"map_x": basis_x, "map_g": basis_g, "null_x": null_space(values_x), "null_g": null_space(values_g)}
        products = values_g.clamp_min(0).unsqueeze(2) * values_x.clamp_min(0).unsqueeze(1)
        return {**found, "moment": even_out(products, found)}

    def moments(self, layers: Sequence[Rows], start: float, state: State, group: Group) -> dict[str, Any]:
        """``s`` after this batch."""
        maps = split_maps(state, kronecker_widths(layers))
        return {"moment": self._moment(kronecker_moment(layers, start, maps), state, group)}

    def observe_coordinates(self, moment: Tensor, state: State, group: Group) -> dict[str, Any]:
        """The same from the batch's own ``E[(α γ̂)²]``."""
        return {**state, "moment": self._moment(moment, state, group)}

    def _moment(self, moment: Tensor, state: State, group: Group) -> Tensor:
        return self._average(state["moment"], even_out(moment, state), state["age"], group)

    def scales(self, kind: BlockKind, state: State, group: Group, players: int) -> tuple[Tensor | float, Tensor | None]:
        """``1 / (s + λ)``; for players of the same rows Corollary 7."""
        damping, moment = group["damping"], state["moment"]
        if kind != "shared":
            return (moment + damping).reciprocal(), None
        whole = damping * (damping + players * moment)
        return (damping + (players - 2) * moment) / whole, moment / whole


def null_space(values: Tensor) -> Tensor:
    """1 where an eigenvalue ``(G, n)``, ascending, is zero up to rounding, else 0."""
    tolerance = values.shape[1] * torch.finfo(values.dtype).eps * values[:, -1:]
    return (values <= tolerance).to(values.dtype)


def even_out(moment: Tensor, state: State) -> Tensor:
    """``s`` ``(G, M, N)`` with its mean over each null space in place of what an arbitrary basis of it says."""
    for axis, key in ((1, "null_g"), (2, "null_x")):
        null = state[key].unsqueeze(3 - axis)
        mean = (moment * null).sum(axis, keepdim=True) / null.sum(axis, keepdim=True).clamp_min(1)
        moment = torch.where(null > 0, mean, moment)
    return moment
