"""Small layers of one shape, computed together at the end of the backward sweep: one product for all of them.

In the joint step ``Λ_0 = Λ_T + Σ Γ`` and ``y_0 = y_T - Σ s`` are sums over players, in any order. A group of L players
is written down as one layer of L groups (``kernels/coordinates.py``), at a place of its own behind the first stage.
"""

from __future__ import annotations

from typing import Any

from gtddp_compile.graph import Player
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import Apply, Function, Var, total


def counted(b: Builder) -> None:
    """``Γ`` and ``s`` of every group of layers, and their sums; the figures of each layer are for ``diagnostics``."""
    found = [_group(b, number, players) for number, players in enumerate(b.plan.alike)]
    if b.drifts:
        b.emit("backward", 0, "s_alike", "=", total([_over_layers(moved) for _, moved in found]),
               note="gamma M^-1 l")  # fmt: skip
    b.emit("backward", 0, "gamma_alike", "alike_sum", *(Var(grams) for grams, _ in found),
           note="Gamma = sum over their players")  # fmt: skip


def _over_layers(variable: str) -> Apply:
    return Apply("wide", (Apply(".sum()", (Var(variable), 0)),))


def _group(b: Builder, number: int, players: tuple[Player, ...]) -> tuple[str, str]:
    """Variables of every layer's ``Γ`` and ``s``."""

    def own(name: str) -> str:
        return f"{name}alike_{number}"

    def emit(writes: str | tuple[str, ...], function: str, *args: Any, note: str = "", **kwargs: Any) -> None:
        b.emit("backward", 0, writes, function, *args, note=note, **kwargs)

    uses, names = [b.uses(player.name)[0] for player in players], Var(own(""))
    x, g, seen, coordinates = (Var(own(name)) for name in ("x_", "g_", "seen_", "coordinates_"))
    emit(own(""), "=", tuple(player.parameters for player in players), note="layers of one shape")
    inputs = tuple(b.operand(use.operands[0]) for use in uses)
    gradients = tuple(Var(b.g_output(use.op)) for use in uses)
    emit((x.name, g.name), "alike_rows", inputs, gradients, any(uses[0].wants[1:]), note="rows")
    rows = Apply("Layer", ((x,), Apply("scale", (g, Var(b.alpha(0)))), (), ()))
    emit(seen.name, "Rows", Function("made_rows"), rows, note="rows, V_h")
    emit((), "m.observe_alike", 0, "dual", names, (seen,), Var("start"), note="A = E[x x^T], B = E[V_h V_h^T] of each")
    emit(own("maps_"), "m.alike_inverses", names, note="A^-1, B^-1")
    emit(coordinates.name, "dual_coordinates", x, g, Var(own("maps_")), note="x, g, x A^-1, g B^-1")
    emit(own("metric_"), "m.alike_rates", names, note="M^-1 = lr A^-1 x B^-1")
    figures: dict[str, Any] = {"players": tuple((player.stage, player.name) for player in players)}
    if b.drifts:
        last = own("drift_"), own("mu_")
        emit(last, "m.last_steps", names, note="v and mu: M^-1 l_u = -mu v")
        emit(own("moved_"), "alike_along", coordinates, *map(Var, last), note="gamma M^-1 l of each")
        figures["drift"] = Var(own("moved_"))
    emit(own("gammas_"), "alike_grams", coordinates, Var(own("metric_")), Var(b.rows), note="gamma M^-1 gamma^T")
    figures["gammas"] = Var(own("gammas_"))
    kept: dict[str, Any] = {names.name: figures}
    emit((), "m.keep", 0, **kept)
    return own("gammas_"), own("moved_")


def updated(b: Builder, weights: str) -> None:
    """The step of every group."""
    for number, _ in enumerate(b.plan.alike):
        drift = (Var(f"drift_alike_{number}"), Var(f"mu_alike_{number}")) if b.drifts else ()
        b.emit("joint", 0, (), "m.descend_alike", Var(f"alike_{number}"), Var(f"coordinates_alike_{number}"),
               Var(weights), *drift, note="delta_u = -M^-1 (C w + l)")  # fmt: skip
