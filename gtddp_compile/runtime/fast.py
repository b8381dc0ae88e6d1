"""The fast backend: run the generated code."""

from __future__ import annotations

import linecache
import math
import operator
from collections.abc import Callable, Generator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import PLAIN
from gtddp_compile.passes.p12_emit import emit_micro
from gtddp_compile.runtime.compiled import CompiledStep, check_done, refuse_uncompilable
from gtddp_compile.runtime.method import BaseMethod
from gtddp_compile.runtime.precision import Precision
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.runtime.ranks import Ranks

Step = Callable[..., Tensor]
Request = tuple[str, tuple[Any, ...]]
"""A method of the base method, and what one micro-batch would call it with."""

Micro = Generator[Request, Any, Tensor]


class FastBackend:
    """Executes ``UpdateProgram.code``; tracebacks and debuggers show its lines."""

    def __init__(self, program: UpdateProgram, ranks: Ranks | None = None) -> None:
        self.program, self._ranks = program, ranks
        self._step: Step = self._load(program.code, "step")
        options = program.options
        self._compiled: CompiledStep | None = None
        if options.compile is not False:
            kronecker = program.lowered.plan.metric not in PLAIN
            refuse_uncompilable(program.graph, program.curvature, kronecker, program.form.factored)
            self._compiled = CompiledStep(self._step, options.compile)
        self._others: dict[tuple[str, Precision, bool], Callable[..., Any]] = {}

    def run(
        self, m: BaseMethod, p: dict[str, Tensor], b: dict[str, Tensor], q: dict[str, Tensor], inputs: tuple[Any, ...],
        targets: Any, *, plainly: bool = False,
    ) -> Tensor:  # fmt: skip
        """Both sweeps: fills ``q`` and advances ``b``'s running statistics; returns the per-sample losses.

        On an accelerator it waits for the device once, at the end (``runtime.compiled.check_done``), but at the first
        step.

        ``plainly``: without torch.compile, whatever the options say, and looking at every factor as it is made.
        """
        precision = self._look_at(m, p, inputs)
        alone = self.program.lowered.plan.ranks == 1  # others are asked before anything is written
        m.deferred = alone and not plainly and not m.first and next(iter(p.values())).device.type != "cpu"
        other = precision.mixed or m.deferred
        step = self._function("step", precision, m.deferred) if other else self._step
        if self._compiled is not None and plainly is False and not m.first:
            step = self._compiled
        if self._ranks is not None:
            self._ranks.begin_alike(self.program.lowered, m, p, b, inputs)
        with torch.no_grad(), precision.outside():
            phi = step(m, p, b, q, self._again(b), inputs, targets)
            if self._ranks is not None:
                b.update(self._ranks.first({name: b[name] for name in sorted(self.program.graph.ops.advancing)}))
            if m.deferred and step is not self._compiled:
                check_done(m)
            elif step is not self._compiled:
                m.check_finite()
        return phi

    def micro(
        self, m: BaseMethod, p: dict[str, Tensor], b: dict[str, Tensor], q: dict[str, Tensor], inputs: tuple[Any, ...],
        targets: Any,
    ) -> Micro:  # fmt: skip
        """The same for one micro-batch of an update; asks for what the update's micro-batches have in common."""
        precision = self._look_at(m, p, inputs)
        found: Micro = self._function("micro_step", precision)(m, p, b, q, self._again(b), inputs, targets)
        return found

    def _look_at(self, m: BaseMethod, p: dict[str, Tensor], inputs: tuple[Any, ...]) -> Precision:
        """What is here and now: the precision, and how many samples there are.

        Raises:
            CompileError: a compiled step has no such precision.
        """
        m.precision, m.samples = Precision.around(p.values(), m.scale), inputs[0].shape[0]
        if self._compiled is not None and m.precision.mixed:
            where = "under autocast" if m.precision.autocast else "with bfloat16 or half parameters"
            raise CompileError(f"compile=True {where}", "Leave one of them out")
        return m.precision

    def _function(self, name: str, precision: Precision, deferred: bool = False) -> Callable[..., Any]:
        """The program, or its form for micro-batches, in a precision; loaded when it is first asked for."""
        key = name, precision, deferred
        if any(other.scale != precision.scale for _, other, _ in self._others):
            self._others.clear()
        if key not in self._others:
            code = self.program.code + ("" if name == "step" else "\n\n" + emit_micro(self.program.lowered))
            self._others[key] = self._load(code, name, precision, deferred)
        return self._others[key]

    def _again(self, buffers: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Buffers as everything but the first sweep sees them: those that advance are not there."""
        advancing = self.program.graph.ops.advancing
        return {name: None if name in advancing else value for name, value in buffers.items()}

    def _load(self, code: str, name: str, precision: Precision | None = None, deferred: bool = False) -> Any:
        program = self.program
        filename = f"<gtddp_compile {program.graph.name} {name} {id(program):x}>"
        namespace: dict[str, Any] = {"torch": torch, "F": F, "operator": operator, "math": math, "ranks": self._ranks}
        namespace.update(kernels.KERNELS)
        if deferred:
            namespace["factor"] = kernels.factor_unchecked
        namespace.update(program.emitted.constants)
        linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
        exec(compile(code, filename, "exec"), namespace)
        if precision is not None and precision.mixed:
            network = {function.name for function in program.lowered.functions if function.params is None}
            namespace.update({key: precision.function(key, value, network) for key, value in namespace.items()})
        return namespace[name]
