"""Inputs by name: a model whose positional arguments are those that it is given by name, the others left out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

from gtddp_compile.errors import CompileError


class Named(tuple[Any, ...]):
    """Inputs of a model, with their names.

    Attributes:
        names: of its arguments.
    """

    names: tuple[str, ...]


def by_name(given: Mapping[str, Any], model: nn.Module) -> tuple[Any, ...]:
    """Inputs in the order of the model's arguments; without names where they are its first ones."""
    parameters = inspect.signature(model.forward).parameters
    kinds = {parameter.kind for parameter in parameters.values()}
    unknown = [name for name in given if name not in parameters]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        raise CompileError(
            f"the model takes no argument {unknown[0]!r}; its arguments are {', '.join(parameters)}",
            "Leave it out of the inputs",
        )
    names = tuple(name for name in parameters if name in given) + tuple(unknown)
    found = Named(given[name] for name in names)
    found.names = names
    first = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD][: len(names)]
    return tuple(found) if list(names) == first else found


def positional(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[nn.Module, tuple[Any, ...]]:
    """A model that takes inputs by position, and these: the model itself, or one that shares all it holds."""
    if not isinstance(inputs, Named):
        return model, inputs
    kind, names = type(model), inputs.names

    def forward(self: nn.Module, *values: Any) -> Any:
        return kind.forward(self, **dict(zip(names, values, strict=True)))

    own = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in ("self", *names)]
    forward.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    twin: Any = type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})
    found: nn.Module = object.__new__(twin)
    vars(found).update(vars(model))
    return found, tuple(inputs)
