"""The generated step through ``torch.compile``, as one graph.

What a graph cannot do is done around it: the first step runs as it is (it compares the loss with the user's own), and
whether the loss is finite and every Cholesky factor succeeded is looked at once, when the graph is done. A step whose
Gram matrix was not positive definite to rounding is taken back and made again without ``torch.compile``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.methods.curvature import by_parameter
from gtddp_compile.runtime.method import BaseMethod, GivenUp


class NotFactored(Exception):
    """A Cholesky factor failed in a step that does not look at it: nothing may be taken from it."""


class CompiledStep:
    """``step`` by ``torch.compile(fullgraph=True)``.

    Args:
        step: the generated function.
        options: ``True``, or keyword arguments of ``torch.compile`` (``backend``, ``mode``, ``dynamic``).

    Raises:
        CompileError: this torch cannot trace derivatives.
    """

    def __init__(self, step: Callable[..., Tensor], options: bool | Mapping[str, Any]) -> None:
        if not hasattr(torch._dynamo.config, "trace_autograd_ops"):
            raise CompileError(
                f"torch {torch.__version__} cannot take autograd.grad into a graph of torch.compile",
                "Use a newer torch (2.13 is tested), or leave compile out",
            )
        chosen = dict(options) if isinstance(options, Mapping) else {}
        try:
            self._step = torch.compile(step, **{"dynamic": True, **chosen, "fullgraph": True})
        except (TypeError, RuntimeError) as error:
            raise CompileError(
                f"torch.compile does not take compile={chosen}: {error}", "Give options that it has: backend, mode"
            ) from error

    def __call__(self, m: BaseMethod, *arguments: Any) -> Tensor:
        """One step.

        Raises:
            GivenUp: the loss is not finite.
            NotFactored: a factor failed.
        """
        m.rates_in_tensors()
        with torch._dynamo.config.patch(trace_autograd_ops=True):  # autograd.grad inside the graph
            phi = self._step(m, *arguments)
        check_done(m)
        return phi


def check_done(m: BaseMethod) -> None:
    """Look once at whether everything that a step relied on holds: the only time it waits for the device.

    A step has to: what it returns are new parameters in place of the old ones, which only the host can take back.

    Raises:
        GivenUp: the loss or the update is not finite.
        NotFactored: a factor failed.
    """
    assert m.loss is not None
    weights = [stage["weights"] for stage in m.figures.values() if "weights" in stage]
    looked_at = (m.loss, m.updates_sum(), *weights)
    finite, moved, *factored = torch.stack([value.isfinite().all() for value in looked_at]).tolist()
    if not finite:
        raise GivenUp(m.loss)
    if not all(factored):
        raise NotFactored
    if not moved:
        m.check_finite()


def refuse_uncompilable(graph: ControlGraph, curvature: str, kronecker: bool, factored: bool) -> None:
    """What ``torch.compile`` cannot take as one graph."""
    random = [op for op in graph.ops.ops if op.random]
    if random:
        raise random[0].refusal(
            "compile=True: the network draws random numbers, which both sweeps have to share, and the state of the "
            "generator cannot be set inside a graph",
            "Leave compile out, or take the random layers out",
        )
    if kronecker:
        raise CompileError(
            f"compile=True: {curvature} decomposes matrices, and decides from its step count when",
            f"Leave compile out, or use {by_parameter()}",
        )
    if factored:
        raise CompileError(
            "compile=True: terminal factors of several columns are made by vmap over autograd",
            "Leave compile out, or use terminal='gradient' or 'geometric'",
        )
