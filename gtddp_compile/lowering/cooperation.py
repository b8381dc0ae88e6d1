"""Which players of a stage share one curvature matrix: blocks of a Kronecker metric, coalitions, Corollary 7's case.

Players of one stage decide together, and a curvature with cross terms couples them (Theorem 3): the factors of their
inputs and output gradients side by side, which takes one position of each for every position of the other. Players of
the same input whose outputs are only added up have the same rows altogether (Fig. 7a): Corollary 7.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from gtddp_compile.algebra.paths import plain_scales
from gtddp_compile.graph import ControlGraph, Player, Stage, grouped
from gtddp_compile.lowering.plan import MetricBlock
from gtddp_compile.lowering.uses import Use, arranged_shape, describe_use


@dataclass(frozen=True)
class MetricRules:
    """What the curvature and the options say about blocks.

    Attributes:
        kronecker: whether the curvature belongs to players.
        small: largest exact block, in parameters.
        cooperative: whether a coalition uses cross terms.
        shares: whether the curvature has Corollary 7's form.
        inputs_alone: whether the metric is of inputs alone: only players whose outputs are added up are in one.
        widest: inputs of a linear layer up to which its factor is one matrix; 0: it always is.
    """

    kronecker: bool = False
    small: int = 0
    cooperative: bool = True
    shares: bool = False
    inputs_alone: bool = False
    widest: int = 0


LARGEST_JOINT = 2**14
"""Longest side of a coalition's joint factors: 1 GiB in float32, and minutes to decompose at every refresh."""

NARROW = 128
"""Inputs of a layer of many positions that are always one block."""

BY_PARAMETER = MetricRules()
"""Of a curvature that is spherical or diagonal."""


def metric_blocks(graph: ControlGraph, stage: Stage, rules: MetricRules) -> tuple[MetricBlock, ...]:
    """The stage's players by the metric they are in, in the order of their first one."""
    players = [graph.player[name] for name in stage.players]
    if not rules.kronecker:
        return tuple(MetricBlock("parameters", (player,)) for player in players)
    uses = {player.name: tuple(describe_use(graph, player, graph.op(use)) for use in player.uses) for player in players}
    factored = {player.name: uses[player.name][0] for player in players if is_factored(player, uses[player.name])}
    keys = {name: _joint_key(graph, graph.player[name], use, rules) for name, use in factored.items()}
    of_channels = [
        name for name, use in factored.items() if rules.inputs_alone
        and (use.rule.name == "conv" or (list(keys.values()).count(keys[name]) == 1 and _is_of_tokens(graph, use)))
    ]  # fmt: skip
    blocks = [_of_channels(graph, graph.player[name], factored.pop(name), rules) for name in of_channels]
    blocks += [_alone(graph, player, rules) for player in players if player.name not in (*factored, *of_channels)]
    remaining = [player for player in players if player.name in factored]
    if rules.cooperative and rules.shares:
        for group in grouped(remaining, lambda p: _shared_key(graph, factored[p.name])).values():
            if len(group) > 1:
                found = _sum_of(graph, factored[group[0].name].op)
                assert found is not None  # alone otherwise
                why = f"Corollary 7: the same input, outputs added up in {found[0]}"
                blocks.append(MetricBlock("shared", tuple(group), why))
                remaining = [player for player in remaining if player not in group]
    for group in grouped(remaining, lambda p: keys[p.name]).values():
        blocks.append(_joint(graph, group, factored, rules))
    order = {player.name: index for index, player in enumerate(players)}
    return tuple(sorted(blocks, key=lambda block: order[block.players[0].name]))


def is_factored(player: Player, uses: tuple[Use, ...]) -> bool:
    """Whether a player's gradient is a sum of outer products of rows: one use, by a rule with rows, weight trained."""
    return len(uses) == 1 and uses[0].rule.rows and uses[0].wants[0] and set(uses[0].names) == set(player.parameters)


def _is_of_tokens(graph: ControlGraph, use: Use) -> bool:
    return use.rule.name == "linear" and len(arranged_shape(graph, use, use.op) or ()) > 2


def _of_channels(graph: ControlGraph, player: Player, use: Use, rules: MetricRules) -> MetricBlock:
    """A convolution, or a linear layer of many positions, which is one whose kernel has one element.

    Its factor's blocks are no wider than the layer has outputs, or ``NARROW`` if that is more: ``x xᵀ``
    and ``ĝ A⁻¹`` then cost no more than the gradient itself. They divide the inputs evenly.
    """
    blocks, (outputs, width, *_) = 1, graph.ops.parameter_info[use.names[0]].shape
    if use.rule.name == "linear":
        blocks = even_blocks(width, max(outputs, NARROW), rules.widest or width)
    why = f"inputs in {blocks} blocks" if blocks > 1 else ""
    return MetricBlock("channels", (player,), why, blocks, outputs)


def even_blocks(width: int, wanted: int, widest: int) -> int:
    """How many equal blocks of at most ``wanted`` inputs; wider ones where only far more would divide ``width``."""
    least = -(-width // min(wanted, widest))
    counts = [count for count in range(1, width + 1) if width % count == 0]
    near = [count for count in counts if least <= count <= 2 * least]
    wider = [count for count in counts if count < least and width <= count * widest]
    return (near or wider[-1:] or [count for count in counts if count > least])[0]


def _alone(graph: ControlGraph, player: Player, rules: MetricRules) -> MetricBlock:
    """A player without rows: an exact block while it is small, or a multiple of the identity."""
    sizes = [math.prod(graph.ops.parameter_info[name].shape) for name in player.parameters]
    if rules.inputs_alone:
        return MetricBlock("uniform", (player,), size=max(sizes))
    return MetricBlock("exact" if sum(sizes) <= rules.small else "diagonal", (player,))


def _joint(graph: ControlGraph, group: list[Player], uses: Mapping[str, Use], rules: MetricRules) -> MetricBlock:
    """A player alone, or several with cross terms, refused if a side of their factors is over :data:`LARGEST_JOINT`."""
    if len(group) == 1:
        use = uses[group[0].name]
        outputs, *inner = graph.ops.parameter_info[use.names[0]].shape
        width, blocks = math.prod(inner), 1
        if rules.widest and use.rule.name == "linear":  # as _of_channels, but for the few outputs of a classifier
            narrow, whole = -(-width // outputs) if outputs >= NARROW else 1, width + use.wants[1]
            size = -(-whole // max(narrow, -(-whole // rules.widest)))
            blocks = -(-whole // size)  # none of padding alone
        why = f"inputs in {blocks} blocks" if blocks > 1 else ""
        return MetricBlock("kronecker", tuple(group), why, blocks=blocks)
    weights = [graph.ops.parameter_info[uses[player.name].names[0]].shape for player in group]
    biases = sum(uses[player.name].wants[1] for player in group)
    inputs, outputs = sum(math.prod(shape[1:]) for shape in weights) + biases, sum(shape[0] for shape in weights)
    sizes = f"{inputs} x {inputs} and {outputs} x {outputs}"
    if max(inputs, outputs) > LARGEST_JOINT:
        op = graph.op(group[0].op)
        raise op.refusal(
            f"the coalition of {', '.join(player.name for player in group)} has joint Kronecker factors of {sizes} "
            f"(Theorem 3), and {LARGEST_JOINT} is the longest side that is made",
            "Pass cooperative=False, with which every layer has factors of its own, or schedule='sequential'",
        )
    why = f"Theorem 3: cross terms A_uv, B_uv; joint factors {sizes}"
    return MetricBlock("kronecker", tuple(group), why)


def _joint_key(graph: ControlGraph, player: Player, use: Use, rules: MetricRules) -> Hashable:
    """Players with equal keys have cross terms: as many positions of the one as of the other, no groups."""
    positions = _positions(graph, use)
    if not rules.cooperative or positions is None or use.options.get("groups", 1) != 1:
        return player.name
    if rules.inputs_alone:
        added = _sum_of(graph, use.op)
        return player.name if added is None or added[1] != 1 else (positions, added)
    return positions


def _positions(graph: ControlGraph, use: Use) -> int | None:
    """Rows that a sample has of a layer, as its kernels see it."""
    shape = arranged_shape(graph, use, use.op)
    if shape is None:
        return None
    return math.prod(shape[2:] if use.rule.name == "conv" else shape[1:-1])


def _shared_key(graph: ControlGraph, use: Use) -> Hashable:
    """Players with equal keys have the same input, the same shape and the same output derivative."""
    found = _sum_of(graph, use.op)
    if found is None:
        return use.op
    shapes = tuple(graph.ops.parameter_info[name].shape for name in use.names)
    return found, use.rule.name, use.operands, use.wants, shapes, tuple(sorted(use.options.items()))


def _sum_of(graph: ControlGraph, name: str) -> tuple[str, int] | None:
    """The last sum that a value goes into and nowhere else, and how many times that has it; ``None``: none.

    Its derivative by the value is a multiple of the identity (:func:`~gtddp_compile.algebra.paths.plain_scales`),
    whatever is added, subtracted or reshaped on the way.
    """
    found, times = None, 1
    while name not in graph.ops.output_names:
        users = [op for op in map(graph.op, graph.ops.users[name]) if op.carries_gradient and not op.reads_sizes]
        plain = plain_scales(graph, users[0]) if len(users) == 1 else {}
        if name not in plain:
            break
        times *= plain[name]
        name = users[0].name
        if len(plain) > 1:
            found = name, times
    return found
