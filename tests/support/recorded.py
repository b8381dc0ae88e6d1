"""Recordings of small models, and what a recording computes: in lines that share nothing with the compiler."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile import kernels
from gtddp_compile.frontends import trace_export, trace_functional, trace_symbolically
from gtddp_compile.graph import BufferRef, OpGraph, ParamRef, map_leaves
from support.networks import make

FRONT_ENDS = {"fx": trace_symbolically, "export": trace_export, "functional": trace_functional}


def batch(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(seed)).double()


def values(graph: OpGraph, model: nn.Module, *inputs: Tensor) -> Any:
    """What the normal form computes."""
    params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    found: dict[str, Any] = dict(zip(graph.inputs, inputs, strict=True))

    def value(leaf: Any) -> Any:
        if isinstance(leaf, ParamRef):
            return params[leaf.name]
        return buffers[leaf.name] if isinstance(leaf, BufferRef) else found[leaf.name]

    for op in graph.ops:
        if op.target is not None:
            args, kwargs = map_leaves((op.args, dict(op.kwargs)), value)
            found[op.name] = op.target(*args, **kwargs)
    return map_leaves(graph.output, value)


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def assert_recorded_by(graph: OpGraph, frontend: str) -> None:
    """By this front end; with a torch older than the tested one perhaps by one that is asked later."""
    asked = ("fx", "export", "eager")
    later = torch.__version__ < "2.13" and graph.frontend in asked[asked.index(frontend) :]
    assert later or graph.frontend == frontend, graph.frontend


def net(forward: Callable[..., object]) -> nn.Module:
    return make(forward, a=(4, 5), b=(5, 3))


Params = tuple[Tensor | None, ...]


def draw(*shape: int, seed: int = 0) -> Tensor:
    """A normal tensor in double precision."""
    generator = torch.Generator().manual_seed(seed + sum(shape) + 31 * len(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def layer(
    prefix: str, operands: tuple[Tensor, ...], g: Tensor, params: Params, wants: tuple[bool, ...], **options: Any
) -> kernels.Layer:
    """What the kernels of ``prefix`` are called with."""
    kinds: dict[str, Any] = {"conv": kernels.Geometry, "norm": kernels.Norm, "generic": kernels.Operation}
    if prefix == "embedding" and options:
        kinds[prefix] = kernels.Table
    return kernels.Layer(operands, g, params, wants, kinds[prefix](**options) if prefix in kinds else None)
