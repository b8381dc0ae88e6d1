"""Derivatives of a network with respect to its inputs, all of them in one forward pass (Taylor mode).

``laplacian(net)(x)`` runs ``net`` once, on a :class:`Jet`: the value at every point, its first derivatives along every
coordinate, and second derivatives or their sum. Each operation of the network carries the three on by the chain rule
(Griewank and Walther 2008, chapter 13; the sum of second derivatives alone: Li et al. 2024, forward Laplacian). A
linear layer is one for each of them, and that is how the compiler sees it: one weight, used three times.

The functions are written for points along leading axes that do not see each other: ``x`` is ``(…, D)`` and row i of the
result depends on row i of ``x`` alone. Units are those of the network's outputs over those of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vmap

Field = Callable[[Tensor], Tensor]
"""A function of points ``(…, D)``, a module as a rule."""


class Taylor(NamedTuple):
    """A field and its derivatives at every point.

    Attributes:
        value: ``u``, of any shape ``S`` beginning with that of the points.
        gradient: ``∂u/∂x_d``, ``(*S, D)``.
        hessian_diagonal: ``∂²u/∂x_d²``, ``(*S, D)``.
    """

    value: Tensor
    gradient: Tensor
    hessian_diagonal: Tensor


def taylor(f: Field) -> Callable[[Tensor], Taylor]:
    """The field with its first and unmixed second derivatives.

    Args:
        f: maps points ``(…, D)`` to ``(…)`` or ``(…, m)``.

    Raises:
        TypeError: (when called) the points are no floating-point tensor, or ``f`` returns something else than a tensor.
    """

    def derivatives(x: Tensor) -> Taylor:
        jet = _run(f, x, "diagonal")
        return Taylor(jet.value, _last(jet.first), _last(jet.second))

    return derivatives


def laplacian(f: Field) -> Field:
    """``Σ_d ∂²f/∂x_d²``, of the shape of ``f(x)``.

    Args:
        f: maps points ``(…, D)`` to ``(…)`` or ``(…, m)``.

    Raises:
        TypeError: as :func:`taylor`.
    """
    return lambda x: _run(f, x, "sum").second  # type: ignore[return-value]


def hessian_diagonal(f: Field) -> Field:
    """``∂²f/∂x_d²``, ``(*f(x).shape, D)``; as :func:`taylor`."""
    return lambda x: taylor(f)(x).hessian_diagonal


def gradient(f: Field) -> Field:
    """``∂f/∂x_d``, ``(*f(x).shape, D)``: of several outputs the Jacobian; as :func:`taylor`."""
    return lambda x: _last(_run(f, x, "").first)


def divergence(f: Field) -> Field:
    """``Σ_d ∂f_d/∂x_d``, ``(…)``, of a vector field.

    Args:
        f: maps points ``(…, D)`` to vectors ``(…, D)``.

    Raises:
        ValueError: (when called) the field has not as many components as the points have coordinates.
        TypeError: as :func:`taylor`.
    """

    def summed(x: Tensor) -> Tensor:
        found = gradient(f)(x)
        if found.dim() <= x.dim() or found.shape[-2] != x.shape[-1]:
            raise ValueError(
                f"a field of shape {tuple(found.shape[:-1])} has no divergence in {x.shape[-1]} coordinates"
            )
        return found.diagonal(dim1=-2, dim2=-1).sum(-1)

    return summed


def _last(first: Tensor | None) -> Tensor:
    assert first is not None
    return first.movedim(0, -1)


def _run(f: Field, x: Tensor, order: str) -> Jet:
    if not isinstance(x, Tensor) or not x.is_floating_point() or not x.dim():
        raise TypeError(f"points are a floating-point tensor (…, D), not {type(x).__name__}")
    size = x.shape[-1]
    first = torch.eye(size, dtype=x.dtype, device=x.device).view(size, *(1,) * (x.dim() - 1), size)
    first = first.expand(size, *x.shape)
    second = {"": None, "sum": torch.zeros_like(x), "diagonal": torch.zeros_like(first)}[order]
    found: Any = f(Jet(x, first, second))  # type: ignore[arg-type]
    if isinstance(found, Tensor):  # it does not depend on the points
        found = Jet(found, _like(first, found, x.dim()), None if second is None else _like(second, found, x.dim()))
    if not isinstance(found, Jet):
        raise TypeError(f"the field returns {type(found).__name__}, not one tensor")
    return found


def _like(part: Tensor, value: Tensor, dims: int) -> Tensor:
    return value.new_zeros(*part.shape[: part.dim() - dims], *value.shape)


# --- jets -------------------------------------------------------------------------------------------------------------

LINEAR = frozenset(
    {"add", "__add__", "__radd__", "sub", "__sub__", "__rsub__", "rsub", "neg", "__neg__", "cat", "concat", "stack"}
    | {"__getitem__", "select", "narrow", "index_select", "chunk", "split", "unbind", "unsqueeze", "squeeze", "view"}
    | {"reshape", "flatten", "unflatten", "transpose", "permute", "movedim", "expand", "expand_as", "sum", "mean", "to"}
    | {"float", "double", "clone", "contiguous", "T.__get__", "mT.__get__", "t", "repeat", "tile", "flip", "roll"}
)
"""Functions that are linear, up to a constant, in all the jets they are given together."""

PRODUCTS = frozenset({"mul", "multiply", "__mul__", "__rmul__"})

POINTWISE = frozenset(
    {"tanh", "sin", "cos", "exp", "sigmoid", "log", "log1p", "expm1", "sqrt", "rsqrt", "reciprocal", "square", "pow"}
    | {"__pow__", "softplus", "silu", "gelu", "elu", "selu", "celu", "mish", "softsign", "logsigmoid", "tanhshrink"}
    | {
        "erf", "atan", "asin", "acos", "sinh", "cosh", "tan", "asinh", "relu", "leaky_relu", "abs", "__rtruediv__",
        "__rpow__",
    }
)  # fmt: skip
"""Functions of each entry of their only jet."""

METADATA = frozenset({"shape", "ndim", "dtype", "device", "is_cuda", "layout", "requires_grad"})
METHODS = frozenset({"size", "dim", "numel", "is_floating_point", "get_device", "type"})


class Jet:
    """A value with its derivatives, which torch's functions take in place of a tensor.

    Attributes:
        value: of any shape ``S``.
        first: along every direction, ``(D, *S)``.
        second: ``(D, *S)``, or their sum over directions, ``(*S)``; ``None`` where it is not asked for.
    """

    def __init__(self, value: Tensor, first: Tensor, second: Tensor | None) -> None:
        self.value, self.first, self.second = value, first, second

    @property
    def summed(self) -> bool:
        """Whether second derivatives are summed over directions."""
        return self.second is not None and self.second.dim() == self.value.dim()

    def __getattr__(self, name: str) -> Any:
        """Methods and attributes of a tensor."""
        if name in METADATA:
            return getattr(self.value, name)
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        if name in METHODS:
            return getattr(self.value, name)
        method = getattr(Tensor, name)
        if not callable(method):
            return _apply(lambda x: getattr(x, name), name, (self,), {})
        return lambda *args, **kwargs: Jet.__torch_function__(method, (Jet,), (self, *args), kwargs)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """The function of jets."""
        kwargs = dict(kwargs or {})
        if func is F.linear and not any(isinstance(a, Jet) for a in (*args[1:], *kwargs.values())) and args:
            return _linear(*args, **kwargs)
        func = _layer_norm if func is F.layer_norm else func
        kwargs.pop("inplace", None)
        name = str(getattr(func, "__name__", ""))
        if name.endswith("_") and not name.endswith("__"):
            raise TypeError(f"{name} changes a value that is differentiated in place: use {name.rstrip('_')}")
        return _apply(func, name, args, kwargs)


def _operator(name: str) -> Callable[..., Any]:
    method = getattr(Tensor, name)
    return lambda self, *args: Jet.__torch_function__(method, (Jet,), (self, *args))


for _name in (
    *(f"__{side}{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "matmul") for side in ("", "r")),
    "__neg__", "__getitem__",
):  # fmt: skip
    setattr(Jet, _name, _operator(_name))


def _linear(x: Jet, weight: Tensor, bias: Tensor | None = None) -> Jet:
    value, first = F.linear(x.value, weight, bias), F.linear(x.first, weight)
    return Jet(value, first, None if x.second is None else F.linear(x.second, weight))


def _layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """Written out: torch's own is wrong where forward mode is taken twice."""
    axes = tuple(range(-len(shape), 0))
    centred = x - x.mean(axes, keepdim=True)
    found = centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()
    found = found if weight is None else found * weight
    return found if bias is None else found + bias


def _apply(func: Callable[..., Any], name: str, args: Any, kwargs: Any) -> Any:
    """A function of one jet or several, wherever they stand among its arguments."""
    leaves, spec = torch.utils._pytree.tree_flatten((args, kwargs), is_leaf=lambda v: isinstance(v, Jet))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Jet)]
    jets: list[Jet] = [leaves[i] for i in places]

    def of_values(*values: Tensor) -> Any:
        filled = list(leaves)
        for place, value in zip(places, values, strict=True):
            filled[place] = value
        given, options = torch.utils._pytree.tree_unflatten(filled, spec)
        return func(*given, **options)

    if name in PRODUCTS and len(jets) == 2:
        return _product(*jets)
    if name in POINTWISE and len(jets) == 1:
        return _pointwise(of_values, name, *jets)
    return _any(of_values, jets, name in LINEAR or (name in PRODUCTS and len(jets) == 1) or _scales(name, places))


def _scales(name: str, places: Sequence[int]) -> bool:
    allowed = {"matmul": 2, "__matmul__": 2, "__rmatmul__": 2, "mm": 2, "div": 1, "true_divide": 1, "__truediv__": 1}
    return len(places) == 1 and places[0] < allowed.get(name, 0)


def _product(a: Jet, b: Jet) -> Jet:
    value, first = a.value * b.value, a.value * b.first + b.value * a.first
    if a.second is None or b.second is None:
        return Jet(value, first, None)
    both = 2 * a.first * b.first
    second = a.value * b.second + b.value * a.second + (both.sum(0) if a.summed else both)
    return Jet(value, first, second)


def _pointwise(f: Callable[[Tensor], Tensor], name: str, x: Jet) -> Jet:
    """``φ(u)``: ``φ' u_d`` and ``φ' u_dd + φ'' u_d²``."""
    value, slope, bend = _slopes(f, name, x.value)
    if x.second is None:
        return Jet(value, slope * x.first, None)
    squares = x.first * x.first
    return Jet(value, slope * x.first, slope * x.second + bend * (squares.sum(0) if x.summed else squares))


def _slopes(f: Callable[[Tensor], Tensor], name: str, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``φ``, ``φ'``, ``φ''``."""
    if name == "tanh":
        value = torch.tanh(x)
        slope = 1 - value * value
        return value, slope, -2 * value * slope
    if name == "sin":
        value = torch.sin(x)
        return value, torch.cos(x), -value
    ones = torch.ones_like(x)

    ((value, slope), (_, bend), *_) = jvp(lambda x: jvp(f, (x,), (ones,)), (x,), (ones,))
    return value, slope, bend


def _any(f: Callable[..., Any], jets: Sequence[Jet], linear: bool) -> Any:
    """Any function, by forward mode twice along every direction."""
    values, firsts = tuple(j.value for j in jets), tuple(j.first for j in jets)

    def along(*directions: Tensor) -> Any:
        return jvp(f, values, directions)[1]

    def bent(*directions: Tensor) -> Any:
        return jvp(lambda *v: jvp(f, v, directions)[1], values, directions)[1]

    first = vmap(along)(*firsts)
    if any(j.second is None for j in jets):
        return _zipped(f(*values), first, None)
    seconds = tuple(j.second for j in jets)
    second = (along if jets[0].summed else vmap(along))(*seconds)  # type: ignore[arg-type]
    if not linear:
        more = vmap(bent)(*firsts)
        add = (lambda a, b: a + b.sum(0)) if jets[0].summed else (lambda a, b: a + b)
        second = torch.utils._pytree.tree_map(add, second, more)
    return _zipped(f(*values), first, second)


def _zipped(value: Any, first: Any, second: Any) -> Any:
    """One jet, or one for each of several values."""
    if isinstance(value, tuple | list):
        return type(value)(_zipped(v, f, None if second is None else second[i])
                           for i, (v, f) in enumerate(zip(value, first, strict=True)))  # fmt: skip
    return Jet(value, first, second)
