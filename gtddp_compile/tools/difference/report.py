"""The differences as data, and how they are shown: as text by rich, as one self-contained page."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.tools.draw.style import escape
from gtddp_compile.tools.page import page
from gtddp_compile.wording import rendered

Sign = Literal["-", "+", "≠"]
STYLES: dict[str, str] = {"-": "red", "+": "green", "≠": "yellow"}
CLASSES: dict[str, str] = {"-": "gone", "+": "new", "≠": "other"}
SUFFIXES = (".html", ".txt")
WIDTH = 120


@dataclass(frozen=True)
class Change:
    """One entry: gone (``"-"``), new (``"+"``) or another value (``"≠"``).

    Attributes:
        sign: which of these.
        what: where it is.
        left, right: what it is in the programs.
        count: how many it stands for.
    """

    sign: Sign
    what: str
    left: str
    right: str
    count: int = 1


@dataclass(frozen=True)
class Line:
    """One line of a listing that only one of the programs has."""

    sign: Sign
    text: str


@dataclass(frozen=True)
class Hunk:
    """Lines that differ at one place."""

    where: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Section:
    """One kind of difference.

    Attributes:
        title: what is compared.
        unit: what an entry is.
        changes: entries of a table that differ.
        hunks: or places of a listing that differ.
        same: how many entries (of instructions: lines; of derivations: stages) agree.
    """

    title: str
    unit: str
    changes: tuple[Change, ...] = ()
    hunks: tuple[Hunk, ...] = ()
    same: int = 0

    def __bool__(self) -> bool:
        return bool(self.changes or self.hunks)

    @property
    def summary(self) -> str:
        """``"options: 1 differs, 11 agree"``."""
        found = [change.sign for change in self.changes for _ in range(change.count)]
        found += [line.sign for hunk in self.hunks for line in hunk.lines]
        words = {"-": "gone", "+": "new", "≠": "changed"}
        counts = [f"{found.count(sign)} {word}" for sign, word in words.items() if sign in found]
        kind = " (lines)" if self.hunks else ""
        return f"{self.title}: {', '.join([*counts, f'{self.same} the same']) + kind}"


@dataclass(frozen=True)
class ProgramDiff:
    """What differs between two programs; falsy where nothing does.

    ``str()`` is text, ``rich.print`` shows it in colours, :meth:`to_html` is a page, :meth:`save` writes either. Names
    and stage numbers are the first program's, what it has no name for is marked ``′``; instructions are printed as each
    program has them.

    Attributes:
        left, right: what the programs are.
        sections: options, players, operations, shortcuts, stages and cuts, derivation, instructions.
        graphs: the programs' control graphs.
    """

    left: str
    right: str
    sections: tuple[Section, ...]
    graphs: tuple[ControlGraph, ControlGraph]

    def __bool__(self) -> bool:
        return any(self.sections)

    def __getitem__(self, title: str) -> Section:
        """A section by the first word of its title: ``diff["players"]``."""
        return self._by_word[title]

    @cached_property
    def _by_word(self) -> dict[str, Section]:
        return {section.title.partition(" ")[0].rstrip(":"): section for section in self.sections}

    # --- text ---------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return rendered(self, WIDTH)

    def __rich__(self) -> RenderableType:
        """The whole as rich prints it."""
        head = Text.assemble(("- ", "red"), self.left, "\n", ("+ ", "green"), self.right)
        if not self:
            return Group(head, Text("\nThe programs do not differ."))
        shown: list[RenderableType] = [head]
        for section in self.sections:
            shown += [Text(f"\n{section.summary}", style="bold" if section else "dim")]
            shown += [_table(section)] if section.changes else []
            for hunk in section.hunks:
                lines = [_listed(line) for line in hunk.lines]
                shown += [Text(f"  {hunk.where}"), *lines]
        return Group(*shown)

    # --- page ---------------------------------------------------------------------------------------------------------

    def to_html(self) -> str:
        """One self-contained page: both control graphs, then the sections; it loads nothing."""
        one, other = self.graphs
        return page(
            "difference/page.html.j2",
            title=f"Update programs: {one.name} against {other.name}",
            css="difference/page.css",
            pictures=[("gone", f"- {self.left}", one.to_svg(60)), ("new", f"+ {self.right}", other.to_svg(60))],
            diff=self,
            classes=CLASSES,
        )

    def _repr_html_(self) -> str:
        return f"<pre>{escape(str(self))}</pre>"

    def save(self, path: str | Path) -> None:
        """Write the page (``.html``) or the text (``.txt``).

        Raises:
            CompileError: another suffix; nothing is written.
        """
        suffix = Path(path).suffix.lower()
        if suffix not in SUFFIXES:
            raise CompileError(f"differences are not written as {suffix!r}", f"Use one of {', '.join(SUFFIXES)}")
        Path(path).write_text(self.to_html() if suffix == ".html" else f"{self}\n", encoding="utf-8")


def _listed(line: Line) -> Text:
    return Text(f"    {line.sign} {line.text}", style=STYLES[line.sign], no_wrap=True, overflow="ignore")


def _table(section: Section) -> Table:
    found = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for column in ("", section.unit, "- first", "+ second"):
        found.add_column(column, overflow="fold")
    for change in section.changes:
        cells = (change.sign, change.what, change.left, change.right)
        found.add_row(*(Text(cell) for cell in cells), style=STYLES[change.sign])
    return found
