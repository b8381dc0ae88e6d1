"""The demo runs, with very few steps, and its report is complete and stands alone."""

from __future__ import annotations

import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

DEMO = Path(__file__).parent.parent / "examples" / "digits.py"
STEPS, SEEDS = 4, 2


class Page(HTMLParser):
    """Counts elements and collects what the page would load, its ids and the cells of its table."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.rows: list[list[str]] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.counts[tag] = self.counts.get(tag, 0) + 1
        self._open.append(tag)
        self.loads += [
            v or "" for k, v in attrs if k in ("src", "href", "xlink:href") and not (v or "").startswith("#")
        ]
        self.ids += [v or "" for k, v in attrs if k == "id"]
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] in ("td", "small") and self.rows:
            self.rows[-1][-1] += data

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """What the demo printed, and the page."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, str(DEMO), "--steps", str(STEPS), "--seeds", str(SEEDS), "--out", "out.html"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["out.html"]
    return done.stdout, (folder / "out.html").read_text(encoding="utf-8")


def test_report_loads_nothing(made: tuple[str, str]) -> None:
    page = Page(made[1])
    assert page.loads == []
    assert not re.search(r"@import|url\((?!#)", made[1])
    assert "script" not in page.counts


def test_report_is_complete(made: tuple[str, str]) -> None:
    page = Page(made[1])
    assert page.counts["svg"] >= 1 + 2 * 2  # the graph; steps and seconds of at least two learning rates
    assert page.counts["table"] == 1
    rows = [row for row in page.rows if row]
    assert len(rows) % 3 == 0 and {row[1] for row in rows} == {"base", "paper", "default"}
    assert all(row[-1].endswith(f"of {SEEDS}") for row in rows)
    for text in ("conv2", "Eq. 9", f"After {STEPS} steps", "diverged", "ms/step"):
        assert text in made[1], text


def test_ids_are_apart(made: tuple[str, str]) -> None:
    ids = Page(made[1]).ids
    assert len(ids) == len(set(ids))


def test_terminal_shows_the_same_result(made: tuple[str, str]) -> None:
    for text in ("base", "paper", "default", "ms/step", "diverged", "out.html"):
        assert text in made[0], text
