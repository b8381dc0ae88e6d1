"""How every player's layer is computed: the one place where it is decided, from shapes, curvature and options.

The exact form of a Gram matrix follows from the shapes (``costs``); what is decided here beside it is whether
per-sample gradients, once built, are kept for the step, what statistics are made of, and how the step is taken.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from gtddp_compile import kernels
from gtddp_compile.algebra.collapsed import COUPLED, LEVENBERG
from gtddp_compile.graph import Player, grouped
from gtddp_compile.lowering.costs import LayerShape, shape_of
from gtddp_compile.lowering.plan import GramChoice, LayerPlan, MetricBlock, Plan
from gtddp_compile.lowering.uses import Use, describe_use

METRICS = ("spherical", "diagonal", "turned", "turned diagonal")
"""Curvatures whose Gram matrices are made player by player from parameters' own metrics."""

TOGETHER = 2**23
"""Multiplications of a layer's product, batch by inputs by outputs, up to which it is computed with those alike
(docs/performance.md#layers-alike): of larger ones the copies cost what the calls did.
"""

SAMPLES_TOGETHER = 256
"""Largest batch of it: every layer's matrices over samples are there at once."""


def plan_layers(plan: Plan) -> dict[str, LayerPlan]:
    """The layer of every player, by name."""
    graph = plan.graph
    values = (graph.value[c.value] for stage in plan.stages for c in stage.contracts)
    watched = frozenset(value.control for value in values)
    blocks = {player.name: block for stage in plan.stages for block in stage.blocks for player in block.players}
    found = {player.name: _layer(plan, player, blocks[player.name], player.name in watched) for player in graph.players}
    return _with_those_alike(plan, found)


def _with_those_alike(plan: Plan, layers: dict[str, LayerPlan]) -> dict[str, LayerPlan]:
    """The joint step's small layers of one shape, computed together: nobody needs one's ``Γ`` before another's."""
    waits = plan.decay or plan.ranks > 1 or plan.gram == "nystrom" or plan.max_grad_norm is not None
    if plan.form.name != "joint" or plan.form.factored or plan.segments is not None or waits:
        return layers
    keys = {name: _shape_key(plan, layer) for name, layer in reversed(layers.items())}
    for group in grouped([name for name, key in keys.items() if key], lambda name: keys[name]).values():
        if len(group) > 1:
            layers |= {name: replace(layers[name], alike=tuple(group)) for name in group}
    return layers


def _shape_key(plan: Plan, layer: LayerPlan) -> Hashable:
    """Equal for layers that are computed together; ``None`` of one that is computed alone."""
    use, infos = layer.single, plan.graph.ops.parameter_info
    shape = shape_of(plan.graph, use) if use is not None else None
    if use is None or shape is None or layer.kind != "dual" or layer.block.blocks > 1:
        return None
    if use.rule.prefix != "linear" or use.layouts or use.function is not None or layer.watched:
        return None
    if shape.weighted > TOGETHER or shape.output[0] > SAMPLES_TOGETHER:
        return None
    return tuple((infos[name].shape, infos[name].dtype) for name in use.names), use.wants


def _layer(plan: Plan, player: Player, block: MetricBlock, watched: bool) -> LayerPlan:
    graph, form = plan.graph, plan.form
    uses = tuple(describe_use(graph, player, graph.op(use)) for use in player.uses)
    found = LayerPlan(player, block, uses, GramChoice("per-sample gradients, uses added"), watched=watched)
    use = found.single
    if use is None or form.name == "base":
        shared = use is not None and _lines(plan, block, use, shape_of(graph, use))
        coordinates = "" if use is None or block.blocks > 1 else _coordinates(plan, block, use)
        none = GramChoice("none") if form.name == "base" else _stacked(plan, found) or found.gram
        return replace(found, gram=none, lines=shared, coordinates=coordinates, in_place=_in_place(plan, found))
    shape = shape_of(graph, use)
    gram = _gram(plan, block, use, shape)
    kept = gram.kept and plan.segments is None and not form.factored and form.name in LEVENBERG
    kept = kept and (plan.metric in METRICS or block.kind in ("uniform", "channels"))
    found = replace(
        found, gram=replace(gram, kept=kept), coordinates=_coordinates(plan, block, use),
        lines=_lines(plan, block, use, shape),
    )  # fmt: skip
    separated = form.name in COUPLED and not form.factored and plan.metric == "diagonal" and use.wants[0] and not kept
    if separated and gram.approximate != "exact":
        return replace(found, groups=int(use.options.get("groups", 1)))
    return replace(found, in_place=_in_place(plan, found), mapped=_mapped(plan, found, shape))


def _mapped(plan: Plan, layer: LayerPlan, shape: LayerShape | None) -> bool:
    """Whether the metric maps the inputs: they are few, and nobody reads ``δu`` or adds a decay to the gradient."""
    if layer.block.kind != "channels" or plan.decay or layer.watched or layer.gram.kept:
        return False
    return shape is not None and shape.few_inputs


def _in_place(plan: Plan, layer: LayerPlan) -> bool:
    """Whether the update is folded into the layer's own product: nobody reads ``δu``, and ``M`` is spherical."""
    own = layer.block.kind == "parameters" and plan.metric == "spherical" and len(layer.uses) == 1
    return own and layer.uses[0].rule.subtracts and not layer.watched and not layer.gram.kept


def _gram(plan: Plan, block: MetricBlock, use: Use, shape: LayerShape | None) -> GramChoice:
    """How ``Γ`` of a layer with one use is made."""
    form = plan.form
    if form.name in ("substituted", "printed"):
        return GramChoice("a block a sample" if form.factored else "diagonal")
    if form.factored:
        return GramChoice("kernel, columns as samples")
    if plan.gram == "nystrom":
        linear = use.rule.prefix in ("linear", "transposed") and use.wants[0] and plan.metric == "spherical"
        return GramChoice(f"{plan.columns} columns", uses=int(linear))
    if use.rule.prefix == "norm":
        return GramChoice("per-sample", True)
    if shape is None:
        return GramChoice("per-sample")
    diagonal, weight = plan.metric == "diagonal", use.wants[0]
    if use.rule.prefix == "transposed":
        return shape.choice("exact", 0, diagonal=diagonal, weight=weight)
    if plan.turned:
        return _turned(plan, use, shape)
    sketches = form.name == "joint" and not block.of_players  # whose rows are made anyway
    gram = shape.choice(plan.gram, plan.columns, diagonal=diagonal, weight=weight, sketches=sketches)
    if plan.metric == "rescaled" and plan.gram != "exact":  # diagonal in its own basis, and separated there
        return replace(gram, approximate=shape.choice("auto", plan.columns, diagonal=True, weight=weight).approximate)
    return gram


def _turned(plan: Plan, use: Use, shape: LayerShape) -> GramChoice:
    """Of a weight whose metric is diagonal in turned coordinates: its rows are turned, or ``γ`` where that is kept."""
    exact = shape.choice("exact", 0, diagonal=False, weight=use.wants[0])
    if not use.rule.rows or not use.wants[0] or shape.groups > 1 or (shape.prefix == "conv" and exact.kept):
        return GramChoice("per-sample", exact.kept)
    if plan.metric == "turned" or plan.gram == "exact":
        return GramChoice("turned rows")
    found = shape.choice("auto", plan.columns, diagonal=True, weight=True)
    return GramChoice("turned rows", approximate=found.approximate)


def _stacked(plan: Plan, layer: LayerPlan) -> GramChoice | None:
    """How ``Γ`` of a weight is made that linear layers alone use: the positions of all uses are those of one layer.

    A later use may leave out the bias, and may be ``x W``, as where the layer is differentiated backwards.
    """
    first, shapes = layer.uses[0], [shape_of(plan.graph, use) for use in layer.uses]
    found = [shape for shape in shapes if shape is not None and shape.prefix == "linear"]
    same = len({use.params[0] for use in layer.uses if use.params}) == 1 and first.names == layer.player.parameters
    if len(found) < len(layer.uses) or not same or not first.wants[0] or plan.form.factored:
        return None
    if plan.form.name not in COUPLED or len(layer.uses) == 1 or plan.turned:
        return None
    outputs, inputs = found[0].weight
    positions = sum(shape.positions for shape in found)
    if plan.gram == "nystrom":
        return GramChoice(f"{plan.columns} columns", uses=len(layer.uses)) if plan.metric == "spherical" else None
    form = kernels.linear_gram_form(found[0].output[0], positions, inputs, outputs)
    return GramChoice("pairs" if form == "pairs" and plan.metric != "diagonal" else "per-sample", uses=len(layer.uses))


def _coordinates(plan: Plan, block: MetricBlock, use: Use) -> str:
    """In which form a layer's rows are kept where its Kronecker metric is diagonal.

    ``"rows"``, ``"samples"``, ``"dual"``, or ``""`` where they are too large, or where nobody reads them twice:
    without feedback only an update from few rows is cheaper than one from the gradient.
    """
    shape, form = shape_of(plan.graph, use), plan.form.name
    alone = block.kind == "kronecker" and len(block.players) == 1 and shape is not None
    if not alone or plan.segments is not None or plan.form.factored or form not in ("base", *LEVENBERG):
        return ""
    assert shape is not None
    if not use.wants[0] or (form == "base" and (plan.decay or not shape.few)):
        return ""
    found = shape.coordinates(bias=any(use.wants[1:]))
    if found == "rows" and shape.rowwise and form in LEVENBERG and plan.metric == "kronecker":
        return "rows" if plan.gathers else "dual"  # half as much to send: Γ of "rows" is of the coordinates alone
    return found


def _lines(plan: Plan, block: MetricBlock, use: Use, shape: LayerShape | None) -> bool:
    """Whether the sum of a convolution's ``x xᵀ`` is made of lines of pixels that its patches share."""
    alone = block.kind == "kronecker" and len(block.players) == 1
    if not alone or shape is None or shape.prefix != "conv" or shape.folded or shape.groups > 1 or use.layouts:
        return False
    if plan.metric == "rescaled" and plan.form.name != "base" and not _coordinates(plan, block, use):
        return False  # second moments in the eigenbasis need the patches themselves
    strided = use.options["stride"][0] != 1 or use.options["dilation"][0] != 1
    if strided or not use.wants[0] or plan.segments is not None or not shape.coordinates(bias=any(use.wants[1:])):
        return False
    return kernels.conv_moment_shares(shape.patch, shape.weight[2], shape.output[2])


def rollout_units(plan: Plan) -> tuple[float, float] | None:
    """Multiplications of a step of both rollouts against a training step's; ``None``: of no layer are they known.

    A training step's are three products a layer: forward, gradient of the input, of the weight. The linear rollout has
    ``Γ`` beside them, and with inertia ``⟨γ_i, v⟩``; the nonlinear one runs every layer again, too.
    """
    base = linear = again = 0.0
    for layer in plan.layers.values():
        for use in layer.uses:
            shape = shape_of(plan.graph, use)
            if shape is not None and use.wants[0]:
                base += 3 * shape.weighted
                linear += 2 * shape.weighted + shape.cost(layer.gram) + plan.inertia * shape.weighted
                again += shape.weighted
    return (linear / base, (linear + again) / base) if base else None
