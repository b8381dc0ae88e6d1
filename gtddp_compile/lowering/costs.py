"""How a player's Gram matrix is made, chosen at compile time from the traced shapes.

The kernels take their form by the same functions from the shapes they are called with; what is decided here is whether
the per-sample gradients, once built for the Gram matrix, are kept: the weighted gradients of the same step are then one
product of a vector with them, and the layer's input need not be held for the second sweep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from gtddp_compile import kernels
from gtddp_compile.algebra.collapsed import LEVENBERG
from gtddp_compile.graph import ControlGraph
from gtddp_compile.lowering.plan import Plan
from gtddp_compile.lowering.uses import Use, arranged_shape

KEEP = 2.0
"""Per-sample gradients are kept up to so many times the elements of the layer's input and output."""


FRACTION = 0.5
"""``gram="auto"`` makes a layer's Gram matrix exactly where that costs at most this part of the layer's own training
step (forward, gradient of the input, gradient of the weight)."""

LARGEST = 2**24
"""Elements of rows, and of per-sample gradients, up to which a Kronecker metric's coordinates are kept."""

SPARED = 0.1
"""The same where a sketch can take its place, in the joint step: steps to a target do not tell them apart."""

UNFOLDED = 4.0
"""What a multiplication of unfolded patches, sample by sample, costs against one of torch's own convolutions (measured:
benchmarks/tried.py)."""

SKETCHED = 128
"""Columns of a sketched per-sample gradient, at least: fewer than are needed for the steps to a target to be those of
the exact ``Γ`` (docs/performance.md)."""

NEGLIGIBLE = 2.0**20
"""Multiplications of a Gram matrix that nobody would notice: always exact."""


@dataclass(frozen=True)
class GramChoice:
    """Form of a Gram matrix.

    Attributes:
        form: ``"separable"`` (products of input and output Gram matrices), ``"pairs"``, ``"patches"``, ``"pixels"``
            (sums over pairs of positions), ``"per-sample"`` (``γ`` itself), ``"sketch"`` or ``"centre"``.
        kept: whether ``γ`` is kept for the weighted gradients.
        approximate: ``"exact"``, ``"separable"``, ``"sketch"`` or ``"centre"``: which kernels make it.
        columns: signs an input of the sketch; 0: as many as the option says.
    """

    form: str
    kept: bool = False
    approximate: str = "exact"
    columns: int = 0

    def __str__(self) -> str:
        separated = ["metric separated"] if self.approximate == "separable" else []
        return ", ".join([self.form, *(["kept"] if self.kept else []), *separated])


def choose_gram(plan: Plan, use: Use) -> GramChoice:
    """The choice for one use of a player's parameters."""
    if use.rule.prefix == "norm":
        return GramChoice("per-sample", True)
    layer = _layer(plan.graph, use)
    if layer is None:
        return GramChoice("per-sample")
    if use.rule.prefix == "transposed":
        return layer.choice("exact", 0, diagonal=plan.metric == "diagonal", weight=True)
    return layer.choice(plan.gram, plan.columns, diagonal=plan.metric == "diagonal", weight=use.wants[0],
                         sketches=plan.form.name == "joint" and not plan.form.factored)  # fmt: skip


def choose_stacked(plan: Plan, uses: tuple[Use, ...]) -> GramChoice | None:
    """The choice for a weight that linear layers alone use, whose positions are taken together; ``None``: for another.

    A later use may leave out the bias, and may be ``x W``, as where the layer is differentiated backwards.
    """
    layers = [_layer(plan.graph, use) for use in uses]
    first, weights = uses[0], {use.params[0] for use in uses if use.params}
    whole = first.wants[:1] == (True,) and any(first.names == p.parameters for p in plan.graph.player_using[first.op])
    if not whole or len(weights) > 1 or not all(layer is not None and layer.prefix == "linear" for layer in layers):
        return None
    (batch, *_), (outputs, inputs) = (layers[0].output, layers[0].weight) if layers[0] else ((0,), (0, 0))
    positions = sum(layer.positions for layer in layers if layer is not None)
    pairs = plan.metric != "diagonal" and kernels.linear_gram_form(batch, positions, inputs, outputs) == "pairs"
    return GramChoice(f"{'pairs' if pairs else 'per-sample'} over {len(uses)} uses")


def rollout_units(plan: Plan, uses: Iterable[Use]) -> tuple[float, float] | None:
    """Multiplications of a step of both rollouts against a training step's; ``None``: of no layer are they known.

    A training step's are three products a layer: forward, gradient of the input, of the weight. The linear rollout has
    ``Γ`` beside them, and with inertia ``⟨γ_i, v⟩``; the nonlinear one runs every layer again, too.
    """
    base = linear = again = 0.0
    for use in uses:
        layer = _layer(plan.graph, use)
        if layer is not None and use.wants[0]:
            base += 3 * layer.weighted
            linear += 2 * layer.weighted + layer.cost(choose_gram(plan, use)) + plan.inertia * layer.weighted
            again += layer.weighted
    return (linear / base, (linear + again) / base) if base else None


def observes(plan: Plan, use: Use) -> bool:
    """Whether a layer's per-sample gradients, which an exact ``Γ`` under a diagonal metric is made of, give its
    statistics too: where they are cheaper to make than twice the weighted gradient, that is, where they are summed
    over positions.
    """
    layer = _layer(plan.graph, use)
    if layer is None or layer.positions == 1 or not use.rule.pieces or not use.wants[0] or plan.metric != "diagonal":
        return False
    choice = choose_gram(plan, use)
    return not choice.kept and choice.form == "per-sample" and choice.approximate == "exact"


def separates(plan: Plan, use: Use) -> bool:
    """Whether a layer's metric that is diagonal in its own basis (EK-FAC) is separated there."""
    layer = _layer(plan.graph, use)
    if layer is None or plan.gram == "exact" or plan.metric != "rescaled":
        return False
    return layer.choice("auto", plan.columns, diagonal=True, weight=use.wants[0]).approximate == "separable"


def choose_coordinates(plan: Plan, use: Use) -> str:
    """In which form a layer's per-sample gradients are kept where its Kronecker metric is diagonal.

    ``"rows"``, ``"samples"``, ``"dual"`` (:mod:`gtddp_compile.kernels.coordinates`), or ``""`` where they are too
    large, or where nobody reads them twice: without feedback only an update from few rows is cheaper than one from
    the gradient.
    """
    layer = _layer(plan.graph, use)
    form = plan.form.name
    if layer is None or plan.segments is not None or plan.form.factored or form not in ("base", *LEVENBERG):
        return ""
    found = layer.coordinates(bias=any(use.wants[1:]))
    if not use.wants[0] or (form == "base" and (plan.decay or not layer.few)):
        return ""
    if found == "rows" and layer.positions == 1 and form in LEVENBERG and plan.metric == "kronecker":
        return "dual"
    return found


def shares_lines(plan: Plan, use: Use) -> bool:
    """Whether the sum of a convolution's ``x xᵀ`` is made of lines of pixels that its patches share."""
    layer, options = _layer(plan.graph, use), use.options
    if layer is None or layer.prefix != "conv" or layer.folded or layer.groups > 1 or use.layouts:
        return False
    if options["stride"][0] != 1 or options["dilation"][0] != 1 or not use.wants[0] or plan.segments is not None:
        return False
    if not layer.coordinates(bias=any(use.wants[1:])):
        return False
    return kernels.conv_moment_shares(layer.patch, layer.weight[2], layer.output[2])


def _layer(graph: ControlGraph, use: Use) -> _Layer | None:
    """Shapes of a linear layer or convolution."""
    prefix = use.rule.prefix
    shapes = [arranged_shape(graph, use, ref.name) for ref in use.operands if ref.name in graph.ops.position]
    output = arranged_shape(graph, use, use.op)
    weight = graph.ops.parameter_info.get(use.params[0].name) if use.params and use.params[0] is not None else None
    if prefix not in ("linear", "transposed", "conv") or not output or not shapes or not shapes[0] or weight is None:
        return None
    if prefix == "transposed":
        return _Layer("linear", output, shapes[0], tuple(weight.shape), 1)
    folded = prefix == "conv" and len(output) > len(weight.shape)
    return _Layer(prefix, shapes[0], output, tuple(weight.shape), use.options.get("groups", 1), folded)


@dataclass(frozen=True)
class _Layer:
    """Shapes of a linear layer or convolution; costs are multiplications."""

    prefix: str
    x: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[int, ...]
    groups: int
    folded: bool = False

    def choice(self, gram: str, columns: int, *, diagonal: bool, weight: bool, sketches: bool = False) -> GramChoice:
        """The form of the Gram matrix that the option ``gram`` asks for; ``sketches``: of ``"auto"`` too."""
        exact = self._exact(diagonal=diagonal, separated=False, weight=weight)
        if gram == "exact":
            return exact
        separated = self._exact(diagonal=False, separated=diagonal, weight=weight)
        if gram == "auto":
            slow, most = UNFOLDED if self.prefix == "conv" and sketches else 1.0, SPARED if sketches else FRACTION
            cheap = self.gram(exact) <= NEGLIGIBLE or slow * self.gram(exact) <= most * 3 * self.weighted
            if cheap or not sketches or not weight:
                return exact if cheap or self.cost(exact) <= self.cost(separated) else separated
            few = max(4, -(-SKETCHED * self.groups // self.weight[0]))
            if self.sketch(few) < min(slow * self.gram(exact), slow * self.gram(separated)):
                return GramChoice(f"sketch of {few} columns", False, "sketch", columns=few)
            return exact if self.cost(exact) <= self.cost(separated) else separated
        found = separated
        if gram in ("sketch", "coarse") and self.sketch(columns) + self.weighted < self.cost(found):
            found = GramChoice(f"sketch of {columns} columns", False, "sketch")
        if gram == "coarse" and self.overlaps:
            found = GramChoice("kernel's centre for all", False, "centre")
        return exact if gram == "coarse" and self.gram(exact) <= NEGLIGIBLE else found

    def _exact(self, *, diagonal: bool, separated: bool, weight: bool) -> GramChoice:
        """The best form for a metric that does not (``diagonal``) or does separate, by nature or ``separated``."""
        form = self.form(diagonal=diagonal)
        kept = form == "per-sample" and weight and self.fits and not separated
        return GramChoice(form, kept, "separable" if separated else "exact")

    @property
    def overlaps(self) -> bool:
        """Whether a convolution's patches overlap, so that the elements of its kernel see the same pixels."""
        return self.prefix == "conv" and self.positions * math.prod(self.weight[2:]) >= 2 * math.prod(self.x[2:])

    @property
    def positions(self) -> int:
        return math.prod(self.output[1:-1] if self.prefix == "linear" else self.output[2:])

    @property
    def patch(self) -> int:
        return math.prod(self.weight[1:])

    @property
    def fits(self) -> bool:
        """Whether ``γ`` is small enough to keep."""
        return math.prod(self.weight) <= KEEP * (math.prod(self.x) + math.prod(self.output)) / self.output[0]

    def coordinates(self, *, bias: bool) -> str:
        """The cheaper form of coordinates where they, and the rows they are made of, are of bounded size."""
        batch, inputs, outputs = self.output[0], self.patch + bias, self.weight[0] // self.groups
        form = kernels.coordinates_form(batch, self.positions, inputs, outputs)
        kept = batch * self.groups * inputs * outputs if form == "samples" else 0
        rows = batch * self.positions * self.groups * (inputs + outputs)
        return form if max(kept, rows) <= LARGEST else ""

    @property
    def few(self) -> bool:
        """Whether mapping all rows is less than mapping the weight's gradient."""
        rows, outputs = self.output[0] * self.positions, self.weight[0] // self.groups
        return kernels.few_rows(rows, self.patch, outputs)

    @property
    def weighted(self) -> float:
        """The weighted gradient from inputs and output gradients."""
        return math.prod(self.output) * self.patch

    def form(self, *, diagonal: bool) -> str:
        """The exact form, as the kernels take it."""
        batch, outputs = self.output[0], self.weight[0] // self.groups
        if diagonal:
            return "per-sample"
        if self.prefix == "linear":
            form = kernels.linear_gram_form(batch, self.positions, self.patch, outputs)
            form = "separable" if form == "pairs" and self.positions == 1 else form
        else:
            pixels, kernel = math.prod(self.x[2:]), math.prod(self.weight[2:])
            shape = (self.weight[1] * kernel, 1) if self.folded else (self.weight[1], kernel)
            form = kernels.conv_gram_form(batch, self.positions, pixels, *shape, outputs)
        return "per-sample" if form == "materialised" else form

    def gram(self, choice: GramChoice) -> float:
        """The Gram matrix alone; of a diagonal metric without positions, sums over pairs of samples."""
        if self.positions == 1 and choice.form == "per-sample":
            return self.output[0] ** 2 * math.prod(self.weight) / 2
        return self.cost(choice) - (0.0 if choice.kept else self.weighted)

    def cost(self, choice: GramChoice) -> float:
        """The Gram matrix and the weighted gradient."""
        batch, outputs = self.output[0], self.weight[0]
        if choice.approximate in ("sketch", "centre"):
            return self.weighted + self.sketch(choice.columns or 1)
        if choice.form == "per-sample":
            build = self.weighted + batch**2 * math.prod(self.weight)
            return build + (batch * math.prod(self.weight) if choice.kept else self.weighted)
        pairs = (batch * self.positions) ** 2
        inputs = self.x[1] if choice.form == "pixels" else self.patch * self.groups
        return pairs * (inputs + outputs) / 2 + self.weighted

    def sketch(self, columns: int) -> float:
        """Projected inputs, their products with output gradients, and the Gram matrix of those."""
        batch, outputs = self.output[0], self.weight[0]
        projected = batch * self.positions * columns * (self.groups * self.patch + outputs)
        return projected + batch**2 * outputs * columns
