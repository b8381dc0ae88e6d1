"""What the compiler must know about a parametric operation: its per-sample parameter gradients, five ways.

Write ``γ`` (``B × m``) for the per-sample gradients of one operation's parameters, ``γ_i = (∂h_i/∂u)ᵀ g_i``,
where ``h`` is the operation's output and ``g = ∂φ/∂h`` its per-sample back-propagated gradient. A rule names
five kernels:

========================  =======================================================  =======================
``PREFIX_weighted``       ``γᵀ 1`` (``g`` already carries the weights ``w``)        one tensor a parameter
``PREFIX_gram``           ``γ M⁻¹ γᵀ`` for spherical or diagonal ``M``               ``(B, B)``
``PREFIX_gram_diagonal``  its diagonal alone                                        ``(B,)``
``PREFIX_directional``    ``⟨γ_i, v⟩`` for a change ``v`` of the parameters          ``(B,)``
``PREFIX_per_sample``     ``γ`` itself                                              ``(B, *shape)`` each
========================  =======================================================  =======================

Kernels are pure functions of tensors in ``gtddp_compile.kernels`` (one file a layer kind) that use torch
alone, so that an exported program can carry their text with it. They are called, in this precise order, as::

    PREFIX_weighted(operands, g, params, wants, **options)                  -> tuple of (*shape)
    PREFIX_gram(operands, g, params, wants, metric, **options)              -> (B, B)
    PREFIX_gram_diagonal(operands, g, params, wants, metric, **options)     -> (B,)
    PREFIX_directional(operands, g, params, wants, direction, **options)    -> (B,)
    PREFIX_per_sample(operands, g, params, wants, **options)                -> tuple of (B, *shape)

* ``operands``: tuple of tensors, what :meth:`Rule.operands` names, in that order (inputs detached from
  autograd);
* ``g``: gradient of the per-sample losses with respect to the operation's output, the output's shape;
* ``params``: tuple of the operation's parameter tensors in the order of :meth:`Rule.roles`, ``None`` where
  absent (frozen ones are there);
* ``wants``: tuple of bools aligned with ``params``: which are trained. Results hold the wanted ones only, in
  order;
* ``metric`` (``gram``, ``gram_diagonal``): tuple aligned with the wanted ones; each the inverse curvature
  ``M⁻¹`` of that parameter, a float or 0-d tensor (spherical) or a tensor of the parameter's shape
  (diagonal);
* ``direction`` (``directional``): tuple aligned with the wanted ones, tensors of the parameters' shapes;
* ``options``: literals of the operation (stride, padding …), printed into the generated code.

Where :attr:`Rule.rows` is set there is also ``PREFIX_rows(operands, g, params, wants, **options)``: homogeneous inputs
``(B, G, T, n)`` and output gradients ``(B, G, T, m)``, what Kronecker factors are made of (``kernels/kronecker.py``).

Where :attr:`Rule.subtracts` is set there is also ``PREFIX_subtract(operands, g, targets, wants, rates, **options)``:
``target -= rate · γᵀ 1`` of every wanted parameter, in place.

Where :attr:`Rule.pieces` is set there is also ``PREFIX_pieces(operands, g, params, wants, **options)``, an iterator of
``(index, part, gamma)``: ``γ`` ``(B, rows, …)`` of the rows ``part`` of the wanted parameter ``index``, to be
overwritten by the caller if it likes.

Where :attr:`Rule.prepare` is set, ``operands = PREFIX_prepare(operands, **options)`` comes first, once a
stage and on the whole batch; all the kernels above take the prepared operands (a normalisation's ``x̂``). Beside it
there is ``PREFIX_gamma``, which is ``PREFIX_per_sample`` of the whole batch from operands that are not prepared.

The batch axis is the leading axis of every operand (prepared ones, where the rule prepares) and of ``g``, and
callers may slice them all alike before a call, so that ``B`` is the size of a group. The generic rule alone
departs from this: its option ``batched`` names the operands with a batch axis, and with its option ``mixes``
operands are never sliced, only ``g`` is, to rows beginning at ``first=`` (``weighted`` takes the whole
``g``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref


class Rule(Protocol):
    """Compile-time description of one kind of parametric operation."""

    name: str
    """Shown by ``program.cost()``."""

    prefix: str
    """Kernel functions are ``gtddp_compile.kernels.PREFIX_weighted`` and so on."""

    prepare: bool
    """Whether there is a kernel ``PREFIX_prepare``."""

    rows: bool
    """Whether there is a kernel ``PREFIX_rows``: the layer is a sum of outer products ``g xᵀ`` over positions."""

    subtracts: bool
    """Whether there is a kernel ``PREFIX_subtract``: the weighted gradient's product can write the parameter."""

    pieces: bool
    """Whether there is a kernel ``PREFIX_pieces``: per-sample gradients a piece at a time."""

    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """Whether this rule is exact for ``op`` when the parameters ``trainable`` are trained."""
        ...

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """The tensors besides ``g`` and parameters that the kernels need."""
        ...

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """The operation's parameters in the kernels' order (weight, bias); ``None`` where it has none."""
        ...

    def options(self, op: Op) -> Mapping[str, Any]:
        """Literal keyword arguments for the kernels."""
        ...
