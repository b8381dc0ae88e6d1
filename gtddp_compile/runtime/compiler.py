"""The pipeline from a model to a program, and which programs one model has been compiled to."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends import beginning
from gtddp_compile.graph import ControlGraph, Op, OpGraph
from gtddp_compile.kernels import random_state
from gtddp_compile.methods.curvature import Curvature
from gtddp_compile.methods.setting import Setting
from gtddp_compile.methods.terminal import at_depth
from gtddp_compile.options import Options
from gtddp_compile.passes import (
    augment,
    distribute,
    emit,
    find_players,
    find_shortcuts,
    lower,
    normalise,
    recompute,
    schedule,
)
from gtddp_compile.passes.p01_normalise import still_holds
from gtddp_compile.runtime.dense.backend import DenseBackend
from gtddp_compile.runtime.fast import FastBackend
from gtddp_compile.runtime.model import ModelView
from gtddp_compile.runtime.planning import plan_program
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.runtime.ranks import Ranks, check_shared_model

Backend = FastBackend | DenseBackend
KEPT = 8
PATHS = 8
"""Paths through a model that decides on values."""


def build_graph(model: nn.Module, inputs: tuple[Any, ...], options: Options) -> ControlGraph:
    """Passes 1 to 5: the control graph."""
    ops = with_statistics(normalise(model, inputs), corrected=options.running_statistics == "corrected")
    return control_graph(ops, options.schedule, type(model).__name__)


def with_statistics(graph: OpGraph, *, corrected: bool) -> OpGraph:
    """Batch-norms whose running statistics keep nothing of what they began with (docs/theory.md#running-statistics),
    or the model's own: the reference that a recording is compared with.
    """

    def own(op: Op) -> Op:
        kwargs = {name: value for name, value in op.kwargs.items() if name != "corrected"}
        return replace(op, kwargs={**kwargs, "corrected": True} if corrected else kwargs)

    return replace(graph, ops=tuple(own(op) if op.kind == "batch_norm" and op.advances else op for op in graph.ops))


def control_graph(ops: OpGraph, how: str | Mapping[str, int], name: str) -> ControlGraph:
    """Passes 2 to 5: from the normal form, without the model. ``how``: the schedule; ``name``: of the network."""
    return augment(schedule(find_shortcuts(find_players(ops)), how), name)


def build_program(
    graph: ControlGraph, options: Options, curvature: Curvature, *, decay: bool, setting: Setting | None = None,
    ranks: int = 1,
) -> UpdateProgram:  # fmt: skip
    """Passes 6 to 12: derivation to code. ``decay``: whether any group has coupled weight decay."""
    options = replace(options, terminal=at_depth(options.terminal, graph.unbroken, graph.depth))
    derived, plan = plan_program(graph, options, curvature, decay=decay, ranks=ranks)
    lowered = distribute(recompute(lower(plan)))
    return UpdateProgram(graph, derived, plan.form, lowered, emit(lowered), options, curvature.name, setting)


class Specialisations:
    """The programs of one model: one for every state of its modules, and where torch.export built sizes in, for those.

    The last :data:`KEPT` states are kept, so that a model may alternate between them without being compiled again.
    """

    def __init__(self, view: ModelView, options: Options, curvature: Curvature, ranks: Ranks | None = None) -> None:
        self._view, self._options, self._curvature, self._ranks = view, options, curvature, ranks
        self._graphs: dict[Any, list[ControlGraph]] = {}
        self._known: dict[tuple[int, Any], bool] = {}
        self._programs: dict[tuple[int, bool], tuple[UpdateProgram, Backend]] = {}
        self._compiled = 0
        self._skipped: set[tuple[Any, str]] = set()
        self._said: set[str] = set()

    def adopt(self, program: UpdateProgram) -> None:
        """Take a program that was made elsewhere as that of the model as it is now."""
        backend = FastBackend(program) if self._options.backend == "fast" else DenseBackend(program)
        self._graphs[self._structure(program.graph)] = [program.graph]
        self._programs[id(program.graph), program.lowered.plan.decay] = (program, backend)

    def program_for(
        self, inputs: tuple[Any, ...], *, decay: bool, left: tuple[ControlGraph, ...] = ()
    ) -> tuple[UpdateProgram, Backend]:
        """The program for the model as it is now and these inputs, compiled if there is none yet.

        Args:
            inputs: the batch.
            decay: whether any group has coupled weight decay.
            left: graphs along whose path these inputs do not lead.

        Raises:
            CompileError: the model cannot be compiled, or refuses the inputs.
        """
        graph = self._graph_for(inputs, left)
        if self._ranks is not None:
            check_shared_model(graph, self._view.model)
        if (id(graph), decay) not in self._programs:
            program = build_program(graph, self._options, self._curvature, decay=decay,
                                    ranks=1 if self._ranks is None else self._ranks.size)  # fmt: skip
            fast = self._options.backend == "fast"
            backend = FastBackend(program, self._ranks) if fast else DenseBackend(program)
            self._programs[id(graph), decay] = (program, backend)  # holds the graph, so its id stays its own
        return self._programs[id(graph), decay]

    def _graph_for(self, inputs: tuple[Any, ...], left: tuple[ControlGraph, ...]) -> ControlGraph:
        structure = self._view.signature(self._skipped)
        gone = {id(graph) for graph in left}
        for graph in self._graphs.get(structure, ()):
            if id(graph) not in gone and self._holds(graph, inputs):
                return graph
        if len(gone) >= PATHS:
            (read, *_) = left[-1].guards
            raise CompileError(
                f"the path through the model depends on values, and {PATHS} batches took another one each",
                "Replace the decision by torch.where",
                module=read.module,
                source=read.source or None,
            )
        with beginning(random_state() if left else None):
            graph = build_graph(self._view.model, inputs, self._options)
        if graph.guards and not gone:
            self._say_guarded(graph)
        structure = self._structure(graph)
        if structure not in self._graphs:
            self._forget()
        self._graphs.setdefault(structure, []).append(graph)
        return graph

    def _say_guarded(self, graph: ControlGraph) -> None:
        """A model that decides on values is compiled for the path that its inputs take: not in silence, but once."""
        where = ", ".join(dict.fromkeys(f"{op.source or op.module or graph.name}" for op in graph.guards))
        if where in self._said:
            return
        self._said.add(where)
        warnings.warn(
            f"the path through the model depends on values (at {where}); the program takes that of the example inputs "
            f"and checks it at every step; a batch that leads elsewhere is compiled again, up to {PATHS} paths",
            stacklevel=3,
        )

    def _structure(self, graph: ControlGraph) -> Any:
        """The state of the modules, but for what their forward passes write."""
        self._skipped |= self._view.owned(graph.ops.kept)
        return self._view.signature(self._skipped)

    def _holds(self, graph: ControlGraph, inputs: tuple[Any, ...]) -> bool:
        ops = with_statistics(graph.ops, corrected=False)
        if ops.frontend == "fx":
            return still_holds(ops, self._view.model, inputs)
        key = (id(graph), tuple((value.shape, value.dtype) for value in inputs))
        if key not in self._known:
            holds = still_holds(ops, self._view.model, inputs)
            if graph.guards and not holds:  # others of this shape may take its path
                return False
            self._known[key] = holds
        return self._known[key]

    def _forget(self) -> None:
        """Make room for one more state of the modules."""
        self._compiled += 1
        if self._compiled == KEPT + 1:
            warnings.warn(
                f"the program was derived {KEPT} times because modules were replaced, changed between training and "
                "evaluation, or had attributes changed; each new state compiles again (buffers may change freely)",
                stacklevel=2,
            )
        if len(self._graphs) >= KEPT:
            oldest = next(iter(self._graphs))
            gone = {id(graph) for graph in self._graphs.pop(oldest)}
            self._programs = {key: value for key, value in self._programs.items() if key[0] not in gone}
            self._known = {key: value for key, value in self._known.items() if key[0] not in gone}
