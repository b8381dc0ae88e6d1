"""The normal form of a traced model: a topologically ordered list of functional operations.

Whatever front end traced the model (torch.fx or torch.export), the passes see this and nothing else. Every operation
is a plain function of values, parameters, buffers and literals: a ``torch.nn.Linear`` call has become
``F.linear(x, params["fc.weight"], params["fc.bias"])``, an in-place operation its out-of-place twin.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.utils import _pytree as pytree

from gtddp_compile.errors import CompileError
from gtddp_compile.graph.layouts import LEADING, Layout


@dataclass(frozen=True, slots=True)
class Ref:
    """The value computed by the operation called ``name``."""

    name: str


@dataclass(frozen=True, slots=True)
class ParamRef:
    """A parameter, by its canonical qualified name (the first that ``model.named_parameters()`` gives it)."""

    name: str


@dataclass(frozen=True, slots=True)
class BufferRef:
    """A buffer or a constant tensor attribute, by its qualified name."""

    name: str


Leaf = Ref | ParamRef | BufferRef

GUARD = "guard"
"""Kind of a decision on values along which the model was recorded."""
DETACHED = "detach"
"""Kind at which gradients stop."""
SIZES = frozenset(
    {"size", "shape", "stride", "dim", "ndim", "ndimension", "numel", "nelement", "len", "getattr"}
    | {"device", "dtype", "item", "tolist", "int", "float", "bool", GUARD}
)
"""Kinds whose value is a size, a number or a description, unless it is a tensor."""
LIKES = frozenset(f"{word}_like" for word in ("empty", "zeros", "ones", "full", "rand", "randn", "randint"))
"""Kinds that make a tensor as large as another one, whatever is in that."""


@dataclass(frozen=True, slots=True)
class Method:
    """A tensor method used as a function: ``Method("view")(x, -1)`` is ``x.view(-1)``."""

    name: str

    def __call__(self, value: Any, *args: Any, **kwargs: Any) -> Any:
        """Call the method on ``value``."""
        return getattr(value, self.name)(*args, **kwargs)


@dataclass(frozen=True)
class Op:
    """One operation.

    Attributes:
        name: unique and qualified, ``"layer1.0.conv1"`` or ``"layer1.0.add"``; it also names the value computed.
        kind: canonical lower-case word, the same whatever front end: ``"input"``, ``"linear"``, ``"conv"``,
            ``"batch_norm"``, ``"add"``, ``"sub"``, ``"relu"``, ``"getitem"``, ``"flatten"``, ``"module"`` … Any
            function without an entry in the normaliser's table keeps its own name.
        target: what computes it, a function of ``args`` and ``kwargs`` (``None`` for inputs).
        args, kwargs: literals, :class:`Ref`, :class:`ParamRef`, :class:`BufferRef`, nested in tuples, lists, dicts,
            slices.
        module: qualified path of the module whose ``forward`` contains it (the leaf module itself for a layer).
        source: ``"file.py:12"`` of the user's own line, ``""`` where unknown.
        shape, dtype: of the value for the example inputs, batch axis included; ``None`` if it is not one tensor.
        advances: buffers that the operation writes (running statistics of a batch-norm in training mode).
        random: whether it draws random numbers (dropout in training mode).
        mixes_samples: whether what it gives sample i depends on what players give sample j ≠ i (batch-norm in training
            mode, ``h - h.mean(0)``), as was found by trial; it is read sample by sample (docs/theory.md#mixing).
        layout: where the samples of its value lie; ``None``: along the leading axis, if it has any of its own;
            ``UNKNOWN``: it depends on them, but no axis has them.
    """

    name: str
    kind: str
    target: Callable[..., Any] | None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    source: str = ""
    shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    advances: tuple[str, ...] = ()
    random: bool = False
    mixes_samples: bool = False
    layout: Layout | None = None

    @property
    def samples(self) -> Layout:
        """Where the samples of its value lie."""
        return self.layout or LEADING

    @property
    def is_tensor(self) -> bool:
        """Whether the value is one tensor (not a size, a tuple, ``None``)."""
        return self.shape is not None

    @property
    def is_size(self) -> bool:
        """Whether the value is a size or a number; what is no tensor otherwise is a tuple of tensors."""
        return not self.is_tensor and (self.kind in SIZES or self.kind.startswith(("sym_", "is_")))

    @property
    def reads_sizes(self) -> bool:
        """Whether of its operands the sizes alone matter."""
        return self.is_size or self.kind in LIKES

    @property
    def is_differentiable(self) -> bool:
        """Whether the value is a tensor that gradients can pass through."""
        return self.dtype is not None and (self.dtype.is_floating_point or self.dtype.is_complex)

    @property
    def carries_gradient(self) -> bool:
        """Whether gradients can pass through the operation: not a size, an index, or a detached value."""
        return self.kind != DETACHED and (self.is_differentiable if self.is_tensor else not self.is_size)

    @property
    def nbytes(self) -> int:
        """Bytes of the value; 0 where its shape is not known."""
        return math.prod(self.shape) * self.dtype.itemsize if self.shape is not None and self.dtype is not None else 0

    def refusal(self, why: str, remedy: str) -> CompileError:
        """The error that this operation cannot be compiled as it is."""
        return CompileError(why, remedy, module=self.module, operation=self.kind, source=self.source or None)

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """Every reference in the arguments, in order, repeats kept."""
        return tuple(iter_leaves((self.args, dict(self.kwargs))))

    @cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operations whose values this one reads, in order, without repeats."""
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves if isinstance(leaf, Ref)))

    @cached_property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters this operation reads, in order, without repeats."""
        return tuple(dict.fromkeys(leaf.name for leaf in self.leaves if isinstance(leaf, ParamRef)))


@dataclass(frozen=True, slots=True)
class ParameterInfo:
    """A parameter of the model: canonical name, shape, whether it is trained, and its other names if tied."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool = True
    aliases: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class OpGraph:
    """A traced model in normal form.

    Attributes:
        ops: in topological order, input operations first.
        inputs: names of the input operations, in the order of the model's positional arguments.
        output: what the model returns: a :class:`Ref` or a tree of them (tuples, named ones too, lists, dicts, and
            whatever classes torch's pytree knows).
        parameters: every parameter of the model, used or not.
        frontend: ``"fx"``, ``"export"``, ``"eager"`` or ``"derivatives"``.
        specialised: whether the sizes of the example inputs are built in, the batch size included.
        kept: names of attributes in which the model's forward pass keeps something that it does not read.
    """

    ops: tuple[Op, ...]
    inputs: tuple[str, ...]
    output: Any
    parameters: tuple[ParameterInfo, ...] = ()
    frontend: str = "fx"
    specialised: bool = False
    kept: tuple[str, ...] = ()

    @cached_property
    def by_name(self) -> dict[str, Op]:
        """Operations by name."""
        return {op.name: op for op in self.ops}

    @cached_property
    def batch(self) -> int | None:
        """Samples of the example inputs; ``None`` where they have no axis."""
        shapes = (self.by_name[name].shape for name in self.inputs)
        return next((shape[0] for shape in shapes if shape), None)

    @cached_property
    def guards(self) -> tuple[Op, ...]:
        """Decisions on values along whose outcome the model was recorded, each checked at every step."""
        return tuple(op for op in self.ops if op.kind == GUARD)

    @cached_property
    def position(self) -> dict[str, int]:
        """Index of each operation in topological order."""
        return {op.name: index for index, op in enumerate(self.ops)}

    @cached_property
    def advancing(self) -> frozenset[str]:
        """Buffers that the forward pass writes."""
        return frozenset(name for op in self.ops for name in op.advances)

    @cached_property
    def users(self) -> dict[str, tuple[str, ...]]:
        """Names of the operations that read each value, in topological order."""
        found: dict[str, list[str]] = {op.name: [] for op in self.ops}
        for op in self.ops:
            for name in op.operands:
                found[name].append(op.name)
        return {name: tuple(users) for name, users in found.items()}

    @cached_property
    def finished(self) -> dict[str, tuple[str, ...]]:
        """Values that nobody reads after an operation, by its name; those that are returned are never finished."""
        last = {op.name: op.name for op in self.ops}
        last.update((name, op.name) for op in self.ops for name in op.operands)
        found: dict[str, list[str]] = {op.name: [] for op in self.ops}
        for name, reader in last.items():
            if name not in self.output_names:
                found[reader].append(name)
        return {name: tuple(values) for name, values in found.items()}

    def downstream(self, start: Iterable[str], passes: Callable[[Op], bool] = lambda op: True) -> frozenset[str]:
        """Some operations, and those that read them or what came of them: all on the way are such that ``passes``."""
        found = set(start)
        for op in self.ops:
            if any(name in found for name in op.operands) and passes(op):
                found.add(op.name)
        return frozenset(found)

    def upstream(self, start: Iterable[str], passes: Callable[[Op], bool] = lambda op: True) -> frozenset[str]:
        """Some operations, and those that they read, of those that pass, and so on."""
        found = set(start)
        for op in reversed(self.ops):
            if op.name in found and passes(op):
                found.update(op.operands)
        return frozenset(found)

    @cached_property
    def reached(self) -> frozenset[str]:
        """Operations that an input's tensor reaches (its size alone does not count)."""
        return self.downstream(self.inputs, lambda op: not op.is_size)

    @cached_property
    def read_apart(self) -> frozenset[str]:
        """Parameters that are read without a gradient, or parts of them are: by another stage than their player's."""
        found: set[str] = set()
        pending = [op for op in self.ops if op.kind == DETACHED]
        while pending:
            op = pending.pop()
            found.update(op.parameters)
            pending += [self.by_name[name] for name in op.operands if name not in self.reached]
        return frozenset(found)

    @cached_property
    def fed(self) -> frozenset[str]:
        """Operations that depend on the inputs, be it on their sizes alone: what others compute is no sample's own."""
        return self.downstream(self.inputs)

    @cached_property
    def smooth(self) -> frozenset[str]:
        """Operations that derivatives of inputs or parameters lead to: not whole numbers, nor what is made of them."""

        def passes(op: Op) -> bool:
            return not op.is_size and (op.is_differentiable or not op.is_tensor)

        return self.downstream((o.name for o in self.ops if (o.parameters or o.kind == "input") and passes(o)), passes)

    @cached_property
    def returned(self) -> frozenset[str]:
        """Operations that the output depends on, be it without derivatives."""
        return self.upstream(self.output_names)

    @cached_property
    def mixing(self) -> tuple[str, ...]:
        """Operations that mix samples, in order."""
        return tuple(op.name for op in self.ops if op.mixes_samples)

    @cached_property
    def output_names(self) -> tuple[str, ...]:
        """Names of the operations whose values the model returns, in order, without repeats."""
        return tuple(dict.fromkeys(leaf.name for leaf in iter_leaves(self.output) if isinstance(leaf, Ref)))

    def as_returned(self, values: Any) -> Any:
        """The output's values, in plain tuples, lists and dicts, in the classes that the model returns them in."""
        return values if isinstance(self.output, Ref) else pytree.tree_unflatten(pytree.tree_leaves(values), self._spec)

    @cached_property
    def _spec(self) -> pytree.TreeSpec:
        return pytree.tree_structure(self.output)

    @cached_property
    def parameter_info(self) -> dict[str, ParameterInfo]:
        """Parameters by canonical name."""
        return {info.name: info for info in self.parameters}

    def __str__(self) -> str:
        return "\n".join(f"{op.name:<32} {op.kind:<14} {op.shape} <- {', '.join(op.operands)}" for op in self.ops)


def iter_leaves(tree: Any) -> Iterator[Leaf]:
    """References inside nested tuples, lists, dicts, slices and classes known to torch's pytree, left to right."""
    if isinstance(tree, Ref | ParamRef | BufferRef):
        yield tree
    elif isinstance(tree, tuple | list):
        for item in tree:
            yield from iter_leaves(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from iter_leaves(item)
    elif isinstance(tree, slice):
        yield from iter_leaves((tree.start, tree.stop, tree.step))
    elif type(tree) in pytree.SUPPORTED_NODES:
        for item in _parts(tree):
            yield from iter_leaves(item)


def map_leaves(tree: Any, change: Callable[[Leaf], Any], constant: Callable[[Any], Any] = lambda value: value) -> Any:
    """The same nested structure with references replaced by ``change(reference)``, all else by ``constant(it)``."""

    def map_in(part: Any) -> Any:
        return map_leaves(part, change, constant)

    if isinstance(tree, Ref | ParamRef | BufferRef):
        return change(tree)
    if isinstance(tree, tuple):
        return tuple(map(map_in, tree))
    if isinstance(tree, list):
        return list(map(map_in, tree))
    if isinstance(tree, Mapping):
        return {key: map_in(item) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*map(map_in, (tree.start, tree.stop, tree.step)))
    if type(tree) in pytree.SUPPORTED_NODES:  # a dataclass: what it holds, in a tuple
        return tuple(map(map_in, _parts(tree)))
    return constant(tree)


def _parts(tree: Any) -> list[Any]:
    return pytree.tree_flatten(tree, is_leaf=lambda item: item is not tree)[0]
