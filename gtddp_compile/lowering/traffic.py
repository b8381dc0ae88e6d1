"""What a program over several ranks sends, on paper: elements of every collective, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

from gtddp_compile.graph import Player
from gtddp_compile.lowering.plan import LayerPlan, Plan
from gtddp_compile.lowering.uses import Use, arranged_shape


class Sent(NamedTuple):
    """A kind of collective in a step: how often, and how many elements a rank hands in, all calls together.

    ``per_step``: 1 if at every step; 0: when the curvature takes the batch into its averages.
    """

    what: str
    collective: Literal["all_reduce", "all_gather", "gather"]
    calls: int
    elements: int
    per_step: int = 1


def gram_way(plan: Plan) -> Literal["rows", "blocks"]:
    """Which way to Γ of all samples moves less, by what a rank sends and receives with ring algorithms.

    ``"rows"``: an all-gather, ``(R - 1) b E`` elements; ``"blocks"``: a gather, ``b E``, and an all-reduce of Γ,
    ``2 B² (R - 1) / R``; a sample has E elements of rows, a rank b of the B samples.
    """
    own = plan.graph.ops.batch or 1
    rows = own * sum(row_elements(plan, layer) for layer in plan.layers.values())
    total, ranks = own * plan.ranks, plan.ranks
    return "rows" if (ranks - 1) * rows <= rows + 2 * total**2 * (ranks - 1) / ranks else "blocks"


def row_elements(plan: Plan, layer: LayerPlan) -> int:
    """Elements a sample of what Γ of a player is made of: its rows, their coordinates, or ``γ``."""
    use, chosen, sizes = layer.single, layer.gram, plan.graph.ops.parameter_info
    trained = sum(math.prod(sizes[name].shape) for name in layer.player.parameters)
    if layer.coordinates == "samples":
        return trained
    if layer.coordinates:
        assert use is not None
        return _row_elements(plan, use)
    if chosen.uses:
        return sum(_value_elements(plan, one) for one in layer.uses)
    if chosen.kept or use is None or layer.block.kind == "exact":
        return trained
    if chosen.approximate == "sketch" and layer.block.kind == "channels":
        outputs = sizes[layer.player.parameters[0]].shape[0]
        return outputs * (chosen.columns or plan.columns) + outputs * (len(layer.player.parameters) - 1)
    return _value_elements(plan, use)


def _row_elements(plan: Plan, use: Use) -> int:
    """Homogeneous inputs and output gradients at every position."""
    weight = plan.graph.ops.parameter_info[use.names[0]].shape
    output = arranged_shape(plan.graph, use, use.op) or ()
    positions = math.prod(output[1:]) // weight[0]
    return positions * (math.prod(weight[1:]) + len(use.names) - 1 + weight[0])


def _value_elements(plan: Plan, use: Use) -> int:
    """The operands and the gradient of the output."""
    names = [ref.name for ref in use.operands if ref.name in plan.graph.ops.position]
    shapes = [arranged_shape(plan.graph, use, name) for name in (*(names[:1] if use.rule.prepare else names), use.op)]
    return sum(math.prod(shape[1:]) for shape in shapes if shape)


def traffic(plan: Plan, samples: int, *, statistics: bool) -> Iterator[Sent]:
    """Every collective of a step of a rank with so many samples, in program order.

    Args:
        plan: of the program.
        samples: of the rank.
        statistics: whether the curvature reads the gradient (``needs_statistics``).
    """
    layers, joint = plan.layers.values(), plan.form.name == "joint"
    players = [layer.player for layer in layers]
    yield Sent("losses", "all_gather", 1, 4)
    full = plan.gathers and joint
    if full:
        yield Sent("vectors over samples", "all_gather", 2, 2 * samples)
    first = [player for player in players if plan.layers[player.name].block.kind == "parameters"]
    if statistics and joint and plan.metric == "diagonal":
        yield Sent("Q_u", "all_reduce", len(first), _parameters(plan, first))
    yield from _factors(plan)
    if full:
        rows = samples * sum(row_elements(plan, layer) for layer in layers)
        blocks = gram_way(plan) == "blocks"
        yield Sent("rows", "gather" if blocks else "all_gather", len({id(o.block) for o in layers}), rows)
        if blocks:
            yield Sent("Gamma", "all_reduce", 1, (plan.ranks * samples) ** 2)
    if joint:
        yield Sent("agreement", "all_reduce", 1, 1)
    yield Sent("update", "all_reduce", len({id(o.block) for o in layers}), _parameters(plan, players))


def _parameters(plan: Plan, players: list[Player]) -> int:
    sizes = plan.graph.ops.parameter_info
    return sum(math.prod(sizes[name].shape) for player in players for name in player.parameters)


def _factors(plan: Plan) -> Iterator[Sent]:
    """Factors of Kronecker-factored blocks, both sides."""
    return iter(())
