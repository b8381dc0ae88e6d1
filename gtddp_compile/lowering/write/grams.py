"""A stage's Gram matrices as instructions, and what its players are drawn to, block by block."""

from __future__ import annotations

from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import Apply, Var
from gtddp_compile.lowering.write.calls import drawn, gram, gram_diagonal, kept, layer, parts_of
from gtddp_compile.lowering.write.columns import sample_gram
from gtddp_compile.lowering.write.statistics import Observed, sketch_of


def sketched(b: Builder, t: int, found: Observed, drifts: dict[str, str]) -> tuple[str, Apply | None] | None:
    """A layer's sketched ``Γ`` and ``⟨γ_i, M⁻¹ ℓ_u⟩``, where one product makes both: a variable and a formula."""
    if sketch_of(b, t, found.block) is None:
        return None
    (player,) = found.block.players
    (use,), identity = b.uses(player.name), b.identity(player)
    gamma, moved, rows = f"gamma_{t}_{identity}", f"s_{t}_{identity}", f"sketch_{identity}"
    direction = None
    if player.name in drifts:
        direction = parts_of(drifts[player.name], player, use)
    b.emit("backward", t, (rows, moved if direction else "_"), b.kernel(use, "sketched"), layer(b, use),
           Var(f"maps_{identity}"), Var(found.metric), direction, note="gamma M^-1/2; gamma M^-1 l")  # fmt: skip
    b.emit("backward", t, gamma, "joint_gram", (Var(rows),), (1.0,), Var(b.rows), note="gamma M^-1 gamma^T")
    if direction is None:
        return gamma, None
    return gamma, drawn(b, player, Var(moved))


def drift(b: Builder, t: int, found: Observed) -> dict[str, str]:
    """``M⁻¹ ℓ_u`` of every player."""
    names = {player.name: f"drift_{b.identity(player)}" for player in found.block.players}
    if not b.plan.decay:
        for player in found.block.players:
            b.emit("backward", t, (names[player.name], f"mu_{b.identity(player)}"), "m.last_step", player.parameters,
                   note="v and mu: M^-1 l_u = -mu v")  # fmt: skip
    elif found.of_players or found.block.kind == "channels":
        arguments = (b.first(found.block).kind, found.block.names)
        b.emit("backward", t, tuple(names.values()), "m.drift_block", *arguments, note="M^-1 l_u")
    else:
        (player,) = found.block.players
        b.emit("backward", t, f"{names[player.name]}", "m.drift", player.parameters, note="M^-1 l_u")
    return names


def _whitened(b: Builder, t: int, found: Observed) -> Var | None:
    """A layer's input, or ``γ`` where it is kept, in coordinates where the metric of channels is spherical."""
    if found.block.kind != "channels":
        return None
    (player,) = found.block.players
    (use,), whitened = b.uses(player.name), f"white_{b.identity(player)}"
    if b.layer(player).gram.kept:
        b.emit("backward", t, whitened, "channel_rows", Var(kept(b, t, player)),
               Var(f"maps_{b.identity(player)}"), note="gamma X")  # fmt: skip
        return Var(whitened)
    b.emit("backward", t, whitened, b.kernel(use, "whitened"), layer(b, use), Var(f"maps_{b.identity(player)}"),
           note="x X at every pixel")  # fmt: skip
    return Var(whitened)


def block_gram(b: Builder, t: int, found: Observed) -> str:
    """``Γ`` of a block."""
    if not found.of_players:
        (player,) = found.block.players
        return gram(b, t, player, found.metric, _whitened(b, t, found))
    result = f"gamma_{t}_{b.name_of(found.block)}"
    grams = [b.layer(player).gram.approximate for player in found.block.players]
    separable = not b.factored and found.block.kind != "exact" and "separable" in grams
    options = {"separable": True} if separable else {}
    taken = (Var(found.coordinates),) if found.coordinates else (found.layers,)
    kernel = "coordinates_gram" if found.coordinates else "kronecker_gram"
    kernel = "dual_gram" if b.first(found.block).kind == "dual" else kernel
    b.emit("backward", t, result, kernel, *taken, Var(found.metric), Var(b.rows),
           note="gamma M^-1 gamma^T", **options)  # fmt: skip
    return result


def block_diagonal(b: Builder, t: int, found: Observed) -> str:
    """The diagonal of a block's ``Γ``."""
    result = f"diagonal_{t}_{b.name_of(found.block)}"
    if found.of_players:
        b.emit("backward", t, result, "kronecker_gram_diagonal", found.layers, Var(found.metric))
    else:
        gram_diagonal(b, t, found.block.players[0], found.metric, result, _whitened(b, t, found))
    return result


def block_sample_gram(b: Builder, t: int, found: Observed) -> str:
    """``Γ_ii`` of a block, where every sample has columns of its own."""
    if not found.of_players:
        return sample_gram(b, t, found.block.players[0], found.metric, _whitened(b, t, found))
    result = f"gamma_{t}_{b.name_of(found.block)}"
    b.emit("backward", t, result, "kronecker_sample_grams", found.layers, Var(found.metric), Var("rank"))
    return result


def open_gain(b: Builder, t: int, found: Observed, opens: dict[str, str]) -> dict[str, str]:
    """``k`` of every player."""
    names, note = {player.name: f"k_{b.identity(player)}" for player in found.block.players}, "k = -M^-1 Q_u (4)"
    if found.of_players or found.block.kind == "channels":
        gradients = tuple(Var(opens[name]) for name in names)
        arguments = (found.block.kind, found.block.names, gradients)
        b.emit("backward", t, tuple(names.values()), "m.open_block", *arguments, note=note)
    else:
        (player,) = found.block.players
        b.emit("backward", t, f"{names[player.name]}", "m.open_gain", player.parameters, Var(opens[player.name]),
               note=note)  # fmt: skip
    return names
