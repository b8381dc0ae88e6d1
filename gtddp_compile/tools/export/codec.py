"""Records as plain data and back, driven by their type annotations: nothing is written down twice, nothing executed.

A record is one of this package's dataclasses. Fields typed ``Any`` hold what arguments of an operation can be; values
that plain data does not have are tagged, ``{"ref": "fc1"}``, ``{"tuple": […]}``. Tensors are entries of a table, so
that a tensor used twice stays one.
"""

from __future__ import annotations

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal, NoReturn, Union, get_args, get_origin

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import BufferRef, ParamRef, Ref
from gtddp_compile.lowering.instructions import Buffer, Code, Function, Param, Var
from gtddp_compile.lowering.layers import RULES, Rule
from gtddp_compile.tools.export import targets

LEAVES: Mapping[str, Any] = {
    "ref": Ref, "param": ParamRef, "buffer": BufferRef,
    "var": Var, "old_param": Param, "old_buffer": Buffer, "code": Code, "call": Function,
}  # fmt: skip
"""Leaves of argument trees that hold one string."""

NAMED: Mapping[str, Any] = {"dtype": torch.dtype, "memory_format": torch.memory_format, "layout": torch.layout}
RULE_BY_NAME: Mapping[str, Rule] = {rule.name: rule for rule in RULES}
DEVICE = re.compile(r"(cpu|cuda|mps|xpu|meta)(:[0-9]{1,2})?")
TARGETS = ("function", "method", "aten")
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
    }


def is_target(hint: Any) -> bool:
    """Whether a field holds a function."""
    return get_origin(hint) is Callable or any(get_origin(option) is Callable for option in options_of(hint))


def options_of(hint: Any) -> tuple[Any, ...]:
    """Members of a union; of anything else itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


# --- writing ----------------------------------------------------------------------------------------------------------


class Writer:
    """Makes data of records; collects their tensors."""

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def record(self, record: Any) -> dict[str, Any]:
        """A dataclass instance, field by field."""
        where = str(getattr(record, "name", type(record).__name__))
        kind: Any = type(record)
        return {name: self._field(getattr(record, name), hint, where) for name, (hint, _) in fields_of(kind).items()}

    def _field(self, value: Any, hint: Any, where: str) -> Any:
        if is_target(hint):
            return None if value is None else self._target(value, where)
        if hint is Rule:
            return value.name
        if hint is Any:
            return self.tree(value, where)
        return self._typed(value, hint, where)

    def _typed(self, value: Any, hint: Any, where: str) -> Any:
        if type(value) in LEAVES.values() or isinstance(value, tuple(NAMED.values())):
            return self.tree(value, where)
        if dataclasses.is_dataclass(value):
            return self.record(value)
        if isinstance(value, Mapping):
            (mapping,) = (
                option for option in options_of(hint) if get_origin(option) in (dict, typing.Mapping, Mapping)
            )
            inner = get_args(mapping)[1]
            return {key: self._field(item, inner, where) for key, item in value.items()}
        if isinstance(value, tuple):
            (sequence,) = (option for option in options_of(hint) if get_origin(option) is tuple)
            inner = get_args(sequence)
            kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
            return [self._field(item, kind, where) for item, kind in zip(value, kinds, strict=True)]
        return self.tree(value, where)

    def tree(self, value: Any, where: str) -> Any:
        """An argument: literals as they are, everything else with a tag."""
        if value is None or isinstance(value, bool | str) or (isinstance(value, int) and type(value) is int):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else {"float": str(value)}
        for tag, kind in LEAVES.items():
            if type(value) is kind:
                return {tag: getattr(value, dataclasses.fields(kind)[0].name)}
        for tag, kind in NAMED.items():
            if isinstance(value, kind):
                return {tag: str(value).removeprefix("torch.")}
        if isinstance(value, Tensor):
            return {"tensor": self._tensor(value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if isinstance(value, slice):
            return {"slice": [self.tree(part, where) for part in (value.start, value.stop, value.step)]}
        if value is Ellipsis:
            return {"ellipsis": True}
        if type(value) in (tuple, torch.Size):
            return {"tuple": [self.tree(item, where) for item in value]}
        if type(value) is list:
            return [self.tree(item, where) for item in value]
        if type(value) in (dict, types.MappingProxyType):
            return {"dict": [[self.tree(key, where), self.tree(item, where)] for key, item in value.items()]}
        return self._target(value, where)

    def _target(self, value: Any, where: str) -> dict[str, str]:
        found = targets.name_of(value)
        if found is None:
            shown = getattr(value, "__qualname__", None) or f"a {type(value).__name__}"
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
        self.tensors = tensors

    def record(self, kind: type, data: Any, at: str) -> Any:
        """An instance of a dataclass."""
        if not isinstance(data, dict):
            refuse(at, f"a {kind.__name__} is written as an object")
        known = fields_of(kind)
        unknown = sorted(set(data) - set(known))
        if unknown:
            refuse(f"{at}/{unknown[0]}", f"a {kind.__name__} has no such field")
        missing = [name for name, (_, optional) in known.items() if name not in data and not optional]
        if missing:
            refuse(at, f"{kind.__name__} lacks {missing[0]!r}")
        return kind(**{name: self.value(data[name], known[name][0], f"{at}/{name}") for name in data})

    def value(self, data: Any, hint: Any, at: str) -> Any:
        """A value of an annotated type."""
        if is_target(hint):
            return None if data is None else self.target(data, at)
        if hint is Any:
            return self.tree(data, at)
        if hint is Rule:
            return RULE_BY_NAME.get(data) if isinstance(data, str) and data in RULE_BY_NAME else refuse(at, "no rule")
        fitting = [option for option in options_of(hint) if self._fits(data, option)]
        if fitting:  # of several records the one that has these fields
            return self._typed(data, next((o for o in fitting if _has_fields(o, data)), fitting[0]), at)
        refuse(at, f"{_shown(data)} is not {hint if not isinstance(hint, type) else hint.__name__}")

    def _fits(self, data: Any, hint: Any) -> bool:
        origin = get_origin(hint)
        if origin is Literal:
            return any(type(data) is type(choice) and data == choice for choice in get_args(hint))
        if hint is float:
            return type(data) in (int, float) or (isinstance(data, dict) and set(data) == {"float"})
        if hint in (int, str, bool):
            return type(data) is hint
        if hint is None or hint is type(None):
            return data is None
        if origin is tuple:
            return isinstance(data, list)
        if hint in LEAVES.values() or hint in NAMED.values() or hint is Tensor:
            return isinstance(data, dict) and set(data) == {_tag(hint)}
        return isinstance(data, dict)

    def _typed(self, data: Any, hint: Any, at: str) -> Any:
        origin = get_origin(hint)
        if origin is tuple:
            inner = get_args(hint)
            repeated = len(inner) == 2 and inner[1] is Ellipsis
            if not repeated and len(inner) != len(data):
                refuse(at, f"{len(data)} items where there are {len(inner)}")
            kinds = [inner[0]] * len(data) if repeated else list(inner)
            return tuple(self.value(x, kind, f"{at}/{i}") for i, (x, kind) in enumerate(zip(data, kinds, strict=True)))
        if origin is not None and origin is not Literal:
            inner = get_args(hint)[1]
            return {key: self.value(item, inner, f"{at}/{key}") for key, item in data.items()}
        if hint in LEAVES.values() or hint in NAMED.values() or hint in (float, Tensor):
            return self.tree(data, at)
        if dataclasses.is_dataclass(hint):
            return self.record(typing.cast(type, hint), data, at)
        return data

    def tree(self, data: Any, at: str) -> Any:
        """An argument."""
        if data is None or isinstance(data, bool | int | float | str):
            return data
        if isinstance(data, list):
            return [self.tree(item, f"{at}/{i}") for i, item in enumerate(data)]
        if not isinstance(data, dict) or len(data) != 1:
            refuse(at, "a tagged value is an object with one key")
        ((tag, inside),) = data.items()
        return self._tagged(tag, inside, f"{at}/{tag}")

    def _tagged(self, tag: str, data: Any, at: str) -> Any:
        if tag in LEAVES and isinstance(data, str):
            return LEAVES[tag](data)
        if tag in TARGETS:
            return self.target({tag: data}, at)
        if tag in NAMED and isinstance(data, str):
            found = getattr(torch, data, None) if data.isidentifier() else None
            return found if isinstance(found, NAMED[tag]) else refuse(at, f"torch has no {tag} {data!r}")
        if tag == "tuple" and isinstance(data, list):
            return tuple(self.tree(item, f"{at}/{i}") for i, item in enumerate(data))
        if tag == "dict" and isinstance(data, list):
            return self._dict(data, at)
        if tag == "slice" and isinstance(data, list) and len(data) == 3:
            return slice(*(self.tree(item, f"{at}/{i}") for i, item in enumerate(data)))
        if tag == "float" and data in NON_FINITE:
            return float(data)
        if tag == "ellipsis" and data is True:
            return Ellipsis
        if tag == "device" and isinstance(data, str) and DEVICE.fullmatch(data):
            return torch.device(data)
        if tag == "tensor" and type(data) is int and 0 <= data < len(self.tensors):
            return self.tensors[data]
        refuse(at, "no value is written like this")

    def _dict(self, data: list[Any], at: str) -> dict[Any, Any]:
        found = {}
        for index, pair in enumerate(data):
            if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], bool | int | str | None):
                refuse(f"{at}/{index}", "an entry is a pair of a plain key and a value")
            found[pair[0]] = self.tree(pair[1], f"{at}/{index}")
        return found

    def target(self, data: Any, at: str) -> Any:
        """A function by its entry in the closed table."""
        if isinstance(data, dict) and len(data) == 1:
            ((kind, name),) = data.items()
            if kind in TARGETS and isinstance(name, str):
                found = targets.target_of(kind, name)
                if found is not None:
                    return found
                refuse(at, f"{name!r} is no {kind} that a program may call")
        refuse(at, "a function is written by kind and name")


def is_instance(value: Any, hint: Any) -> bool:
    """Whether a value is what an option is declared to be."""
    for option in options_of(hint):
        origin = get_origin(option)
        if option is float and type(value) in (int, float):
            return True
        if origin is Literal and value in get_args(option):
            return True
        if origin is tuple and isinstance(value, tuple | list):
            inner = get_args(option)
            kinds = [inner[0]] * len(value) if len(inner) == 2 and inner[1] is Ellipsis else list(inner)
            if len(kinds) == len(value) and all(map(is_instance, value, kinds)):
                return True
        plain = isinstance(option, type) and origin is None and option is not float
        if plain and isinstance(value, option) and not (option is int and isinstance(value, bool)):
            return True
        if option is None and value is None:
            return True
    return False


def _has_fields(option: Any, data: Any) -> bool:
    """Whether every key is a field of the record; true of what is no record."""
    return not dataclasses.is_dataclass(option) or set(data) <= {field.name for field in dataclasses.fields(option)}


def _tag(kind: Any) -> str:
    return next(tag for tag, known in (*LEAVES.items(), *NAMED.items(), ("tensor", Tensor)) if known is kind)


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 40 else f"{text[:37]}…"


def refuse(at: str, why: str) -> NoReturn:
    """The one error of a malformed file."""
    raise CompileError(f"the file is no update program: at {at}, {why}", REMEDY)
