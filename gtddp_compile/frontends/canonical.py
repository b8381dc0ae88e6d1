"""One name and one function for every operation, whichever way it was written.

``x.relu_()``, ``F.relu(x, inplace=True)``, ``torch.relu(x)`` and ``aten.relu_`` are the kind ``"relu"``; the in-place
ones are marked as such and replaced by their out-of-place twins.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch._ops import OpOverload

from gtddp_compile import kernels
from gtddp_compile.frontends.traced import Call
from gtddp_compile.graph import Method, Ref

OPERATORS: Mapping[str, Callable[..., Any]] = {
    f"i{name}": getattr(operator, name)
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and_", "or_", "xor", "matmul")
} | {"iand": operator.and_, "ior": operator.or_}
KINDS = {
    "conv1d": "conv", "conv2d": "conv", "conv3d": "conv",
    "conv_transpose1d": "conv_transpose", "conv_transpose2d": "conv_transpose", "conv_transpose3d": "conv_transpose",
    "truediv": "div", "true_divide": "div", "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg",
    "concat": "cat", "concatenate": "cat",
    "numpy_T": "T",
    **dict.fromkeys(
        ("upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d",
         "upsample_bicubic2d", "upsample_trilinear3d"), "interpolate"),
    "and_": "and", "or_": "or", "not_": "not", "select_copy": "select",
}  # fmt: skip
CONV = "input weight bias stride padding dilation groups"
ATEN: Mapping[str, tuple[Callable[..., Any], str]] = {
    "linear": (F.linear, "input weight bias"),
    "conv1d": (F.conv1d, CONV), "conv2d": (F.conv2d, CONV), "conv3d": (F.conv3d, CONV),
    "layer_norm": (F.layer_norm, "input normalized_shape weight bias eps"),
    "rms_norm": (F.rms_norm, "input normalized_shape weight eps"),
    "group_norm": (F.group_norm, "input num_groups weight bias eps"),
    "instance_norm": (F.instance_norm, "input running_mean running_var weight bias use_input_stats momentum eps"),
    "embedding": (F.embedding, "indices weight"),
    "copy": (kernels.copy_like_first, "self src"),
}  # fmt: skip
"""aten operators that have a form of torch.nn.functional which a rule knows, and which of their arguments it takes."""
RANDOM = frozenset(
    {
        "bernoulli", "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal",
        "uniform",
    }
    | {"multinomial", "poisson", "exponential", "cauchy", "geometric", "log_normal", "random", "gumbel_softmax"}
)  # fmt: skip
DROPPING = frozenset(
    {"dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_dropout", "feature_alpha_dropout"}
    | {"native_dropout", "rrelu"}
)


@dataclass(frozen=True)
class Canonical:
    """A cleaned call: ``in_place`` says that it changed its first argument."""

    kind: str
    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_place: bool = False


def canonical(call: Call) -> Canonical:
    """The cleaned form of a recorded call."""
    form = _cleaned(call)
    if form.target in SPARSE:
        return _dense(form)
    return _by_position(form) if form.kind in ("add", "sub", "rsub") else form


SPARSE: Mapping[Callable[..., Any], int] = {F.embedding: 6, F.embedding_bag: 7}
"""Functions with an argument ``sparse``, and its position."""


def _dense(form: Canonical) -> Canonical:
    """A table whose gradient is a dense tensor, of the same values."""
    at = SPARSE[form.target]
    args = (*form.args[:at], False, *form.args[at + 1 :]) if len(form.args) > at else form.args
    return replace(form, args=args, kwargs={name: v for name, v in form.kwargs.items() if name != "sparse"})


def _by_position(form: Canonical) -> Canonical:
    """A sum or a difference of two arguments, neither of them by name."""
    rest = {"input" if name == "self" else name: value for name, value in form.kwargs.items()}
    named = [name for name in ("input", "other")[len(form.args) :] if name in rest]
    return replace(form, args=(*form.args, *(rest.pop(name) for name in named)), kwargs=rest)


def _cleaned(call: Call) -> Canonical:
    target, args, kwargs = call.target, call.args, dict(call.kwargs)
    if isinstance(target, OpOverload):
        return _of_aten(target, args, kwargs)
    name = base_name(target)
    if target is operator.setitem:
        return Canonical("setitem", kernels.setitem, args, kwargs, True)
    if getattr(operator, name, None) is target and name in OPERATORS:
        plain = OPERATORS[name]
        return Canonical(kind_of(base_name(plain)), plain, args, kwargs, True)
    in_place = bool(kwargs.pop("inplace", False))
    twin = _out_of_place(target, name)
    if twin is not None:
        target, name, in_place = twin, name.rstrip("_"), True
    if target is getattr and len(args) == 2 and args[1] in ("T", "mT", "H", "mH", "real", "imag"):
        return Canonical(str(args[1]), target, args, kwargs)
    if target is getattr and args[1:] == ("data",):
        return Canonical("detach", Method("detach"), args[:1], {})
    return Canonical(kind_of(name), target, args, kwargs, in_place)


def base_name(target: Any) -> str:
    """The function's own name."""
    if isinstance(target, Method):
        return target.name
    name = getattr(target, "__name__", None) or type(target).__name__
    return str(name).removeprefix("_") if name in ("_and", "_or") else str(name)


def kind_of(name: str) -> str:
    """The canonical kind of a function's name."""
    return KINDS.get(name, name)


def python_number(value: Any) -> Any:
    """A number as Python's own: numpy's, which a model may compute its constants with, are printed otherwise."""
    return value.item() if type(value).__module__ == "numpy" and getattr(value, "shape", None) == () else value


def is_random(kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call draws random numbers."""
    if kind in RANDOM:
        return True
    if kind in DROPPING:
        training = kwargs.get("training", kwargs.get("train", args[-1] if len(args) > 2 else True))
        probability = kwargs.get("p", args[1] if len(args) > 1 else 0.5)
        return training is not False and (kind == "rrelu" or probability != 0)
    if kind == "scaled_dot_product_attention":
        return bool(kwargs.get("dropout_p", args[4] if len(args) > 4 else 0.0))
    return False


def is_identity(kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether the value is the first argument itself: dropout that drops nothing."""
    if kind in ("alias", "lift_fresh_copy", "lift_fresh"):
        return isinstance(args[0], Ref)
    return kind in DROPPING - {"rrelu", "native_dropout"} and not is_random(kind, args, kwargs)


def _out_of_place(target: Any, name: str) -> Callable[..., Any] | None:
    """The twin of ``relu_``, ``add_`` …; ``None`` if the name does not end in one underscore."""
    if not name.endswith("_") or name.endswith("__") or name in ("requires_grad_", "and_", "or_", "not_"):
        return None
    plain = name[:-1]
    if plain in ("copy", "zero", "fill", "bernoulli", "uniform", "normal"):
        return getattr(kernels, f"{plain}_like_first")  # type: ignore[no-any-return]
    if isinstance(target, Method):
        return Method(plain)
    found = next((getattr(module, plain) for module in (torch, F) if hasattr(module, plain)), None)
    return found


# --- aten -------------------------------------------------------------------------------------------------------------


def bound(target: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of an aten operator by name, defaults filled in."""
    schema = target._schema.arguments
    found = {a.name: a.default_value for a in schema if a.has_default_value()}
    found.update((a.name, value) for a, value in zip(schema, args, strict=False))
    found.update(kwargs)
    return found


def _of_aten(target: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Canonical:
    name = target._schema.name.split("::")[-1]
    if name in ATEN:
        (function, names), given = ATEN[name], bound(target, args, kwargs)
        padding = given.get("padding_idx") if function is F.embedding else None
        options = {} if padding in (None, -1) else {"padding_idx": padding}
        return Canonical(kind_of(name), function, tuple(given[each] for each in names.split()), options)
    if target._schema.is_mutable and name.endswith("_"):
        plain = name[:-1]
        if plain in ("copy", "zero", "fill", "bernoulli", "uniform", "normal"):
            return Canonical(plain, getattr(kernels, f"{plain}_like_first"), args, kwargs, True)
        packet = getattr(torch.ops.aten, plain)
        overload = target._overloadname if target._overloadname in packet.overloads() else packet.overloads()[0]
        return Canonical(kind_of(plain), getattr(packet, overload), args, kwargs, True)
    return Canonical(kind_of(name), target, args, kwargs)
