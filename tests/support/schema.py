"""The JSON Schema of stored programs, from the type annotations that the reader itself goes by.

docs/program-schema.json is this schema; ``PYTHONPATH=tests python tests/export/test_export_json.py`` writes it again.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args, get_origin

from torch import Tensor

from gtddp_compile.tools.export.codec import DEVICE, LEAVES, NAMED, NON_FINITE, RECORDS, TARGETS, fields_of, options_of
from gtddp_compile.tools.export.document import FORMAT, MOST_AXES, SCHEMA_VERSION, Stored

Schema = dict[str, Any]
PLAIN: Mapping[Any, str] = {int: "integer", str: "string", bool: "boolean", types.NoneType: "null"}
TREE: Schema = {"$ref": "#/$defs/tree"}
TEXT: Schema = {"type": "string"}
INDEX: Schema = {"type": "integer", "minimum": 0}
DIGEST: Schema = {"type": "string", "pattern": "^sha256:[0-9a-f]{64}$"}


def schema() -> Schema:
    """The schema of a whole file: head, checksum, tensors, program."""
    definitions: Schema = {"tree": _tree(), "target": _any([_tagged(kind, TEXT) for kind in TARGETS])}
    properties: Schema = {
        "format": {"const": FORMAT},
        "version": {"const": SCHEMA_VERSION},
        "written_by": {**TEXT, "description": "Versions of the package and of torch that wrote the file."},
        "checksum": {**DIGEST, "description": "Of the JSON text of {tensors, program}, ASCII, without white space."},
        "tensors": {"type": "array", "items": _tensor()},
        "program": _fields(Stored, definitions),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": FORMAT,
        "description": "What gtddp_compile writes as .json and reads back without running anything.",
        **_object(properties, list(properties)),
        "$defs": dict(sorted(definitions.items())),
    }


def _object(properties: Schema, required: list[str]) -> Schema:
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _tagged(tag: str, inside: Schema) -> Schema:
    return _object({tag: inside}, [tag])


def _any(options: list[Schema]) -> Schema:
    return options[0] if len(options) == 1 else {"anyOf": options}


def _pairs(key: Schema, item: Schema) -> Schema:
    return _tagged("dict", {"type": "array", "items": _row([key, item])})


def _row(kinds: list[Schema]) -> Schema:
    return {"type": "array", "prefixItems": kinds, "items": False, "minItems": len(kinds)}


def _of(hint: Any, definitions: Schema) -> Schema:
    """Schema of an annotated type; records are collected in ``definitions``."""
    return _any([_single(option, definitions) for option in options_of(hint)])


def _single(hint: Any, definitions: Schema) -> Schema:
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any:
        return TREE
    if origin is Callable:
        return {"$ref": "#/$defs/target"}
    if origin is Literal:
        return {"enum": list(inner)}
    if hint is float:
        return _any([{"type": "number"}, _tagged("float", {"enum": list(NON_FINITE)})])
    if origin is tuple and inner[1:] == (Ellipsis,):
        return {"type": "array", "items": _of(inner[0], definitions)}
    if origin is tuple:
        return _row([_of(kind, definitions) for kind in inner])
    if origin is not None:
        return _pairs(_of(inner[0], definitions), _of(inner[1], definitions))
    if hint is Tensor:
        return _tagged("tensor", INDEX)
    if hint in PLAIN:
        return {"type": PLAIN[hint]}
    if hint.__name__ in RECORDS:
        return _tagged(hint.__name__, _fields(hint, definitions))
    return _tagged(next(tag for tag, kind in NAMED.items() if kind is hint), TEXT)


def _fields(kind: Any, definitions: Schema) -> Schema:
    """A record's fields, described once."""
    if kind.__name__ not in definitions:
        known = fields_of(kind)
        properties = {name: _of(hint, definitions) for name, (hint, _) in known.items()}
        found = _object(properties, [name for name, (_, optional) in known.items() if not optional])
        definitions[kind.__name__] = {"description": kind.__doc__.strip().partition("\n")[0], **found}
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _tree() -> Schema:
    """An argument of an operation, or an option."""
    many: Schema = {"type": "array", "items": TREE}
    tagged: dict[str, Schema] = {
        **dict.fromkeys((*LEAVES, *NAMED, *TARGETS), TEXT),
        "list": many,
        "slice": {**many, "minItems": 3, "maxItems": 3},
        "float": {"enum": list(NON_FINITE)},
        "ellipsis": {"const": True},
        "device": {**TEXT, "pattern": f"^{DEVICE.pattern}$"},
        "tensor": {**INDEX, "description": "Index into tensors."},
    }
    plain: Schema = {"type": ["null", "boolean", "number", "string"]}
    pairs = _pairs({"type": ["string", "integer", "boolean", "null"]}, TREE)
    options = [plain, many, *(_tagged(tag, inside) for tag, inside in tagged.items()), pairs]
    return {
        "description": "A literal, an array (a tuple), or an object whose only key says what it is.",
        **_any(options),
    }


def _tensor() -> Schema:
    words = {"dtype": "A dtype of torch, without 'torch.'.", "data": "Elements row by row, native bytes, base64."}
    shape: Schema = {"type": "array", "items": INDEX, "maxItems": MOST_AXES}
    text: Schema = {key: {**TEXT, "description": said} for key, said in words.items()}
    return _object({"dtype": text["dtype"], "shape": shape, "data": text["data"]}, ["dtype", "shape", "data"])
