"""What the compiler must know about a parametric operation: its per-sample parameter gradients, in four forms.

Write ``γ`` (``B × m``) for the per-sample gradients of one operation's parameters, ``γ_i = (∂h_i/∂u)ᵀ g_i``, where ``h``
is the operation's output and ``g = ∂φ/∂h`` its per-sample back-propagated gradient. A rule names four kernels:

========================  =======================================================  =======================
``PREFIX_weighted``       ``γᵀ 1`` (``g`` already carries the weights ``w``)        one tensor a parameter
``PREFIX_gram``           ``γ M⁻¹ γᵀ`` for spherical or diagonal ``M``               ``(B, B)``
``PREFIX_gram_diagonal``  its diagonal alone                                        ``(B,)``
``PREFIX_directional``    ``⟨γ_i, v⟩`` for a change ``v`` of the parameters          ``(B,)``
``PREFIX_per_sample``     ``γ`` itself                                              ``(B, *shape)`` each
========================  =======================================================  =======================

Kernels are pure functions of tensors in ``gtddp_compile.kernels`` (one file a layer kind) that use torch alone, so that
an exported program can carry their text with it. Every kernel is called as
``kernel(operands, g, …, params, wants, **options)``:

* ``operands``: tuple of tensors, what :meth:`Rule.operands` names, in that order (inputs detached from autograd);
* ``g``: gradient of the per-sample losses with respect to the operation's output, the output's shape;
* ``params``: tuple of the operation's parameter tensors in the order of :meth:`Rule.roles`, ``None`` where absent;
* ``wants``: tuple of bools aligned with ``params``: which are trained. Results hold the wanted ones only, in order;
* ``metric`` (``gram``, ``gram_diagonal``): tuple aligned with the wanted ones; each the inverse curvature ``M⁻¹`` of that
  parameter, a float or 0-d tensor (spherical) or a tensor of the parameter's shape (diagonal);
* ``direction`` (``directional``): tuple aligned with the wanted ones, tensors of the parameters' shapes;
* ``options``: literals of the operation (stride, padding …), printed into the generated code.

The batch axis is the leading axis of every operand and of ``g``.
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
