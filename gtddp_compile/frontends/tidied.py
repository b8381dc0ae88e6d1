"""From aten operations to the calls of the normal form: what derivatives leave behind is tidied up.

One walk in order. What depends on no value of an input or parameter is computed now: tangents that are zero take the
products with them away, and seeds that are the same for every sample are kept once (``spread``). What does nothing is
left out, and what is computed twice is computed once: forward mode runs a network again for every direction. A product
with a weight is a linear layer again, ``x Wᵀ`` or ``x W``, with the bias where it is added.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gtddp_compile import kernels
from gtddp_compile.frontends.traced import Call
from gtddp_compile.graph import BufferRef, Method, ParamRef, Ref

MADE = frozenset(
    f"{start}{word}{end}"
    for word in ("zeros", "ones", "full", "empty")
    for start, end in (("", ""), ("new_", ""), ("", "_like"))
) | {"_efficientzerotensor", "arange", "eye", "scalar_tensor", "lift_fresh_copy"}  # fmt: skip
"""Operations of which the sizes of their operands alone matter."""

SAME = frozenset({"alias", "detach", "lift_fresh_copy", "clone", "_to_copy", "contiguous"})
"""Operations that give their operand's values, where dtype and shape are its own."""

SHAPED = frozenset({"view", "_unsafe_view", "reshape", "expand", "squeeze", "unsqueeze"})
PRODUCTS = frozenset({"mul", "mm", "bmm"})

Names = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


def tidied(recorded: fx.GraphModule, names: Names, given: Sequence[Tensor]) -> tuple[tuple[Call, ...], list[Any]]:
    """The calls of a recording without side effects, and its outputs in terms of them.

    ``names`` of parameters, buffers and inputs, and their values (``given``) are in the order of its arguments.
    """
    return _Walk(recorded, names, given).calls_and_output()


class _Walk:
    def __init__(self, recorded: fx.GraphModule, names: Names, given: Sequence[Tensor]) -> None:
        params, buffers, inputs = names
        self._recorded = recorded
        self._leaves: list[Any] = [*map(ParamRef, params), *map(BufferRef, buffers), *map(Ref, inputs)]
        self._given, self._first = given, Ref(inputs[0])
        self._batch = given[len(params) + len(buffers)].shape[0] if inputs else 0
        self._value: dict[fx.Node, Any] = {}
        self._leaf: dict[fx.Node, Any] = {}
        """What a node has become; none while nobody asked for it (constants, transposed weights)."""
        self._constant: set[fx.Node] = set()
        self._turned: dict[fx.Node, ParamRef] = {}
        """Nodes that are a weight, transposed."""
        self._calls: dict[str, Call] = {}
        self._known: dict[Any, Ref] = {}
        self._times: Counter[str] = Counter()
        """Of how many nodes a call is the value."""

    def calls_and_output(self) -> tuple[tuple[Call, ...], list[Any]]:
        leaves = iter(zip(self._leaves, self._given, strict=True))
        for node in self._recorded.graph.nodes:
            if node.op == "placeholder":
                self._leaf[node], self._value[node] = next(leaves)
            elif node.op == "get_attr":
                self._value[node] = getattr(self._recorded, str(node.target))
                self._constant.add(node)
            elif node.op == "call_function":
                self._visit(node)
            else:
                output = [self._ref(value) for value in pytree.tree_leaves(node.args[0])]
        return tuple(self._calls.values()), output

    # --- one node -------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._value.__getitem__)
        with torch.no_grad():
            value = self._value[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        name, read = _name(node), node.all_input_nodes
        if name in MADE or (read and all(n in self._constant for n in read)) or self._is_nothing(node, name):
            self._constant.add(node)
            return
        same = self._same(node, name)
        if same is not None:
            self._take(node, same)
        elif _transposes(name, args[1:]) and value.dim() == 2 and self._is_weight(read[0]):
            self._turn(node, read[0])
        elif (name in ("mm", "addmm") and self._product(node, name)) or (name == "add" and self._biased(node)):
            return
        else:
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self._ref)
            # A copy that was left out may have lain otherwise.
            self._emit(node, torch.reshape if name in ("view", "_unsafe_view") else node.target, args, kwargs)

    def _is_nothing(self, node: fx.Node, name: str) -> bool:
        """Whether a factor is zero for every value of inputs and parameters."""
        read = node.args[: 2 if name in PRODUCTS else 1] if name in PRODUCTS or name.endswith("_backward") else ()
        return any(self._is_all(n, 0) for n in read) and isinstance(self._value[node], Tensor)

    def _is_all(self, node: Any, number: int) -> bool:
        value = self._value.get(node) if isinstance(node, fx.Node) and node in self._constant else node
        if isinstance(value, Tensor):
            return bool((value == number).all())
        return type(value) in (int, float) and value == number

    def _same(self, node: fx.Node, name: str) -> fx.Node | None:
        """The operand that an operation gives back as it is."""
        first, *rest = _given(node) or (None,)
        if name in SAME or name in SHAPED:
            kept = node.meta["where"][2] if name == "detach" and "where" in node.meta else True
            return first if kept and isinstance(first, fx.Node) and self._is_like(node, first) else None
        if name not in ("add", "sub", "mul", "div") or not rest:
            return None
        nothing = 0 if name in ("add", "sub") else 1
        if self._is_all(rest[0], nothing) and isinstance(first, fx.Node) and self._is_like(node, first):
            return first
        swaps = name in ("add", "mul") and node.kwargs.get("alpha", 1) == 1 and isinstance(rest[0], fx.Node)
        return rest[0] if swaps and self._is_all(first, nothing) and self._is_like(node, rest[0]) else None

    def _is_like(self, node: fx.Node, other: fx.Node) -> bool:
        a, b = self._value[node], self._value[other]
        return isinstance(b, Tensor) and a.shape == b.shape and a.dtype == b.dtype and a.device == b.device

    def _take(self, node: fx.Node, other: fx.Node) -> None:
        if other in self._constant:
            self._constant.add(node)
        elif other in self._turned:
            self._turned[node] = self._turned[other]
        else:
            self._leaf[node] = self._leaf[other]

    # --- weights --------------------------------------------------------------------------------------------------

    def _is_weight(self, node: Any) -> bool:
        leaf = self._turned.get(node) or self._leaf.get(node)
        return isinstance(leaf, ParamRef) and self._value[node].dim() == 2

    def _turn(self, node: fx.Node, weight: fx.Node) -> None:
        if weight in self._turned:
            self._leaf[node] = self._turned[weight]
        else:
            self._turned[node] = self._leaf[weight]

    def _product(self, node: fx.Node, name: str) -> bool:
        """A product with a weight as a linear layer; whether it is one."""
        bias, (left, right) = (None, _given(node)) if name == "mm" else (_given(node)[0], _given(node)[1:])
        if node.kwargs or not self._is_weight(right) or self._is_weight(left):
            return False
        if right not in self._turned:
            if bias is not None:
                return False
            self._emit(node, kernels.transposed, (self._ref(left), self._leaf[right]), {})
            return True
        leaf = None if bias is None else self._leaf.get(bias)
        if bias is not None and not (isinstance(leaf, ParamRef) and self._value[bias].dim() == 1):
            return False
        self._emit(node, F.linear, (self._ref(left), self._turned[right], leaf), {})
        return True

    def _biased(self, node: fx.Node) -> bool:
        """A bias that is added to a linear layer's value, which nobody else reads, as part of the layer."""
        product, bias = _given(node)[:2]
        leaf = self._leaf.get(bias) if isinstance(bias, fx.Node) and isinstance(product, fx.Node) else None
        if not isinstance(leaf, ParamRef) or node.kwargs or not self._is_like(node, product):
            return False
        view, width = product, self._value[bias].shape
        while len(product.users) == 1 and _name(product) in SHAPED and self._value[product].shape[-1:] == width:
            product = _given(product)[0]
        ref = self._leaf.get(product)
        call = self._calls.get(ref.name) if isinstance(ref, Ref) else None
        if call is None or call.target is not F.linear or call.args[2] is not None:
            return False
        if self._value[product].shape[-1:] != width or len(product.users) > 1 or self._times[call.name] > 1:
            return False
        before, key = (_call_key(call.target, args, call.grad) for args in (call.args, (*call.args[:2], leaf)))
        if key in self._known:
            return False
        self._calls[call.name] = replace(call, args=(*call.args[:2], leaf))
        self._known[key] = self._known.pop(before)
        self._take(node, view)
        return True

    # --- calls ----------------------------------------------------------------------------------------------------

    def _ref(self, node: Any) -> Any:
        """What a call takes for a node."""
        if not isinstance(node, fx.Node):
            return node
        if node not in self._leaf:
            if node in self._turned:
                self._emit(node, Method("t"), (self._turned[node],), {})
            else:
                self._leaf[node] = self._made(node)
        return self._leaf[node]

    def _made(self, node: fx.Node) -> Any:
        """A constant: where every sample has the same part, that part for each of them."""
        value = self._value[node]
        if not isinstance(value, Tensor) or not self._batch:
            return value
        for axis, size in enumerate(value.shape):
            if size and size % self._batch == 0:
                for order, samples in (((self._batch, -1), axis), ((-1, self._batch), axis + 1)):
                    apart = value.detach().unflatten(axis, order)
                    own = apart.select(samples, 0)
                    if bool((apart == own.unsqueeze(samples)).all()):
                        return self._spread(node, own.clone(), axis, samples)
        return value.detach()

    def _spread(self, node: fx.Node, own: Tensor, axis: int, samples: int) -> Ref:
        key = (own.shape, own.dtype, own.contiguous().numpy(force=True).tobytes())
        found = self._call(node, kernels.spread, (self._first, own), {}, key)
        if samples:
            found = self._call(node, Method("movedim"), (found, 0, samples), {})
        return self._call(node, Method("flatten"), (found, axis, axis + 1), {})

    def _emit(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> None:
        self._leaf[node] = self._call(node, target, args, kwargs)

    def _call(self, node: fx.Node, target: Any, args: Any, kwargs: Any, key: Any = None) -> Ref:
        """A call, unless it was made before."""
        module, source, grad = node.meta.get("where", ("", "", True))
        key = key or _call_key(target, (args, kwargs) if kwargs else args, grad)
        if key not in self._known or _draws(node):
            weight = next((a for a in args if isinstance(a, ParamRef)), None)
            module = weight.name.rpartition(".")[0] if weight is not None else module
            name = f"call_{len(self._calls)}"
            self._calls[name] = Call(name, target, tuple(args), dict(kwargs), module, source, grad)
            self._known[key] = Ref(name)
        self._times[self._known[key].name] += 1
        return self._known[key]


def _given(node: fx.Node) -> tuple[Any, ...]:
    return node.args


def _name(node: fx.Node) -> str:
    if node.target is operator.getitem:
        return "getitem"
    schema = getattr(node.target, "_schema", None)
    return str(schema.name).split("::")[-1] if schema is not None else str(node.target)


def _transposes(name: str, axes: Sequence[Any]) -> bool:
    """Whether two axes change places."""
    if name in ("t", "transpose"):
        return name == "t" or axes[0] % 2 != axes[1] % 2
    return name == "permute" and list(axes[0]) == [1, 0]


def _draws(node: fx.Node) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def _call_key(target: Any, arguments: Any, grad: bool) -> str:
    """A call as text that differs where calls do."""
    leaves, spec = pytree.tree_flatten(arguments)
    said = [id(leaf) if isinstance(leaf, Tensor) else (type(leaf).__name__, leaf) for leaf in leaves]
    return f"{target}{said}{spec}{grad}"
