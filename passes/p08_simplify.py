"""Simplify: leave out what is zero, dead or already computed.

Takes the derivations and the collapsed form; guarantees a :class:`Plan` in which

* values that no player has moved (inputs, what is computed from them alone) have ``δ = 0``: no gradient, no gain. The
  first stage's feedback gain is dead for this reason;
* zero and identity blocks are not multiplied out: a waiting value's gradient and contraction are carried, so the cost
  of ``c`` is linear in the (value, reader) pairs instead of in the stages a value crosses;
* a stage whose new values nobody compares with the old ones is not run again (always the last one);
* how every player's layer is computed is decided (``lowering.decide``) and written down;
* ``α`` is computed only where statistics or the form ask for it; in the linear rollout both take ``α_T``;
* with ``ℓ_u = 0`` the drift ``s`` is zero and ``y`` stays the ones;
* beside coupled weight decay no ``reach`` raises the rate: the loss would count more, and the decay would not.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.algebra.derivation import Equation
from gtddp_compile.graph import ControlGraph, Stage
from gtddp_compile.lowering.decide import plan_layers
from gtddp_compile.lowering.plan import Asked, Contraction, Plan, StagePlan
from gtddp_compile.lowering.segments import choose_segments
from gtddp_compile.passes.p06_derive import Derived, cut_after


def simplify(
    derived: Derived, form: CollapsedForm, asked: Asked, *, contracts: bool, statistics: bool, recompute: bool
) -> Plan:
    """Decide what lives.

    Args:
        derived: the derivations of every stage.
        form: the collapsed equations.
        asked: what the plan takes over as it is.
        contracts: whether ``c`` is there: feedback is on, and not ``"open"``.
        statistics: whether the curvature learns from ``Q_u``.
        recompute: whether the trajectory is run again instead of kept.
    """
    graph = derived.graph
    feeds = _contractions(graph) if contracts else ()
    needs_alpha = statistics or form.name in ("substituted", "printed")
    rerun = _stages_to_rerun(graph, feeds)
    seen_at, made_at = _by_stage(feeds, len(graph.stages))
    joint = form.name == "joint"
    stages = tuple(
        StagePlan(
            index=stage.index,
            players=tuple(graph.player[name] for name in stage.players),
            pulled=tuple(name for name in stage.consumed if _moves(graph, name) and not name.startswith("params:")),
            opened=_opened(graph, stage),
            feeds=tuple(seen_at[stage.index]),
            contracts=tuple(made_at[stage.index]),
            rerun=stage.index in rerun,
            statistics=needs_alpha,
            blocks=derived.stages[stage.index].blocks,
        )
        for stage in graph.stages
    )
    removed = _describe(graph, stages, linear=asked.linear, factored=form.factored, joint=joint)
    if asked.decay and asked.reach:
        asked = replace(asked, reach=0.0)
        removed += ("no reach: the loss would count more, and the coupled weight decay would not",)
    plan = Plan(
        **vars(asked),
        graph=graph,
        form=form if asked.linear else without_decay(form),
        stages=stages,
        removed=removed,
        segments=choose_segments(graph, gradients=form.name != "base") if recompute else None,
    )
    return replace(plan, layers=plan_layers(plan))


def _moves(graph: ControlGraph, name: str) -> bool:
    """Whether a value can change within a step: some player acts on it."""
    return name in graph.value and not graph.value[name].fixed


def _opened(graph: ControlGraph, stage: Stage) -> tuple[str, ...]:
    after = set(cut_after(graph, stage))
    return tuple(
        name for name in stage.produced if name in after and _moves(graph, name) and not graph.value[name].control
    )


def _contractions(graph: ControlGraph) -> tuple[Contraction, ...]:
    """One for every (moved value, reader) pair that some later stage's decision can see."""
    found = []
    for value in graph.values:
        since = value.born
        for reader in () if value.fixed else graph.segments(value.name):
            found.append(Contraction(value.name, reader, since, value.born))
            since = value.born if value.control else reader
    return tuple(c for c in found if c.since + 1 < len(graph.stages))


def _by_stage(
    feeds: tuple[Contraction, ...], stages: int
) -> tuple[dict[int, list[Contraction]], dict[int, list[Contraction]]]:
    """Contractions by the stages whose decision they enter, and by the stage that changes their value."""
    seen: dict[int, list[Contraction]] = {t: [] for t in range(stages)}
    made: dict[int, list[Contraction]] = {t: [] for t in range(stages)}
    for contraction in feeds:
        for t in range(contraction.since + 1, min(contraction.reader, stages - 1) + 1):
            seen[t].append(contraction)
        made[contraction.born].append(contraction)
    return seen, made


def _stages_to_rerun(graph: ControlGraph, feeds: tuple[Contraction, ...]) -> set[int]:
    """Stages that compute a contracted value, and those that such a stage reads from: state, masks, whole numbers."""
    needed = {c.born for c in feeds}
    wanted: set[str] = set()
    for stage in reversed(graph.stages):
        if stage.index in needed or not wanted.isdisjoint(stage.ops):
            needed.add(stage.index)
            wanted.update(o for name in graph.with_expressions(stage.ops) for o in graph.op(name).operands)
    return needed


def without_decay(form: CollapsedForm) -> CollapsedForm:
    """The form with ``ℓ_u = 0``: the drift vanishes from every equation, and with it ``y = y'``.

    Where the linear term is kept apart, the drift still has the ordinary gradient in it.
    """
    zero = ("l",) if form.factored else ("s", "l")
    backward = {name: _without(zero, equation) for name, equation in form.backward.items()}
    forward = {name: _without(zero, equation) for name, equation in form.forward.items()}
    return replace(form, backward=backward, forward=forward)


@cache
def _without(zero: tuple[str, ...], equation: Equation) -> Equation:
    """The equation where symbols are zero; forms of every network share their equations."""
    gone = {symbol: 0 * symbol for symbol in equation.expression.free_symbols if str(symbol) in zero}
    return replace(equation, expression=equation.expression.subs(gone).doit())


def _describe(
    graph: ControlGraph, stages: tuple[StagePlan, ...], *, linear: bool, factored: bool, joint: bool
) -> tuple[str, ...]:
    dead = [str(stage.index) for stage in stages if not stage.feeds]
    idle = [str(stage.index) for stage in stages if not stage.rerun]
    fixed = [value.name for value in graph.values if value.fixed]
    said = []
    if joint:
        said.append("no forward sweep: on the linearised dynamics the weights are the same at every stage")
    elif dead:
        said.append(f"feedback gain dead at stage {', '.join(dead)}: nothing before it has moved")
    if idle and not joint:
        said.append(f"stage {', '.join(idle)} not run again: nobody compares its new values")
    if fixed:
        said.append(f"no gradient for {', '.join(fixed)}: no player acts on it")
    if not linear and not factored:
        said.append("drift s = 0: no coupled weight decay, no inertia")
    return tuple(said)
