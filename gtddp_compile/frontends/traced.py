"""What a front end hands over: the calls a model made, in order, not yet cleaned."""

from __future__ import annotations

import inspect
import os
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ParameterInfo, Ref, map_leaves

PACKAGE, TORCH = Path(__file__).parents[1], Path(torch.__file__).parent
OURS = tuple(f"{folder}{os.sep}" for folder in (PACKAGE, PACKAGE.parent / "passes", TORCH))
"""Folders of this package (its passes lie beside it in the source tree) and of torch."""
PYTHONS, SITE = sysconfig.get_paths()["stdlib"], str(TORCH.parent)
"""Folders of Python's own modules, and of those that are installed, which may lie in the former."""


class Untraceable(Exception):
    """A front end cannot record this model.

    Attributes:
        why: one sentence.
        module, operation, source: where, if known.
    """

    def __init__(
        self, why: str, *, module: str | None = None, operation: str | None = None, source: str | None = None
    ) -> None:
        super().__init__(why)
        self.why, self.module, self.operation, self.source = why, module, operation, source

    def refusal(self, why: str, remedy: str) -> CompileError:
        """The error that a model cannot be compiled for this."""
        return CompileError(why, remedy, module=self.module or "", operation=self.operation, source=self.source or None)

    def apart(self) -> Untraceable:
        """The same without where it was raised: what keeps it would keep every value of those calls, itself one."""
        return Untraceable(self.why, module=self.module, operation=self.operation, source=self.source)


@dataclass(frozen=True)
class Call:
    """One recorded call.

    Attributes:
        name: unique within the trace.
        target: a function, a :class:`~gtddp_compile.graph.Method`, or an aten operator.
        args, kwargs: as the normal form's, with references to other calls by ``name``.
        module: path of the module in whose ``forward`` it was made.
        source: ``"file.py:12"`` of the user's line.
        grad: whether gradients were recorded there (``False`` inside ``torch.no_grad()``).
    """

    name: str
    target: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    source: str = ""
    grad: bool = True


@dataclass(frozen=True)
class Traced:
    """A recorded model.

    Attributes:
        inputs: names of the positional arguments, in order.
        calls: in the order they were made.
        output: what is returned, with references.
        frontend: ``"fx"``, ``"export"``, ``"eager"`` or ``"derivatives"``.
        specialised: whether sizes of the example inputs are built in, the batch size included.
    """

    inputs: tuple[str, ...]
    calls: tuple[Call, ...]
    output: Any
    frontend: str
    specialised: bool = False


def named(value: Any, leaves: Mapping[str, Any]) -> Any:
    """Arguments of an fx node with references, or the leaves that are known by name, in place of nodes."""

    def reference(item: Any) -> Any:
        return leaves.get(item.name, Ref(item.name)) if isinstance(item, fx.Node) else item

    return map_leaves(value, lambda leaf: leaf, reference)


def parameter_infos(model: nn.Module) -> tuple[ParameterInfo, ...]:
    """Every parameter by its canonical name, with the other names it goes by."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return tuple(
        ParameterInfo(name, tuple(p.shape), p.dtype, p.requires_grad, tuple(n for n in names[id(p)] if n != name))
        for name, p in model.named_parameters()
    )


def argument_names(model: nn.Module, count: int) -> tuple[str, ...]:
    """Names of the first ``count`` positional arguments of ``forward``."""
    found: list[str] = []
    for parameter in inspect.signature(model.forward).parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            rest = count - len(found)
            found += [parameter.name] if rest == 1 else [f"{parameter.name}_{i}" for i in range(rest)]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            found.append(parameter.name)
    found += [f"input_{i}" for i in range(len(found), count)]
    return tuple(found[:count])


@contextmanager
def module_paths(model: nn.Module) -> Iterator[list[str]]:
    """Paths of the modules whose ``forward`` runs while the block does, the innermost last."""
    paths, stack = {id(module): path for path, module in model.named_modules()}, [""]

    def enter(module: nn.Module, _: Any) -> None:
        stack.append(paths.get(id(module), stack[-1]))

    def leave(module: nn.Module, *_: Any) -> None:
        stack.pop()

    with ExitStack() as hooks:
        hooks.callback(register_module_forward_pre_hook(enter).remove)
        hooks.callback(register_module_forward_hook(leave, always_call=True).remove)
        yield stack


def is_users(filename: str) -> bool:
    """Whether a file is neither torch's nor this package's nor Python's own."""
    pythons = filename.startswith((PYTHONS, "<")) and not filename.startswith(SITE)
    return not pythons and not filename.startswith(OURS)


def users_line(frame: FrameType | None = None) -> str:
    """``"file.py:12"`` of the innermost frame that is the user's (or a model library's), ``""`` if there is none."""
    frame = frame or sys._getframe(1)
    while frame is not None:
        if is_users(frame.f_code.co_filename):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def raised_at(trace: TracebackType | None) -> str:
    """``"file.py:12"`` of the user's innermost line in a traceback."""
    found = ""
    while trace is not None:
        filename = trace.tb_frame.f_code.co_filename
        if is_users(filename):
            found = f"{Path(filename).name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def module_of(trace: TracebackType | None, model: nn.Module) -> tuple[str, str]:
    """Qualified path and class of the innermost module of the model in whose methods an exception passed."""
    names = {id(module): name for name, module in model.named_modules()}
    found: nn.Module = model
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and id(owner) in names:
            found = owner
        trace = trace.tb_next
    return names[id(found)], type(found).__name__
