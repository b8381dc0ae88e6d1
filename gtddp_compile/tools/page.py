"""Pages from the templates (``.html.j2``) beside the tools: self-contained, every text escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

ROOT = Path(__file__).parent


def page(template: str, **values: Any) -> str:
    """A filled template, ``"draw/page.html.j2"``."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    found = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
        loader=FileSystemLoader(ROOT),
    )  # fmt: skip
    found.globals["part"] = lambda name: Markup(ROOT.joinpath(name).read_text(encoding="utf-8"))
    return found
