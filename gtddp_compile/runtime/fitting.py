"""Whether a program that was made elsewhere is the program of this model, and if not, where they part."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.traced import parameter_infos
from gtddp_compile.graph import ControlGraph, Op
from gtddp_compile.runtime.compiler import build_graph
from gtddp_compile.runtime.program import UpdateProgram

REMEDY = "Build the model that the program was exported from, or compile one for this model (without program=)"


def check_fit(program: UpdateProgram, model: nn.Module) -> None:
    """The model has the program's parameters, operations and stages.

    It is traced with inputs of the shapes the program was compiled for; dtypes may differ.
    """
    _check_parameters(program.graph, model)
    inputs = _inputs(program.graph, next(model.parameters()))
    graph = build_graph(model, inputs, program.options)
    for theirs, ours in zip_longest(program.graph.ops.ops, graph.ops.ops):
        _check_operation(theirs, ours)
    if not _same(program.graph.ops.output, graph.ops.output):
        raise CompileError("the model returns other values than the program's", REMEDY)
    for theirs_stage, ours_stage in zip_longest(program.graph.stages, graph.stages):
        if theirs_stage != ours_stage:
            raise CompileError(
                f"the program's stage {theirs_stage} is {ours_stage} in this model, though their operations agree",
                REMEDY,
            )


def _check_parameters(graph: ControlGraph, model: nn.Module) -> None:
    theirs, ours = graph.ops.parameter_info, {info.name: info for info in parameter_infos(model)}
    for name in dict.fromkeys([*theirs, *ours]):
        their, our, remedy = theirs.get(name), ours.get(name), REMEDY
        if our is None:
            why = f"the program has a parameter {name!r}, the model has none"
        elif their is None:
            why = f"the model has a parameter {name!r}, the program has none"
        elif their.shape != our.shape:
            why = f"the program's {name!r} has shape {their.shape}, the model's {our.shape}"
        elif their.trainable != our.trainable:
            words = ("trained", "frozen") if their.trainable else ("frozen", "trained")
            why = f"{name!r} is {words[0]} in the program and {words[1]} in the model"
            remedy = "Set requires_grad as the program has it"
        else:
            continue
        raise CompileError(why, remedy, module=name.rpartition(".")[0])


def _inputs(graph: ControlGraph, like: Tensor) -> tuple[Tensor, ...]:
    """Inputs of the program's shapes; floating ones of the model's dtype, whole numbers zero."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in graph.ops.inputs:
        op = graph.op(name)
        floating = op.dtype is None or op.dtype.is_floating_point
        value = torch.rand(op.shape or (), generator=generator) if floating else torch.zeros(op.shape or ())
        found.append(value.to(like.device, like.dtype if floating else op.dtype))
    return tuple(found)


def _check_operation(theirs: Op | None, ours: Op | None) -> None:
    if theirs is None or ours is None:
        op = theirs or ours
        assert op is not None
        who = ("the program", "the model") if theirs is not None else ("the model", "the program")
        raise op.refusal(f"{who[0]} goes on with it where {who[1]} ends", REMEDY)
    if (theirs.kind, theirs.name) != (ours.kind, ours.name):
        raise ours.refusal(f"the program has {theirs.kind} ({theirs.name}) here", REMEDY)
    if theirs.target is not ours.target and theirs.target != ours.target:
        raise ours.refusal("the program computes it by another function", REMEDY)
    if not _same(theirs.args, ours.args) or not _same(dict(theirs.kwargs), dict(ours.kwargs)):
        raise ours.refusal(f"the program has it {_arguments(theirs)}, the model {_arguments(ours)}", REMEDY)
    if theirs.shape != ours.shape:
        raise ours.refusal(f"its value has shape {theirs.shape} in the program, {ours.shape} here", REMEDY)


def _arguments(op: Op) -> str:
    shown = [getattr(arg, "name", None) or repr(arg) for arg in op.args]
    shown += [f"{key}={getattr(value, 'name', None) or repr(value)}" for key, value in op.kwargs.items()]
    return f"of ({', '.join(shown)})"


def _same(left: Any, right: Any) -> bool:
    """Whether two argument trees are equal, tensors by value."""
    if isinstance(left, Tensor) or isinstance(right, Tensor):
        both = isinstance(left, Tensor) and isinstance(right, Tensor)
        return both and left.shape == right.shape and bool((left == right).all())
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return list(left) == list(right) and all(_same(left[key], right[key]) for key in left)
    return bool(left == right)
