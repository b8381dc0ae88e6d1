"""Layers whose input has not moved: their new output from the Gram matrix of their inputs, without a second product.

Where no player has acted on what a layer reads (``δx = 0``: ``StagePlan.still``), the augmented Jacobian leaves of its
change the control's own part, ``δh = f_u δu``. With ``δu = -M⁻¹ γᵀ w``, a spherical ``M`` and one row a sample,

    δh = -(η_w X Xᵀ + η_b) (w ∘ G)

and ``X Xᵀ`` has been made for ``Γ``: ``B² m`` multiplications in place of ``B n m``. Layers that read the same value
share ``X Xᵀ`` too, whether they have moved or not.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from gtddp_compile.algebra.collapsed import COUPLED
from gtddp_compile.graph import ParamRef, Player, Ref
from gtddp_compile.lowering.builder import Builder
from gtddp_compile.lowering.costs import choose_gram
from gtddp_compile.lowering.instructions import Code, Function, Phase, StageFunction, Var
from gtddp_compile.lowering.plan import StagePlan
from gtddp_compile.lowering.uses import Use


def _separate_use(b: Builder, player: Player) -> Use | None:
    """The player's only use, if its ``Γ`` is ``(X Xᵀ) ∘ (G Gᵀ)`` over the whole batch."""
    plan, uses = b.plan, b.uses(player.name)
    whole = plan.form.name in COUPLED and plan.coupling == "full" and not b.factored
    if not whole or plan.metric != "spherical" or len(uses) > 1 or uses[0].names != player.parameters:
        return None
    (use,) = uses
    output = b.graph.op(use.op).shape
    rows = use.rule.responds and use.wants[0] and not use.layouts and output is not None and len(output) == 2
    choice = choose_gram(plan, use)
    return use if rows and choice.form == "separable" and choice.approximate == "exact" else None


def responding(b: Builder, player: Player) -> Use | None:
    """The player's use, if its new output is made from ``X Xᵀ``: its input is still, and wider than the batch."""
    stage = b.plan.stages[b.graph.stage_of[player.op]]
    if not stage.rerun or player.name not in stage.still or b.plan.linear or b.plan.segments is not None:
        return None
    use = _separate_use(b, player)
    shape = None if use is None else b.graph.op(_input(use)).shape
    return use if shape and shape[0] < shape[1] else None


def responds(b: Builder, op: str) -> bool:
    """Whether the new value of a player's operation is made from its old one."""
    return any(responding(b, player) is not None for player, _ in b.uses_at(op))


def _input(use: Use) -> str:
    (operand,) = use.operands
    return operand.name


def inputs_gram(b: Builder, t: int, player: Player) -> dict[str, Any]:
    """``X Xᵀ`` as an option of the kernel of ``Γ``, where somebody else reads it too; made the first time."""
    use = _separate_use(b, player)
    if use is None or not isinstance(use.operands[0], Ref):
        return {}
    if not b.readers:
        found = (_separate_use(b, other) for other in b.graph.players)
        b.readers.update(_input(other) for other in found if other is not None)
    if b.readers[_input(use)] < 2 and responding(b, player) is None:
        return {}
    name = f"inputs_{b.name(_input(use))}"
    if b.first_time(name):
        b.emit("backward", t, (f"*{name}",), b.kernel(use, "inputs"), b.operand(use.operands[0]), note="X X^T")
    return {"inputs": Var(name)}


def scaled(b: Builder, phase: Phase, t: int, use: Use, weights: Code) -> Code | Var:
    """``w ∘ G``, of which a layer that responds makes its own change too."""
    player = next(player for player, found in b.uses_at(use.op) if found is use)
    if phase != "forward" or responding(b, player) is None:
        return weights
    b.emit(phase, t, (f"*push_{b.name(use.op)}",), "=", weights, note="w G")
    return Var(f"push_{b.name(use.op)}")


def respond(b: Builder, stage: StagePlan) -> None:
    """The new outputs of the stage's layers that respond."""
    for player in stage.players:
        use = responding(b, player)
        if use is None:
            continue
        name, x = b.name(use.op), b.operand(use.operands[0])
        after = tuple(Code(f"q[{p.name!r}]") if isinstance(p, ParamRef) else b.operand(p) for p in use.params)
        functions = [Function(b.kernel(use, kernel)) for kernel in ("response", "forward")]
        b.emit("forward", stage.index, (f"*{b.new(use.op)}",), "m.respond", use.names, *functions, Var(name),
               Var(f"inputs_{b.name(_input(use))}"), Var(f"push_{name}"), use.wants, (x,), after,
               note="delta h = f_u delta_u, as delta x = 0")  # fmt: skip


def functions_after(b: Builder, functions: tuple[StageFunction, ...]) -> dict[int, StageFunction | None]:
    """What is left of a stage's dynamics in the forward sweep, where layers respond; ``None``: nothing."""
    found: dict[int, StageFunction | None] = {}
    for function in functions:
        players = b.plan.stages[function.stage].players if function.stage >= 0 else ()
        done = {use.op for player in players if (use := responding(b, player)) is not None}
        if done:
            found[function.stage] = _without(b, function, done) if done < set(function.ops) else None
    return found


def _without(b: Builder, function: StageFunction, done: set[str]) -> StageFunction:
    """A stage's function from the outputs of some of its operations on."""
    ops = tuple(op for op in function.ops if op not in done)
    inputs = tuple(dict.fromkeys(o for op in ops for o in b.graph.op(op).operands if o not in ops))
    returns = tuple(name for name in function.returns if name not in done)
    doc = f"{function.doc}, from outputs that are known on"
    return replace(function, name=f"{function.name}_on", inputs=inputs, ops=ops, taps=(), returns=returns, doc=doc)
