"""Kernel calls of a player, over all uses of its parameters, as instructions."""

from __future__ import annotations

from typing import Any

from gtddp_compile.graph import LEADING, BufferRef, Player
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.instructions import SAMPLES, Apply, Function, Phase, StageFunction, Var, item, total
from gtddp_compile.lowering.plan import Contraction
from gtddp_compile.lowering.uses import Use


def operands(b: Builder, use: Use) -> Var | tuple[Var, ...]:
    """What a use's kernels take besides the gradient: prepared where the rule prepares, samples leading."""
    if use.layouts:
        return Var(f"o_{b.name(use.key)}_apart")
    if use.rule.prepare:
        return Var(f"o_{b.name(use.op)}")
    return tuple(b.operand(ref) for ref in use.operands)


def bundle(b: Builder, use: Use, taken: Any = None, g: Any = None) -> Apply:
    """What a use's kernels are called with; ``taken`` and ``g`` in place of its operands and gradient."""
    parameters = tuple(b.operand(ref) for ref in use.params)
    how = b.how(use)
    rest = () if how is None else (how,)
    return Apply("Layer", (taken or operands(b, use), g or Var(b.g_output(use.op)), parameters, use.wants, *rest))


def layer(b: Builder, use: Use) -> Var | Apply:
    """The same, made once a stage. The generic kernels read values of parameters, which the step moves: theirs is made
    where it is read.
    """
    return bundle(b, use) if use.function is not None else Var(f"layer_{b.name(use.key)}")


def weighed(b: Builder, use: Use, weights: str) -> Apply:
    """A use's layer with ``V_h``, the weighted gradient of its output, the linear term included."""
    if b.factored:
        return Apply("combined", (layer(b, use), Var("start"), Var(weights)))
    return Apply("scaled", (layer(b, use), Var(weights)))


def prepare(b: Builder, t: int, tap: str) -> None:
    """Once a stage: what the kernels of a player's operation take, and ``g`` of its value, with samples leading."""
    uses = [use for player, use in b.uses_at(tap) if not _unprepared(b, player, use)]
    for use in [use for use in uses if use.rule.prepare][:1]:
        whole = tuple(b.operand(ref) for ref in use.operands)
        more = (emitted_moments(b, t, use),) if b.synchronised(tap) else ()
        b.emit("backward", t, f"o_{b.name(tap)}", f"{use.rule.prefix}_prepare", whole, b.how(use), *more)
    for use in [use for use in uses if use.layouts]:
        _, *rest = b.arrangement(use)
        found = Var(f"o_{b.name(tap)}") if use.rule.prepare else tuple(b.operand(ref) for ref in use.operands)
        b.emit("backward", t, f"o_{b.name(use.key)}_apart", "apart_all", found, SAMPLES, tuple(rest),
               note="samples leading")  # fmt: skip
    for use in [use for use in uses if use.layouts][:1]:
        columns = {"columns": 1} if b.factored else {}
        b.emit("backward", t, f"{b.g_output(tap)}", "apart", Var(b.g_as_it_lies(tap)), SAMPLES,
               *(b.arrangement(use)[0] or ()), note="samples leading", **columns)  # fmt: skip
    for use in [use for use in uses if use.function is None]:
        b.emit("backward", t, f"layer_{b.name(use.key)}", "Layer", *bundle(b, use).args)


def _unprepared(b: Builder, player: Player, use: Use) -> bool:
    """Whether ``γ`` is made from the operands as they are, and nobody else asks for prepared ones."""
    return use.rule.prepare and not use.layouts and b.layer(player).gram.kept


def emitted_moments(b: Builder, t: int, use: Use) -> Var:
    """The moments of a batch-norm's batch."""
    name, x = f"moments_{b.name(use.op)}", b.operand(use.operands[0])
    kernel, more = ("joined_moments", (Var("ranks"),)) if b.synchronised(use.op) else ("batch_moments", ())
    b.emit("backward", t, name, kernel, x, *more, note="mean, variance")
    return Var(name)


def kept_rows(b: Builder, use: Use) -> str:
    """The variable of a use's per-sample gradients where they are kept."""
    return f"rows_{b.name(use.key)}"


def player_function(b: Builder, use: Use) -> StageFunction:
    """A use's operations as a function of its parameters and operands, for the generic kernels."""
    buffers = {ref.name: b.name(f"buffer {ref.name}") for ref in use.operands if isinstance(ref, BufferRef)}
    inputs = (*use.extras, *(f"buffer {r.name}" if isinstance(r, BufferRef) else r.name for r in use.operands))
    params = tuple(ref.name for ref in use.params if ref is not None)
    doc = f"{use.op} as a function of its parameters"
    return StageFunction(
        f"player_{b.name(use.key)}", -1, inputs, use.ops, (), (use.op,), params, doc, use.extras, buffers
    )


def kept(b: Builder, t: int, player: Player) -> str:
    """``γ`` of a player whose per-sample gradients are kept, built the first time; returns the variable."""
    (use,) = b.uses(player.name)
    name = kept_rows(b, use)
    if not b.first_time(name):
        return name
    if not _unprepared(b, player, use):
        b.emit("backward", t, name, b.kernel(use, "per_sample"), layer(b, use), note="gamma")
        return name
    more: tuple[Var, ...] = ()
    if use.options.get("form") == "batch" and use.options.get("training"):
        more = (emitted_moments(b, t, use),)
    raw = bundle(b, use, tuple(b.operand(ref) for ref in use.operands))
    b.emit("backward", t, name, b.kernel(use, "gamma"), raw, *more, note="gamma")
    return name


def weighted(b: Builder, phase: Phase, t: int, player: Player, weights: str, prefix: str, note: str) -> str:
    """``C w`` of one player over all its uses (``b + C w`` if the linear term is kept apart); returns the variable."""
    found = []
    if b.layer(player).gram.kept:
        name = f"{prefix}_{b.identity(player)}"
        b.emit(phase, t, name, "rows_weighted", Var(kept(b, t, player)), Var(weights), note=note)
        return name
    for use in b.uses(player.name):
        name, kernel = f"{prefix}_{b.name(use.key)}", b.kernel(use, "weighted")
        if use.rule.rows and not b.factored and len(b.graph.op(use.op).shape or ()) > 2:
            b.emit(phase, t, name, "weigh", Function(kernel), layer(b, use), Var(weights), note=note)
        else:
            b.emit(phase, t, name, kernel, weighed(b, use, weights), note=note)
        found.append((use.names, Var(name)))
    if len(found) == 1 and found[0][0] == player.parameters:
        return found[0][1].name
    total = f"{prefix}_{b.identity(player)}_total"
    b.emit(phase, t, total, "gather", player.parameters, *found, note="every use")
    return total


def gram(b: Builder, t: int, player: Player, metric: str, given: Var | None = None) -> str:
    """``Γ`` of one player (over all columns, the gradient's included, where there are several).

    ``given``: the layer, or ``γ``, in the metric's own coordinates.
    """
    result, note = f"gamma_{t}_{b.identity(player)}", "gamma M^-1 gamma^T"
    more: dict[str, Any] = {}
    chosen, use = b.layer(player).gram, b.layer(player).single
    if chosen.uses:  # all of one layer with the positions of every use
        uses = b.uses(player.name)
        found = [operands(b, use) for use in uses]
        inputs = tuple(item(v, 0) if isinstance(v, Var) else v[0] for v in found)
        rest = tuple(Var(b.g_output(use.op)) for use in uses[1:])
        said = tuple((use.rule.prefix == "transposed", use.wants[1]) for use in uses)
        joined, of_all = bundle(b, uses[0], (*inputs, *rest)), f"{note} of all uses"
        if b.plan.gram == "nystrom":
            whole = f"all_{b.identity(player)}"
            b.emit("backward", t, (whole, "_"), "joined_uses", joined, Var(metric), note="positions of all uses",
                   uses=said)  # fmt: skip
            return whole
        b.emit("backward", t, result, "gram_blocks", Function("linear_uses_gram"), joined, Var(metric), Var(b.rows),
               note=of_all, uses=said)  # fmt: skip
        return result
    if b.plan.gram == "nystrom":
        return per_sample(b, t, player)
    if chosen.form == "turned rows" and use is not None:
        more = {"separable": True} if chosen.approximate == "separable" else {}
        b.emit("backward", t, result, "turned_gram", Function(b.kernel(use, "rows")), layer(b, use), Var(metric),
               Var(b.rows), note=note, **more)  # fmt: skip
        return result
    if chosen.kept or use is None or b.plan.turned:
        gamma = given or Var(kept(b, t, player) if chosen.kept else per_sample(b, t, player))
        b.emit("backward", t, result, "joint_gram", gamma, Var(metric), Var(b.rows), note=note)
        return result
    choice = chosen.approximate
    more = {"columns": chosen.columns or b.plan.columns, "seed": t} if choice == "sketch" else {}
    functions = [Function(b.kernel(use, "gram" if choice == "exact" else f"{choice}_gram"))]
    functions += [Function(b.kernel(use, "per_sample"))] if b.factored else []
    b.emit("backward", t, result, "factor_gram" if b.factored else "gram_blocks", *functions, given or layer(b, use),
           Var(metric), Var(b.rows), note=note, **more)  # fmt: skip
    return result


def product_of(b: Builder, player: Player) -> tuple[Any, ...]:
    """What a product with ``Γ`` of one player is made of (``kernels.nystrom.Players``)."""
    metric, names = Var(f"metric_{b.identity(player)}"), player.parameters
    if b.layer(player).gram.uses:  # the bias is a column of the weight
        whole = Var(f"all_{b.identity(player)}")
        joined = (names[:1], Function("linear_weighted"), Function("linear_directional"), whole)
        return names[:1], (item(metric, 0),), (joined,), (Function("linear_columns"), whole, metric)
    uses = tuple(
        (use.names, Function(b.kernel(use, "weighted")), Function(b.kernel(use, "directional")), layer(b, use))
        for use in b.uses(player.name)
    )
    return names, metric, uses, (Function("joint_columns"), Var(f"gamma_{b.identity(player)}_total"), metric)


def per_sample(b: Builder, t: int, player: Player, weights: str | None = None) -> str:
    """``γ`` of one player, its uses added up (over all columns, where there are several); returns the variable.

    With ``weights``, ``V_u = b + C w`` of every sample instead: one column whatever the form.
    """
    prefix = "gamma" if weights is None else "vu"
    whole = f"{prefix}_{b.identity(player)}_total"
    if any(instruction.writes == whole for instruction in b.instructions):
        return whole
    gradients = []
    for use in b.uses(player.name):
        name, kernel = f"{prefix}_{b.name(use.key)}_rows", b.kernel(use, "per_sample")
        call = ("factor_rows", Function(kernel)) if b.factored and weights is None else (kernel,)
        taken, note = (layer(b, use), "gamma") if weights is None else (weighed(b, use, weights), "V_u")
        b.emit("backward", t, name, *call, taken, note=note)
        gradients.append((use.names, Var(name)))
    b.emit("backward", t, whole, "gather", player.parameters, *gradients, note="every use")
    return whole


def parts_of(direction: str, player: Player, use: Use) -> tuple[Apply, ...]:
    """Of a direction in a player's parameters, the tensors of those that a use takes."""
    return tuple(item(Var(direction), player.parameters.index(name)) for name in use.names)


def directional(
    b: Builder, phase: Phase, t: int, player: Player, direction: str, result: str, only: frozenset[str] | None = None
) -> list[Var]:
    """``⟨γ_i, v⟩`` of a player, a variable a use (``only`` of the named ones)."""
    found, last = [], b.plan.inertia and not b.plan.decay  # the last step, which may be taken already
    for use in b.uses(player.name):
        if only is not None and use.op not in only:
            continue
        change, name, rows = parts_of(direction, player, use), f"{result}_{b.name(use.key)}", b.layer(player).gram.kept
        call = "rows_directional" if rows else b.kernel(use, "directional")
        taken = Var(kept(b, t, player)) if rows else layer(b, use)
        if b.factored and not rows:
            b.emit(phase, t, name, "factor_directional", Function(call), taken, change)
        elif last:
            b.emit(phase, t, name, "along", Function(call), taken, change)
        else:
            b.emit(phase, t, name, call, taken, change)
        found.append(Var(name))
    return found


def drawn(b: Builder, player: Player, part: Var) -> Apply:
    """``⟨γ_i, M⁻¹ ℓ_u⟩`` of a player from ``⟨γ_i, v⟩``: without weight decay ``v`` is the last step, times ``-μ``."""
    wide = Apply("wide", (part,))
    return wide if b.plan.decay else Apply("*", (Apply("neg", (Var(f"mu_{b.identity(player)}"),)), wide))


def gram_diagonal(b: Builder, t: int, player: Player, metric: str, result: str, given: Var | None = None) -> None:
    """The diagonal of ``Γ`` of one player."""
    use = b.layer(player).single
    if use is not None and not b.plan.turned:
        b.emit("backward", t, result, b.kernel(use, "gram_diagonal"), given or layer(b, use), Var(metric))
        return
    blocks = gram(b, t, player, metric)
    b.emit("backward", t, result, "=", Apply(".diagonal()", (item(Var(blocks), 0),)))


def contract(b: Builder, t: int, contraction: Contraction) -> None:
    """``⟨g, δx⟩`` of a value that a stage has moved, or of a tied control for its later uses."""
    value, reader = contraction.value, contraction.reader
    result = b.contraction(value, reader)
    control = b.graph.value[value].control
    if control is None:
        kernel, layout = "contract_factors" if b.factored else "contract", b.graph.op(value).samples
        call, where = ((kernel,), ()) if layout == LEADING else (
            ("contract_arranged", Function(kernel)), (SAMPLES, layout.axis, layout.fold)
        )  # fmt: skip
        more: dict[str, Any] = {"columns": 1} if where and b.factored else {}
        if layout.order:
            more.update(order=Var(b.name(layout.order)), order_after=Var(b.new(layout.order)))
        b.emit("forward", t, result, *call, Var(b.g(value, reader)), Var(b.new(value)), Var(b.name(value)),
               *where, note=f"<g, delta {value}>", **more)  # fmt: skip
        return
    player = b.graph.player[control]
    here = frozenset(use for use in player.uses if b.graph.stage_of[use] == reader)
    terms = directional(b, "forward", t, player, f"delta_{b.identity(player)}", result, here)
    b.emit("forward", t, result, "=", total(terms), note=f"what the new {control} will change at stage {reader}")
