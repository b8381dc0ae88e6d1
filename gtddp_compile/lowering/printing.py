"""Print an operation of the normal form as a line of Python."""

from __future__ import annotations

import inspect
import math
import operator
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from gtddp_compile import kernels
from gtddp_compile.graph import BufferRef, Method, Op, ParamRef, Ref

INFIX: dict[Any, str] = {
    operator.add: "+", operator.sub: "-", operator.mul: "*", operator.truediv: "/", operator.floordiv: "//",
    operator.mod: "%", operator.pow: "**", operator.matmul: "@", operator.lt: "<", operator.le: "<=", operator.gt: ">",
    operator.ge: ">=", operator.eq: "==", operator.ne: "!=", operator.and_: "&", operator.or_: "|",
}  # fmt: skip
PLAIN = (torch.dtype, torch.memory_format, torch.layout)


@cache
def _known() -> dict[int, str]:
    """Printed name of every function that generated code can refer to by name."""
    found: dict[int, str] = {}
    for prefix, module in (("operator", operator), ("math", math), ("torch", torch), ("F", F)):
        for name in dir(module):
            value = getattr(module, name)
            if callable(value) and not name.startswith("_"):
                found[id(value)] = f"{prefix}.{name}"
    found[id(torch._weight_norm)] = "torch._weight_norm"  # which parametrizations.weight_norm calls
    found.update((id(value), name) for name, value in kernels.KERNELS.items())
    found.update((id(value), value.__name__) for value in (getattr, len, int, float, bool, tuple, list))
    return found


class Printer:
    """Prints operations; what has no name in torch becomes a named constant of the program."""

    def __init__(self, name: Callable[[str], str]) -> None:
        self._name = name
        self.constants: dict[str, Any] = {}

    def operation(self, op: Op, *, params: Mapping[str, str] | None = None, more: Mapping[str, str] = {}) -> str:
        """Right-hand side of the operation's assignment; ``params`` renames parameters (a player's own function),
        ``more`` are keyword arguments, as text.
        """

        def show(value: Any) -> str:
            return self._value(value, params)

        args = [show(arg) for arg in op.args]
        target = op.target
        if target in INFIX and len(args) == 2 and not op.kwargs:
            return f"{args[0]} {INFIX[target]} {args[1]}"
        if target is operator.getitem:
            return f"{args[0]}[{self._index(op.args[1], params)}]"
        if target is operator.neg:
            return f"-{args[0]}"
        args += [f"{key}={show(value)}" for key, value in op.kwargs.items()]
        args += [f"{key}={text}" for key, text in more.items()]
        if isinstance(target, Method):
            return f"{args[0]}.{target.name}({', '.join(args[1:])})"
        return f"{self._target(target)}({', '.join(args)})"

    def _target(self, target: Any) -> str:
        if isinstance(target, torch._ops.OpOverload):
            return f"torch.ops.{target}"
        known = _known().get(id(target))
        if known is not None:
            return known
        return self._constant(target)

    def _constant(self, value: Any) -> str:
        for name, known in self.constants.items():
            if known is value:
                return name
        name = f"const_{len(self.constants)}"
        self.constants[name] = value
        return name

    def _index(self, index: Any, params: Mapping[str, str] | None) -> str:
        items = index if isinstance(index, tuple) else (index,)
        text = ", ".join(self._slice(item, params) for item in items)
        return f"{text}," if isinstance(index, tuple) and len(items) == 1 else text or "()"

    def _slice(self, item: Any, params: Mapping[str, str] | None) -> str:
        if not isinstance(item, slice):
            return self._value(item, params)
        parts = ["" if part is None else self._value(part, params) for part in (item.start, item.stop, item.step)]
        return f"{parts[0]}:{parts[1]}" + (f":{parts[2]}" if parts[2] else "")

    def _value(self, value: Any, params: Mapping[str, str] | None) -> str:
        if isinstance(value, Ref):
            return self._name(value.name)
        if isinstance(value, ParamRef):
            return params[value.name] if params is not None else f"p[{value.name!r}]"
        if isinstance(value, BufferRef):
            return params[value.name] if params and value.name in params else f"b[{value.name!r}]"
        if isinstance(value, torch.Size | tuple):
            inner = ", ".join(self._value(item, params) for item in value)
            return f"({inner}{',' if len(value) == 1 else ''})"
        if isinstance(value, list):
            return f"[{', '.join(self._value(item, params) for item in value)}]"
        if isinstance(value, Mapping):
            return f"{{{', '.join(f'{key!r}: {self._value(item, params)}' for key, item in value.items())}}}"
        if isinstance(value, slice):
            parts = (value.start, value.stop, value.step)
            return f"slice({', '.join(self._value(part, params) for part in parts)})"
        return self._literal(value)

    def _literal(self, value: Any) -> str:
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or value is Ellipsis or isinstance(value, bool | int | float | str):
            return "..." if value is Ellipsis else repr(value)
        if isinstance(value, PLAIN):
            return str(value)
        if isinstance(value, torch.device):
            return f"torch.device({str(value)!r})"
        if inspect.isroutine(value) or callable(value):
            return self._target(value)
        return self._constant(value)
