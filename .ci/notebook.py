"""Pages of docs/ as notebooks: their code is run in order, and the site shows what it printed and drew.

A hook of mkdocs (`.ci/site.yml`). The Markdown is the one source; the first page can also be downloaded as `.ipynb`.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PAGES = ("tutorial.md", "own-layer.md", "own-loss.md", "micro-batches.md")
DOCS = Path(__file__).resolve().parent.parent / "docs"


@dataclass
class Cell:
    """Words, or code with what came of it: text, and pictures as SVG."""

    kind: str
    text: str
    printed: str = ""
    pictures: list[str] = field(default_factory=list)


def cells(page: str) -> list[Cell]:
    """A page cut at its blocks of Python."""
    parts = re.split(r"^```python\n(.*?)^```\n", page, flags=re.DOTALL | re.MULTILINE)
    found = [Cell("code" if index % 2 else "markdown", part.strip()) for index, part in enumerate(parts)]
    return [cell for cell in found if cell.text]


def executed(name: str) -> list[Cell]:
    """The cells of a page of docs/, run from top to bottom as in a notebook; an exception is the page's error."""
    names: dict[str, Any] = {"__name__": "__main__"}
    found = cells((DOCS / name).read_text(encoding="utf-8"))
    for index, cell in enumerate(found):
        if cell.kind == "code":
            run(cell, f"{name}, block {index}", names)
    return found


def run(cell: Cell, place: str, names: dict[str, Any]) -> None:
    """Run one cell: what it prints, the value of an expression at its end, and figures that pyplot has open."""
    tree, printed = ast.parse(cell.text), io.StringIO()
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, place, "exec"), names)
        value = eval(compile(ast.Expression(last.value), place, "eval"), names) if isinstance(last, ast.Expr) else None
    if hasattr(value, "_repr_html_"):
        cell.pictures += re.findall(r"<svg.*</svg>", value._repr_html_(), re.DOTALL)
    elif value is not None:
        print(repr(value), file=printed)
    cell.printed = printed.getvalue().rstrip()
    if plots := sys.modules.get("matplotlib.pyplot"):
        for number in plots.get_fignums():
            drawn = io.StringIO()
            plots.figure(number).savefig(drawn, format="svg", bbox_inches="tight")
            cell.pictures.append(drawn.getvalue())
        plots.close("all")


def as_page(found: list[Cell]) -> str:
    """Markdown with the results behind each block."""
    parts = []
    for cell in found:
        parts.append(f"```python\n{cell.text}\n```" if cell.kind == "code" else cell.text)
        if cell.printed:
            parts.append(f"``` {{ .text .output .no-copy }}\n{cell.printed}\n```")
        for picture in cell.pictures:
            data = base64.b64encode(picture.encode()).decode()
            parts.append(
                f'<img class="output" alt="what the block above draws" src="data:image/svg+xml;base64,{data}">'
            )
    return "\n\n".join(parts) + "\n"


def as_notebook(found: list[Cell]) -> str:
    """A Jupyter notebook, format 4.5, with its results."""
    written = []
    for index, cell in enumerate(found):
        entry: dict[str, Any] = {"id": f"cell-{index}", "cell_type": cell.kind, "metadata": {}, "source": cell.text}
        if cell.kind == "code":
            printed = [{"output_type": "stream", "name": "stdout", "text": cell.printed + "\n"}] if cell.printed else []
            drawn = [{"output_type": "display_data", "metadata": {}, "data": {"image/svg+xml": svg}}
                     for svg in cell.pictures]  # fmt: skip
            entry |= {"execution_count": None, "outputs": printed + drawn}
        written.append(entry)
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": kernel, "cells": written}, indent=1)


# --- the hook ---------------------------------------------------------------------------------------------------------

_found: dict[str, list[Cell]] = {}


def on_files(files: Any, config: Any) -> Any:
    """Run the pages; the first one's notebook becomes a file of the site."""
    from mkdocs.structure.files import File

    _found.update((name, executed(name)) for name in PAGES)
    files.append(File.generated(config, PAGES[0].replace(".md", ".ipynb"), content=as_notebook(_found[PAGES[0]])))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The pages that were run, with their results."""
    name = page.file.src_uri
    if name not in _found:
        return markdown
    shown = as_page(_found[name])
    if name == PAGES[0]:
        notebook = name.replace(".md", ".ipynb")
        shown = shown.replace(
            "\n\n", f"\n\n[This page as a Jupyter notebook]({notebook}){{ .md-button download }}\n\n", 1
        )
    return shown
