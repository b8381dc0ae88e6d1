"""What a program over several ranks sends, on paper: elements of every collective, from shapes alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

from gtddp_compile.lowering.plan import MetricBlock, Plan
from gtddp_compile.lowering.uses import Use, arranged_shape
from gtddp_compile.methods.curvature import Kronecker
from gtddp_compile.methods.setting import Setting


class Sent(NamedTuple):
    """A kind of collective in a step: how often, and how many elements a rank hands in, all calls together.

    ``every_step``: not only where a curvature takes the batch into its averages (option ``stat_every``).
    """

    what: str
    collective: Literal["all_reduce", "all_gather", "gather", "broadcast"]
    calls: int
    elements: int
    every_step: bool = True

    def moved(self, ranks: int) -> float:
        """Elements that a rank sends, by ring algorithms."""
        shares = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "gather": 1, "broadcast": 1}
        return self.elements * shares[self.collective]


BUCKET = 2**23
"""Elements from which on gradients that wait are added up over ranks, all of them in one collective."""


def buckets(sizes: Iterable[int]) -> int:
    """How many collectives updates of such sizes make, in program order."""
    found = waiting = 0
    for size in sizes:
        waiting += size
        if waiting >= BUCKET:
            found, waiting = found + 1, 0
    return found + (waiting > 0)


def gram_way(plan: Plan) -> Literal["rows", "blocks"]:
    """Which way to Γ of all samples moves less, by what a rank sends and receives with ring algorithms.

    ``"rows"``: an all-gather, ``(R - 1) b E`` elements; ``"blocks"``: a gather, ``b E``, and an all-reduce of Γ,
    ``2 B² (R - 1) / R``; a sample has E elements of rows, a rank b of the B samples.
    """
    own = plan.graph.ops.batch or 1
    rows = own * sum(row_elements(plan, block) for block in _blocks(plan))
    total, ranks = own * plan.ranks, plan.ranks
    return "rows" if (ranks - 1) * rows <= rows + 2 * total**2 * (ranks - 1) / ranks else "blocks"


def row_elements(plan: Plan, block: MetricBlock) -> int:
    """Elements a sample of what Γ of a block is made of: rows of its layers, their coordinates, or ``γ``."""
    layer = plan.layers[block.players[0].name]
    use, chosen = layer.single, layer.gram
    if block.kind == "exact" or layer.coordinates == "samples":
        return _parameters(plan, [block])
    if layer.coordinates:
        assert use is not None
        return _row_elements(plan, use)
    if block.of_players or chosen.uses:
        players = block.players[: 1 if block.kind == "shared" else None]
        return _value_elements(plan, [use for player in players for use in plan.layers[player.name].uses])
    if chosen.kept or use is None or (plan.turned and chosen.form != "turned rows"):
        return _parameters(plan, [block])
    if chosen.approximate == "sketch" and block.kind == "channels":
        outputs = plan.graph.ops.parameter_info[use.names[0]].shape[0]
        return outputs * ((chosen.columns or plan.columns) + len(use.names) - 1)
    return _value_elements(plan, [use])


def _row_elements(plan: Plan, use: Use) -> int:
    """Homogeneous inputs and output gradients at every position."""
    weight = plan.graph.ops.parameter_info[use.names[0]].shape
    output = arranged_shape(plan.graph, use, use.op) or ()
    positions = math.prod(output[1:]) // weight[0]
    return positions * (math.prod(weight[1:]) + len(use.names) - 1 + weight[0])


def _value_elements(plan: Plan, uses: list[Use]) -> int:
    """Operands, each once, and the gradients of the outputs."""
    found: dict[tuple[str, str], int] = {}
    for use in uses:
        names = [ref.name for ref in use.operands if ref.name in plan.graph.ops.position]
        for name in names[:1] if use.rule.prepare else names:
            shape = arranged_shape(plan.graph, use, name) or (1,)
            found[name, use.key if use.layouts else ""] = math.prod(shape[1:])
        found[use.op, "g"] = math.prod((arranged_shape(plan.graph, use, use.op) or (1,))[1:])
    return sum(found.values())


def traffic(plan: Plan, setting: Setting, samples: int) -> Iterator[Sent]:
    """Every collective of a step of a rank with so many samples; the others have as many."""
    blocks, joint, curvature = _blocks(plan), plan.form.name == "joint", setting.curvature
    yield Sent("program", "all_gather", 1, 3)
    yield Sent("losses", "all_gather", 1, 5)
    if (plan.metric == "diagonal" or plan.turned) and joint and curvature.needs_statistics:
        yield Sent("Q_u", "all_reduce", len(blocks), _parameters(plan, blocks))
    diagonal = [block for block in blocks if block.kind == "diagonal"]
    if diagonal:
        yield Sent("second moments", "all_reduce", len(diagonal), _parameters(plan, diagonal))
    if isinstance(curvature, Kronecker):
        yield from _factors(plan, curvature, [b for b in blocks if b.of_players or b.kind == "channels"])
    if plan.gathers and joint:
        rows = samples * sum(row_elements(plan, block) for block in blocks)
        way = gram_way(plan)
        yield Sent("rows", "all_gather" if way == "rows" else "gather", len(blocks), rows)
        if way == "blocks":
            yield Sent("Gamma", "all_reduce", 1, (plan.ranks * samples) ** 2)
        yield Sent("vectors over samples", "all_gather", 2, 2 * samples)
    if joint:
        yield Sent("agreement", "all_reduce", 1, 1)
    own = [elements(plan, block.names) for stage in reversed(plan.stages) for block in stage.blocks]
    together = 1 if plan.max_grad_norm is not None else buckets(own)
    yield Sent("update", "all_reduce", together if joint else len(blocks), sum(own))
    buffers = [setting.buffers[name] for name in plan.graph.ops.advancing]
    if buffers:
        kinds = len({buffer.dtype for buffer in buffers})
        yield Sent("buffers", "broadcast", kinds, sum(math.prod(buffer.shape) for buffer in buffers))


def _blocks(plan: Plan) -> list[MetricBlock]:
    return [block for stage in plan.stages for block in stage.blocks]


def _parameters(plan: Plan, blocks: list[MetricBlock]) -> int:
    return sum(elements(plan, block.names) for block in blocks)


def elements(plan: Plan, names: Any) -> int:
    """Elements of parameters, by names in nested tuples."""
    if isinstance(names, str):
        return math.prod(plan.graph.ops.parameter_info[names].shape)
    return sum(elements(plan, part) for part in names)


def _factors(plan: Plan, curvature: Kronecker, blocks: list[MetricBlock]) -> Iterator[Sent]:
    """Both factors of every block, or that of the inputs; second moments in their basis."""
    found, moments = 0, 0
    for block in blocks:
        groups, inputs, outputs = _widths(plan, block)
        found += groups * (inputs**2 + (0 if curvature.inputs_alone else outputs**2))
        moments += groups * inputs * outputs
    if found:
        yield Sent("factors", "all_reduce", len(blocks), found, False)
    if curvature.rescales and moments:
        yield Sent("moments", "all_reduce", len(blocks), moments)


def _widths(plan: Plan, block: MetricBlock) -> tuple[int, int, int]:
    """``(G, n, m)`` of a block's factors."""
    if block.kind == "exact":
        return 1, 1, _parameters(plan, [block])
    inputs = outputs = groups = 0
    for player in block.players[: 1 if block.kind == "shared" else None]:
        shapes = [plan.graph.ops.parameter_info[name].shape for name in player.parameters]
        use = plan.layers[player.name].uses[0]
        weight = max(shapes, key=len)
        groups = int(use.options.get("groups", 1))
        if block.kind == "channels":
            return groups * block.blocks, weight[1] // block.blocks, 0
        inputs += math.prod(weight[1:]) + len(shapes) - 1
        outputs += weight[0] // groups
    return (groups, inputs, outputs) if block.blocks == 1 else (block.blocks, -(-inputs // block.blocks), outputs)
