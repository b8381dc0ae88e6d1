"""From a control graph to what its program has to compute: the symbolic passes."""

from __future__ import annotations

from gtddp_compile.cooperation import BY_PARAMETER, MetricRules
from gtddp_compile.curvature import Curvature, Kronecker
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.options import Options, Sketch
from gtddp_compile.passes import collapse, derive, simplify
from gtddp_compile.passes.p06_derive import Derived
from gtddp_compile.passes.p07_collapse import form_name
from gtddp_compile.plan import Plan
from gtddp_compile.terminal import terminal_weight


def plan_program(graph: ControlGraph, options: Options, curvature: Curvature, *, decay: bool) -> tuple[Derived, Plan]:
    """Passes 6 to 8: derivation, collapse, plan. ``decay``: whether any group has coupled weight decay."""
    form_name(options.recursion, options.coupling_kind, feedback=bool(options.feedback))
    derived = derive(graph, options.recursion, metric_rules(options, curvature))
    refuse_printed(derived)
    form = collapse(derived, options.coupling_kind, feedback=bool(options.feedback), factored=options.factored)
    plan = simplify(
        derived,
        form,
        coupling=options.coupling,
        feedback=options.feedback,
        statistics=curvature.needs_statistics,
        decay=decay,
        clip=options.feedback_clip,
        metric=curvature.metric,
        gram="sketch" if isinstance(options.gram, Sketch) else options.gram,
        columns=options.gram.columns if isinstance(options.gram, Sketch) else 0,
        memory=options.memory,
        terminal=terminal_weight(options.terminal_kind),
    )
    return derived, plan


def refuse_printed(derived: Derived) -> None:
    """Eq. 23 as printed has ``Q_uu⁻¹`` and ``Q_vv⁻¹`` of each player alone: there is no printed form with cross terms.

    Raises:
        CompileError: a coalition is coupled by its curvature.
    """
    for stage in derived.stages if derived.recursion == "printed" else ():
        for block in stage.blocks:
            if len(block.players) > 1:
                names = ", ".join(player.name for player in block.players)
                raise CompileError(
                    f"recursion='printed' has no form for cross terms of {names}: Eq. 23 is printed without",
                    "Use cooperative=False, or recursion='substituted' (the derived form)",
                    module=block.players[0].name,
                )


def metric_rules(options: Options, curvature: Curvature) -> MetricRules:
    """Which players are in one metric; with feedback off only where ``cooperative=True`` was said (Proposition 4)."""
    if not isinstance(curvature, Kronecker):
        return BY_PARAMETER
    return MetricRules(True, curvature.small, options.cooperates, curvature.shares)
