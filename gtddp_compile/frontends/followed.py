"""The front end before the last: the model is run, and every torch function it calls is noted.

Nothing is traced symbolically, so the model does what it does in training: sizes are numbers, whatever asks whether it
is being traced hears no, and decisions on values are made. Sizes are built in; whole numbers read from values, and what
is decided on others (``scalars``), are checked in every step (``guard``).
"""

from __future__ import annotations

import copy
import functools
import inspect
import operator
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, is_tensor_method_or_property
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from gtddp_compile import kernels
from gtddp_compile.frontends.canonical import base_name, is_random, kind_of
from gtddp_compile.frontends.layers import FUNCTIONS, LAYERS
from gtddp_compile.frontends.leaving import READS, TRUTH, WHOLE
from gtddp_compile.frontends.reference import leaves, start
from gtddp_compile.frontends.scalars import Scalar, plain
from gtddp_compile.frontends.traced import (
    Call,
    Traced,
    Untraceable,
    argument_names,
    module_paths,
    raised_at,
    users_line,
)
from gtddp_compile.graph import BufferRef, Method, ParamRef, Ref, iter_leaves, map_leaves

PLAIN = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift", "and", "or", "xor")
KEYWORDS = {"and": "and_", "or": "or_", "div": "truediv"}
OPERATORS: Mapping[str, Callable[..., Any]] = {
    **{f"__{name}__": getattr(operator, KEYWORDS.get(name, name)) for name in (*PLAIN, "div")},
    **{f"__i{name}__": getattr(operator, f"i{'truediv' if name == 'div' else name}") for name in (*PLAIN, "div")},
    **{f"__{name}__": getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "neg", "abs", "invert")},
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
}
SWAPPED = {f"__r{name}__": OPERATORS[f"__{name}__"] for name in (*PLAIN, "div")}
VIEWED = ("T", "mT", "H", "mH", "real", "imag")
"""Attributes that are tensors."""

METADATA = frozenset(
    {"size", "dim", "ndimension", "numel", "nelement", "element_size", "stride", "storage_offset", "get_device"}
    | {"is_floating_point", "is_complex", "is_contiguous", "is_same_size", "is_inference", "is_signed", "is_conj"}
    | {"is_neg", "is_pinned", "is_shared", "is_tensor", "is_storage", "is_sparse", "is_coalesced", "has_names"}
    | {"type", "data_ptr", "result_type", "can_cast", "promote_types", "broadcast_shapes", "dim_order", "__len__"}
    | {"__hash__", "requires_grad_", "retain_grad", "untyped_storage", "_set_grad_enabled"}
)
"""Functions that read no element of a tensor."""

BUILT_IN = "a number read from values is built in where it cannot be followed (float(), math, numpy, a text, a key)"
COUNTING = frozenset({"nonzero", "argwhere", "masked_select", "bincount", "repeat_interleave"})
"""Functions whose size depends on values; so does an index by a mask."""


def trace_followed(model: nn.Module, inputs: tuple[Any, ...]) -> Traced:
    """Record a model by running it once.

    Raises:
        Untraceable: it computes where torch functions cannot be followed, or builds a number read from values in.
    """
    parameters, buffers = leaves(model)
    recorder = Recorder(model, parameters, buffers)
    inputs = copy.deepcopy(inputs)
    names = argument_names(model, len(inputs))
    for name, value in zip(names, inputs, strict=True):
        if not isinstance(value, Tensor):
            raise Untraceable("an input is no tensor")
        recorder.know(value, Ref(name))
    try:
        with (
            torch.random.fork_rng(),
            torch.enable_grad(),
            recorder.inside(model),
            _Produced(recorder.produced),
            recorder,
        ):
            start()
            output = torch.func.functional_call(model, {**parameters, **buffers}, inputs)
        returned = pytree.tree_map(recorder.tree, output)
    except Untraceable:
        raise
    except Exception as error:  # the user's own code runs here and may raise anything
        text = (str(error).strip() or type(error).__name__).split("\n")[0]
        raise Untraceable(f"followed: {text[:300]}", source=raised_at(error.__traceback__)) from error
    return Traced(names, tuple(recorder.calls), returned, "eager", specialised=True)


class _Produced(TorchDispatchMode):
    """Notes every tensor that is computed, whoever computes it."""

    def __init__(self, found: dict[int, weakref.ref[Tensor]]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in pytree.tree_leaves(result):
            if isinstance(value, Tensor):
                self._found[id(value)] = weakref.ref(value)
        return result


class Recorder(TorchFunctionMode):
    """Runs every torch function and writes it down, with the calls that its operands came from."""

    def __init__(self, model: nn.Module, parameters: dict[str, Tensor], buffers: dict[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.produced: dict[int, weakref.ref[Tensor]] = {}
        self._known: dict[int, tuple[Tensor, Any]] = {}
        self._moving: set[str] = set()
        """Calls whose value may be another one in another step."""
        self._stack: list[str] = [""]
        self._counters: dict[str, BufferRef] = {}
        self._cast = torch.is_autocast_enabled("cpu")
        for name, value in (*model.named_parameters(), *parameters.items()):
            self.know(value, ParamRef(name))
        for name, value in (*model.named_buffers(), *buffers.items()):
            self.know(value, BufferRef(name))

    def know(self, value: Tensor, leaf: Any) -> None:
        """What a tensor is called; it is kept, so that no other takes its place in memory."""
        self._known[id(value)] = (value, leaf)
        if isinstance(leaf, Ref) and not any(call.name == leaf.name for call in self.calls[-1:]):
            self._moving.add(leaf.name)

    @contextmanager
    def inside(self, model: nn.Module) -> Iterator[None]:
        """Modules that are recorded by functions of their own are, and every call learns whose it is."""
        patched = []
        for module in model.modules():
            kind = next((kind for kind in type(module).__mro__ if kind in LAYERS), None)
            own = type(module).forward.__module__.startswith("torch.") and "forward" not in vars(module)
            if kind is not None and own:
                module.forward = functools.partial(LAYERS[kind], self, module)
                patched.append(module)

        try:
            with module_paths(model) as self._stack:
                yield
        finally:
            for module in patched:
                del module.forward

    # --- calls ---------------------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a function of ours and note it as one call, as the tracer of torch.fx does."""
        positional, named = self.tree((args, kwargs))
        args, kwargs = _plain((args, kwargs))
        with torch._C.DisableTorchFunction():
            result = target(*args, **kwargs)
        self._note(target, positional, named, result)
        return result

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run, and note unless no element of a tensor is read."""
        kwargs = kwargs or {}
        if func in FUNCTIONS:
            with self:
                return FUNCTIONS[func](self, *args, **kwargs)
        name, attribute = _name(func)
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        if name == "requires_grad.__set__":  # what a value needs, its readers decide
            return func(*args, **kwargs)
        if name in READS and not attribute:
            return self._number(name, func, args, kwargs)
        if name in METADATA or (attribute and name not in (*VIEWED, "data")):
            args, kwargs = _plain((args, kwargs))
            result = func(*args, **kwargs)
            if not isinstance(result, Tensor) or (name in METADATA and result is args[0]):
                return result
        args, kwargs = _in_place_by_name(func, args, kwargs)
        noted = self.tree((args, kwargs))
        args, kwargs = _plain((args, kwargs))
        result = func(*args, **kwargs)
        if func in (F.batch_norm, torch.batch_norm):
            self._batch_norm(args, kwargs, result)
        elif not self._counts_batches(name, noted[0]):
            self._note(*_target(func, name, attribute, *noted), result, args)
        return result

    def _note(self, target: Any, args: Any, kwargs: Any, result: Any, given: Any = ()) -> None:
        name = base_name(target)
        in_place = target is operator.setitem or kwargs.get("inplace") or name in _IN_PLACE or _ends_in_place(name)
        if not in_place and any(result is value for value in given):
            return  # it is its operand
        if not in_place and not any(isinstance(value, Tensor) for value in pytree.tree_leaves(result)):
            raise self._refusal(f"{name} takes values out of torch")
        parts = isinstance(result, tuple | list)  # of which each is detached, not all at once
        call = self._append(target, args, kwargs, grad=parts or torch.is_grad_enabled())
        first = args[0] if args else None
        if in_place:
            if call.name in self._moving and isinstance(first, Ref):
                self._moving.add(first.name)
            return
        self._bind(result, call.name)
        if self._is_counted(name, given):
            for value in pytree.tree_leaves(result):
                if isinstance(value, Tensor):
                    size = self._append(Method("size"), (self.tree(value),), {}, grad=True)
                    self._guard(size, tuple(value.shape))

    def _append(self, target: Any, args: Any, kwargs: Any, *, grad: bool | None = None) -> Call:
        """``grad``: where no tensor comes out, there is nothing to detach."""
        if torch.is_autocast_enabled("cpu") != self._cast:
            raise self._refusal("the model changes autocast")
        name = f"call_{len(self.calls)}"
        call = Call(
            name, target, args, kwargs, self._stack[-1], users_line(), torch.is_grad_enabled() if grad is None else grad
        )
        read = tuple(iter_leaves((args, kwargs)))
        moves = any(not isinstance(leaf, Ref) or leaf.name in self._moving for leaf in read)
        if moves or is_random(kind_of(base_name(target)), args, kwargs):
            self._moving.add(name)
        self.calls.append(call)
        return call

    def _bind(self, result: Any, name: str) -> None:
        """The tensors of a result, under the names of their own that the parts of a tuple get."""
        if isinstance(result, Tensor):
            self._known[id(result)] = (result, Ref(name))
        elif isinstance(result, tuple | list):
            for position, part in enumerate(result):
                if any(isinstance(value, Tensor) for value in pytree.tree_leaves(part)):
                    self._bind(part, self._append(operator.getitem, (Ref(name), position), {}).name)

    def _is_counted(self, name: str, given: tuple[Any, ...]) -> bool:
        """Whether the size of a value depends on others' elements."""
        if name in COUNTING or "unique" in name or (name == "where" and len(given) == 1):
            return True
        if name != "getitem":
            return False
        picked = given[1] if isinstance(given[1], tuple | list) else [given[1]]
        parts = [part for index in picked for part in (_ends(index) if isinstance(index, slice) else [index])]
        sliced = any(isinstance(end, Tensor) for index in picked if isinstance(index, slice) for end in _ends(index))
        return sliced or any(isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8) for part in parts)

    # --- numbers -------------------------------------------------------------------------------------------------

    def _number(self, name: str, func: Any, args: Any, kwargs: Any) -> Any:
        """A number read from values: every step has to read the same, unless it can be followed."""
        noted = self.tree((args, kwargs))
        args, kwargs = _plain((args, kwargs))
        result = func(*args, **kwargs)
        if all(isinstance(leaf, Ref) and leaf.name not in self._moving for leaf in iter_leaves(noted)):
            return result
        if any(isinstance(number, float | complex) for number in pytree.tree_leaves(result)):
            if name not in ("item", "tolist") or isinstance(result, complex):
                raise self._refusal(BUILT_IN)
            return self._scalars(result, Ref(self._append(Method(name), *noted, grad=True).name))
        if name in ("equal", "allclose"):
            read = self._append(Method(name), *noted, grad=True)
        elif name == "__contains__":
            same = self._append(operator.eq, noted[0], {})
            read = self._append(
                Method("item"), (Ref(self._append(Method("any"), (Ref(same.name),), {}).name),), {}, grad=True
            )
        else:
            cast = "bool" if name in TRUTH else "long" if name in WHOLE else None
            value = noted[0][0] if cast is None else Ref(self._append(Method(cast), noted[0][:1], {}).name)
            read = self._append(Method("tolist" if name == "tolist" else "item"), (value,), {}, grad=True)
        self._guard(read, result)
        return result

    def _scalars(self, value: Any, leaf: Ref) -> Any:
        """Numbers that were read, in lists as ``tolist`` gives them."""
        if isinstance(value, list):
            return [self._scalars(part, self._computed(operator.getitem, (leaf, i))) for i, part in enumerate(value)]
        return Scalar(value, leaf, self._computed, self._decided, self._built_in)

    def _computed(self, function: Callable[..., Any], args: Any) -> Ref:
        return Ref(self._append(function, self.tree(args), {}, grad=True).name)

    def _decided(self, function: Callable[..., Any], args: Any) -> Any:
        result = function(*_plain(args))
        self._guard(self._append(function, self.tree(args), {}, grad=True), result)
        return result

    def _built_in(self) -> NoReturn:
        raise self._refusal(BUILT_IN)

    def _guard(self, read: Call, value: Any) -> None:
        if read.name in self._moving:
            holds = self._append(operator.eq, (Ref(read.name), value), {}, grad=True)
            self._append(kernels.guard, (Ref(holds.name), self._stack[-1], read.source), {}, grad=True)

    # --- normalisation -------------------------------------------------------------------------------------------

    def _counts_batches(self, name: str, args: tuple[Any, ...]) -> bool:
        """Batch-norm's step counter: the batch-norm operation of the normal form advances it itself."""
        first = args[0] if args else None
        if not isinstance(first, BufferRef) or not first.name.endswith("num_batches_tracked"):
            return False
        self._counters[first.name.rpartition(".")[0]] = first
        return name in ("add_", "__iadd__")

    def _batch_norm(self, args: Any, kwargs: Any, result: Tensor) -> None:
        signature = inspect.signature(F.batch_norm).bind(*args[:8], **kwargs)
        signature.apply_defaults()
        a = self.tree(signature.arguments)
        mean = a["running_mean"]
        counter = self._counters.get(mean.name.rpartition(".")[0]) if isinstance(mean, BufferRef) else None
        arguments = (a["input"], mean, a["running_var"], counter, a["weight"], a["bias"])
        options = {"training": bool(a["training"]), "momentum": a["momentum"], "eps": a["eps"]}
        self._note(kernels.batch_norm, arguments, options, result)

    # --- operands ------------------------------------------------------------------------------------------------

    def tree(self, value: Any) -> Any:
        """Arguments with references in place of tensors."""
        return map_leaves(value, lambda leaf: leaf, self._leaf)

    def _leaf(self, value: Any) -> Any:
        if isinstance(value, Scalar):
            return value.leaf
        if not isinstance(value, Tensor):
            return value
        known = self._known.get(id(value))
        if known is not None:
            return known[1]
        made = self.produced.get(id(value))
        if value.requires_grad or (made is not None and made() is value):
            raise self._refusal("a tensor is computed where calls of torch's functions cannot be followed")
        return value.detach()

    def _refusal(self, why: str) -> Untraceable:
        return Untraceable(f"followed: {why}", module=self._stack[-1], source=users_line())


def _plain(arguments: Any) -> Any:
    """Arguments with values in place of the numbers that are followed."""
    return map_leaves(arguments, lambda leaf: leaf, plain)


def _ends(index: slice) -> tuple[Any, Any, Any]:
    return index.start, index.stop, index.step


_IN_PLACE = frozenset(f"i{name}" for name in PLAIN)


def _ends_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__") and name not in KEYWORDS.values()


def _name(func: Any) -> tuple[str, bool]:
    """The function's own name, and whether it is an attribute that is read."""
    name = str(getattr(func, "__name__", type(func).__name__))
    if name not in ("__get__", "__set__"):
        return name, False
    owner = func.__self__
    found = str(getattr(owner, "__name__", None) or getattr(getattr(owner, "fget", None), "__name__", ""))
    return (found, True) if name == "__get__" else (f"{found}.{name}", False)


def _target(func: Any, name: str, attribute: bool, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """A function as the normal form takes it: operators by Python's, methods by name."""
    if attribute:
        return (Method("detach"), args, {}) if name == "data" else (getattr, (args[0], name), {})
    if name in SWAPPED:
        return SWAPPED[name], (args[1], args[0]), kwargs
    if name in OPERATORS:
        return OPERATORS[name], args, kwargs
    return (Method(name) if is_tensor_method_or_property(func) else func), args, kwargs


def _in_place_by_name(func: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """``inplace`` by name, however it was given."""
    if getattr(func, "__module__", "") != "torch.nn.functional" or not inspect.isfunction(func):
        return args, kwargs
    parameters = list(inspect.signature(func).parameters)
    if "inplace" not in parameters[: len(args)]:
        return args, kwargs
    position = parameters.index("inplace")
    return args[:position], {**kwargs, "inplace": args[position]}
