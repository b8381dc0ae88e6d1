"""The first front end: torch.fx symbolic tracing, through torch's own layers down to functions of parameters.

Departures from ``torch.fx.symbolic_trace``: in-place operators and item assignment are recorded as what they are
(torch.fx records ``x += y`` as a new value and refuses ``x[i] = y``); ``torch.no_grad()`` is recorded; parameters are
found by identity in constant time; a model is never changed by being traced.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy
from torch.utils import _pytree as pytree

from gtddp_compile.frontends.canonical import base_name
from gtddp_compile.frontends.layers import FUNCTIONS, LAYERS
from gtddp_compile.frontends.leaving import Reads
from gtddp_compile.frontends.traced import Call, Traced, Untraceable, argument_names, named, raised_at, users_line
from gtddp_compile.graph import BufferRef, Method, ParamRef

IN_PLACE = ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "imatmul")


class Recorded(fx.Proxy):
    """A value under trace that records item assignment and in-place operators."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Most functions as torch.fx records them, some as what they compute."""
        if function is torch.autograd.grad:
            raise TypeError("a derivative is taken in forward")
        if function not in FUNCTIONS:
            return super().__torch_function__(function, types, args, kwargs)
        (tracer, *_) = (value.tracer for value in args if isinstance(value, fx.Proxy))
        return FUNCTIONS[function](tracer, *args, **(kwargs or {}))

    def __hash__(self) -> int:
        if _is_read(self.node):  # a table would be asked for this object, not for the number
            raise TypeError("a number read from values is looked up in a table")
        return id(self)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, index, value), {})


def _is_read(node: fx.Node) -> bool:
    """Whether it is a number read from values, or computed of one by Python's operators."""
    if node.op == "call_method":
        return node.target in ("item", "tolist")
    if getattr(node.target, "__module__", "") != "_operator":
        return False
    return any(map(_is_read, node.all_input_nodes))


def _record_in_place(name: str) -> Callable[[Any, Any], Any]:
    function = getattr(operator, name)

    def record(self: Any, other: Any) -> Any:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return record


for _name in IN_PLACE:
    setattr(Recorded, f"__{_name}__", _record_in_place(_name))


class Tracer(fx.Tracer):
    """Traces through every module but those in :data:`LAYERS`, which are recorded by functions of their own."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__(param_shapes_constant=True)
        self.proxy_buffer_attributes = True
        self._names = names
        self._parameters = {id(p): name for name, p in model.named_parameters()}
        self._buffers = {id(b): name for name, b in model.named_buffers()}
        self._attributes: dict[int, Any] = {}
        self.constants: dict[str, Tensor] = {}
        self.failed_in: str | None = None
        self.asked: fx.Node | None = None
        self.returns: pytree.TreeSpec | None = None

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """One placeholder for every input given; other arguments keep their defaults."""

        def flat(*args: Any) -> tuple[Any, ...]:
            leaves, self.returns = pytree.tree_flatten(root_fn(*args))  # torch.fx forgets types such as named tuples
            return tuple(leaves)

        return flat, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in self._names)]

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """None: what is not traced through is recorded by :meth:`call_module`."""
        return False

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Trace through, or record a layer by its own function."""
        record = next((LAYERS[kind] for kind in type(m).__mro__ if kind in LAYERS), None)
        called = forward if record is None else lambda *a, **k: record(self, m, *a, **k)
        try:
            return super().call_module(m, called, args, kwargs)
        except Exception:
            self.failed_in = self.failed_in or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """A parameter or buffer as a value under trace."""
        if not isinstance(attr_val, Tensor):
            return attr_val
        known = self._attributes.get(id(attr_val))
        if known is None:
            name = self._parameters.get(id(attr_val)) or self._buffers.get(id(attr_val))
            if name is None:
                return attr_val
            made = self.create_proxy("get_attr", name, (), {})
            known = ParameterProxy(self, made.node, name, attr_val) if isinstance(attr_val, nn.Parameter) else made
            self._attributes[id(attr_val)] = known
        return known

    def to_bool(self, obj: fx.Proxy) -> bool:
        """Refused, as torch.fx does; remembers whose value was asked for."""
        self.asked = obj.node
        return super().to_bool(obj)

    def create_arg(self, a: Any) -> Any:
        """Tensors that are neither parameters nor buffers become constants of the trace, not of the model."""
        if isinstance(a, Tensor):
            name = self._parameters.get(id(a)) or self._buffers.get(id(a))
            if name is None:
                name = f"_constant_{len(self.constants)}"
                self.constants[name] = a.detach()
            return self.create_node("get_attr", name, (), {})
        return super().create_arg(a)

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **more: Any) -> fx.Node:
        """Every node remembers the module and the user's line, and whether gradients were on."""
        node = super().create_node(kind, target, args, kwargs, *rest, **more)
        node.meta["where"] = (self.scope.module_path, users_line(), torch.is_grad_enabled())
        return node

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """Values under trace are :class:`Recorded`."""
        return Recorded(node, self)


@cache
def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` as one operation with the function's name."""

    def apply(*args: Any) -> Any:
        return function.apply(*args)

    apply.__name__ = apply.__qualname__ = function.__name__
    return apply


@contextmanager
def _functions_of_the_users_own() -> Iterator[None]:
    """``torch.autograd.Function`` is recorded as it is: its ``backward`` need not be the derivative of its ``forward``
    (straight-through estimators, reversed gradients), and torch.fx would trace into the latter alone. One that is given
    a function to call (torch.utils.checkpoint) is traced through: parameters are used in there.
    """
    own = vars(torch.autograd.Function)["apply"]

    def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        leaves = pytree.tree_leaves(args)
        tracer = next((leaf.tracer for leaf in leaves if isinstance(leaf, fx.Proxy)), None)
        if tracer is None or any(callable(leaf) and not isinstance(leaf, fx.Proxy) for leaf in leaves):
            return own.__get__(None, cls)(*args, **kwargs)
        return tracer.create_proxy("call_function", applied(cls), args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own  # type: ignore[method-assign]


def trace_symbolically(model: nn.Module, inputs: tuple[Any, ...]) -> Traced:
    """Record a model by torch.fx; of its inputs only their number matters."""
    names = argument_names(model, len(inputs))
    tracer = Tracer(model, names)
    cast = torch.is_autocast_enabled("cpu")
    try:
        with torch.enable_grad(), _functions_of_the_users_own(), Reads(model):
            graph = tracer.trace(model)
    except Untraceable:
        raise
    except Exception as error:  # the user's own code runs here and may raise anything
        raise Untraceable(
            _reason(error),
            module=tracer.failed_in or "",
            operation=None if tracer.asked is None else base_name(tracer.asked.target),
            source=raised_at(error.__traceback__),
        ) from error
    if torch.is_autocast_enabled("cpu") != cast:
        raise Untraceable("the model leaves autocast changed")
    return _collect(graph, tracer, len(inputs))


def _reason(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    if isinstance(error, fx.proxy.TraceError):
        return "the path through the model depends on the values or sizes of its inputs"
    if Recorded.__name__ in text:
        return f"a tensor goes where its numbers are needed: {text.replace(Recorded.__name__, 'a tensor under trace')}"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _collect(graph: fx.Graph, tracer: Tracer, count: int) -> Traced:
    parameters = set(tracer._parameters.values())
    inputs, calls, output = [], [], None
    leaves: dict[str, Any] = {}

    for node in graph.nodes:
        module, source, grad = node.meta["where"]
        if node.op == "placeholder":
            inputs.append(node.name)
        elif node.op == "get_attr":
            if node.target in tracer.constants:
                leaves[node.name] = tracer.constants[node.target]
            else:
                leaves[node.name] = ParamRef(node.target) if node.target in parameters else BufferRef(node.target)
        elif node.op == "output":
            assert tracer.returns is not None
            output = pytree.tree_unflatten(named(node.args[0], leaves), tracer.returns)
        else:
            target = Method(node.target) if node.op == "call_method" else node.target
            args, kwargs = named(node.args, leaves), named(node.kwargs, leaves)
            calls.append(Call(node.name, target, args, kwargs, module, source, grad))
    return Traced(tuple(inputs[:count]), tuple(calls), output, "fx")
