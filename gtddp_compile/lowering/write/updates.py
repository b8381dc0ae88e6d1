"""A stage's updates as instructions, block by block: weighted gradients, and what the base method makes of them."""

from __future__ import annotations

from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import Function, Phase, Var
from gtddp_compile.lowering.plan import MetricBlock
from gtddp_compile.lowering.write.calls import weighed, weighted
from gtddp_compile.lowering.write.statistics import statistics


def base_update(b: Builder, t: int, block: MetricBlock, alpha: str) -> None:
    """Feedback off: statistics and update of a block in the backward sweep (Proposition 4)."""
    note = "delta_u = -M^-1 Q_u (Prop. 4)"
    if b.first(block).coordinates:
        statistics(b, t, block, alpha, {})
        (use,) = b.uses(block.players[0].name)
        functions = [Function(b.kernel(use, name)) for name in ("weighted", "rows")]
        b.emit("backward", t, (), "m.descend_rows", use.names, *functions, weighed(b, use, alpha), note=note)
        return
    gradients = {}
    if b.plan.stages[t].statistics or block.kind != "parameters" or not _descends(b, "backward", t, block, alpha, note):
        for player in block.players:
            gradients[player.name] = weighted(b, "backward", t, player, alpha, "grad", "Q_u")
    statistics(b, t, block, alpha, gradients)
    if gradients:
        update(b, "backward", t, block, gradients, note)


def decide(b: Builder, phase: Phase, t: int, block: MetricBlock, weights: str) -> None:
    """The weighted gradients of a block and what the base method makes of them."""
    note = "delta_u = -M^-1 (C w + l)"
    dual, found = b.first(block).kind == "dual", Var(f"coordinates_{b.name_of(block)}")
    verb, deltas = _verb(b, block)
    if dual and not b.plan.decay and verb == "descend":
        b.emit(phase, t, (), "m.descend_dual", block.names, found, Var(weights), note=note)
    elif b.first(block).coordinates and not b.plan.decay:
        step = f"step_{b.name_of(block)}"
        kernel, more = ("dual_step", ()) if dual else ("coordinates_step", (Var(f"metric_{b.name_of(block)}"),))
        b.emit(phase, t, step, kernel, found, Var(weights), *more, note="M^-1 C w / lr")
        b.emit(phase, t, deltas, f"m.{verb}_steps", b.first(block).kind, block.names, (Var(step),), note=note)
    elif not _descends(b, phase, t, block, weights, note):
        gradients = {p.name: weighted(b, phase, t, p, weights, "grad", "C w") for p in block.players}
        update(b, phase, t, block, gradients, note)


# --- all gradients before the first update ----------------------------------------------------------------------------


def base_gradients(b: Builder, t: int, block: MetricBlock, alpha: str) -> None:
    """Feedback off, the gradients clipped together: statistics that are not taken from them, and the gradients."""
    for player in block.players:
        b.gradients[player.name] = weighted(b, "backward", t, player, alpha, "grad", "Q_u")
    if block.kind != "parameters":
        statistics(b, t, block, alpha, {})


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
        statistics(b, t, block, None, gradients, "joint")
    update(b, "joint", t, block, gradients, "delta_u = -M^-1 (C w + l)")


def _descends(b: Builder, phase: Phase, t: int, block: MetricBlock, weights: str, note: str) -> bool:
    """Fold the update, or the metric, into the layer's own product, where nobody reads ``δu``."""
    (player, *_) = block.players
    if not (b.layer(player).in_place or b.layer(player).mapped):
        return False
    (use,) = b.uses(player.name)
    verb, kernel = ("by", "subtract") if b.layer(player).in_place else ("inputs", "whitened")
    functions = [Function(b.kernel(use, name)) for name in ("weighted", kernel)]
    b.emit(phase, t, (), f"m.descend_{verb}", use.names, *functions, weighed(b, use, weights), note=note)
    return True


def update(b: Builder, phase: Phase, t: int, block: MetricBlock, gradients: dict[str, str], note: str) -> None:
    """The base method consumes the gradients of a block; ``δu`` is written down where somebody reads it."""
    verb, deltas = _verb(b, block)
    if block.of_players or block.kind == "channels":
        found = tuple(Var(gradients[player.name]) for player in block.players)
        b.emit(phase, t, deltas, f"m.{verb}_block", b.first(block).kind, block.names, found, note=note)
    else:
        (player,) = block.players
        writes = f"{deltas[0]}" if deltas else ()
        b.emit(phase, t, writes, f"m.{verb}", player.parameters, Var(gradients[player.name]), note=note)


def _verb(b: Builder, block: MetricBlock) -> tuple[str, tuple[str, ...]]:
    """How the base method is asked, and the variables of ``δu`` where somebody reads it."""
    watched = any(b.layer(player).watched for player in block.players)
    return ("apply", tuple(f"delta_{b.identity(player)}" for player in block.players)) if watched else ("descend", ())
