"""The program as data: a straight list of calls in static single assignment, and the stages' dynamics.

An instruction is ``writes = function(*args, **kwargs)`` with a note saying which equation it is. Functions come from a
closed set (kernels, stage functions of the program itself, methods of the base method ``m``), arguments are variables,
parameters, buffers and literals; so a program can be read, compared and printed without being run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Phase = Literal["trajectory", "loss", "backward", "forward", "joint", "checkpoint", "recompute", "gradients"]
"""Of ``"forward"`` and ``"joint"`` a program has one: the policy rolled out on the network, or on its linearisation.
The last three are of programs that run the trajectory again (``memory="recompute"``)."""


@dataclass(frozen=True, slots=True)
class Var:
    """A variable of the program."""

    name: str


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter before the update."""

    name: str


@dataclass(frozen=True, slots=True)
class Buffer:
    """A buffer, as the first sweep reads it."""

    name: str


@dataclass(frozen=True, slots=True)
class Code:
    """A formula over variables, printed from a derived expression."""

    text: str


@dataclass(frozen=True, slots=True)
class Function:
    """A function passed to another (a kernel, a player's own dynamics)."""

    name: str


WORD = re.compile(r"""'[^']*'|"[^"]*"|(?<![\w.])[A-Za-z_]\w*""")
"""Names in source text, and strings, which hold none (a parameter is often called like a variable)."""


@dataclass(frozen=True)
class Instruction:
    """One call.

    Attributes:
        phase: sweep it belongs to.
        stage: stage it belongs to, -1 before the first and the number of stages at the loss.
        writes: variables it defines; a single ``"*name"`` takes the whole result.
        function: name of what is called; ``"="`` evaluates a :class:`Code`.
        args, kwargs: arguments.
        note: the equation it is, for the reader.
    """

    phase: Phase
    stage: int
    writes: tuple[str, ...]
    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    note: str = ""

    def __str__(self) -> str:
        return render_instruction(self)

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the variables it defines."""
        return tuple(name.removeprefix("*") for name in self.writes)

    @property
    def reads(self) -> tuple[str, ...]:
        """Names that its arguments mention, each once, in order: variables, and functions handed over."""
        found: dict[str, None] = {}

        def seen(name: str) -> str:
            found[name] = None
            return name

        _mapped((self.args, dict(self.kwargs or {})), seen)
        return tuple(found)

    def renamed(self, names: Mapping[str, str]) -> Instruction:
        """The same with other variables in its arguments; what is written keeps its name."""
        args, kwargs = _mapped((self.args, dict(self.kwargs or {})), lambda name: names.get(name, name))
        return replace(self, args=args, kwargs=kwargs if self.kwargs is not None else None)


def _mapped(value: Any, name: Callable[[str], str]) -> Any:
    """An argument with ``name`` applied to every name in it."""
    if isinstance(value, Var | Code | Function):
        text = value.text if isinstance(value, Code) else value.name
        return type(value)(WORD.sub(lambda found: found[0] if found[0][0] in "'\"" else name(found[0]), text))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(item, name) for item in value)
    return {key: _mapped(item, name) for key, item in value.items()} if isinstance(value, dict) else value


@dataclass(frozen=True)
class StageFunction:
    """The dynamics of one stage, run in both sweeps: ``returns = name(p, b, *inputs)``.

    Attributes:
        name: ``"stage_3"``, ``"prologue"``; ``"player_…"`` for an operation handed to a generic kernel.
        stage: its index.
        inputs: names of the operations whose values it takes.
        ops: names of the operations it runs, in order.
        taps: those among them whose gradient is asked for (players' outputs).
        returns: names of the operations whose values it returns.
        params: for a player's function, the parameters it takes as a tuple; ``None`` for a stage.
        doc: one line for the reader.
        extras: for a player's function, those of ``inputs`` that are no tensors: they come first.
        edges: those of ``returns`` whose gradient alone is asked for: where they lie in the graph is returned instead.
        buffers: for a player's function, variables of the buffers it takes, by the buffers' names.
        moments: of batch-norms in training among ``ops``, the variable of what is known of the batch (these come
            first), or ``""`` where the function finds the moments itself; torch finds those of the others.
    """

    name: str
    stage: int
    inputs: tuple[str, ...]
    ops: tuple[str, ...]
    taps: tuple[str, ...]
    returns: tuple[str, ...]
    params: tuple[str, ...] | None = None
    doc: str = ""
    extras: tuple[str, ...] = ()
    buffers: Mapping[str, str] = field(default_factory=dict)
    edges: tuple[str, ...] = ()
    moments: Mapping[str, str] = field(default_factory=dict)


def identifier(name: str, taken: Callable[[str], bool]) -> str:
    """A Python identifier for a qualified name, not yet taken."""
    base = re.sub(r"\W", "_", name)
    base = f"v{base}" if not base or base[0].isdigit() or base[0] == "_" else base
    found, count = base, 2
    while taken(found):
        found, count = f"{base}_{count}", count + 1
    return found


def render(value: Any) -> str:
    """Python source of an argument."""
    if isinstance(value, Var | Function):
        return value.name
    if isinstance(value, Code):
        return value.text
    if isinstance(value, Param):
        return f"p[{value.name!r}]"
    if isinstance(value, Buffer):
        return f"b[{value.name!r}]"
    if isinstance(value, tuple):
        return f"({', '.join(render(item) for item in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(render(item) for item in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {render(item)}' for key, item in value.items())}}}"
    return repr(value)


def render_instruction(instruction: Instruction) -> str:
    """One line of Python."""
    writes = instruction.writes
    if instruction.function == "=":
        call = render(instruction.args[0])
    else:
        arguments = [render(arg) for arg in instruction.args]
        arguments += [f"{key}={render(arg)}" for key, arg in (instruction.kwargs or {}).items()]
        call = f"{instruction.function}({', '.join(arguments)})"
    if not writes:
        return call
    if len(writes) == 1 and writes[0].startswith("*"):
        return f"{writes[0][1:]} = {call}"
    return f"{', '.join(writes)}{',' if len(writes) == 1 else ''} = {call}"
