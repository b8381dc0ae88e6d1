"""Back ends of the compiler: an update program written to a file, one format a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gtddp_compile.errors import CompileError
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.export.document import read, to_json
from gtddp_compile.tools.export.graph import save_graph
from gtddp_compile.tools.export.python import to_python
from gtddp_compile.tools.export.tex import to_tex

__all__ = ["FORMATS", "read", "to_json", "to_python", "to_tex", "write"]

TEXTS: Mapping[str, Callable[[UpdateProgram], str]] = {".py": to_python, ".json": to_json, ".tex": to_tex}
FORMATS = (*TEXTS, ".pt2")


def write(program: UpdateProgram, path: Path, targets: Any = None) -> None:
    """Write the program in the format of the path's suffix; it is complete before the file is opened."""
    if path.suffix not in FORMATS:
        raise CompileError(f"there is no export format {path.suffix!r}", f"Choose one of {', '.join(FORMATS)}")
    if program.lowered.plan.ranks > 1 and path.suffix != ".tex":
        raise CompileError(
            f"the program has collectives of {program.lowered.plan.ranks} ranks, which {path.suffix} has not",
            "Export that of an optimizer without process_group",
        )
    grid = program.options.line_search
    if grid is not None and path.suffix in (".py", ".pt2"):
        raise CompileError(
            f"line_search={grid!r} tries steps by running the model, which {path.suffix} has not",
            "Export as .json, or compile without it",
        )
    if path.suffix == ".pt2":
        save_graph(program, path, targets)
    else:
        text = TEXTS[path.suffix](program)
        path.write_text(text, encoding="utf-8")
