"""Records as plain data and back, driven by their type annotations: nothing is written down twice, nothing executed.

A record is one of this package's dataclasses, ``{"Op": {…}}``. Values that plain data does not have are tagged in the
same way, ``{"ref": "fc1"}``; an array is a tuple. Tensors are entries of a table, so that one used twice stays one.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import BufferRef, Layout, Method, Op, OpGraph, ParameterInfo, ParamRef, Ref
from gtddp_compile.methods.curvature import REGISTRY, Curvature
from gtddp_compile.methods.setting import BufferInfo, Group
from gtddp_compile.methods.terminal import Geometric, MonteCarlo
from gtddp_compile.options import Nystrom, Options, Sketch
from gtddp_compile.tools.export import targets

LEAVES: Mapping[str, Any] = {"ref": Ref, "param": ParamRef, "buffer": BufferRef}
"""Leaves of argument trees: they hold one name."""
NAMED: Mapping[str, Any] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}
PLAIN = (Op, OpGraph, ParameterInfo, Layout, BufferInfo, Group, Options, Geometric, MonteCarlo, Sketch, Nystrom)
RECORDS: dict[str, Any] = {kind.__name__: kind for kind in (*PLAIN, *REGISTRY.values())}
"""What a file may hold, beside what :mod:`.document` adds."""
TARGETS = ("function", "method", "aten")
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:[0-9]{1,2})?")
WORD = re.compile(r'[^"\\\x00-\x1f\x7f-\x9f\u2028\u2029]*')
"""What a field of text may hold: names come into comments and docstrings of the code, which they must not leave."""
NON_FINITE = ("inf", "-inf", "nan")
"""Numbers that JSON does not have, as they are tagged."""
REMEDY = "Export the program again, with the version of gtddp_compile that reads it"


@cache
def fields_of(kind: Any) -> Mapping[str, tuple[Any, bool]]:
    """Type of every field of a record, and whether it may be left out."""
    hints = typing.get_type_hints(kind)
    missing = dataclasses.MISSING
    return {
        f.name: (hints[f.name], f.default is not missing or f.default_factory is not missing)
        for f in dataclasses.fields(kind)
        if f.init
    }


def options_of(hint: Any) -> tuple[Any, ...]:
    """Members of a union; the base methods for their protocol; of anything else itself."""
    if hint is Curvature:
        return tuple(REGISTRY.values())
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def is_instance(value: Any, hint: Any) -> bool:
    """Whether a value is what a field is declared to be."""
    return any(_is_a(value, option) for option in options_of(hint))


def _is_a(value: Any, option: Any) -> bool:
    origin, inner = get_origin(option), get_args(option)
    if option is Any:
        return True
    if origin is Literal:
        return any(type(value) is type(choice) and value == choice for choice in inner)
    if origin is tuple:
        kinds = [inner[0]] * len(value) if inner[1:] == (Ellipsis,) and isinstance(value, Sequence) else inner
        return isinstance(value, tuple | list) and len(value) == len(kinds) and all(map(is_instance, value, kinds))
    if origin is Callable:
        return callable(value)
    if origin is not None:
        return isinstance(value, Mapping) and all(
            is_instance(key, inner[0]) and is_instance(item, inner[1]) for key, item in value.items()
        )
    if option is str:
        return isinstance(value, str) and WORD.fullmatch(value) is not None
    return (
        type(value) in (int, float)
        if option is float
        else isinstance(value, option) and (option is bool or not isinstance(value, bool))
    )


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Makes data of records; collects their tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def record(self, record: Any) -> dict[str, Any]:
        """A record's fields."""
        where = str(getattr(record, "name", type(record).__name__))
        found = {}
        kind: Any = type(record)
        for name, (hint, _) in fields_of(kind).items():
            value = getattr(record, name)
            if not is_instance(value, hint):
                raise CompileError(
                    f"its {name} is {_shown(value)}, which a stored program cannot hold",
                    "Give it another value, or export another format", operation=where,
                )  # fmt: skip
            found[name] = self.tree(tuple(value) if type(value) is list and hint is not Any else value, where)
        return found

    def tree(self, value: Any, where: str) -> Any:
        """A value: literals as they are, everything else with a tag."""
        if value is None or type(value) in (bool, int, str):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        if RECORDS.get(type(value).__name__) is type(value):
            return {type(value).__name__: self.record(value)}
        for tag, kind in LEAVES.items():
            if type(value) is kind:
                return {tag: value.name}
        for tag, kind in NAMED.items():
            if isinstance(value, kind):
                return {tag: str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, slice):
            return {"slice": self.tree((value.start, value.stop, value.step), where)}
        if value is Ellipsis:
            return {"ellipsis": True}
        if type(value) in (tuple, torch.Size):
            return [self.tree(item, where) for item in value]
        if type(value) is list:
            return {"list": self.tree(tuple(value), where)}
        if type(value) in (dict, types.MappingProxyType):
            return {"dict": self.tree(tuple(value.items()), where)}
        return self._target(value, where)

    def _target(self, value: Any, where: str) -> dict[str, str]:
        found = targets.name_of(value)
        if found is None:
            method = f"Tensor.{value.name}" if isinstance(value, Method) else None
            shown = method or getattr(value, "__qualname__", None) or f"a {type(value).__name__}"
            raise CompileError(
                f"it involves {shown}, which a stored program cannot name: it may name torch's operations alone",
                "Write it in terms of torch's own functions, or export another format",
                operation=where,
            )
        return {found[0]: found[1]}

    def _tensor(self, value: Tensor) -> int:
        for index, known in enumerate(self.tensors):
            if known is value:
                return index
        self.tensors.append(value)
        return len(self.tensors) - 1


# --- reading ----------------------------------------------------------------------------------------------------------


class Reader:
    """Makes records of data; whatever does not fit is refused with the place where it stands."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._tensors = tensors

    def record(self, kind: Any, data: Any, at: str) -> Any:
        """An instance of a record."""
        if not isinstance(data, dict):
            refuse(at, f"a {kind.__name__} is written as an object")
        known = fields_of(kind)
        for name in data:
            if name not in known:
                refuse(f"{at}/{name[:40]}", f"a {kind.__name__} has no such field")
        for name, (_, optional) in known.items():
            if name not in data and not optional:
                refuse(at, f"{kind.__name__} lacks {name!r}")
        found = {name: self.tree(item, f"{at}/{name}") for name, item in data.items()}
        for name, value in found.items():
            if not is_instance(value, known[name][0]):
                refuse(f"{at}/{name}", f"{_shown(value)} is no {name} of a {kind.__name__}")
        return kind(**found)

    def tree(self, data: Any, at: str) -> Any:
        """A value."""
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            return tuple(self.tree(item, f"{at}/{i}") for i, item in enumerate(data))
        if not isinstance(data, dict) or len(data) != 1:
            refuse(at, "a tagged value is an object with one key")
        ((tag, inside),) = data.items()
        at = f"{at}/{tag[:40]}"
        if tag in RECORDS:
            return self.record(RECORDS[tag], inside, at)
        if tag in ("list", "dict", "slice"):
            return self._made(tag, self.tree(inside, at), at)
        return self._named(tag, inside, at)

    def _made(self, tag: str, items: Any, at: str) -> Any:
        if not isinstance(items, tuple) or (tag == "slice" and len(items) != 3):
            refuse(at, f"no {tag} is written like this")
        if tag != "dict":
            return list(items) if tag == "list" else slice(*items)
        if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in items) or not all(
            isinstance(key, bool | int | str | None) for key, _ in items
        ):
            refuse(at, "an entry is a pair of a plain key and a value")
        return dict(items)

    def _named(self, tag: str, data: Any, at: str) -> Any:
        if tag == "tensor" and type(data) is int and 0 <= data < len(self._tensors):
            return self._tensors[data]
        if tag == "ellipsis" and data is True:
            return Ellipsis
        if not isinstance(data, str):
            refuse(at, "no value is written like this")
        if tag in LEAVES and WORD.fullmatch(data):
            return LEAVES[tag](data)
        if tag in TARGETS:
            found = targets.target_of(tag, data)
            return refuse(at, f"{data!r} is no {tag} that a program may call") if found is None else found
        if tag in NAMED:
            found = getattr(torch, data, None) if data.isidentifier() else None
            return found if isinstance(found, NAMED[tag]) else refuse(at, f"torch has no {tag} {data!r}")
        if tag == "float" and data in NON_FINITE:
            return float(data)
        if tag == "device" and DEVICE.fullmatch(data):
            return torch.device(data)
        refuse(at, "no value is written like this")


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}…"


def refuse(at: str, why: str) -> NoReturn:
    """The one error of a malformed file."""
    raise CompileError(f"the file is no update program: at {at}, {why}", REMEDY)
