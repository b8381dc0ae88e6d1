"""docs/derivations.md names tests that exist."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_test_named_there_exists() -> None:
    text = (ROOT / "docs" / "derivations.md").read_text(encoding="utf-8")
    sources = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")}
    named = set(re.findall(r"`(?:tests/(?:\w+/)?)?(test_\w+\.py)", text))
    assert named and named <= set(sources)
    functions = set(re.findall(r"`(?:test_\w+\.py::)?(test_\w+)`", text))
    defined = {name for source in sources.values() for name in re.findall(r"^def (test_\w+)", source, re.M)}
    assert len(functions) > 10 and functions <= defined, functions - defined
