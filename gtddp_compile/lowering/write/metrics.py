"""A stage's metric as instructions: statistics, ``M⁻¹``, Gram matrices and updates, block by block.

One function for each thing a stage does with ``M``, the same for metrics of parameters (``m.metric``, the rules' own
kernels) and of players (``m.block_metric``, the kernels of ``kronecker``); the two sweeps do not see the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gtddp_compile.algebra.collapsed import LEVENBERG
from gtddp_compile.graph import Player
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import Apply, Function, Phase, Var, item
from gtddp_compile.lowering.plan import LayerPlan, MetricBlock
from gtddp_compile.lowering.uses import Use
from gtddp_compile.lowering.write.calls import (
    faded_by,
    gram,
    gram_diagonal,
    kept,
    observed_gram,
    operands,
    output_gradient,
    params,
    parts_of,
    per_sample,
    weighted,
)
from gtddp_compile.lowering.write.columns import sample_gram


@dataclass(frozen=True)
class Observed:
    """A block after its statistics: the variables of its metric and of its layers' rows.

    ``coordinates``: of its per-sample gradients where the metric is diagonal, if they are kept.
    """

    block: MetricBlock
    metric: str
    layers: tuple[Var, ...]
    coordinates: str = ""

    @property
    def of_players(self) -> bool:
        """Whether the metric is one matrix over weight and bias, and over the players of a coalition."""
        return self.block.of_players


def base_update(b: Builder, t: int, block: MetricBlock, alpha: str) -> None:
    """Feedback off: statistics and update of a block in the backward sweep (Proposition 4)."""
    note = "delta_u = -M^-1 Q_u (Prop. 4)"
    if _first(b, block).coordinates:
        _statistics(b, t, block, alpha, {})
        (use,) = b.uses(block.players[0].name)
        functions = [Function(b.kernel(use, name)) for name in ("weighted", "rows")]
        b.emit("backward", t, (), "m.descend_rows", use.names, *functions, operands(b, use),
               output_gradient(b, use, alpha), params(b, use), use.wants, note=note, **b.options(use))  # fmt: skip
        return
    gradients = {}
    if b.plan.stages[t].statistics or block.kind != "parameters" or not _descends(b, "backward", t, block, alpha, note):
        for player in block.players:
            gradients[player.name] = weighted(b, "backward", t, player, alpha, "grad", "Q_u")
    _statistics(b, t, block, alpha, gradients)
    if gradients:
        update(b, "backward", t, block, gradients, note)


def observe(b: Builder, t: int, block: MetricBlock, alpha: str | None, opens: dict[str, str]) -> Observed:
    """Statistics (``opens``: ``Q_u`` of each player, where it is known) and the metric."""
    if block.kind == "parameters" and _first(b, block).observed:  # with its Γ
        return Observed(block, "", ())
    layers = _statistics(b, t, block, alpha, opens)
    coordinates = _kept(b, t, block, alpha) if _first(b, block).coordinates else ""
    metric = _metric(b, block)
    if _first(b, block).kind == "dual":
        b.emit("backward", t, metric, "m.rate", block.players[0].parameters, note="M^-1 = lr A^-1 x B^-1")
    elif block.kind == "channels":
        b.emit("backward", t, metric, "m.channels_metric", block.players[0].parameters, note="M^-1 of x X")
    elif block.of_players:
        b.emit("backward", t, metric, "m.block_metric", block.kind, _names(block), note="M^-1")
    else:
        separated = _first(b, block).groups
        call, groups = ("m.metric", ()) if separated is None else ("m.separated_metric", (separated,))
        b.emit("backward", t, metric, call, block.players[0].parameters, *groups, note="M^-1")
    return Observed(block, metric, layers, coordinates)


def sketched(b: Builder, t: int, found: Observed, drifts: dict[str, str]) -> tuple[str, Apply | None] | None:
    """A convolution's sketched ``Γ`` and ``⟨γ_i, M⁻¹ ℓ_u⟩``, where one product makes both: a variable and a formula."""
    if _sketch(b, t, found.block) is None:
        return None
    (player,) = found.block.players
    (use,), identity = b.uses(player.name), b.identity(player)
    gamma, moved = f"gamma_{t}_{identity}", f"s_{t}_{identity}"
    direction = None
    if player.name in drifts:
        direction = parts_of(drifts[player.name], player, use)
    b.emit("backward", t, (gamma, moved if direction else "_"), "conv_sketched", operands(b, use),
           Var(b.g_output(use.op)), params(b, use), use.wants, Var(f"maps_{identity}"), Var(found.metric), direction,
           Var(b.rows), note="gamma M^-1 gamma^T; gamma M^-1 l", **b.options(use))  # fmt: skip
    if direction is None:
        return gamma, None
    return gamma, Apply("wide", (Var(moved),)) if b.plan.decay else faded_by(b, player, moved)


def _sketch(b: Builder, t: int, block: MetricBlock) -> tuple[int, int] | None:
    """Columns and seed of the sketch that a convolution's ``Γ`` is made by, where it is."""
    if block.kind != "channels" or b.factored or b.plan.form.name not in LEVENBERG:
        return None
    chosen = _first(b, block).gram
    return (chosen.columns or b.plan.columns, t) if chosen.approximate == "sketch" else None


def drift(b: Builder, t: int, found: Observed) -> dict[str, str]:
    """``M⁻¹ ℓ_u`` of every player."""
    names = {player.name: f"drift_{b.identity(player)}" for player in found.block.players}
    if not b.plan.decay:
        for player in found.block.players:
            b.emit("backward", t, (names[player.name], f"mu_{b.identity(player)}"), "m.last_step", player.parameters,
                   note="v and mu: M^-1 l_u = -mu v")  # fmt: skip
    elif found.of_players or found.block.kind == "channels":
        arguments = (_first(b, found.block).kind, _names(found.block))
        b.emit("backward", t, tuple(names.values()), "m.drift_block", *arguments, note="M^-1 l_u")
    else:
        (player,) = found.block.players
        b.emit("backward", t, f"{names[player.name]}", "m.drift", player.parameters, note="M^-1 l_u")
    return names


def _whitened(b: Builder, t: int, found: Observed) -> Var | None:
    """A convolution's input, or ``γ`` where it is kept, in coordinates where the metric of channels is spherical."""
    if found.block.kind != "channels":
        return None
    (player,) = found.block.players
    (use,), whitened = b.uses(player.name), f"white_{b.identity(player)}"
    if b.layer(player).gram.kept:
        b.emit("backward", t, whitened, "channel_rows", Var(kept(b, t, player)),
               Var(f"maps_{b.identity(player)}"), note="gamma X")  # fmt: skip
        return Var(whitened)
    b.emit("backward", t, whitened, "conv_whitened", operands(b, use), _one_column(b, use),
           params(b, use), Var(f"maps_{b.identity(player)}"), note="x X at every pixel")  # fmt: skip
    return Var(whitened)


def _one_column(b: Builder, use: Use) -> Var | Apply:
    """Output gradients with the axes of the output: without that of a factor's columns."""
    return item(Var(b.g_output(use.op)), 0) if b.factored else Var(b.g_output(use.op))


def block_gram(b: Builder, t: int, found: Observed) -> str:
    """``Γ`` of a block."""
    if not found.of_players:
        (player,) = found.block.players
        return observed_gram(b, t, player) or gram(b, t, player, found.metric, _whitened(b, t, found))
    result = f"gamma_{t}_{_identity(b, found.block)}"
    grams = [b.layer(player).gram.approximate for player in found.block.players]
    separable = not b.factored and found.block.kind != "exact" and "separable" in grams
    options = {"separable": True} if separable else {}
    taken = (Var(found.coordinates),) if found.coordinates else (found.layers,)
    kernel = "coordinates_gram" if found.coordinates else "kronecker_gram"
    kernel = "dual_gram" if _first(b, found.block).kind == "dual" else kernel
    b.emit("backward", t, result, kernel, *taken, Var(found.metric), Var(b.rows),
           note="gamma M^-1 gamma^T", **options)  # fmt: skip
    return result


def block_diagonal(b: Builder, t: int, found: Observed) -> str:
    """The diagonal of a block's ``Γ``."""
    result = f"diagonal_{t}_{_identity(b, found.block)}"
    if found.of_players:
        b.emit("backward", t, result, "kronecker_gram_diagonal", found.layers, Var(found.metric))
    else:
        gram_diagonal(b, t, found.block.players[0], found.metric, result, _whitened(b, t, found))
    return result


def block_sample_gram(b: Builder, t: int, found: Observed) -> str:
    """``Γ_ii`` of a block, where every sample has columns of its own."""
    if not found.of_players:
        return sample_gram(b, t, found.block.players[0], found.metric, _whitened(b, t, found))
    result = f"gamma_{t}_{_identity(b, found.block)}"
    b.emit("backward", t, result, "kronecker_sample_grams", found.layers, Var(found.metric), Var("rank"))
    return result


def open_gain(b: Builder, t: int, found: Observed, opens: dict[str, str]) -> dict[str, str]:
    """``k`` of every player."""
    names, note = {player.name: f"k_{b.identity(player)}" for player in found.block.players}, "k = -M^-1 Q_u (4)"
    if found.of_players or found.block.kind == "channels":
        gradients = tuple(Var(opens[name]) for name in names)
        arguments = (found.block.kind, _names(found.block), gradients)
        b.emit("backward", t, tuple(names.values()), "m.open_block", *arguments, note=note)
    else:
        (player,) = found.block.players
        b.emit("backward", t, f"{names[player.name]}", "m.open_gain", player.parameters, Var(opens[player.name]),
               note=note)  # fmt: skip
    return names


def decide(b: Builder, phase: Phase, t: int, block: MetricBlock, weights: str) -> None:
    """The weighted gradients of a block and what the base method makes of them."""
    note = "delta_u = -M^-1 (C w + l)"
    dual, found = _first(b, block).kind == "dual", Var(f"coordinates_{_identity(b, block)}")
    verb, deltas = _verb(b, block)
    if dual and not b.plan.decay and verb == "descend":
        b.emit(phase, t, (), "m.descend_dual", _names(block), found, Var(weights), note=note)
    elif _first(b, block).coordinates and not b.plan.decay:
        step = f"step_{_identity(b, block)}"
        kernel, more = ("dual_step", ()) if dual else ("coordinates_step", (Var(_metric(b, block)),))
        b.emit(phase, t, step, kernel, found, Var(weights), *more, note="M^-1 C w / lr")
        b.emit(phase, t, deltas, f"m.{verb}_steps", _first(b, block).kind, _names(block), (Var(step),), note=note)
    elif not _descends(b, phase, t, block, weights, note):
        gradients = {p.name: weighted(b, phase, t, p, weights, "grad", "C w") for p in block.players}
        update(b, phase, t, block, gradients, note)


# --- all gradients before the first update ----------------------------------------------------------------------------


def base_gradients(b: Builder, t: int, block: MetricBlock, alpha: str) -> None:
    """Feedback off, the gradients clipped together: statistics that are not taken from them, and the gradients."""
    for player in block.players:
        b.gradients[player.name] = weighted(b, "backward", t, player, alpha, "grad", "Q_u")
    if block.kind != "parameters":
        _statistics(b, t, block, alpha, {})


def clipped(b: Builder, weights: str) -> None:
    """Every player's weighted gradient, all clipped by the norm of all (torch.nn.utils.clip_grad_norm_)."""
    stages = [stage for stage in reversed(b.plan.stages) if stage.players]
    players = [player for stage in stages for block in stage.blocks for player in block.players]
    for player in players if b.plan.form.name == "joint" else ():
        b.gradients[player.name] = weighted(b, "joint", player.stage, player, weights, "grad", "C w")
    writes = tuple(f"clipped_{b.identity(player)}" for player in players)
    found = [Var(b.gradients[player.name]) for player in players]
    b.emit("joint", 0, writes, "clip_gradients", b.plan.max_grad_norm, *found, note="as clip_grad_norm_")


def update_clipped(b: Builder, t: int, block: MetricBlock) -> None:
    """The base method consumes the clipped gradients of a block."""
    gradients = {player.name: f"clipped_{b.identity(player)}" for player in block.players}
    if b.plan.form.name == "base" and block.kind == "parameters":
        _statistics(b, t, block, None, gradients, "joint")
    update(b, "joint", t, block, gradients, "delta_u = -M^-1 (C w + l)")


def _descends(b: Builder, phase: Phase, t: int, block: MetricBlock, weights: str, note: str) -> bool:
    """Fold the update into the layer's own product, where there is one and nobody reads ``δu``."""
    (player, *_) = block.players
    if not b.layer(player).in_place:
        return False
    (use,) = b.uses(player.name)
    functions = [Function(b.kernel(use, name)) for name in ("weighted", "subtract")]
    g = output_gradient(b, use, weights)
    b.emit(phase, t, (), "m.descend_by", use.names, *functions, operands(b, use), g, params(b, use), use.wants,
           note=note, **b.options(use))  # fmt: skip
    return True


def update(b: Builder, phase: Phase, t: int, block: MetricBlock, gradients: dict[str, str], note: str) -> None:
    """The base method consumes the gradients of a block; ``δu`` is written down where somebody reads it."""
    verb, deltas = _verb(b, block)
    if block.of_players or block.kind == "channels":
        found = tuple(Var(gradients[player.name]) for player in block.players)
        b.emit(phase, t, deltas, f"m.{verb}_block", _first(b, block).kind, _names(block), found, note=note)
    else:
        (player,) = block.players
        writes = f"{deltas[0]}" if deltas else ()
        b.emit(phase, t, writes, f"m.{verb}", player.parameters, Var(gradients[player.name]), note=note)


def _verb(b: Builder, block: MetricBlock) -> tuple[str, tuple[str, ...]]:
    """How the base method is asked, and the variables of ``δu`` where somebody reads it."""
    watched = any(b.layer(player).watched for player in block.players)
    return ("apply", tuple(f"delta_{b.identity(player)}" for player in block.players)) if watched else ("descend", ())


# --- coordinates ------------------------------------------------------------------------------------------------------


def _first(b: Builder, block: MetricBlock) -> LayerPlan:
    """How the first of a block's layers is computed: those of a coalition keep nothing."""
    return b.layer(block.players[0])


def _kept(b: Builder, t: int, block: MetricBlock, alpha: str | None) -> str:
    """Coordinates of a block's per-sample gradients, and the moments that are taken from them."""
    identity, names = _identity(b, block), _names(block)
    maps, found = f"maps_{identity}", f"coordinates_{identity}"
    rows, form = [Var(name) for name in _rows(b, block.players[0])], _first(b, block).coordinates
    if form == "dual":
        b.emit("backward", t, maps, "m.block_inverses", names, note="A^-1, B^-1")
        b.emit("backward", t, found, "dual_coordinates", *rows, Var(maps), note="x, g, x A^-1, g B^-1")
        return found
    b.emit("backward", t, maps, "m.block_maps", names, note="where M is diagonal")
    if form == "samples":
        gamma = per_sample(b, t, block.players[0])
        b.emit("backward", t, found, "sample_coordinates", Var(gamma), Var(maps), note="there")
    else:
        b.emit("backward", t, found, "kronecker_coordinates", *rows, Var(maps), form, note="gamma there")
    if b.plan.metric == "rescaled":
        moment = f"moment_{identity}"
        b.emit("backward", t, moment, "coordinates_moment", Var(found), Var(alpha or ""), Var("start"),
               note="E[(alpha gamma)^2]")  # fmt: skip
        b.emit("backward", t, (), "m.observe_coordinates", names, Var(moment), note="statistics")
    return found


def _rows(b: Builder, player: Player) -> tuple[str, str]:
    """Variables of a layer's rows where they are made once."""
    return f"x_{b.identity(player)}_rows", f"g_{b.identity(player)}_rows"


def _metric(b: Builder, block: MetricBlock) -> str:
    return f"metric_{_identity(b, block)}"


# --- statistics -------------------------------------------------------------------------------------------------------


def _statistics(
    b: Builder, t: int, block: MetricBlock, alpha: str | None, opens: dict[str, str], phase: Phase = "backward"
) -> tuple[Var, ...]:
    """What the curvature learns; the layers' rows, where the metric is made of them."""
    if block.kind == "parameters":
        (player,) = block.players
        known = Var(opens[player.name]) if player.name in opens else None
        note = "statistics of the base method" if known else "the base method counts its steps"
        b.emit(phase, t, (), "m.observe", player.parameters, known, note=note)
        return ()
    if block.kind == "channels":
        (player,) = block.players
        (use,), whitened = b.uses(player.name), f"maps_{b.identity(player)}"
        b.emit(phase, t, whitened, "m.observe_channels", player.parameters, operands(b, use),
               _one_column(b, use), params(b, use), block.positions, use.options["groups"],
               *filter(None, [_sketch(b, t, block)]), note="A = E[x x^T] of a pixel's channels")  # fmt: skip
        return ()
    if block.kind == "uniform":
        (player,) = block.players
        b.emit(phase, t, (), "m.observe_uniform", player.parameters, block.positions, note="input 1 at so many places")
        return ()
    assert alpha is not None
    if block.kind == "diagonal":
        (player,) = block.players
        moment, v_u = f"moment_{b.identity(player)}", per_sample(b, t, player, alpha)
        b.emit("backward", t, moment, "second_moment", Var(v_u), Var("start"), note="E[V_u^2]")
        b.emit("backward", t, (), "m.observe_moment", player.parameters, Var(moment), note="statistics")
        return ()
    form = _first(b, block).coordinates
    if _first(b, block).lines if b.plan.form.name == "base" else form in ("rows", "dual"):
        _seen_once(b, t, block, alpha)
        return ()
    count = 1 if block.kind == "shared" else len(block.players)
    players = block.players[:count]
    seen = tuple(_layer(b, t, block, player, alpha) for player in players)
    verb = "observe_factors" if form == "samples" and _later(b) else "observe_block"
    b.emit("backward", t, (), f"m.{verb}", t, block.kind, _names(block), seen, Var("start"),
           note="A = E[x x^T], B = E[V_h V_h^T]")  # fmt: skip
    read = b.plan.form.name != "base" and form != "samples"
    return tuple(_layer(b, t, block, player) for player in players) if read else ()


def _seen_once(b: Builder, t: int, block: MetricBlock, alpha: str) -> None:
    """Factors from rows that are made once; where coordinates are, moments follow from them."""
    (player,) = block.players
    (use,), (x, g), name = b.uses(player.name), _rows(b, player), f"seen_{b.identity(player)}"
    b.emit("backward", t, (x, g), b.kernel(use, "rows"), operands(b, use), Var(b.g_output(use.op)), params(b, use),
           use.wants, note="rows", **_rows_options(b, use, block))  # fmt: skip
    made: tuple[object, ...] = (Var(x),)
    more: dict[str, Any] = {}
    if _first(b, block).lines:  # made where it is read: not at every step
        made, more = (
            (Var(x), *(b.operand(ref) for ref in use.operands)),
            {"moment": Function(b.kernel(use, "moment")), **b.options(use)},
        )
    b.emit("backward", t, name, "kronecker_layer", Function("made_rows"), made, Apply("scale", (Var(g), Var(alpha))),
           params(b, use), use.wants, note="rows, V_h", **more)  # fmt: skip
    verb = "observe_factors" if _later(b) else "observe_block"
    b.emit("backward", t, (), f"m.{verb}", t, _first(b, block).kind, _names(block), (Var(name),), Var("start"),
           note="A = E[x x^T], B = E[V_h V_h^T]")  # fmt: skip


def _later(b: Builder) -> bool:
    """Whether moments are taken from coordinates, when the factors have been seen."""
    return b.plan.metric == "rescaled" and b.plan.form.name != "base"


def _layer(b: Builder, t: int, block: MetricBlock, player: Player, alpha: str | None = None) -> Var:
    """The rows of a player (with ``alpha``, weighted: inputs and ``V_h``), or ``γ`` (``V_u``) as an exact block's."""
    name = f"{'layer' if alpha is None else 'seen'}_{b.identity(player)}"
    if block.kind == "exact":
        gamma = per_sample(b, t, player, alpha)
        b.emit("backward", t, name, "kronecker_layer", Function("flat_rows"), Var(gamma), item(Var(gamma), 0),
               (), (), note="rows")  # fmt: skip
        return Var(name)
    (use,) = b.uses(player.name)
    g = Var(b.g_output(use.op)) if alpha is None else output_gradient(b, use, alpha)
    layer = "factor_layer" if b.factored and alpha is None else "kronecker_layer"
    rows, more = b.kernel(use, "rows"), _rows_options(b, use, block)
    if alpha is not None and b.plan.form.name != "base" and _first(b, block).lines:
        rows, more = "line_rows", more | {"moment": Function(b.kernel(use, "moment"))}
    b.emit("backward", t, name, layer, Function(rows), operands(b, use), g, params(b, use), use.wants,
           note="rows", **more)  # fmt: skip
    return Var(name)


def _rows_options(b: Builder, use: Use, block: MetricBlock) -> dict[str, Any]:
    """Options of the kernel that makes a layer's rows."""
    return b.options(use) | ({"blocks": block.blocks} if block.blocks > 1 else {})


def _names(block: MetricBlock) -> tuple[tuple[str, ...], ...]:
    return tuple(player.parameters for player in block.players)


def _identity(b: Builder, block: MetricBlock) -> str:
    return "_and_".join(b.identity(player) for player in block.players)
