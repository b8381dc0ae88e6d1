"""What the model itself does on the example inputs, and whether a recording does the same."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, is_dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_buffer_registration_hook, register_module_forward_pre_hook
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.backwards import linear_backwards
from gtddp_compile.frontends.traced import Untraceable, module_of, raised_at, users_line
from gtddp_compile.graph import BufferRef, Op, OpGraph, ParamRef, map_leaves
from gtddp_compile.methods.losses import largest

SEED = 2**32 - 5
"""Not one that somebody else would choose."""
_BEGIN: ContextVar[list[Tensor] | None] = ContextVar("begin", default=None)
ROUNDING = 1000
"""Units of rounding of the largest gradient below which one is none."""
PROBES = 4
"""Entries of a value that are looked for among the operands' before all are."""
RETURNED = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
"""What a model may return beside tensors."""
REENTRANT = (
    "torch.utils.checkpoint with use_reentrant=True knows loss.backward() alone, and a step asks for some gradients",
    "Give it use_reentrant=False, which computes the same (transformers: "
    "gradient_checkpointing_enable({'use_reentrant': False}))",
)
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}


@contextmanager
def beginning(state: list[Tensor] | None) -> Iterator[None]:
    """Models are watched in the block from this state of the random generators, a step's own: what they draw may decide
    on their path. ``None``: the same from everywhere.
    """
    token = _BEGIN.set(state)
    try:
        yield
    finally:
        _BEGIN.reset(token)


def start() -> int:
    """Set the random generators as a model that is watched finds them; the seed."""
    state = _BEGIN.get()
    if state is None:
        seed_all(SEED)
    else:
        kernels.restore_random_state(state)
    return torch.initial_seed()


def seed_all(number: int) -> None:
    """``torch.manual_seed``, which where there is no accelerator notes the call, with its stack, for each kind
    that might come to be used, and keeps it: a millisecond, and memory.
    """
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@dataclass(frozen=True)
class Reference:
    """Outputs and parameter gradients of one pass through the model.

    Attributes:
        outputs: tensors of the output, flat.
        gradients: of a fixed linear function of the outputs, by parameter; ``None`` where it has no path to them.
        buffers: after the pass.
        drawn: state of the random generators after it: a recording draws as much as the model, or it has kept a draw.
    """

    outputs: tuple[Tensor, ...]
    gradients: Mapping[str, Tensor | None]
    buffers: Mapping[str, Tensor]
    drawn: list[Tensor]


def observe(model: nn.Module, inputs: tuple[Any, ...]) -> Reference:
    """Run the model on copies of its buffers; random state and model are left as they were.

    Raises:
        CompileError: it raises, assigns a buffer, packs sequences, returns no differentiable tensor, or has a Function
            whose backward is not linear.
    """
    with linear_backwards(model):
        return _observed(model, inputs)


def _observed(model: nn.Module, inputs: tuple[Any, ...]) -> Reference:
    params, buffers = leaves(model)
    with torch.random.fork_rng(), torch.enable_grad():
        seed = start()
        try:
            with _assignments(model, buffers) as assigned, _padded(model):
                output = _called(model, params, buffers, inputs)
        except CompileError:
            raise
        except Exception as error:  # the user's own code runs here and may raise anything
            path, kind = module_of(error.__traceback__, model)
            shapes = ", ".join(f"{tuple(value.shape)}" for value in inputs)
            alone = "more than 1 value per channel" in str(error)  # batch-norm, on what a loader has left over
            raise CompileError(
                f"the model itself fails on inputs of shape {shapes}: {type(error).__name__}: {error}",
                "Leave out a last batch of one sample (drop_last=True of DataLoader), or call model.eval()"
                if alone
                else "Pass inputs that the model accepts: a tensor, or a tuple in the order of its arguments",
                module=path,
                operation=kind,
                source=raised_at(error.__traceback__) or None,
            ) from error
        drawn = kernels.random_state()
        if torch.initial_seed() != seed:
            raise CompileError(
                "the forward pass seeds torch's random numbers, which a compiled program does not do",
                "Seed them outside forward, or draw what is to stay the same into a buffer",
                module="",
            )
        for name in assigned:
            raise CompileError(
                f"the forward pass writes the buffer {name!r}, which only normalisation layers may do",
                "Keep the forward pass free of side effects: update it in the training loop, with the module that "
                "writes it in evaluation mode for the step",
                module=name.rpartition(".")[0],
            )
        found = tuple(tensors(output))
        if not any(value.requires_grad for value in found):
            raise CompileError(
                "no output of the model depends on its trainable parameters in a differentiable way",
                "Return a tensor computed by torch operations, outside torch.no_grad()",
                module="",
            )
        try:
            gradients = _gradients(found, params)
        except RuntimeError as error:  # autograd's word for a value that was overwritten, or cannot be differentiated
            why, remedy = f"the model cannot be differentiated: {error}", "Make loss.backward() work on it first"
            if "use_reentrant" in str(error):
                why, remedy = REENTRANT
            raise CompileError(why, remedy, module="") from error
        return Reference(tuple(value.detach() for value in found), gradients, buffers, drawn)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Tensors of the output of one pass, from the same random state, without further questions."""
    with torch.random.fork_rng(), torch.enable_grad():
        start()
        return tuple(value.detach() for value in tensors(_called(model, *leaves(model), inputs)))


def _called(model: nn.Module, params: dict[str, Tensor], buffers: dict[str, Tensor], inputs: tuple[Any, ...]) -> Any:
    with _alone(model):
        output = torch.func.functional_call(model, {**params, **buffers}, copy.deepcopy(inputs))
    _know_dataclasses(output)
    parts = pytree.tree_leaves(output)
    for index, leaf in enumerate(parts):
        place = f" (part {index + 1} of {len(parts)})" if len(parts) > 1 else ""
        if isinstance(leaf, Tensor) and (leaf.is_nested or leaf.layout != torch.strided):
            raise CompileError(
                f"the model returns a sparse or nested tensor{place}", "Return it dense: .to_dense()", module=""
            )
        if not isinstance(leaf, Tensor) and type(leaf) not in RETURNED:
            raise CompileError(
                f"the model returns an object of class {type(leaf).__name__}{place}, which no program can make",
                "Return its tensors, alone or in tuples, lists, dicts or dataclasses, and make the object in the loss",
                module="",
            )
    return output


def _know_dataclasses(output: Any) -> None:
    """Tell torch of the dataclasses that a model returns, so that they are taken apart as tuples and dicts are."""
    for leaf in pytree.tree_leaves(output):
        if is_dataclass(leaf) and not isinstance(leaf, type) and type(leaf) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(leaf))
            _know_dataclasses(leaf)


@contextmanager
def _assignments(model: nn.Module, buffers: Mapping[str, Tensor]) -> Iterator[list[str]]:
    """Names of the buffers that are assigned in the block (``self.mean = …``), which no front end reports reliably.

    ``buffers``: the copies that the model runs on.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    found: list[str] = []
    versions = {id(buffer): buffer._version for buffer in buffers.values()}

    def note(module: nn.Module, name: str, value: Tensor | None) -> None:
        # Itself and not written meanwhile: x.to(where it is).
        same = value is module._buffers.get(name) and value is not None and versions.get(id(value)) == value._version
        if id(module) in paths and not same:
            found.append(f"{paths[id(module)]}.{name}".removeprefix("."))

    handle = register_module_buffer_registration_hook(note)
    try:
        yield found
    finally:
        handle.remove()


@contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Without the collectives of its SyncBatchNorms: one process observes, on any device."""
    norms = [m for m in model.modules() if isinstance(m, nn.SyncBatchNorm) and "forward" not in vars(m)]
    for norm in norms:
        vars(norm)["forward"] = MethodType(_BatchNorm.forward, norm)
    try:
        yield
    finally:
        for norm in norms:
            del vars(norm)["forward"]


@contextmanager
def _padded(model: nn.Module) -> Iterator[None]:
    """Refuse modules of the model that are given packed sequences: their rows lie by time, fewer at every step."""
    paths = {id(module): path for path, module in model.named_modules()}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if id(module) in paths and any(isinstance(value, PackedSequence) for value in inputs):
            raise CompileError(
                "its input is a PackedSequence, whose rows are as many as the lengths say and lie along no axis of "
                "samples",
                "Give it the padded batch (B, T, n) and read each sample's states up to its length; a layer of one "
                "direction computes the same there",
                module=paths[id(module)],
                operation=type(module).__name__,
                source=users_line() or None,
            )

    handle = register_module_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()


def run(graph: OpGraph, model: nn.Module, inputs: tuple[Any, ...]) -> tuple[OpGraph, Reference]:
    """Run a recording the same way; the graph comes back with the shapes and dtypes of its values, and with every
    operation that draws random numbers known as one, whatever it is called.
    """
    params, buffers = leaves(model)
    values: dict[str, Any] = dict(zip(graph.inputs, copy.deepcopy(inputs), strict=True))
    ops: list[Op] = []
    with torch.random.fork_rng(), torch.enable_grad():
        start()
        before = kernels.random_state()
        for op in graph.ops:
            if op.target is not None:
                values[op.name] = evaluate(op, values, params, buffers)
            after = kernels.random_state()
            drew, before = not all(map(torch.equal, before, after)), after
            ops.append(_with_shape(replace(op, random=op.random or drew), values[op.name]))
            for name in graph.finished[op.name]:  # what autograd does not keep is let go
                del values[name]
        output = map_leaves(graph.output, lambda leaf: _value(leaf, values, params, buffers))
        found = tuple(tensors(output))
        if not any(value.requires_grad for value in found):
            raise Untraceable("what was recorded does not depend on the parameters")
        outputs, drawn = tuple(value.detach() for value in found), kernels.random_state()
        try:
            gradients = _gradients(found, params)
        except RuntimeError as error:  # autograd's word for an operation without a derivative
            raise Untraceable(f"what was recorded cannot be differentiated: {error}") from error
        return replace(graph, ops=tuple(ops)), Reference(outputs, gradients, buffers, drawn)


def agrees(found: Reference, expected: Reference) -> bool:
    """Whether a recording computed the model's outputs, gradients and buffers, up to rounding."""
    if len(found.outputs) != len(expected.outputs) or not all(map(torch.equal, found.drawn, expected.drawn)):
        return False
    pairs = list(zip(found.outputs, expected.outputs, strict=True))
    pairs += [(found.buffers[name], value) for name, value in expected.buffers.items()]
    if not all(_close(a, b) for a, b in pairs):
        return False
    noise = ROUNDING * max((largest(value) for value in expected.gradients.values() if value is not None), default=0.0)
    for name, gradient in expected.gradients.items():
        own = found.gradients[name]
        if gradient is not None or own is not None:
            missing = torch.zeros_like(gradient if own is None else own)  # type: ignore[arg-type]
            own, gradient = (missing if value is None else value for value in (own, gradient))
            if not _close(own, gradient, noise):
                return False
    return True


def reads_values(graph: OpGraph, model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether a recording does what the model does with other parameters and buffers too, or one of them fails there.

    Else it has kept what the model computed of them out of sight (``for p in self.parameters()``, say).
    """
    params, buffers = ({name: _other(value) for name, value in held.items()} for held in leaves(model))
    values: dict[str, Any] = dict(zip(graph.inputs, copy.deepcopy(inputs), strict=True))
    with torch.random.fork_rng(), torch.enable_grad():
        start()
        try:
            expected = tuple(tensors(_called(model, dict(params), {k: v.clone() for k, v in buffers.items()}, inputs)))
        except Exception:  # the user's own code, which may ask for some values
            return True
        start()
        try:
            for op in graph.ops:
                if op.target is not None:
                    values[op.name] = evaluate(op, values, params, buffers)
                for name in graph.finished[op.name]:
                    del values[name]
        except Untraceable:  # another path
            return True
        found = tensors(map_leaves(graph.output, lambda leaf: _value(leaf, values, params, buffers)))
        return all(_close(a.detach(), b.detach()) for a, b in zip(found, expected, strict=True))


def _other(value: Tensor) -> Tensor:
    """A value near by, each entry by another factor."""
    if not value.is_floating_point():
        return value
    factor = torch.arange(value.numel(), dtype=torch.float32, device=value.device).cos().reshape(value.shape)
    return (value * (1 + 0.01 * factor).to(value.dtype)).detach().requires_grad_(value.requires_grad)


def tensors(output: Any) -> Iterator[Tensor]:
    """Tensors of a nested output, in order."""
    return (leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def only_moves(value: Tensor, operands: Iterable[Any]) -> bool:
    """Whether every entry of a value is one of its operands', or zero: entries that are no longer where they were."""
    given = [o.detach().flatten() for o in tensors(list(operands)) if o.dtype == value.dtype]
    if not given:
        return False
    own, known = value.detach().flatten(), torch.cat([*given, value.new_zeros(1)])
    some = (own[:PROBES, None] == known).any(1)  # nearly always enough to tell: isin sorts
    return bool(some.all()) and bool(torch.isin(own, known).all())


def _close(a: Tensor, b: Tensor, noise: float = 0.0) -> bool:
    """``noise``: units of rounding of what is nothing, a gradient that cancels (the bias of attention's keys)."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if torch.equal(a, b):  # the rule, and one pass over large tables
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return False
    tolerance = TOLERANCE.get(b.dtype, 5e-2)
    floor = noise * torch.finfo(b.dtype).eps
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance * largest(b) + floor, equal_nan=True)


def leaves(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Parameters, and copies of the buffers."""
    params = {name: p.detach().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    return params, {name: b.detach().clone() for name, b in model.named_buffers()}


def _gradients(outputs: tuple[Tensor, ...], params: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    """Gradients of ``Σ_j cos(j) y_j`` over all entries of the outputs."""
    reached = [value for value in outputs if value.requires_grad]
    weights = [
        torch.arange(v.numel(), dtype=torch.float32).cos().to(v.device, v.dtype).reshape(v.shape) for v in reached
    ]
    wanted = {name: p for name, p in params.items() if p.requires_grad}
    found = torch.autograd.grad(reached, list(wanted.values()), weights, allow_unused=True)
    dense = (gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient for gradient in found)
    return dict(zip(wanted, dense, strict=True))


def _value(leaf: Any, values: Mapping[str, Any], params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
    if isinstance(leaf, ParamRef):
        return params[leaf.name]
    return buffers[leaf.name] if isinstance(leaf, BufferRef) else values[leaf.name]


def evaluate(op: Op, values: Mapping[str, Any], params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> Any:
    """The value of one operation."""
    args, kwargs = map_leaves((op.args, dict(op.kwargs)), lambda leaf: _value(leaf, values, params, buffers))
    assert op.target is not None
    try:
        return op.target(*args, **kwargs)
    except Exception as error:  # whatever the operation raises says that it was recorded wrongly
        text = str(error).split("\n")[0]
        raise Untraceable(
            f"the recorded {op.kind} fails: {type(error).__name__}: {text}", module=op.module, source=op.source
        ) from error


def descending(op: Op, value: Any) -> Any:
    """Whole numbers that were drawn in descending order: a permutation that leaves rows in place shows nothing."""
    drawn = op.random and isinstance(value, Tensor) and value.dim() and not value.is_floating_point()
    return value.sort(0, descending=True).values if drawn else value


def _with_shape(op: Op, value: Any) -> Op:
    return replace(op, shape=tuple(value.shape), dtype=value.dtype) if isinstance(value, Tensor) else op
