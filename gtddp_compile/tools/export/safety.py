"""What code of a loaded program may be: straight lines of calls of known functions. Read, never run, before it is used.

The second wall behind the closed table of :mod:`.targets`: whatever a file says, the text that comes of it is parsed
and every node of it has to be one that the emitter writes.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.tools.export.codec import REMEDY
from gtddp_compile.tools.export.targets import ATTRIBUTES, BUILTINS, aten, functions, methods

NODES = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Return, ast.Expr, ast.With, ast.withitem),
    *(ast.Name, ast.Load, ast.Store, ast.Constant, ast.Tuple, ast.List, ast.Dict, ast.Slice, ast.Subscript),
    *(ast.Attribute, ast.Call, ast.keyword, ast.BinOp, ast.UnaryOp, ast.Compare, ast.operator, ast.unaryop, ast.cmpop),
    *(ast.Delete, ast.Del),
)
ROOTS = ("torch", "F", "operator", "math")
PLAIN = ("enable_grad", "device", "Size", "slice")


def check_code(code: str, constants: Iterable[str]) -> None:
    """Refuse code that is anything else than calls of the program's own functions, kernels and torch's operations.

    Raises:
        CompileError: naming the line.
    """
    try:
        tree = ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise _refused(f"its code does not parse: {error}") from error
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    known = defined | set(kernels.KERNELS) | set(ROOTS) | set(BUILTINS) | {"slice"} | set(constants)
    if any(name.startswith("__") for name in defined) or defined & (set(kernels.KERNELS) | set(ROOTS)):
        raise _refused("it redefines a function of the compiler")
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef) or node.decorator_list:
            raise _refused(f"line {node.lineno} of its code is no function")
        _check_function(node, known)


def _check_function(function: ast.FunctionDef, known: set[str]) -> None:
    """Every node is one the emitter writes, and every name is known when it is read."""
    visible = known | {argument.arg for argument in function.args.args}
    for statement in ast.walk(function):
        if isinstance(statement, ast.FunctionDef) and statement is not function:
            raise _refused(f"line {statement.lineno} of its code defines a function inside another")
        if not isinstance(statement, NODES):
            where = getattr(statement, "lineno", function.lineno)
            raise _refused(f"line {where} of its code has a {type(statement).__name__}")
        _check_node(statement)
    for statement in function.body:
        _check_names(statement, visible)


def _check_names(statement: ast.stmt, visible: set[str]) -> None:
    if isinstance(statement, ast.With):
        for inner in statement.body:
            _check_names(inner, visible)
        return
    names = [node for node in ast.walk(statement) if isinstance(node, ast.Name)]
    for name in names:
        if not isinstance(name.ctx, ast.Store) and name.id not in visible:
            raise _refused(f"line {name.lineno} of its code reads {name.id!r}, which nothing before it defines")
    visible.update(name.id for name in names if isinstance(name.ctx, ast.Store))
    visible.difference_update(name.id for name in names if isinstance(name.ctx, ast.Del))


def _check_node(node: ast.AST) -> None:
    if isinstance(node, ast.Attribute):
        _check_attribute(node)
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Name) and function.id == "getattr":
            wanted = node.args[1] if len(node.args) > 1 else None
            if not isinstance(wanted, ast.Constant) or wanted.value not in ATTRIBUTES:
                raise _refused(f"line {node.lineno} of its code asks for an attribute that no program needs")
        if not isinstance(function, ast.Name | ast.Attribute):
            raise _refused(f"line {node.lineno} of its code calls what is no name")
    if isinstance(node, ast.Assign | ast.Delete):
        parts = [part for target in node.targets for part in ast.walk(target)]
        if any(isinstance(part, ast.Attribute | ast.Subscript) for part in parts):
            raise _refused(f"line {node.lineno} of its code assigns to a part of something")


def _check_attribute(node: ast.Attribute) -> None:
    text = ast.unparse(node)
    root = text.partition(".")[0]
    if node.attr.startswith("__") or ("(" in text and node.attr not in methods() | ATTRIBUTES):
        raise _refused(f"line {node.lineno} of its code uses the attribute {node.attr!r}")
    if root not in ROOTS:
        if not (node.attr in methods() | ATTRIBUTES or (root == "m" and not node.attr.startswith("_"))):
            raise _refused(f"line {node.lineno} of its code uses the attribute {node.attr!r}")
    elif not _names_torch(text):
        raise _refused(f"line {node.lineno} of its code uses {text!r}, which no program needs")


def _names_torch(text: str) -> bool:
    """Whether it is a function of the closed table, a part of such a name, or a plain constant of torch."""
    if text in functions() or any(name.startswith(f"{text}.") for name in ("torch.linalg.x", "torch.fft.x")):
        return True
    if text == "torch.ops" or text == "torch.ops.aten":
        return True
    if text.startswith("torch.ops.aten."):
        name = text.removeprefix("torch.ops.")
        return name.count(".") == 1 or aten(name) is not None
    import torch

    last = getattr(torch, text.removeprefix("torch."), None) if text.count(".") == 1 else None
    return text.removeprefix("torch.") in (*PLAIN, "special") or isinstance(
        last, torch.dtype | torch.memory_format | torch.layout
    )


def _refused(why: str) -> CompileError:
    return CompileError(f"the file is no update program: {why}", REMEDY)
