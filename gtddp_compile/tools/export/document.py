"""``.json``: the program as data, versioned and checked, read back without running anything.

What is stored is the normal form with its control graph, the instructions and stage functions, options, base method
and loss. Symbolic parts are derived again from the graph when it is loaded, and compared with the stored equations.
The schema is published as docs/program-schema.json.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.lowering.instructions import Instruction, StageFunction
from gtddp_compile.lowering.lowered import Lowered
from gtddp_compile.lowering.uses import Use
from gtddp_compile.methods.curvature import REGISTRY, Curvature, resolve
from gtddp_compile.methods.losses import Loss, absent, split
from gtddp_compile.methods.setting import BufferInfo, Group, Setting
from gtddp_compile.options import Options
from gtddp_compile.passes.p11_emit import emit
from gtddp_compile.runtime.planning import plan_program
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.export.codec import REMEDY, Reader, Writer, fields_of, is_instance, refuse
from gtddp_compile.tools.export.losses import named_classes
from gtddp_compile.tools.export.parts import VERSION, Parts
from gtddp_compile.tools.export.safety import check_code
from gtddp_compile.tools.export.values import base64_of, loss_arguments, make_loss

FORMAT = "gtddp_compile update program"
SCHEMA_VERSION = 1
"""Raised whenever a file of before could be read wrongly."""
MOST_AXES = 64


@dataclass(frozen=True)
class StoredLoss:
    """One of torch's own losses by class and arguments; a function only by name: it has to be given again."""

    name: str
    arguments: Mapping[str, Any]
    is_torch: bool


@dataclass(frozen=True)
class StoredMethod:
    """A base method by name, with its hyperparameters."""

    name: str
    options: Mapping[str, Any]


@dataclass(frozen=True)
class StoredForm:
    """The collapsed equations as text: for readers, and to see that a loaded graph derives the same."""

    name: str
    equations: tuple[str, ...]


@dataclass(frozen=True)
class Stored:
    """The file's ``program``."""

    graph: ControlGraph
    options: Options
    curvature: StoredMethod
    groups: tuple[Group, ...]
    loss: StoredLoss
    decay: bool
    form: StoredForm
    functions: tuple[StageFunction, ...]
    instructions: tuple[Instruction, ...]
    uses: Mapping[str, tuple[Use, ...]]
    names: Mapping[str, str]
    attributes: Mapping[str, Any]
    buffers: Mapping[str, BufferInfo] = field(default_factory=dict)


# --- writing ----------------------------------------------------------------------------------------------------------


def to_json(parts: Parts) -> str:
    """The program as a JSON document.

    Raises:
        CompileError: the network calls functions that are not torch's, or the base method is not one of the package's.
    """
    writer = Writer()
    program = writer.record(_stored(parts))
    body = {"tensors": [_tensor_data(tensor) for tensor in writer.tensors], "program": program}
    head = {"format": FORMAT, "version": SCHEMA_VERSION, "written_by": f"gtddp_compile {VERSION}"}
    return json.dumps({**head, "checksum": _checksum(body), **body}, indent=1, ensure_ascii=True) + "\n"


def _stored(parts: Parts) -> Stored:
    setting, lowered = parts.setting, parts.lowered
    named = named_classes(parts.graph.ops.output)
    if named:
        raise CompileError(
            f"the model returns a {named[0].__name__}: a stored program holds plain tuples, lists and dicts alone",
            "Return one of these, or export as .py",
        )
    return Stored(
        graph=parts.graph,
        options=parts.options,
        curvature=_stored_method(setting.curvature),
        groups=setting.groups,
        loss=_stored_loss(setting.loss),
        decay=lowered.plan.decay,
        form=StoredForm(parts.form.name, _equations(parts)),
        functions=lowered.functions,
        instructions=lowered.instructions,
        uses=lowered.uses,
        names=lowered.names,
        attributes=setting.constants,
        buffers=setting.buffers,
    )


def _stored_method(curvature: Curvature) -> StoredMethod:
    kind: Any = type(curvature)
    known: Any = REGISTRY.get(curvature.name)
    if known is not kind:
        raise CompileError(
            f"the base method {kind.__name__} is none of the package's own, so a file cannot name it",
            f"Use one of {', '.join(REGISTRY)}, or export another format",
        )
    return StoredMethod(curvature.name, {f.name: getattr(curvature, f.name) for f in fields(kind) if f.init})


def _stored_loss(loss: Loss) -> StoredLoss:
    found = loss_arguments(loss)
    return StoredLoss(loss.name, {}, False) if found is None else StoredLoss(found[0], found[1], True)


def _equations(parts: Parts) -> tuple[str, ...]:
    return tuple(f"{equation.symbol} = {equation.expression}" for equation in parts.equations)


def _tensor_data(tensor: Tensor) -> dict[str, Any]:
    plain = tensor.detach()
    return {"dtype": str(plain.dtype)[6:], "shape": list(plain.shape), "data": base64_of(plain)}


def _checksum(body: Mapping[str, Any]) -> str:
    """Of the content, whatever the white space."""
    text = json.dumps(body, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


# --- reading ----------------------------------------------------------------------------------------------------------


def read(path: Path) -> UpdateProgram:
    """A stored program.

    Raises:
        CompileError: the file is no program, was changed or cut off, or was written by a newer version.
        OSError: it cannot be read.
    """
    return from_json(path.read_bytes())


def from_json(content: bytes) -> UpdateProgram:
    """The same from the file's content."""
    stored, reader_at = _checked(content), "program"
    tensors, data = stored["tensors"], stored["program"]
    if not isinstance(tensors, list):
        refuse("tensors", "there is no list")
    reader = Reader(tuple(_tensor(entry, f"tensors/{index}") for index, entry in enumerate(tensors)))
    try:
        found: Stored = reader.record(Stored, data, reader_at)
        return _program(found)
    except CompileError:
        raise
    except Exception as error:  # the passes are written for graphs that passes made; this one came from outside
        raise CompileError(
            f"the file is no update program: its parts do not fit each other ({type(error).__name__}: {error})", REMEDY
        ) from error


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
    if version > SCHEMA_VERSION:
        raise CompileError(
            f"the file has version {version} and was written by {str(document.get('written_by'))[:80]!r}; this is "
            f"gtddp_compile {VERSION}, which reads up to version {SCHEMA_VERSION}",
            "Update gtddp_compile, or export again with this version",
        )
    body = {key: document.get(key) for key in ("tensors", "program")}
    if set(document) != {"format", "version", "written_by", "checksum", *body}:
        refuse("/", "the keys are not those of a program")
    if document["checksum"] != _checksum_or_none(body):
        raise CompileError(
            "the file was changed or damaged after it was written: its checksum does not match",
            "Export the program again",
        )
    return body


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _checksum_or_none(body: Mapping[str, Any]) -> str | None:
    try:
        return _checksum(body)
    except (ValueError, RecursionError):
        return None


def _tensor(entry: Any, at: str) -> Tensor:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data"}:
        refuse(at, "a tensor has dtype, shape and data")
    dtype = getattr(torch, entry["dtype"], None) if isinstance(entry["dtype"], str) else None
    shape = entry["shape"]
    if not isinstance(dtype, torch.dtype):
        refuse(f"{at}/dtype", "there is no such dtype")
    if (
        not isinstance(shape, list)
        or not all(type(n) is int and 0 <= n < 2**40 for n in shape)
        or len(shape) > MOST_AXES
    ):
        refuse(f"{at}/shape", "it is no shape")
    try:
        data = base64.b64decode(entry["data"], validate=True) if isinstance(entry["data"], str) else None
    except (binascii.Error, ValueError) as error:
        raise CompileError(f"the file is no update program: at {at}/data, {error}", REMEDY) from error
    if data is None or len(data) != math.prod(shape) * dtype.itemsize:
        refuse(f"{at}/data", "its length is not that of the tensor")
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=dtype).reshape(shape)


def _program(stored: Stored) -> UpdateProgram:
    curvature = _method(stored.curvature)
    derived, plan = plan_program(stored.graph, stored.options, curvature, decay=stored.decay)
    lowered = Lowered(
        plan=plan,
        instructions=stored.instructions,
        functions=stored.functions,
        uses=dict(stored.uses),
        names=dict(stored.names),
    )
    setting = Setting(curvature, stored.groups, _loss(stored.loss), dict(stored.attributes), stored.buffers)
    _check_groups(setting)
    parts = Parts(stored.graph, derived, plan.form, lowered, stored.options, setting)
    if (plan.form.name, _equations(parts)) != (stored.form.name, stored.form.equations):
        refuse("program/form", "the equations are not those that its graph derives")
    emitted = emit(lowered)
    if not all(isinstance(value, Tensor) for value in emitted.constants.values()):
        refuse("program", "a constant of its code is no tensor")
    check_code(emitted.code, emitted.constants)
    return UpdateProgram(stored.graph, derived, plan.form, lowered, emitted, stored.options, parts.curvature, setting)


def _method(stored: StoredMethod) -> Curvature:
    if stored.name not in REGISTRY:
        refuse("program/curvature/name", f"there is no base method {stored.name!r}")
    _check_types(REGISTRY[stored.name], stored.options, "program/curvature/options")
    return resolve(stored.name, **stored.options)


def _check_groups(setting: Setting) -> None:
    if not setting.groups:
        refuse("program/groups", "there are none")
    wanted = set(setting.curvature.defaults())
    for index, group in enumerate(setting.groups):
        at = f"program/groups/{index}/options"
        if not wanted <= set(group.options):
            refuse(at, f"{', '.join(sorted(wanted - set(group.options)))} is missing")
        _check_types(type(setting.curvature), {name: group.options[name] for name in wanted}, at)


def _check_types(kind: type, options: Mapping[str, Any], at: str) -> None:
    """Hyperparameters are of the types that the base method declares."""
    known = fields_of(kind)
    for name, value in options.items():
        if name in known and not is_instance(value, known[name][0]):
            refuse(f"{at}/{name}", f"{value!r} is no value of {name}")


def _loss(stored: StoredLoss) -> Loss:
    if not stored.is_torch:
        return absent(stored.name)
    try:
        return split(make_loss(stored.name, stored.arguments))
    except (TypeError, ValueError) as error:
        raise CompileError(f"the file is no update program: at program/loss, {error}", REMEDY) from error
