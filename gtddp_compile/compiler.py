"""The pipeline from a model to a program: every pass in order, nothing else."""

from __future__ import annotations

from typing import Any

from torch import nn

from gtddp_compile.curvature import Curvature
from gtddp_compile.graph import ControlGraph
from gtddp_compile.options import Options
from gtddp_compile.passes import (
    augment,
    collapse,
    derive,
    emit,
    find_players,
    find_shortcuts,
    lower,
    normalise,
    schedule,
    simplify,
)
from gtddp_compile.passes.p07_collapse import form_name
from gtddp_compile.program import UpdateProgram


def build_graph(model: nn.Module, inputs: tuple[Any, ...], options: Options) -> ControlGraph:
    """Passes 1 to 5: the control graph."""
    players = find_players(normalise(model, inputs))
    return augment(schedule(find_shortcuts(players), options.schedule), type(model).__name__)


def build_program(graph: ControlGraph, options: Options, curvature: Curvature, *, decay: bool) -> UpdateProgram:
    """Passes 6 to 10: derivation to code. ``decay``: whether any group has coupled weight decay."""
    form_name(options.recursion, options.coupling_kind, feedback=bool(options.feedback))
    derived = derive(graph, options.recursion)
    form = collapse(derived, options.coupling_kind, feedback=bool(options.feedback))
    plan = simplify(
        derived,
        form,
        coupling=options.coupling,
        feedback=options.feedback,
        statistics=curvature.needs_statistics,
        decay=decay,
        clip=options.feedback_clip,
    )
    lowered = lower(plan)
    return UpdateProgram(graph, derived, plan.form, lowered, emit(lowered), options, curvature.name)
