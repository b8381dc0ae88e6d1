"""Words for people: counts and lists, in pictures, tables and messages."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType

FEW = 4
"""Names that are said of a long list in a sentence."""


def plural(count: int, word: str, words: str | None = None) -> str:
    """``1 stage``, ``2 stages``."""
    return f"{count} {word if count == 1 else words or word + 's'}"


def listed(names: Sequence[str], most: int = 12) -> str:
    """Names with commas; of more than ``most`` the rest is counted."""
    more = f", +{len(names) - most}" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def few(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return listed(names, FEW) + (" more" if len(names) > FEW else "")


def rendered(found: RenderableType, width: int = 110) -> str:
    """What rich prints, as plain text without trailing blanks, the same on every terminal."""
    from rich.console import Console  # only where something is shown

    stream = StringIO()
    console = Console(
        file=stream, width=width, color_system=None, force_terminal=False, legacy_windows=False, emoji=False,
        markup=False, highlight=False, _environ={},
    )  # fmt: skip
    console.print(found, crop=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().rstrip().splitlines())
