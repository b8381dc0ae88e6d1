"""Pages, documents and modules from the templates (``.j2``) beside the tools; in pages every text is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ROOT = Path(__file__).parent
MARKS = (("variable", "<<", ">>"), ("block", "<%", "%>"), ("comment", "<#", "#>"))
LATEX = {
    f"{kind}_{end}_string": mark for kind, *marks in MARKS for end, mark in zip(("start", "end"), marks, strict=True)
}


def page(template: str, **values: Any) -> str:
    """A filled template, ``"draw/page.html.j2"``; those of LaTeX have ``<< >>`` and ``<% %>`` for its braces."""
    return _environment(template.endswith(".tex.j2")).get_template(template).render(**values)


@cache
def _environment(latex: bool) -> Environment:
    found = Environment(
        autoescape=lambda name: str(name).endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        loader=FileSystemLoader(ROOT),
        **(LATEX if latex else {}),  # type: ignore[arg-type]
    )
    found.globals["part"] = lambda name: Markup(ROOT.joinpath(name).read_text(encoding="utf-8"))
    return found
