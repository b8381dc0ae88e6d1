"""``.json``: what a program was compiled from, versioned and checked, read back without running anything.

Stored are the network's normal form, options, base method and loss, with digests of the equations and of the code that
came of them. Loading runs the passes behind the normal form again and refuses a file whose digests are others.
The schema is published as docs/program-schema.json.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.algebra.derivation import equation_text
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import OpGraph
from gtddp_compile.methods.curvature import REGISTRY, Curvature
from gtddp_compile.methods.losses import Loss, absent, split
from gtddp_compile.methods.setting import BufferInfo, Group, Setting
from gtddp_compile.options import Options
from gtddp_compile.runtime.compiler import build_program, control_graph
from gtddp_compile.runtime.program import VERSION, UpdateProgram
from gtddp_compile.tools.export.codec import RECORDS, REMEDY, Reader, Writer, fields_of, is_instance, refuse
from gtddp_compile.tools.export.losses import named_classes
from gtddp_compile.tools.export.targets import ATTRIBUTES
from gtddp_compile.tools.export.values import base64_of, loss_arguments, make_loss

FORMAT = "gtddp_compile update program"
SCHEMA_VERSION = 2
"""Raised whenever a file of before could be read wrongly."""
WRITER = f"gtddp_compile {VERSION}, torch {torch.__version__}"
MOST_AXES = 64


@dataclass(frozen=True)
class StoredLoss:
    """One of torch's own losses by class and arguments; a function only by name: it has to be given again."""

    name: str
    arguments: Mapping[str, Any]
    is_torch: bool


@dataclass(frozen=True)
class Stored:
    """The file's ``program``: what the compiler needs to make it again, and digests of what it made."""

    name: str
    ops: OpGraph
    options: Options
    curvature: Curvature
    groups: tuple[Group, ...]
    loss: StoredLoss
    decay: bool
    equations: str
    code: str
    constants: Mapping[str, Tensor] = field(default_factory=dict)
    buffers: Mapping[str, BufferInfo] = field(default_factory=dict)


RECORDS["StoredLoss"] = StoredLoss

# --- writing ----------------------------------------------------------------------------------------------------------


def to_json(program: UpdateProgram) -> str:
    """The program as a JSON document.

    Raises:
        CompileError: the network calls functions that are not torch's, or the base method is not one of the package's.
    """
    writer = Writer()
    stored = writer.record(_stored(program))
    body = {"tensors": [_tensor_data(tensor) for tensor in writer.tensors], "program": stored}
    head = {"format": FORMAT, "version": SCHEMA_VERSION, "written_by": WRITER}
    return json.dumps({**head, "checksum": _checksum(body), **body}, indent=1, ensure_ascii=True) + "\n"


def _stored(program: UpdateProgram) -> Stored:
    setting, ops = program.compiled_for, program.graph.ops
    named, kind = named_classes(ops.output), type(setting.curvature)
    if named:
        raise CompileError(
            f"the model returns a {named[0].__name__}: a stored program holds plain tuples, lists and dicts alone",
            "Return one of these, or export as .py",
        )
    if kind not in REGISTRY.values():
        raise CompileError(
            f"the base method {kind.__name__} is none of the package's own, so a file cannot name it",
            f"Use one of {', '.join(REGISTRY)}, or export another format",
        )
    loss = loss_arguments(setting.loss)
    return Stored(
        name=program.graph.name,
        ops=ops,
        options=program.options,
        curvature=setting.curvature,
        groups=setting.groups,
        loss=StoredLoss(setting.loss.name, {}, False) if loss is None else StoredLoss(*loss, True),
        decay=program.lowered.plan.decay,
        equations=_digest(_equations(program)),
        code=_digest([program.code]),
        constants=setting.constants,
        buffers=setting.buffers,
    )


def _equations(program: UpdateProgram) -> Iterable[str]:
    """Every equation of the derivation, those that stages of one pattern share once."""
    for derivation in {stage.derivation.pattern: stage.derivation for stage in program.derived.stages}.values():
        yield from map(equation_text, (*derivation.equations(), *derivation.rolled.values()))
    yield from map(equation_text, (*program.form.backward.values(), *program.form.forward.values()))


def _tensor_data(tensor: Tensor) -> dict[str, Any]:
    plain = tensor.detach()
    return {"dtype": str(plain.dtype)[6:], "shape": list(plain.shape), "data": base64_of(plain)}


def _checksum(body: Mapping[str, Any]) -> str:
    """Of the content, whatever the white space."""
    return _digest([json.dumps(body, separators=(",", ":"), ensure_ascii=True, allow_nan=False)])


def _digest(lines: Iterable[str]) -> str:
    return f"sha256:{hashlib.sha256(chr(10).join(lines).encode()).hexdigest()}"


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> UpdateProgram:
    """A stored program.

    Raises:
        CompileError: the file is no program, was changed or cut off, was written by a newer version, or this version
            makes another program of it.
        OSError: it cannot be read.
    """
    return from_json(path.read_bytes())


def from_json(content: bytes) -> UpdateProgram:
    """The same from the file's content."""
    document = _checked(content)
    tensors = document["tensors"]
    if not isinstance(tensors, list):
        refuse("tensors", "there is no list")
    reader = Reader(tuple(_tensor(entry, f"tensors/{index}") for index, entry in enumerate(tensors)))
    try:
        stored: Stored = reader.record(Stored, document["program"], "program")
        program = _program(stored)
    except CompileError:
        raise
    except Exception as error:  # the passes are written for graphs that passes made; this one came from outside
        raise CompileError(
            f"the file is no update program: its parts do not fit each other ({type(error).__name__}: {error})", REMEDY
        ) from error
    for what, found, wanted in (
        ("equations", _digest(_equations(program)), stored.equations),
        ("code", _digest([program.code]), stored.code),
    ):
        if found != wanted:
            raise CompileError(
                f"the file's network and options give other {what} here than where it was written: by "
                f"{str(document['written_by'])[:80]!r}, and this is {WRITER!r}",
                "Load it with the versions that wrote it, or compile the model and export it again",
            )
    return program


def _checked(content: bytes) -> dict[str, Any]:
    """The document's object, after format, version and checksum."""
    try:
        document = json.loads(content.decode("utf-8"), parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        why = "it is cut off or no JSON" if isinstance(error, ValueError) else "it is nested too deeply"
        raise CompileError(f"the file is no update program: {why} ({error})", REMEDY) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise CompileError(f"the file is no update program: its format is not {FORMAT!r}", "Load what .json exported")
    version = document.get("version")
    if type(version) is not int or version < 1:
        refuse("version", "there is no version number")
    if version != SCHEMA_VERSION:
        raise CompileError(
            f"the file has version {version} and was written by {str(document.get('written_by'))[:80]!r}; this is "
            f"{WRITER}, which reads version {SCHEMA_VERSION}",
            "Update gtddp_compile, or export again with this version" if version > SCHEMA_VERSION else REMEDY,
        )
    body = {key: document.get(key) for key in ("tensors", "program")}
    if set(document) != {"format", "version", "written_by", "checksum", *body}:
        refuse("/", "the keys are not those of a program")
    try:
        intact = document["checksum"] == _checksum(body)
    except (ValueError, RecursionError):
        intact = False
    if not intact:
        raise CompileError(
            "the file was changed or damaged after it was written: its checksum does not match",
            "Export the program again",
        )
    return document


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _tensor(entry: Any, at: str) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data"}:
        refuse(at, "a tensor has dtype, shape and data")
    dtype = getattr(torch, entry["dtype"], None) if isinstance(entry["dtype"], str) else None
    shape, data = entry["shape"], entry["data"]
    if not isinstance(dtype, torch.dtype):
        refuse(f"{at}/dtype", "there is no such dtype")
    sizes = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**40 for n in shape)
    if not sizes or len(shape) > MOST_AXES:
        refuse(f"{at}/shape", "it is no shape")
    try:
        content = base64.b64decode(data, validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError) as error:
        raise CompileError(f"the file is no update program: at {at}/data, {error}", REMEDY) from error
    if not isinstance(data, str) or len(content) != math.prod(shape) * dtype.itemsize:
        refuse(f"{at}/data", "its length is not that of the tensor")
    if not content:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def _program(stored: Stored) -> UpdateProgram:
    """The passes behind the normal form, run on what was stored."""
    _check_ops(stored.ops)
    _check_groups(stored)
    setting = Setting(stored.curvature, stored.groups, _loss(stored.loss), stored.constants, stored.buffers)
    graph = control_graph(stored.ops, stored.options.schedule, stored.name)
    return build_program(graph, stored.options, stored.curvature, decay=stored.decay, setting=setting)


def _check_ops(ops: OpGraph) -> None:
    """What the generated code takes from an operation as it is: names of arguments and of attributes."""
    for index, op in enumerate(ops.ops):
        at = f"program/ops/OpGraph/ops/{index}"
        if not all(isinstance(key, str) and key.isidentifier() for key in op.kwargs):
            refuse(f"{at}/kwargs", "an argument's name is no name")
        if op.target is getattr and (len(op.args) < 2 or op.args[1] not in ATTRIBUTES):
            refuse(f"{at}/args", "it asks for an attribute that no program needs")


def _check_groups(stored: Stored) -> None:
    """Every group has the base method's options, of the types that it declares."""
    if not stored.groups:
        refuse("program/groups", "there are none")
    known = fields_of(type(stored.curvature))
    for index, group in enumerate(stored.groups):
        for name in stored.curvature.defaults():
            at = f"program/groups/{index}/options/{name}"
            if name not in group.options:
                refuse(at, "it is missing")
            if name in known and not is_instance(group.options[name], known[name][0]):
                refuse(at, f"{group.options[name]!r} is no value of {name}")


def _loss(stored: StoredLoss) -> Loss:
    if not stored.is_torch:
        return absent(stored.name)
    try:
        return split(make_loss(stored.name, stored.arguments))
    except (TypeError, ValueError) as error:
        raise CompileError(f"the file is no update program: at program/loss, {error}", REMEDY) from error
