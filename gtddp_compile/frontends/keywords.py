"""Inputs by name: a model whose positional arguments are those that it is given by name, the others left out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from gtddp_compile.errors import CompileError


class Named(tuple[Any, ...]):
    """Inputs of a model, with their names.

    Attributes:
        names: of its arguments.
        absent: names of the arguments without a default that are ``None``.
    """

    names: tuple[str, ...]
    absent: tuple[str, ...]


def named_by_place(given: Sequence[Any], model: nn.Module) -> dict[str, Any]:
    """Inputs by position, some of them ``None``, by name.

    Raises:
        CompileError: they have no names, or one that is ``None`` has another default.
    """
    parameters = inspect.signature(model.forward).parameters.values()
    own = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD][: len(given)]
    other = [p.name for p, value in zip(own, given, strict=False) if value is None and not _may_be_none(p)]
    if other or len(own) < len(given):
        raise CompileError(
            f"an input is None where the model's argument {other[0]!r} has another default"
            if other
            else "an input is None, and forward names fewer arguments than there are inputs",
            "Leave it out, or let a module around the model pass None",
        )
    return {p.name: value for p, value in zip(own, given, strict=True)}


def _may_be_none(parameter: inspect.Parameter) -> bool:
    return parameter.default is None or parameter.default is parameter.empty


def by_name(given: Mapping[str, Any], model: nn.Module) -> tuple[Any, ...]:
    """Inputs in the order of the model's arguments, ``None`` left out; without names where they are its first ones."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    unknown = [name for name in given if name not in parameters and given[name] is not None]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise CompileError(
            f"the model takes no argument {unknown[0]!r}; its arguments are {', '.join(parameters)}",
            "Leave it out of the inputs",
        )
    names = tuple(name for name in parameters if given.get(name) is not None) + tuple(unknown)
    found = Named(given[name] for name in names)
    found.names = names
    found.absent = tuple(n for n, p in parameters.items() if n in given and n not in names and p.default is p.empty)
    first = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][: len(names)]
    return tuple(found) if list(names) == first and not found.absent else found


def positional(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model that takes inputs by position, and these: the model itself, or one that shares all it holds."""
    if not isinstance(inputs, Named):
        return model, inputs
    kind, names, absent = type(model), inputs.names, dict.fromkeys(inputs.absent)

    def forward(self: nn.Module, *values: Any) -> Any:
        return kind.forward(self, **absent, **dict(zip(names, values, strict=True)))

    own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    twin: Any = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    found: nn.Module = object.__new__(twin)
    vars(found).update(vars(model))
    return found, tuple(inputs)
