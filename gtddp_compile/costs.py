"""How a player's Gram matrix is made, chosen at compile time from the traced shapes.

The kernels take their form by the same functions from the shapes they are called with; what is decided here is whether
the per-sample gradients, once built for the Gram matrix, are kept: the weighted gradients of the same step are then one
product of a vector with them, and the layer's input need not be held for the second sweep.
``benchmarks/cost_model.py`` compares the choices with measurements.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gtddp_compile import kernels
from gtddp_compile.graph import ControlGraph
from gtddp_compile.uses import Use

KEEP = 2.0
"""Per-sample gradients are kept up to so many times the elements of the layer's input and output."""


@dataclass(frozen=True)
class GramChoice:
    """Form of a Gram matrix.

    Attributes:
        form: ``"separable"`` (products of input and output Gram matrices), ``"pairs"``, ``"patches"``, ``"pixels"``
            (sums over pairs of positions) or ``"per-sample"`` (``γ`` itself).
        kept: whether ``γ`` is kept for the weighted gradients.
    """

    form: str
    kept: bool

    def __str__(self) -> str:
        return f"{self.form}, kept" if self.kept else self.form


def choose_gram(graph: ControlGraph, use: Use, metric: str) -> GramChoice:
    """The choice for one use of a player's parameters.

    Args:
        graph: with the shapes of the example inputs.
        use: the use.
        metric: the curvature's kind, ``"spherical"`` or ``"diagonal"``.
    """
    prefix = use.rule.prefix
    if prefix == "norm":
        return GramChoice("per-sample", True)
    shapes = [graph.op(ref.name).shape for ref in use.operands if ref.name in graph.ops.position]
    output = graph.op(use.op).shape
    weight = graph.ops.parameter_info.get(use.params[0].name) if use.params and use.params[0] is not None else None
    if prefix not in ("linear", "conv") or not output or not shapes or not shapes[0] or weight is None:
        return GramChoice("per-sample", False)
    x, size = shapes[0], math.prod(weight.shape)
    if prefix == "linear":
        positions = math.prod(output[1:-1])
        form = kernels.linear_gram_form(output[0], positions, x[-1], output[-1])
        form = "separable" if form == "pairs" and positions == 1 else form
    else:
        groups = use.options["groups"]
        positions, pixels = math.prod(output[2:]), math.prod(x[2:])
        kernel = math.prod(weight.shape[2:])
        form = kernels.conv_gram_form(output[0], positions, pixels, weight.shape[1], kernel, output[1] // groups)
    if metric == "diagonal" or form == "materialised":
        held = (math.prod(x) + math.prod(output)) // output[0]
        return GramChoice("per-sample", size <= KEEP * held and use.wants[0])
    return GramChoice(form, False)
