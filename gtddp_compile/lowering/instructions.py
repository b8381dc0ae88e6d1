"""The program as data: a straight list of calls in static single assignment, and the stages' dynamics.

An instruction is ``writes = function(*args, **kwargs)`` with a note saying which equation it is. Functions come from a
closed set (``operations``), arguments are variables, parameters, buffers, literals and formulas over them; so a program
can be read, compared, renamed and printed without being run.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from gtddp_compile.lowering.operations import names_of

Phase = Literal["trajectory", "loss", "backward", "forward", "joint", "checkpoint", "recompute", "gradients"]
"""Of ``"forward"`` and ``"joint"`` a program has one: the policy rolled out on the network, or on its linearisation.
The last three are of programs that run the trajectory again (``memory="recompute"``)."""

# --- operands ---------------------------------------------------------------------------------------------------------


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
class Function:
    """A function passed to another (a kernel, a player's own dynamics)."""

    name: str


@dataclass(frozen=True, slots=True)
class Apply:
    """A formula: a function of operands, ``kwargs`` as pairs.

    ``function`` is the name of one, an infix operator, ``"neg"``, ``"[]"`` (an item), ``"yield"`` (two operands),
    ``".name"`` (an attribute) or ``".name()"`` (a method) of the first operand.
    """

    function: str
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


def item(value: Any, index: Any) -> Apply:
    """``value[index]``."""
    return Apply("[]", (value, index))


def total(terms: list[Any]) -> Any:
    """The sum of some terms; those that are negated are subtracted."""
    found = terms[0]
    for term in terms[1:]:
        negative = isinstance(term, Apply) and term.function == "neg"
        found = Apply("-", (found, term.args[0])) if negative else Apply("+", (found, term))
    return found


SAMPLES = item(Apply(".shape", (Var("phi"),)), 0)
"""B."""


def mapped(value: Any, change: Callable[[Var], Any]) -> Any:
    """An operand with ``change`` applied to every variable in it."""
    if isinstance(value, Var):
        return change(value)
    if isinstance(value, Apply):
        return Apply(value.function, mapped(value.args, change), mapped(value.kwargs, change))
    if isinstance(value, tuple | list):
        return type(value)(mapped(part, change) for part in value)
    return {key: mapped(part, change) for key, part in value.items()} if isinstance(value, dict) else value


def variables(value: Any) -> Iterator[str]:
    """Names of the variables in an operand."""
    if isinstance(value, Var):
        yield value.name
    elif isinstance(value, Apply):
        yield from variables((value.args, value.kwargs))
    elif isinstance(value, tuple | list | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from variables(part)


# --- instructions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    """One call.

    Attributes:
        phase: sweep it belongs to.
        stage: stage it belongs to, -1 before the first and the number of stages at the loss.
        writes: variables it defines: one for the whole result (a str), or one for each of its parts (a tuple).
        function: name of what is called; ``"="`` evaluates its only argument.
        args, kwargs: operands.
        note: the equation it is, for the reader.
    """

    phase: Phase
    stage: int
    writes: str | tuple[str, ...]
    function: str
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    note: str = ""

    def __str__(self) -> str:
        return render_instruction(self)

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the variables it defines."""
        return (self.writes,) if isinstance(self.writes, str) else self.writes

    @property
    def reads(self) -> tuple[str, ...]:
        """Names of the variables that its operands mention, each once, in order."""
        return tuple(dict.fromkeys(variables((self.args, dict(self.kwargs or {})))))

    @property
    def named(self) -> dict[str, Any]:
        """Its operands by the names that the operation declares."""
        return dict(zip(names_of(self.function), self.args, strict=False)) | dict(self.kwargs or {})

    def renamed(self, names: Mapping[str, str]) -> Instruction:
        """The same with other variables in its operands; what is written keeps its name."""
        return self.with_variables(lambda name: names.get(name, name))

    def with_variables(self, name: Callable[[str], str]) -> Instruction:
        """The same with ``name`` applied to the name of every variable in its operands."""
        return self.replacing(lambda variable: Var(name(variable.name)))

    def replacing(self, change: Callable[[Var], Any]) -> Instruction:
        """The same with ``change`` applied to every variable in its operands."""
        kwargs = None if self.kwargs is None else mapped(dict(self.kwargs), change)
        return replace(self, args=mapped(self.args, change), kwargs=kwargs)

    def writing(self, name: Callable[[str], str]) -> Instruction:
        """The same with ``name`` applied to what it writes."""
        whole = isinstance(self.writes, str)
        found = tuple(name(written) for written in self.written)
        return replace(self, writes=found[0] if whole else found)


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


# --- text -------------------------------------------------------------------------------------------------------------

BINDING = {"+": 1, "-": 1, "*": 2, "/": 2, "neg": 3, "**": 4}
"""How tightly an operator binds; what is no operator binds tightest."""
TIGHTEST = 5


def render(value: Any) -> str:
    """Python source of an operand."""
    if isinstance(value, Var | Function):
        return value.name
    if isinstance(value, Apply):
        return _formula(value)
    if isinstance(value, Param):
        return f"p[{value.name!r}]"
    if isinstance(value, Buffer):
        return f"b[{value.name!r}]"
    if isinstance(value, tuple):
        return f"({', '.join(render(part) for part in value)}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(render(part) for part in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key!r}: {render(part)}' for key, part in value.items())}}}"
    return repr(value)


def _formula(value: Apply) -> str:
    function, args = value.function, value.args
    if function in BINDING:
        own = BINDING[function]
        if function == "neg":
            return f"-{_within(args[0], own)}"
        left, right = args
        return f"{_within(left, own)} {function} {_within(right, own + (function != '+' and function != '*'))}"
    if function == "[]":
        index = args[1]
        if isinstance(index, slice):
            index = Var(f"{'' if index.start is None else index.start}:{'' if index.stop is None else index.stop}")
        return f"{_within(args[0], TIGHTEST)}[{render(index)}]"
    if function == "yield":
        return f"yield {render(args[0])}, {render(args[1])}"
    rest = args
    if function.startswith("."):
        head = f"{_within(args[0], TIGHTEST)}{function.removesuffix('()')}"
        if not function.endswith("()"):
            return head
        function, rest = head, args[1:]
    return f"{function}({_arguments(rest, value.kwargs)})"


def _within(value: Any, binding: int) -> str:
    """An operand of an operator, in parentheses where it binds less tightly."""
    loose = isinstance(value, Apply) and BINDING.get(value.function, TIGHTEST) < binding
    return f"({render(value)})" if loose else render(value)


def _arguments(args: tuple[Any, ...], kwargs: Any) -> str:
    return ", ".join([*(render(arg) for arg in args), *(f"{key}={render(arg)}" for key, arg in kwargs)])


def render_instruction(instruction: Instruction) -> str:
    """One line of Python."""
    writes = instruction.writes
    if instruction.function == "=":
        call = render(instruction.args[0])
    else:
        call = f"{instruction.function}({_arguments(instruction.args, (instruction.kwargs or {}).items())})"
    if not writes:
        return call
    if isinstance(writes, str):
        return f"{writes} = {call}"
    return f"{', '.join(writes)}{',' if len(writes) == 1 else ''} = {call}"
