"""The second front end: torch.export, for what torch.fx cannot trace."""

from __future__ import annotations

import inspect
import io
import logging
import operator
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.symbolic_shapes import is_concrete_int
from torch.utils import _pytree as pytree

from gtddp_compile import kernels
from gtddp_compile.frontends.canonical import bound
from gtddp_compile.frontends.leaving import Reads
from gtddp_compile.frontends.recurrent import MODES, recurrent_graph
from gtddp_compile.frontends.traced import Call, Traced, Untraceable, is_users, named, raised_at
from gtddp_compile.graph import BufferRef, Method, ParamRef, Ref

BATCH_NORMS = ("aten::batch_norm", "aten::_native_batch_norm_legit_functional")
DROPOUT = "aten::native_dropout"
RECURRENT = frozenset(f"aten.{name}.input" for name in MODES)
LSTM_CELL = "aten::lstm_cell"
FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def trace_export(model: nn.Module, inputs: tuple[Any, ...]) -> Traced:
    """Record a model by ``torch.export``, operators as the model called them."""
    return _read(_export(model, inputs), model)


def trace_functional(model: nn.Module, inputs: tuple[Any, ...]) -> Traced:
    """The same after torch's own functionalisation: for in-place operations seen through several views."""
    program = _export(model, inputs)
    try:
        with _quiet():
            program = program.run_decompositions({})
    except Exception as error:  # it runs the operations of the user's model, which may raise anything
        raise Untraceable(f"torch.export: {_said(error)}") from error
    return _read(program, model)


def _said(error: Exception) -> str:
    """The first line of what torch says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"


def _export(model: nn.Module, inputs: tuple[Any, ...]) -> ExportedProgram:
    try:
        given = inspect.signature(model.forward).bind(*inputs).arguments
        shapes = {name: pytree.tree_map(_batch_axis, value) for name, value in given.items()}
        with _quiet(), torch.enable_grad(), Reads(model):
            program = torch.export.export(model, inputs, dynamic_shapes=shapes, strict=False)
    except Untraceable as refusal:
        raise Untraceable(f"torch.export: {refusal.why}", source=refusal.source) from refusal
    except Exception as error:  # the user's own code runs here and may raise anything
        raise Untraceable(f"torch.export: {_said(error)}", source=raised_at(error.__traceback__)) from error
    _check_asserted(program)
    return program


def _check_asserted(program: ExportedProgram) -> None:
    """torch.export follows decisions on numbers read from values, and drops the assertion of some."""
    values = [node.meta.get("val") for node in program.graph.nodes]
    environments: set[Any] = {value.fake_mode.shape_env for value in values if isinstance(value, FakeTensor)}
    if any(environment.deferred_runtime_asserts for environment in environments - {None}):
        raise Untraceable("torch.export: it follows a number read from values")


@contextmanager
def _quiet() -> Iterator[None]:
    """What torch.export says of its inner workings is not for our users: a refusal says it in one sentence."""
    loggers = [logging.getLogger("torch.fx.experimental.symbolic_shapes"), logging.getLogger("torch.export")]
    before = [logger.disabled for logger in loggers]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, disabled in zip(loggers, before, strict=True):
            logger.disabled = disabled


def _batch_axis(value: Any) -> Any:
    """The leading axis may have any size."""
    return {0: Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None


def _read(program: ExportedProgram, model: nn.Module) -> Traced:
    return _Reader(program, model).read()


class _Reader:
    """Turns an exported program into calls."""

    def __init__(self, program: ExportedProgram, model: nn.Module) -> None:
        self.program, self.model = program, model
        self.leaves: dict[str, Any] = {}
        self.calls: list[Call] = []
        self.counters: dict[str, BufferRef] = {}
        """Step counters of batch-norms by the path of their module."""
        self.statistics: list[BufferRef] = []
        canonical = {id(p): name for name, p in model.named_parameters()}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        self.parameter = {name: canonical[id(p)] for name, p in parameters.items()}

    def read(self) -> Traced:
        signature = self.program.graph_signature
        inputs = []
        specialised = False
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                leaf = self._leaf(node)
                if leaf is None:
                    inputs.append(node.name)
                    shape: Any = getattr(node.meta.get("val"), "shape", ())
                    specialised |= bool(len(shape)) and is_concrete_int(shape[0])
                else:
                    self.leaves[node.name] = leaf
            elif node.op == "call_function" and node.name not in self.leaves:
                self._call(node, self.leaves, "", grad=True)
        (last,) = (node for node in self.program.graph.nodes if node.op == "output")
        kinds = torch.export.graph_signature.OutputKind
        values = [
            named(value, self.leaves)
            for value, spec in zip(last.args[0], signature.output_specs, strict=True)
            if spec.kind == kinds.USER_OUTPUT
        ]
        written = {str(spec.target) for spec in signature.output_specs if spec.kind == kinds.BUFFER_MUTATION}
        kept = {ref.name for ref in (*self.counters.values(), *self.statistics)}
        for name in sorted(written - kept):
            raise Untraceable(f"the forward pass writes the buffer {name!r}", module=name.rpartition(".")[0])
        output = pytree.tree_unflatten(values, self.program.call_spec.out_spec)
        return Traced(tuple(inputs), tuple(self.calls), output, "export", specialised)

    def _leaf(self, node: fx.Node) -> Any:
        signature = self.program.graph_signature
        if node.name in signature.inputs_to_parameters:
            return ParamRef(self.parameter[signature.inputs_to_parameters[node.name]])
        if node.name in signature.inputs_to_buffers:
            return BufferRef(signature.inputs_to_buffers[node.name])
        if node.name in signature.inputs_to_lifted_tensor_constants:
            name = signature.inputs_to_lifted_tensor_constants[node.name]
            return self.program.constants[name]
        if node.name in signature.inputs_to_lifted_custom_objs:
            raise Untraceable("the model uses objects that are no tensors in its graph")
        return None

    def _call(self, node: fx.Node, leaves: dict[str, Any], prefix: str, *, grad: bool) -> None:
        target, args = node.target, named(node.args, leaves)
        if isinstance(target, HigherOrderOperator):
            self._inline(node, args, leaves, prefix)
            return
        if isinstance(target, OpOverload) and self._counts_batches(target, args):
            return
        name = f"{prefix}{node.name}"
        if prefix:
            leaves[node.name] = Ref(name)
        module, source = _where(node)
        kwargs = named(dict(node.kwargs), leaves)
        if isinstance(target, OpOverload) and str(target) in RECURRENT:
            self._recurrent(node, bound(target, args, kwargs), leaves, prefix)
            return
        kind = target._schema.name if isinstance(target, OpOverload) else ""
        if kind == LSTM_CELL:
            x, hx, *weights = args
            flat = Ref(f"{name}_flat")
            self.calls.append(Call(flat.name, kernels.lstm_cell, (x, *hx, *weights), kwargs, module, source, grad))
            target, args, kwargs = torch.chunk, (flat, 2, 1), {}
        if kind == DROPOUT or kind in BATCH_NORMS:
            # Part 0 is the value; the others are a mask that nobody else reads, or a batch-norm's buffers' new values.
            leaves.update((user.name, Ref(name)) for user in node.users if user.target is operator.getitem)
        if kind == DROPOUT:
            target = F.dropout
        elif isinstance(target, OpOverload) and kind in BATCH_NORMS:
            target, args, kwargs = self._batch_norm(target, args, kwargs)
        self.calls.append(Call(name, target, args, kwargs, module, source, grad))  # type: ignore[arg-type]

    def _recurrent(self, node: fx.Node, a: dict[str, Any], leaves: dict[str, Any], prefix: str) -> None:
        """A recurrent module: its layers, and what torch returns cut out of what they give."""
        states = a["hx"] if isinstance(a["hx"], list) else [a["hx"]]
        sizes = tuple(int(value.shape[-1]) for value in node.meta["val"][1:])
        graph = recurrent_graph(str(node.target).split(".")[1], a, sizes)
        given = iter((a["input"], *states, *a["params"]))
        inner: dict[str, Any] = {}
        module, source = _where(node)
        for child in graph.nodes:
            if child.op == "placeholder":
                inner[child.name] = next(given)
            elif child.op == "output":
                self._bind_output(node, named(child.args[0], inner), leaves)
            else:
                name = f"{prefix}{node.name}_{child.name}"
                target: Any = Method(str(child.target)) if child.op == "call_method" else child.target
                args, kwargs = named(child.args, inner), named(dict(child.kwargs), inner)
                self.calls.append(Call(name, target, args, kwargs, module, source))
                inner[child.name] = Ref(name)

    def _batch_norm(self, target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Batch-norm with the step counter that its module advanced just before."""
        a = bound(target, args, kwargs)
        mean = a["running_mean"]
        self.statistics += [a[name] for name in ("running_mean", "running_var") if isinstance(a[name], BufferRef)]
        counter = self.counters.get(mean.name.rpartition(".")[0]) if isinstance(mean, BufferRef) else None
        arguments = (a["input"], mean, a["running_var"], counter, a["weight"], a["bias"])
        return kernels.batch_norm, arguments, {"training": a["training"], "momentum": a["momentum"], "eps": a["eps"]}

    def _counts_batches(self, target: OpOverload, args: tuple[Any, ...]) -> bool:
        """Batch-norm's step counter: the batch-norm operation of the normal form advances it itself."""
        if not args or not isinstance(args[0], BufferRef) or not args[0].name.endswith("num_batches_tracked"):
            return False
        self.counters[args[0].name.rpartition(".")[0]] = args[0]
        return target._schema.name in ("aten::add_", "aten::add")

    def _inline(self, node: fx.Node, args: tuple[Any, ...], leaves: dict[str, Any], prefix: str) -> None:
        """``with torch.no_grad():`` is a subgraph of its own."""
        if str(node.target) != "wrap_with_set_grad_enabled":
            module, source = _where(node)
            raise Untraceable(f"the model contains {node.target}", module=module, source=source)
        enabled, body = node.args[0], getattr(self.program.graph_module, str(node.args[1].target))  # type: ignore[union-attr]
        inner: dict[str, Any] = {}
        operands = iter(args[2:])
        for child in body.graph.nodes:
            if child.op == "placeholder":
                inner[child.name] = next(operands)
            elif child.op == "call_function":
                self._call(child, inner, f"{prefix}{node.name}_", grad=bool(enabled))
            elif child.op == "output":
                self._bind_output(node, named(child.args[0], inner), leaves)

    def _bind_output(self, node: fx.Node, outputs: Any, leaves: dict[str, Any]) -> None:
        for user in node.users:
            leaves[user.name] = outputs[user.args[1]]


def _where(node: fx.Node) -> tuple[str, str]:
    """Module path and user's line."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]).split("@")[0] if stack else ""
    path = "" if path.startswith("_empty_nn_module_stack") else path  # torch's word for "added by a decomposition"
    source = ""
    for filename, line in FRAME.findall(node.meta.get("stack_trace") or ""):
        if is_users(filename):
            source = f"{Path(filename).name}:{line}"
    return path, source
