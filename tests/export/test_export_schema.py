"""docs/program-schema.json is the schema that the code has, and what is exported is valid by it."""

from __future__ import annotations

import copy
import json
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from gtddp_compile.tools.export.schema import schema
from support.architectures import EXAMPLES
from support.stored import SETTINGS, compiled, small

PUBLISHED = Path(__file__).resolve().parents[2] / "docs" / "program-schema.json"
NETWORKS = ("densenet_like", "attention_block", "dropout_mlp", "siamese", "two_inputs")


def text() -> str:
    return json.dumps(schema(), indent=1) + "\n"


def exported(name: str, folder: Path) -> dict[str, Any]:
    example = EXAMPLES[name]() if name in NETWORKS else small()
    compiled(example, **SETTINGS.get(name, {})).program.export(folder / "program.json")
    found: dict[str, Any] = json.loads((folder / "program.json").read_text(encoding="utf-8"))
    return found


def test_the_published_schema_is_the_codes() -> None:
    assert PUBLISHED.read_text(encoding="utf-8") == text(), "write it again (CONTRIBUTING.md)"


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())


@pytest.mark.parametrize("name", [*NETWORKS, *SETTINGS])
def test_exported_programs_are_valid(name: str, tmp_path: Path) -> None:
    jsonschema.Draft202012Validator(schema()).validate(exported(name, tmp_path))


def test_every_record_is_closed(tmp_path: Path) -> None:
    """A field too many, one missing or one of another type anywhere in a program is not valid."""
    document, source = exported("dropout_mlp", tmp_path), random.Random(0)
    validator = jsonschema.Draft202012Validator(schema())
    records = list(_records(document["program"], schema()["$defs"]["Stored"], schema()["$defs"]))
    assert len({name for name, _ in records}) > 6
    for _, path in source.sample(records, 20):
        for spoil in (_more, _fewer):
            spoiled = copy.deepcopy(document)
            record = spoiled["program"]
            for key in path:
                record = record[key]
            spoil(record)
            assert not validator.is_valid(spoiled), path
    assert not validator.is_valid({**document, "version": document["version"] + 1})


def _records(data: Any, kind: dict[str, Any], definitions: dict[str, Any], path: tuple[Any, ...] = ()) -> Any:
    """Name and place of every record, by the schema."""
    for option in kind.get("anyOf", [kind]):
        name = option.get("$ref", "").rpartition("/")[2]
        if name in ("tree", "target"):
            continue
        found = definitions[name] if name else option
        if isinstance(data, dict) and "properties" in found and set(data) <= set(found["properties"]):
            yield (name, path)
            for key, item in data.items():
                yield from _records(item, found["properties"][key], definitions, (*path, key))
        elif isinstance(data, dict) and isinstance(found.get("additionalProperties"), dict):
            for key, item in data.items():
                yield from _records(item, found["additionalProperties"], definitions, (*path, key))
        elif isinstance(data, list) and isinstance(found.get("items"), dict):
            for index, item in enumerate(data):
                yield from _records(item, found["items"], definitions, (*path, index))


def _more(record: dict[str, Any]) -> None:
    record["another"] = 1


def _fewer(record: dict[str, Any]) -> None:
    del record[next(iter(record))]


if __name__ == "__main__":
    torch.set_num_threads(1)
    PUBLISHED.write_text(text(), encoding="utf-8")
