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

    layer = Layer(operands, g, params, wants, how)

    PREFIX_weighted(layer)                  -> tuple of (*shape)
    PREFIX_gram(layer, metric)              -> (B, B)
    PREFIX_gram_diagonal(layer, metric)     -> (B,)
    PREFIX_directional(layer, direction)    -> (B,)
    PREFIX_per_sample(layer)                -> tuple of (B, *shape)

* ``operands``: tuple of tensors, what :meth:`Rule.operands` names, in that order (inputs detached from
  autograd);
* ``g``: gradient of the per-sample losses with respect to the operation's output, the output's shape;
* ``params``: tuple of the operation's parameter tensors in the order of :meth:`Rule.roles`, ``None`` where
  absent (frozen ones are there). Of a layer that is made once and read later only their shapes may be read: the step
  writes parameters in place. The generic rule's is made where it is read;
* ``wants``: tuple of bools aligned with ``params``: which are trained. Results hold the wanted ones only, in
  order;
* ``how``: literals of the operation (stride, padding …), a named tuple of the class :attr:`Rule.how` of
  ``gtddp_compile.kernels``; ``None`` where there are none;
* ``metric`` (``gram``, ``gram_diagonal``): tuple aligned with the wanted ones; each the inverse curvature
  ``M⁻¹`` of that parameter, a float or 0-d tensor (spherical) or a tensor of the parameter's shape
  (diagonal);
* ``direction`` (``directional``): tuple aligned with the wanted ones, tensors of the parameters' shapes.

Where :attr:`Rule.rows` is set there is also ``PREFIX_rows(layer)``: homogeneous inputs ``(B, G, T, n)`` and output
gradients ``(B, G, T, m)``, what Kronecker factors are made of (``kernels/kronecker.py``).

Where :attr:`Rule.subtracts` is set there is also ``PREFIX_subtract(layer, targets, rates)``: ``target -= rate · γᵀ 1``
of every wanted parameter, in place.

Where :attr:`Rule.prepare` is set, ``operands = PREFIX_prepare(operands, how)`` comes first, once a
stage and on the whole batch; all the kernels above take the prepared operands (a normalisation's ``x̂``). Beside it
there is ``PREFIX_gamma``, which is ``PREFIX_per_sample`` of the whole batch from operands that are not prepared.

A rule sees the operation alone (:class:`~gtddp_compile.graph.ops.Op`: function, arguments, shape, where samples lie),
no parameter's shape. A kernel may read it off ``params``; what a shape must forbid is in ``lowering/uses.py``
(``_suits``). ``op.target`` is what the front end recorded: two may record two functions for one layer
(``frontends/canonical.py``). ``op.samples`` that is not ``LEADING`` is brought to the front before a kernel is called,
and what a sample has of a folded axis becomes axis 1, or 2 where :attr:`Rule.channels_first` says so.

``decide.py``, ``costs.py`` and ``operations.py`` tell layers by their prefix: with a new one ``γ`` is made per sample
and not kept, and nothing is lifted from half precision unless its file is in :attr:`Rule.files`.

The batch axis is the leading axis of every operand (prepared ones, where the rule prepares) and of ``g``, and
callers may take some samples of a layer (``kernels.part_of``), so that ``B`` is the size of a group. The generic rule
alone departs from this: ``how.batched`` names the operands with a batch axis, and with ``how.mixes`` operands are never
sliced, only ``g`` is, to rows beginning at ``how.first`` (``weighted`` takes the whole ``g``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref
from gtddp_compile.lowering.layers.binding import bind, roles


class Rule(ABC):
    """Compile-time description of one kind of parametric operation.

    Attributes:
        name: shown by ``program.cost()``.
        prefix: of its kernels, ``gtddp_compile.kernels.PREFIX_weighted`` and so on; the name, unless it says another.
        how: class of ``gtddp_compile.kernels`` that holds the options; ``""``: there are none.
        prepare: whether there is a kernel ``PREFIX_prepare``.
        rows: whether there is a kernel ``PREFIX_rows``: the layer is a sum of outer products ``g xᵀ`` over positions.
        subtracts: whether there is a kernel ``PREFIX_subtract``: the weighted gradient's product can write a parameter.
        files: modules of ``gtddp_compile.kernels`` whose functions read values of the layer or gradients of them.
        channels_first: kinds of operations whose parameters lie along axis 1.
    """

    name: str
    how = ""
    prepare = rows = subtracts = False
    files: tuple[str, ...] = ()
    channels_first: frozenset[str] = frozenset()

    @property
    def prefix(self) -> str:
        """Of its kernels."""
        return self.name

    @abstractmethod
    def handles(self, op: Op, trainable: frozenset[str]) -> bool:
        """Whether this rule is exact for ``op`` when the parameters ``trainable`` are trained."""

    def operands(self, op: Op) -> tuple[Ref | BufferRef, ...]:
        """The tensors besides ``g`` and parameters that the kernels need: ``(x,)``."""
        return ((bind(op) or {})["input"],)

    def roles(self, op: Op) -> tuple[ParamRef | BufferRef | None, ...]:
        """The operation's parameters in the kernels' order, (weight, bias); ``None`` where it has none."""
        return roles(bind(op) or {})

    def options(self, op: Op) -> Mapping[str, Any]:
        """Literals for the kernels, by their names in the class ``how``."""
        return {}
