"""Source text that an exported module takes with it: definitions and, transitively, everything of ours they name.

What runs here and what an exported module runs is the same text; nothing is written twice. Definitions come from the
kernels and the base methods, which are written for this: they need torch and the standard library alone.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, lru_cache
from types import ModuleType

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError

COMMENT = re.compile(r"\s*#\s*(type: ignore|noqa|fmt: skip|pragma).*$", re.MULTILINE)
CHECKS, CHECK = ("_check", "check_"), "check"
"""Functions and a method that validate options when a program is compiled; bare calls of them are left out."""


@dataclass(frozen=True)
class Source:
    """A module's text, its top-level definitions and what it imports."""

    name: str
    lines: tuple[str, ...]
    definitions: dict[str, tuple[ast.stmt, ...]]
    imports: dict[str, tuple[str, str | None]]


@cache
def source_of(module: str) -> Source:
    """Read a module's text; it is parsed, not run."""
    loaded = importlib.import_module(module)
    text = inspect.getsource(loaded)
    definitions: dict[str, tuple[ast.stmt, ...]] = {}
    imports: dict[str, tuple[str, str | None]] = {}
    body = ast.parse(text).body
    for position, node in enumerate(body):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            definitions[node.name] = (node,)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            after = body[position + 1 : position + 2]
            said = tuple(n for n in after if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant))
            definitions.update((t.id, (node, *said)) for t in targets if isinstance(t, ast.Name))
        elif isinstance(node, ast.Import):
            imports.update((a.asname or a.name.partition(".")[0], (a.name, None)) for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            imports.update((a.asname or a.name, (node.module, a.name)) for a in node.names)
    return Source(module, tuple(text.splitlines()), definitions, imports)


@dataclass
class Luggage:
    """Definitions collected for one exported module.

    Attributes:
        package: modules whose text is carried; names from elsewhere are imported.
        aliases: names replaced in what is carried (a protocol by the class that implements it).
        imports: import statements that the text needs: ``import math``, or ``from typing import`` with the names.
        pieces: text of every definition by its exported name, dependencies first.
        origins: the module that each of them comes from.
    """

    package: str = "gtddp_compile"
    aliases: dict[str, str] = field(default_factory=dict)
    imports: dict[str, set[str]] = field(default_factory=dict)
    pieces: dict[str, str] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    _taken: dict[tuple[str, str], str] = field(default_factory=dict)
    _written: dict[str, str] = field(default_factory=dict)

    def take(self, module: str, name: str) -> str:
        """Carry a function, constant or alias of a module; returns its name in the exported module."""
        module, name = self._home(module, name)
        if (module, name) in self._taken:
            return self._taken[module, name]
        source = source_of(module)
        statements = source.definitions[name]
        text = _without_checks(source, statements)
        exported = self._name(module, name, text)
        renamed = self._dependencies(source, text)
        self._put(source, exported, _rename(text, {**renamed, name: exported}))
        return exported

    def take_class(self, kind: type, members: frozenset[str]) -> None:
        """Carry a class and its bases with ``__init__``, the members asked for, and those of its own that they call."""
        chain: list[tuple[Source, ast.ClassDef]] = []
        for one in kind.__mro__:
            if one.__module__.startswith(self.package):
                source = source_of(one.__module__)
                (node,) = source.definitions[one.__name__]
                assert isinstance(node, ast.ClassDef)
                chain.append((source, node))
        wanted = _reachable([node for _, node in chain], members | {"__init__"})
        for position in reversed(range(len(chain))):
            self._class(*chain[position], [node.name for _, node in chain[position + 1 : position + 2]], wanted)

    def _class(self, source: Source, node: ast.ClassDef, bases: list[str], wanted: list[ast.FunctionDef]) -> None:
        """Carry one class with those methods of its own that are wanted."""
        used = _called(wanted)
        methods = [method for method in wanted if method in node.body]
        kept: list[ast.stmt] = [
            n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)
            and n.target.id in used
        ]  # fmt: skip
        head = f"class {node.name}({', '.join(bases)}):" if bases else f"class {node.name}:"
        if kept:
            head = f"@dataclass(frozen=True)\n{head}"
            self.needs("dataclass", "dataclasses", "dataclass")
        parts = [_documentation(node), *(_without_checks(source, (n,)) for n in kept)]
        parts += [_without_checks(source, (method,)) for method in methods]
        text = head + "\n" + "\n\n".join(part for part in parts if part)
        if len(parts) == 1 and not parts[0]:
            text += "\n    pass"
        renamed = self._dependencies(source, text)
        self._taken[source.name, node.name] = node.name
        self._put(source, node.name, _rename(text, renamed))

    def _put(self, source: Source, exported: str, text: str) -> None:
        self.pieces[exported], self.origins[exported] = text, source.name

    def _home(self, module: str, name: str) -> tuple[str, str]:
        """Where a name of a module is defined, through re-exports."""
        if module == kernels.__name__:
            module = kernels.KERNELS[name].__module__
        while module.startswith(self.package):
            source = source_of(module)
            if name in source.definitions or name not in source.imports:
                return module, name
            origin, attribute = source.imports[name]
            if attribute is None:
                return origin, ""
            module, name = origin, attribute
        return module, name

    def _name(self, module: str, name: str, text: str) -> str:
        """The exported name: its own, unless another module's definition of it says something else."""
        exported = name
        if self._written.setdefault(name, text) != text:
            exported = f"{name}_{module.rpartition('.')[2].upper() if name.isupper() else module.rpartition('.')[2]}"
        self._taken[module, name] = exported
        return exported

    def _dependencies(self, source: Source, text: str) -> dict[str, str]:
        """Carry or import everything that the kept text names; returns what is called otherwise there."""
        renamed = {old: new for old, new in self.aliases.items() if re.search(rf"\b{old}\b", text)}
        for name in sorted(names_in(text)):
            if name in self.aliases:
                continue
            module, attribute = (
                (source.name, name) if name in source.definitions else source.imports.get(name, ("", ""))
            )
            if module.startswith(self.package) and attribute is not None:
                renamed[name] = self.take(module, attribute)
            elif module:
                self.needs(name, module, attribute)
        return renamed

    def needs(self, name: str, module: str, attribute: str | None = None) -> None:
        """Import a name: a module, or an attribute of one."""
        if attribute is None:
            self.imports.setdefault(f"import {module}" if module == name else f"import {module} as {name}", set())
        else:
            names = self.imports.setdefault(f"from {module} import", set())
            names.add(attribute if name == attribute else f"{attribute} as {name}")

    @property
    def import_lines(self) -> list[str]:
        """The statements; torch's come last."""
        rank = {line: (line.split()[1].startswith("torch"), line.startswith("from"), line) for line in self.imports}
        return [
            f"{line} {', '.join(sorted(self.imports[line]))}".rstrip() for line in sorted(rank, key=rank.__getitem__)
        ]


def carry_function(function: object, luggage: Luggage) -> str:
    """Carry a user's own function: a ``def`` at the top of a module that names torch and other such functions alone."""
    name = getattr(function, "__name__", type(function).__name__)
    module = inspect.getmodule(function)
    if not inspect.isfunction(function) or name == "<lambda>" or not isinstance(module, ModuleType):
        raise _not_carried(name, "it is not a function with a def")
    if function.__closure__:
        raise _not_carried(name, "it uses variables of the function around it")
    try:
        source = source_of(module.__name__)
    except OSError as error:
        raise _not_carried(name, "its source file cannot be read") from error
    if name not in source.definitions:
        raise _not_carried(name, "it is not defined at the top of its module")
    own = Luggage(module.__name__)
    own.pieces, own.origins, own.imports = luggage.pieces, luggage.origins, luggage.imports
    found = own.take(module.__name__, name)
    known = {"torch", "math", "typing", "collections", "functools", "operator", "__future__"}
    for line in own.imports:
        if line.split()[1].partition(".")[0] not in known | {"dataclasses", "itertools"}:
            raise _not_carried(name, f"it needs '{line}'")
    return found


def _not_carried(name: str, why: str) -> CompileError:
    return CompileError(
        f"the function {name} cannot be written into a module that needs torch alone: {why}",
        "Define it with def at the top of a module, in terms of torch, or use one of torch's own losses and layers",
    )


# --- text and syntax --------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)  # of our own text, which all modules carry; that of programs comes and goes
def names_in(text: str) -> frozenset[str]:
    """Every plain name in a text of statements."""
    return frozenset(node.id for node in ast.walk(ast.parse(_dedent(text))) if isinstance(node, ast.Name))


def _called(methods: list[ast.FunctionDef]) -> frozenset[str]:
    """Attributes of ``self`` that the methods use."""
    return frozenset().union(*map(_called_by, methods)) - {CHECK}


@cache
def _called_by(method: ast.FunctionDef) -> frozenset[str]:
    attributes = (node for node in ast.walk(method) if isinstance(node, ast.Attribute))
    return frozenset(a.attr for a in attributes if isinstance(a.value, ast.Name) and a.value.id == "self")


def _reachable(chain: list[ast.ClassDef], members: frozenset[str]) -> list[ast.FunctionDef]:
    """Methods asked for and those they call on ``self``, of a class and its bases, in the order they are written.

    Abstract ones are left out: a class down the chain has them.
    """
    methods = [n for node in chain for n in node.body if isinstance(n, ast.FunctionDef) and not _is_abstract(n)]
    found: set[str] = set()
    pending = sorted(members)
    while pending:
        name = pending.pop()
        if name not in found:
            found.add(name)
            pending += sorted(_called([method for method in methods if method.name == name]))
    return [method for method in methods if method.name in found]


def _is_abstract(method: ast.FunctionDef) -> bool:
    return any(isinstance(d, ast.Name) and d.id == "abstractmethod" for d in method.decorator_list)


def attributes_of(text: str, receiver: str) -> frozenset[str]:
    """Names that follow ``receiver.`` in a text: what is asked of an object."""
    return frozenset(re.findall(rf"{re.escape(receiver)}\.(\w+)", text))


def _documentation(node: ast.ClassDef) -> str:
    """The class docstring without its sections on arguments and errors: options are listed elsewhere."""
    text = ast.get_docstring(node) or ""
    kept = re.split(r"\n\s*(?:Args|Raises|Attributes|Do not use it)\b", text)[0].rstrip()
    lines = [f"    {line}".rstrip() for line in kept.splitlines()]
    if not lines:
        return ""
    closing = '"""' if len(lines) == 1 else '\n    """'
    return f'    """{lines[0].strip()}' + "".join(f"\n{line}" for line in lines[1:]) + closing


def _without_checks(source: Source, statements: tuple[ast.stmt, ...]) -> str:
    """The statements' text without bare calls of compile-time checks and without notes to type checkers."""
    dropped = frozenset().union(*map(_checking, statements))
    first, last = statements[0], statements[-1]
    start = min([first.lineno, *(d.lineno for d in getattr(first, "decorator_list", ()))])
    numbered = range(start, (last.end_lineno or last.lineno) + 1)
    return COMMENT.sub("", "\n".join(source.lines[number - 1] for number in numbered if number not in dropped))


@cache
def _checking(statement: ast.stmt) -> frozenset[int]:
    """Lines of the statement's bare calls of compile-time checks."""
    bare = _bare_calls(statement)
    return frozenset(line for n in bare for line in range(n.lineno, (n.end_lineno or n.lineno) + 1))


def _bare_calls(statement: ast.stmt) -> Iterator[ast.stmt]:
    for node in ast.walk(statement):
        call = node.value if isinstance(node, ast.Expr) else None
        function = call.func if isinstance(call, ast.Call) else None
        checks = isinstance(function, ast.Name) and function.id.startswith(CHECKS)
        if isinstance(node, ast.Expr) and (checks or (isinstance(function, ast.Attribute) and function.attr == CHECK)):
            yield node


def _dedent(text: str) -> str:
    return inspect.cleandoc("\n" + text) if text[:1] == " " else text


def _rename(text: str, names: dict[str, str]) -> str:
    for old, new in names.items():
        if old != new:
            text = re.sub(rf"(?<![\w.'\"]){re.escape(old)}(?![\w'\"]|=[^=])", new, text)
    return text
