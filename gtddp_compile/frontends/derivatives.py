"""The front end of models that differentiate themselves: ``torch.func``'s transforms and ``torch.autograd.grad``.

``make_fx`` runs the model and notes what reaches aten, below every transform, so that derivatives of any order and mode
have become ordinary operations. A second pass functionalises them and takes fused backward operations apart;
:mod:`gtddp_compile.frontends.tidied` brings what is left to the form of the other front ends. Sizes are built in.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._decomp import get_decompositions
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.leaving import LEAVING
from gtddp_compile.frontends.reference import leaves, start
from gtddp_compile.frontends.tidied import tidied
from gtddp_compile.frontends.traced import Traced, Untraceable, argument_names, module_paths, raised_at, users_line
from gtddp_compile.pde import Jet

aten = torch.ops.aten
FUSED: dict[Any, Any] = get_decompositions(
    [
        aten.tanh_backward, aten.sigmoid_backward, aten.silu_backward, aten.gelu_backward, aten.softplus_backward,
        aten.elu_backward, aten.leaky_relu_backward, aten.threshold_backward, aten.native_layer_norm,
        aten.native_layer_norm_backward, aten.native_group_norm, aten.native_group_norm_backward,
        aten._softmax_backward_data, aten._log_softmax_backward_data, aten.select_backward, aten.slice_backward,
    ]
)  # fmt: skip
"""Operations that are taken apart: fused backward ones, and normalisations, whose moments autograd takes as given."""

DECIDES = "the path through the model depends on values"
DETACHING = frozenset(
    {torch.Tensor.detach, torch.Tensor.detach_, torch.detach, vars(torch._C.TensorBase)["data"].__get__}
)


def differentiates(model: nn.Module, inputs: tuple[Any, ...]) -> bool:
    """Whether a model takes derivatives in ``forward``, or maps over samples by ``vmap``: it is run once.

    Raises:
        CompileError: it differentiates with respect to its parameters, or so that parameters get no gradient.
    """
    watch = _Watch(model)
    try:
        with watch, _quiet():
            watch.run(inputs)
    except CompileError:
        raise
    except Exception:  # the user's own code, which may not take being watched: other front ends say what they think
        return watch.found
    return watch.found


def trace_derivatives(model: nn.Module, inputs: tuple[Any, ...]) -> Traced:
    """Record a model and the derivatives that it takes.

    Raises:
        Untraceable: it decides on values, or writes a buffer.
    """
    if not all(isinstance(value, Tensor) for value in inputs):
        raise Untraceable("with its derivatives: an input is no tensor")
    params, buffers = leaves(model)
    where = _Where(model)
    spec: list[pytree.TreeSpec] = []
    given = [*params.values(), *buffers.values(), *(value.clone() for value in inputs)]

    def run(*flat: Tensor) -> list[Any]:
        values = dict(zip([*params, *buffers], flat, strict=False))
        with where.stamped():
            output = torch.func.functional_call(model, values, flat[len(values) :])
        found, shape = pytree.tree_flatten(output)
        spec.append(shape)
        return found

    try:
        # Without a mode in sight, ``make_fx`` makes one for every value that it notes: half of its time.
        with _quiet(), tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True))):
            recorded = make_fx(run)(*given)
            recorded.graph.eliminate_dead_code()
            again = functionalize(_Again(recorded, where).again, remove="mutations")
            plain = make_fx(again, decomposition_table=FUSED)(*given)
            plain.graph.eliminate_dead_code()
    except (CompileError, Untraceable):
        raise
    except Exception as error:  # the user's own code runs here and may raise anything
        said = (str(error).strip() or type(error).__name__).split("\n")[0]
        if "tracing tensor" in said:
            said = DECIDES
        raise Untraceable(f"with its derivatives: {said[:300]}", source=raised_at(error.__traceback__)) from error
    names = argument_names(model, len(inputs))
    calls, output = tidied(plain, (tuple(params), tuple(buffers), names), given)
    return Traced(names, calls, pytree.tree_unflatten(output, spec[0]), "derivatives", specialised=True)


@contextmanager
def _quiet() -> Iterator[None]:
    """With gradients, the same random numbers, and without torch's warnings about its own inner workings."""
    with torch.random.fork_rng(), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start()
        yield


class _Watch(TorchFunctionMode):
    """Looks for derivatives while a model runs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found = False
        self._model = model
        self._params, self._buffers = leaves(model)
        self._names = {id(p): name for name, p in self._params.items()}

    def run(self, inputs: tuple[Any, ...]) -> None:
        """Run the model on copies."""
        values = {**self._params, **self._buffers}
        torch.func.functional_call(self._model, values, copy.deepcopy(inputs))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what is asked for, and do it."""
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            given = dict(zip(("outputs", "inputs", "grad_outputs", "retain_graph", "create_graph"), args, strict=False))
            given.update(kwargs)
            self._refuse(given["inputs"])
            if not given.get("create_graph") and torch.is_grad_enabled():
                raise _refusal("torch.autograd.grad without create_graph=True cuts the derivative off from parameters",
                               "Pass create_graph=True; detach the result where that is meant")  # fmt: skip
        elif func is torch._VF._make_dual:
            self._refuse(args[0])
        elif not self.found:
            read = pytree.tree_leaves((args, kwargs))
            self.found = any(isinstance(value, Jet) or _is_transformed(value) for value in read)
            return func(*args, **kwargs)
        self.found = True
        return func(*args, **kwargs)

    def _refuse(self, read: Any) -> None:
        for value in pytree.tree_leaves(read):
            while isinstance(value, Tensor) and _is_transformed(value):
                value = torch._C._functorch.get_unwrapped(value)
            name = self._names.get(id(value))
            if name is not None:
                raise _refusal(
                    f"the model differentiates with respect to its parameter {name!r} (meta-learning): an inner step "
                    "of the parameters is no operation of a layer",
                    "Differentiate with respect to inputs only, or train with an ordinary optimizer",
                    name.rpartition(".")[0],
                )


def _is_transformed(value: Any) -> bool:
    return isinstance(value, Tensor) and bool(torch._C._functorch.is_functorch_wrapped_tensor(value))


def _refusal(why: str, remedy: str, module: str = "") -> CompileError:
    return CompileError(why, remedy, module=module, operation="grad", source=users_line() or None)


class _Where:
    """Stamps every node with the module and the line that it comes from, and whether gradients pass it."""

    def __init__(self, model: nn.Module) -> None:
        self.given: tuple[str, str, bool] | None = None
        """What a node of the second pass takes over from the first."""
        self._model = model
        self._detaching = False
        self._own = {id(value) for value in (*model.parameters(), *model.buffers())}

    def moves(self, value: Any) -> bool:
        """Whether a value may be another one in another step; torch tells it of what it makes a number of alone."""
        slot = get_proxy_slot(value, get_proxy_mode().tracer, None) if isinstance(value, Tensor) else None  # type: ignore[union-attr]
        return id(value) in self._own or (slot is not None and slot.constant is None)

    @contextmanager
    def stamped(self) -> Iterator[None]:
        """Nodes that the current trace makes in the block."""
        graph: Any = get_proxy_mode().tracer.graph  # type: ignore[union-attr]
        create = graph.create_node

        def stamp(*args: Any, **kwargs: Any) -> fx.Node:
            node: fx.Node = create(*args, **kwargs)
            here = (stack[-1], users_line(), torch.is_grad_enabled() and not self._detaching)
            node.meta["where"] = self.given or here
            return node

        graph.create_node = stamp
        try:
            with module_paths(self._model) as stack, _Detached(self):
                yield
        finally:
            del graph.create_node

    @contextmanager
    def detaching(self) -> Iterator[None]:
        """What is recorded in the block is a value that the user detaches; autograd detaches what it saves."""
        self._detaching = True
        try:
            yield
        finally:
            self._detaching = False


class _Detached(TorchFunctionMode):
    def __init__(self, where: _Where) -> None:
        super().__init__()
        self._where = where

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in LEAVING and any(map(self._where.moves, args)):
            raise Untraceable(f"with its derivatives: {DECIDES}", source=users_line() or None)
        if func not in DETACHING:
            return func(*args, **(kwargs or {}))
        with self._where.detaching():
            return func(*args, **(kwargs or {}))


class _Again(fx.Interpreter):
    """Runs a recording for another trace, whose nodes keep the place that they come from."""

    def __init__(self, recorded: fx.GraphModule, where: _Where) -> None:
        super().__init__(recorded)
        self._where = where

    def again(self, *args: Any) -> Any:
        with self._where.stamped():
            return self.run(*args, enable_io_processing=False)

    def run_node(self, node: fx.Node) -> Any:
        self._where.given = node.meta.get("where")
        return super().run_node(node)
