"""What the base method learns of a stage, and the metric ``M⁻¹`` that it then gives, block by block.

Metrics are of parameters (``m.metric``, the rules' own kernels) or of players (``m.block_metric``, the kernels of
``kronecker``); the two sweeps do not see the difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gtddp_compile.algebra.collapsed import LEVENBERG
from gtddp_compile.graph import Player
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import SAMPLES, Apply, Function, Phase, Var, item
from gtddp_compile.lowering.plan import MetricBlock
from gtddp_compile.lowering.uses import Use
from gtddp_compile.lowering.write.calls import layer, per_sample, weighed


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


def observe(b: Builder, t: int, block: MetricBlock, alpha: str | None, opens: dict[str, str]) -> Observed:
    """Statistics (``opens``: ``Q_u`` of each player, where it is known) and the metric."""
    layers = statistics(b, t, block, alpha, opens)
    coordinates = _kept(b, t, block, alpha) if b.first(block).coordinates else ""
    metric = f"metric_{b.name_of(block)}"
    if b.first(block).kind == "dual":
        b.emit("backward", t, metric, "m.rate", block.players[0].parameters, note="M^-1 = lr A^-1 x B^-1")
    elif block.kind == "channels":
        b.emit("backward", t, metric, "m.channels_metric", block.players[0].parameters, note="M^-1 of x X")
    elif block.of_players:
        b.emit("backward", t, metric, "m.block_metric", block.kind, block.names, note="M^-1")
    else:
        separated = b.first(block).groups
        call, groups = ("m.metric", ()) if separated is None else ("m.separated_metric", (separated,))
        b.emit("backward", t, metric, call, block.players[0].parameters, *groups, note="M^-1")
    return Observed(block, metric, layers, coordinates)


def _positions(b: Builder, block: MetricBlock) -> Apply:
    """At how many positions a sample uses the player's parameters: a batch of other sequences or images has others."""
    samples: Any = Apply("*", (SAMPLES, Apply("+", (Var("rank"), 1)))) if b.factored else SAMPLES
    taps = dict.fromkeys(use.op for use in b.uses(block.players[0].name))
    return Apply("positions", (tuple(Var(b.g_output(tap)) for tap in taps), samples, block.size))


def statistics(
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
        (use,), maps = b.uses(player.name), f"maps_{b.identity(player)}"
        sketch, blocks = sketch_of(b, t, block), block.blocks
        more = (sketch, blocks) if blocks > 1 else (sketch,) if sketch else ()
        b.emit(phase, t, maps, "m.observe_channels", player.parameters, layer(b, use), _positions(b, block), *more,
               note="A = E[x x^T] of a position's channels")  # fmt: skip
        return ()
    if block.kind == "uniform":
        names, note = block.players[0].parameters, "input 1 at so many positions"
        b.emit(phase, t, (), "m.observe_uniform", names, _positions(b, block), note=note)
        return ()
    assert alpha is not None
    if block.kind == "diagonal":
        (player,) = block.players
        moment, v_u = f"moment_{b.identity(player)}", per_sample(b, t, player, alpha)
        b.emit("backward", t, moment, "second_moment", Var(v_u), Var("start"), note="E[V_u^2]")
        b.emit("backward", t, (), "m.observe_moment", player.parameters, Var(moment), note="statistics")
        return ()
    form = b.first(block).coordinates
    if b.first(block).lines if b.plan.form.name == "base" else form in ("rows", "dual"):
        _seen_once(b, t, block, alpha)
        return ()
    count = 1 if block.kind == "shared" else len(block.players)
    players = block.players[:count]
    seen = tuple(_layer(b, t, block, player, alpha) for player in players)
    _observe(b, t, block, block.kind, seen, later=form == "samples" and _later(b))
    read = b.plan.form.name != "base" and form != "samples"
    return tuple(_layer(b, t, block, player) for player in players) if read else ()


def _observe(b: Builder, t: int, block: MetricBlock, kind: str, seen: tuple[Var, ...], *, later: bool) -> None:
    """Factors; ``later``: without the moments."""
    b.emit("backward", t, (), "m.observe_factors" if later else "m.observe_block", t, kind, block.names, seen,
           Var("start"), note="A = E[x x^T], B = E[V_h V_h^T]")  # fmt: skip


def _seen_once(b: Builder, t: int, block: MetricBlock, alpha: str) -> None:
    """Factors from rows that are made once; where coordinates are, moments follow from them."""
    (player,), plan = block.players, b.first(block)
    (use,), (x, g), name = b.uses(player.name), _rows(b, player), f"seen_{b.identity(player)}"
    if block.blocks > 1:
        made = Apply(b.kernel(use, "rows"), (layer(b, use),))
        b.emit("backward", t, (x, g), "in_blocks", made, block.blocks, note="rows")
    else:
        b.emit("backward", t, (x, g), b.kernel(use, "rows"), layer(b, use), note="rows")
    rows = Apply("Layer", ((Var(x),), Apply("scale", (Var(g), Var(alpha))), (), ()))
    moment = _moment(b, use) if plan.lines else {}  # made where it is read: not at every step
    b.emit("backward", t, name, "Rows", Function("made_rows"), rows, note="rows, V_h", **moment)
    _observe(b, t, block, plan.kind, (Var(name),), later=_later(b))


def _moment(b: Builder, use: Use) -> dict[str, Any]:
    return {"moment": (Function(b.kernel(use, "moment")), layer(b, use))}


def _later(b: Builder) -> bool:
    """Whether moments are taken from coordinates, when the factors have been seen."""
    return b.plan.metric == "rescaled" and b.plan.form.name != "base"


def _layer(b: Builder, t: int, block: MetricBlock, player: Player, alpha: str | None = None) -> Var:
    """The rows of a player (with ``alpha``, weighted: inputs and ``V_h``), or ``γ`` (``V_u``) as an exact block's."""
    name = f"{'all' if alpha is None else 'seen'}_{b.identity(player)}"
    if block.kind == "exact":
        gamma = Var(per_sample(b, t, player, alpha))
        b.emit("backward", t, name, "Rows", Function("flat_rows"), Apply("Layer", (gamma, item(gamma, 0), (), ())),
               note="rows")  # fmt: skip
        return Var(name)
    (use,) = b.uses(player.name)
    kernel, taken = b.kernel(use, "rows"), layer(b, use) if alpha is None else weighed(b, use, alpha)
    more: dict[str, Any] = {"blocks": block.blocks} if block.blocks > 1 else {}
    if b.factored and alpha is None:
        taken = Apply("column_samples", (taken,))
    if alpha is not None and b.plan.form.name != "base" and b.first(block).lines:
        kernel, more = "line_rows", more | _moment(b, use)
    b.emit("backward", t, name, "Rows", Function(kernel), taken, note="rows", **more)
    return Var(name)


def _kept(b: Builder, t: int, block: MetricBlock, alpha: str | None) -> str:
    """Coordinates of a block's per-sample gradients, and the moments that are taken from them."""
    own, names = b.name_of(block), block.names
    maps, found = f"maps_{own}", f"coordinates_{own}"
    rows, form = [Var(name) for name in _rows(b, block.players[0])], b.first(block).coordinates
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
        moment = f"moment_{own}"
        b.emit("backward", t, moment, "coordinates_moment", Var(found), Var(alpha or ""), Var("start"),
               note="E[(alpha gamma)^2]")  # fmt: skip
        b.emit("backward", t, (), "m.observe_coordinates", names, Var(moment), note="statistics")
    return found


def _rows(b: Builder, player: Player) -> tuple[str, str]:
    """Variables of a layer's rows where they are made once."""
    return f"x_{b.identity(player)}_rows", f"g_{b.identity(player)}_rows"


def sketch_of(b: Builder, t: int, block: MetricBlock) -> tuple[int, int] | None:
    """Columns and seed of the sketch that a convolution's ``Γ`` is made by, where it is."""
    if block.kind != "channels" or b.factored or b.plan.form.name not in LEVENBERG:
        return None
    chosen = b.first(block).gram
    return (chosen.columns or b.plan.columns, t) if chosen.approximate == "sketch" else None
