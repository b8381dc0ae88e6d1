"""The fast backend: run the generated code."""

from __future__ import annotations

import linecache
import math
import operator
from collections.abc import Callable, Generator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.passes.p10_emit import emit_micro
from gtddp_compile.program import UpdateProgram
from gtddp_compile.runtime.method import BaseMethod

Step = Callable[..., Tensor]
Request = tuple[str, tuple[Any, ...]]
"""A method of the base method, and what one micro-batch would call it with."""

Micro = Generator[Request, Any, Tensor]


class FastBackend:
    """Executes ``UpdateProgram.code``; tracebacks and debuggers show its lines."""

    def __init__(self, program: UpdateProgram) -> None:
        self.program = program
        self._step: Step = _load(program, program.code, "step")

    def run(
        self,
        m: BaseMethod,
        p: dict[str, Tensor],
        b: dict[str, Tensor],
        q: dict[str, Tensor],
        inputs: tuple[Any, ...],
        targets: Any,
    ) -> Tensor:
        """Both sweeps: fills ``q`` and advances ``b``'s running statistics; returns the per-sample losses."""
        with torch.no_grad():
            return self._step(m, p, b, q, self._again(b), inputs, targets)

    def micro(
        self,
        m: BaseMethod,
        p: dict[str, Tensor],
        b: dict[str, Tensor],
        q: dict[str, Tensor],
        inputs: tuple[Any, ...],
        targets: Any,
    ) -> Micro:
        """The same for one micro-batch of an update; asks for what the update's micro-batches have in common."""
        found: Micro = self._micro_step(m, p, b, q, self._again(b), inputs, targets)
        return found

    @cached_property
    def _micro_step(self) -> Callable[..., Micro]:
        code = self.program.code + "\n\n" + emit_micro(self.program.lowered)
        found: Callable[..., Micro] = _load(self.program, code, "micro_step")
        return found

    def _again(self, buffers: dict[str, Tensor]) -> dict[str, Tensor | None]:
        """Buffers as everything but the first sweep sees them: those that advance are not there."""
        advancing = {name for op in self.program.graph.ops.ops for name in op.advances}
        return {name: None if name in advancing else value for name, value in buffers.items()}


def _load(program: UpdateProgram, code: str, name: str) -> Any:
    filename = f"<gtddp_compile {program.graph.name} {name} {id(program):x}>"
    namespace: dict[str, Any] = {"torch": torch, "F": F, "operator": operator, "math": math}
    namespace.update((name, getattr(kernels, name)) for name in kernels.__all__)
    namespace.update(program.emitted.constants)
    linecache.cache[filename] = (len(code), None, code.splitlines(keepends=True), filename)
    exec(compile(code, filename, "exec"), namespace)
    return namespace[name]
