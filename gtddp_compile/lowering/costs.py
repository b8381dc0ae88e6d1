"""What a layer's Gram matrix and step cost, from the traced shapes, and in which exact form it is cheapest.

The kernels take their form by the same functions from the shapes they are called with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from gtddp_compile import kernels
from gtddp_compile.graph import ControlGraph
from gtddp_compile.lowering.plan import GramChoice
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

WORTH = 96.0
"""Multiplications of an exact ``Γ`` for every output of a convolution up to which its per-sample gradients are kept in
the joint step: a sketch, ``⟨γ_i, v⟩`` and the weighted gradient are convolutions of their own. Timed on layers of 1 to
64 channels, 64 to 1,024 positions and 8 to 128 samples; beyond it the two are even or the sketch wins."""

UNFOLDED = 4.0
"""What a multiplication of unfolded patches, sample by sample, costs against one of torch's own convolutions."""

SKETCHED = 128
"""Columns of a sketched per-sample gradient, at least: fewer than are needed for the steps to a target to be those of
the exact ``Γ`` (docs/performance.md)."""

NEGLIGIBLE = 2.0**20
"""Multiplications of a Gram matrix that nobody would notice: always exact."""


def shape_of(graph: ControlGraph, use: Use) -> LayerShape | None:
    """Shapes of a linear layer or convolution."""
    prefix = use.rule.prefix
    shapes = [arranged_shape(graph, use, ref.name) for ref in use.operands if ref.name in graph.ops.position]
    output = arranged_shape(graph, use, use.op)
    weight = graph.ops.parameter_info.get(use.params[0].name) if use.params and use.params[0] is not None else None
    if prefix not in ("linear", "transposed", "conv") or not output or not shapes or not shapes[0] or weight is None:
        return None
    if prefix == "transposed":
        return LayerShape("linear", output, shapes[0], tuple(weight.shape), 1)
    folded = prefix == "conv" and len(output) > len(weight.shape)
    return LayerShape(prefix, shapes[0], output, tuple(weight.shape), use.options.get("groups", 1), folded)


@dataclass(frozen=True)
class LayerShape:
    """Shapes of a linear layer or convolution, and what can be computed of it at what cost (multiplications)."""

    prefix: str
    x: tuple[int, ...]
    output: tuple[int, ...]
    weight: tuple[int, ...]
    groups: int
    folded: bool = False

    def choice(self, gram: str, columns: int, *, diagonal: bool, weight: bool, sketches: bool = False) -> GramChoice:
        """The form of the Gram matrix that the option ``gram`` asks for; ``sketches``: of ``"auto"`` too."""
        exact = self._exact(diagonal=diagonal, separated=False, weight=weight)
        keeps = sketches and self.prefix == "conv" and self.output[0] * self.patch <= WORTH * self.positions
        if gram == "exact" or (gram == "auto" and exact.kept and keeps):
            return exact
        separated = self._exact(diagonal=False, separated=diagonal, weight=weight)
        if gram == "auto":
            slow, most = UNFOLDED if self.prefix == "conv" and sketches else 1.0, SPARED if sketches else FRACTION
            cheap = self.gram(exact) <= NEGLIGIBLE or slow * self.gram(exact) <= most * 3 * self.weighted
            if cheap or not sketches or not weight:
                return exact if cheap or self.cost(exact) <= self.cost(separated) else separated
            few = max(4, -(-SKETCHED * self.groups // self.weight[0]))
            if self.sketch(few) < min(slow * self.gram(exact), slow * self.gram(separated)):
                return GramChoice(self._sketched(few), False, "sketch", columns=few)
            return exact if self.cost(exact) <= self.cost(separated) else separated
        if gram == "sketch" and self.sketch(columns) + self.weighted < self.cost(separated):
            return GramChoice(self._sketched(columns), False, "sketch")
        return separated

    def _sketched(self, columns: int) -> str:
        """What a sample's gradient is reduced to: so many random columns in the place of inputs, of every output."""
        return f"sketch of {columns} columns x {self.weight[0] // self.groups} outputs"

    def _exact(self, *, diagonal: bool, separated: bool, weight: bool) -> GramChoice:
        """The best form for a metric that does not (``diagonal``) or does separate, by nature or ``separated``."""
        form = self.form(diagonal=diagonal)
        kept = form == "per-sample" and weight and self.fits and not separated
        return GramChoice(form, kept, "separable" if separated else "exact")

    @property
    def positions(self) -> int:
        """How often a sample uses the weight."""
        return math.prod(self.output[1:-1] if self.prefix == "linear" else self.output[2:])

    @property
    def rowwise(self) -> bool:
        """Whether a sample has one row of it whatever the batch: positions are an axis, even where there is one."""
        return self.prefix == "linear" and len(self.output) == 2

    @property
    def patch(self) -> int:
        """Inputs of an output."""
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
    def few_inputs(self) -> bool:
        """Whether mapping all pixels' channels is less than mapping those of the weight's gradient."""
        outputs, channels, *kernel = self.weight
        pixels = math.prod(self.x) // (channels * self.groups)
        return kernels.few_pixels(pixels, outputs * math.prod(kernel) // self.groups)

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
            form = "separable" if form == "pairs" and self.rowwise else form
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
        if choice.approximate == "sketch":
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
