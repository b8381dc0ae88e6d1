"""The JSON Schema of stored programs, from the type annotations that the reader itself goes by.

docs/program-schema.json is this schema; ``PYTHONPATH=tests python tests/export/test_export_schema.py`` writes it again.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from gtddp_compile.lowering.layers import Rule
from gtddp_compile.tools.export.codec import (
    DEVICE,
    LEAVES,
    NAMED,
    NON_FINITE,
    RULE_BY_NAME,
    TARGETS,
    fields_of,
    is_target,
    options_of,
)
from gtddp_compile.tools.export.document import FORMAT, MOST_AXES, SCHEMA_VERSION, Stored

Schema = dict[str, Any]
DRAFT = "https://json-schema.org/draft/2020-12/schema"
PLAIN: Mapping[Any, str] = {int: "integer", str: "string", bool: "boolean", None: "null", types.NoneType: "null"}
TREE = {"$ref": "#/$defs/tree"}


def schema() -> Schema:
    """The schema of a whole file: head, checksum, tensors, program."""
    definitions: Schema = {"tree": _tree(), "target": _target(), "tensor": _tensor()}
    program = _of(Stored, definitions)
    properties: Schema = {
        "format": {"const": FORMAT},
        "version": {"const": SCHEMA_VERSION},
        "written_by": {"type": "string", "description": "Package and version that wrote the file."},
        "checksum": {
            "type": "string",
            "pattern": "^sha256:[0-9a-f]{64}$",
            "description": "SHA-256 of the JSON text of {tensors, program}, ASCII, without white space.",
        },
        "tensors": {"type": "array", "items": {"$ref": "#/$defs/tensor"}},
        "program": program,
    }
    return {
        "$schema": DRAFT,
        "title": FORMAT,
        "description": "What gtddp_compile writes as .json and reads back without running anything.",
        **_object(properties, list(properties)),
        "$defs": dict(sorted(definitions.items())),
    }


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _tagged(tag: str, inside: Schema) -> Schema:
    return _object({tag: inside}, [tag])


def _of(hint: Any, definitions: Schema) -> Schema:
    """Schema of an annotated type; records are collected in ``definitions``."""
    if is_target(hint):
        target: Schema = {"$ref": "#/$defs/target"}
        return {"anyOf": [target, {"type": "null"}]} if types.NoneType in options_of(hint) else target
    if hint is Any:
        return TREE
    if hint is Rule:
        return {"enum": sorted(RULE_BY_NAME)}
    options = options_of(hint)
    if len(options) > 1:
        return {"anyOf": [_of(option, definitions) for option in options]}
    return _single(hint, definitions)


def _single(hint: Any, definitions: Schema) -> Schema:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return {"enum": list(inner)}
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if hint is float:
        return {"anyOf": [{"type": "number"}, _tagged("float", {"enum": list(NON_FINITE)})]}
    if origin is tuple and len(inner) == 2 and inner[1] is Ellipsis:
        return {"type": "array", "items": _of(inner[0], definitions)}
    if origin is tuple:
        kinds = [_of(kind, definitions) for kind in inner]
        return {"type": "array", "prefixItems": kinds, "items": False, "minItems": len(kinds)}
    if origin is not None:
        return {"type": "object", "additionalProperties": _of(inner[1], definitions)}
    for tag, kind in (*LEAVES.items(), *NAMED.items()):
        if hint is kind:
            return _tagged(tag, {"type": "string"})
    if hint is Tensor:
        return _tagged("tensor", {"type": "integer", "minimum": 0})
    return _record(hint, definitions)


def _record(kind: type, definitions: Schema) -> Schema:
    if kind.__name__ not in definitions:
        definitions[kind.__name__] = {}  # records may hold each other
        known = fields_of(kind)
        properties = {name: _of(hint, definitions) for name, (hint, _) in known.items()}
        found = _object(properties, [name for name, (_, optional) in known.items() if not optional])
        definitions[kind.__name__] = {"description": _first_line(kind), **found}
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _first_line(kind: type) -> str:
    return (kind.__doc__ or kind.__name__).strip().partition("\n")[0]


def _tree() -> Schema:
    """An argument of an operation."""
    many: Schema = {"type": "array", "items": TREE}
    key: Schema = {"type": ["string", "integer", "boolean", "null"]}
    pair: Schema = {"type": "array", "prefixItems": [key, TREE], "items": False, "minItems": 2}
    tagged = {tag: {"type": "string"} for tag in (*LEAVES, *NAMED, *TARGETS)}
    inside: Schema = {
        **tagged,
        "tuple": many,
        "dict": {"type": "array", "items": pair},
        "slice": {**many, "minItems": 3, "maxItems": 3},
        "float": {"enum": list(NON_FINITE)},
        "ellipsis": {"const": True},
        "device": {"type": "string", "pattern": f"^{DEVICE.pattern}$"},
        "tensor": {"type": "integer", "minimum": 0, "description": "Index into tensors."},
    }
    return {
        "description": "A literal, or an object whose only key says what it is.",
        "anyOf": [
            {"type": ["null", "boolean", "number", "string"]},
            many,
            {"type": "object", "properties": inside, "additionalProperties": False, "minProperties": 1,
             "maxProperties": 1},
        ],
    }  # fmt: skip


def _target() -> Schema:
    return {
        "description": "A function by its entry in the closed table of tensor operations; never imported or evaluated.",
        "anyOf": [_tagged(kind, {"type": "string"}) for kind in TARGETS],
    }


def _tensor() -> Schema:
    size: Schema = {"type": "integer", "minimum": 0}
    return _object(
        {
            "dtype": {"type": "string", "description": "A dtype of torch, without 'torch.'."},
            "shape": {"type": "array", "items": size, "maxItems": MOST_AXES},
            "data": {
                "type": "string",
                "contentEncoding": "base64",
                "description": "Elements row by row, native bytes.",
            },
        },
        ["dtype", "shape", "data"],
    )
