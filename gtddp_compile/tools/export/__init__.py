"""Back ends of the compiler: an update program written to a file, one format a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gtddp_compile.errors import CompileError
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.export.document import read, to_json
from gtddp_compile.tools.export.graph import save_graph
from gtddp_compile.tools.export.parts import Parts
from gtddp_compile.tools.export.python import to_python
from gtddp_compile.tools.export.tex import to_tex

__all__ = ["FORMATS", "Parts", "read", "to_json", "to_python", "to_tex", "write"]


def _text(make: Callable[[Parts], str]) -> Callable[[Parts, Path], None]:
    """A format that is text. It is complete before the file is opened: an error leaves what was there."""

    def save(parts: Parts, path: Path) -> None:
        text = make(parts)
        path.write_text(text, encoding="utf-8")

    return save


FORMATS: Mapping[str, Callable[[Parts, Path], None]] = {
    ".py": _text(to_python),
    ".json": _text(to_json),
    ".tex": _text(to_tex),
    ".pt2": save_graph,
}
"""Back ends by suffix."""


def write(program: UpdateProgram, path: Path, targets: Any = None) -> None:
    """Write the program in the format of the path's suffix.

    Raises:
        CompileError: no such format, or the program holds what the format cannot.
    """
    save = FORMATS.get(path.suffix)
    if save is None:
        raise CompileError(f"there is no export format {path.suffix!r}", f"Choose one of {', '.join(FORMATS)}")
    parts = Parts.of(program, targets)
    if parts.options.line_search is not None and path.suffix in (".py", ".pt2"):
        raise CompileError(
            f"line_search={parts.options.line_search!r} tries steps by running the model, which {path.suffix} has not",
            "Export as .json, or compile without it",
        )
    save(parts, path)
