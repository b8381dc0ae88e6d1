"""The fast backend: run the generated code."""

from __future__ import annotations

import linecache
import math
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.program import UpdateProgram
from gtddp_compile.runtime.method import BaseMethod

Step = Callable[..., Tensor]


class FastBackend:
    """Executes ``UpdateProgram.code``; tracebacks and debuggers show its lines."""

    def __init__(self, program: UpdateProgram) -> None:
        self.program = program
        self._step: Step = _load(program)

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
        advancing = {name for op in self.program.graph.ops.ops for name in op.advances}
        again: dict[str, Tensor | None] = {name: None if name in advancing else value for name, value in b.items()}
        with torch.no_grad():
            return self._step(m, p, b, q, again, inputs, targets)


def _load(program: UpdateProgram) -> Step:
    filename = f"<gtddp_compile {program.graph.name} {id(program):x}>"
    namespace: dict[str, Any] = {"torch": torch, "F": F, "operator": operator, "math": math}
    namespace.update((name, getattr(kernels, name)) for name in kernels.__all__)
    namespace.update(program.emitted.constants)
    linecache.cache[filename] = (len(program.code), None, program.code.splitlines(keepends=True), filename)
    exec(compile(program.code, filename, "exec"), namespace)
    step: Step = namespace["step"]
    return step
