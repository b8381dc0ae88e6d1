"""From the words of a command line to a model, its inputs and its loss.

The user's code runs here, whatever it does wrong is reported as a :class:`CompileError` that names the user's line.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import typer
from torch import Tensor, nn

from gtddp_compile.errors import CompileError

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")
}
FLOATS = tuple(name for name, dtype in DTYPES.items() if dtype.is_floating_point)
LOSSES = {"cross_entropy": nn.CrossEntropyLoss, "mse": nn.MSELoss, "l1": nn.L1Loss, "bce": nn.BCEWithLogitsLoss}


def load_model(target: str, arguments: Iterable[str], dtype: str) -> nn.Module:
    """The model that ``package.module:factory`` or ``path/to/file.py:factory`` names, in training mode.

    Args:
        target: the factory is a class or function that returns a module, or a module itself; dots reach inside.
        arguments: ``KEY=VALUE`` keyword arguments for the factory, values as Python literals or plain words.
        dtype: a floating-point type for parameters and buffers.

    Raises:
        CompileError: the user's code failed or returned something else.
    """
    torch.manual_seed(0)
    found = _attribute(target, "TARGET")
    keywords = keyword_arguments(arguments, "--arg")
    model = found if isinstance(found, nn.Module) else _called(found, keywords, target)
    if not isinstance(model, nn.Module):
        raise CompileError(
            f"{target} gave {type(model).__name__}, not a torch.nn.Module",
            "Name a class, a function that returns a module, or a module",
        )
    return model.to(DTYPES[dtype]).train()


def load_inputs(words: Iterable[str], dtype: str) -> tuple[Tensor, ...]:
    """Example inputs: ``2,3,32,32`` is drawn from a normal distribution, ``2,16:int64`` is zeros (valid indices)."""
    generator = torch.Generator().manual_seed(0)
    return tuple(_input(word, dtype, generator) for word in words)


def load_loss(word: str) -> nn.Module | Callable[[Any, Any], Tensor]:
    """A loss by its short name, by its class in ``torch.nn``, or ``module:name`` for one of the user's own."""
    if ":" in word:
        found = _attribute(word, "--loss")
        loss: nn.Module | Callable[[Any, Any], Tensor] = (
            _called(found, {}, word) if isinstance(found, type) and issubclass(found, nn.Module) else found
        )
        return loss
    kind = LOSSES.get(word) or (getattr(nn, word, None) if word.endswith("Loss") else None)
    if kind is None:
        raise typer.BadParameter(
            f"{word!r}: give one of {', '.join(LOSSES)}, a class of torch.nn such as SmoothL1Loss, or module:callable",
            param_hint="--loss",
        )
    made: nn.Module = kind()
    return made


def keyword_arguments(words: Iterable[str], option: str) -> dict[str, Any]:
    """``KEY=VALUE`` words as keyword arguments; a value that is no Python literal is a plain word."""
    found = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and key.isidentifier()):
            raise typer.BadParameter(f"{word!r} is not KEY=VALUE", param_hint=option)
        try:
            found[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[key] = value
    return found


def parse_schedule(words: Sequence[str]) -> str | dict[str, int]:
    """A schedule by its name, or ``PLAYER=STAGE`` for every player."""
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    found = {}
    for word in words:
        player, equals, stage = word.rpartition("=")
        if not (equals and player and stage.strip().isdecimal()):
            raise typer.BadParameter(
                f"{word!r}: give one name, or PLAYER=STAGE for every player (layer1.conv=3)", param_hint="--schedule"
            )
        found[player] = int(stage)
    return found


def number_or_word(word: str) -> str | int:
    """``"32"`` as 32, other words as they are (for ``--coupling``)."""
    return int(word) if word.isdecimal() else word


def _input(word: str, default: str, generator: torch.Generator) -> Tensor:
    sizes, _, name = word.partition(":")
    dtype = DTYPES.get(name or default)
    try:
        shape = [int(size) for size in sizes.replace("x", ",").split(",")]
    except ValueError:
        shape = []
    if dtype is None or not shape or min(shape) < 1:
        raise typer.BadParameter(
            f"{word!r} is not SIZE,SIZE,…[:DTYPE], for instance 2,3,224,224 or 2,16:int64 (types: {', '.join(DTYPES)})",
            param_hint="--input",
        )
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.zeros(shape, dtype=dtype)


def _attribute(target: str, option: str) -> Any:
    place, colon, path = target.rpartition(":")
    if not (colon and place and path):
        raise typer.BadParameter(f"{target!r} is not package.module:name or path/to/file.py:name", param_hint=option)
    module = _file(Path(place)) if place.endswith(".py") else _module(place)
    found: Any = module
    for name in path.split("."):
        if not hasattr(found, name):
            names = [key for key, value in vars(module).items() if _own(value, module)]
            raise CompileError(
                f"{place} has no {path!r}", f"It has {', '.join(names)}" if names else "Check the name after the colon"
            )
        found = getattr(found, name)
    return found


def _own(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _module(name: str) -> ModuleType:
    """Import a module by name, the current directory included, as ``python -m`` would."""
    _reach(Path.cwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(f"{error.name}.")):
            raise CompileError(
                f"there is no module {error.name!r} here or among the installed packages",
                "Check the name, run the command in the directory that holds it, or give path/to/file.py:name",
            ) from error
        raise _failed(f"importing {name}", error) from error
    except Exception as error:
        raise _failed(f"importing {name}", error) from error


def _file(path: Path) -> ModuleType:
    """Run a Python file as a module; what lies beside it can be imported from it."""
    if not path.is_file():
        raise CompileError(f"there is no file {path}", f"Paths are relative to {Path.cwd()}")
    _reach(path.resolve().parent)
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{os.getpid()}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    if spec is None or spec.loader is None:
        raise CompileError(f"{path} cannot be imported", "Give a Python source file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise _failed(f"running {path}", error) from error
    return module


def _reach(directory: Path) -> None:
    if str(directory) not in sys.path:
        sys.path.insert(0, str(directory))


def _called(factory: Any, keywords: Mapping[str, Any], target: str) -> Any:
    if not callable(factory):
        raise CompileError(
            f"{target} is {type(factory).__name__}, which cannot be called", "Name a class, a function or a module"
        )
    try:
        return factory(**keywords)
    except Exception as error:
        raise _failed(f"calling {target}", error) from error


def _failed(doing: str, error: Exception) -> CompileError:
    """What the user's own code raised, with the user's line."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    source = f"{own[-1].filename}:{own[-1].lineno}" if own else None
    if isinstance(error, SyntaxError) and error.filename:
        source = f"{error.filename}:{error.lineno}"
    remedy = "Give the missing arguments with --arg KEY=VALUE" if isinstance(error, TypeError) else "Correct it there"
    return CompileError(f"{doing} raised {type(error).__name__}: {error}", remedy, source=source)
