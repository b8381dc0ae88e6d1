"""Coordinates by Graphviz's layered layout, from the ``graphviz-pure`` wheel: one executable, no system package.

It is run as a separate process, reads DOT from a pipe and answers JSON; only rectangles of known sizes go in, so no
font is needed. The wheel puts its executable beside Python's, which need not be on ``PATH``.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

from gtddp_compile.errors import CompileError

ENGINE = "graphviz-pure"
TIMEOUT = 120.0
SMALL, BENDS = 300, 2500
GAP = 14.0
SIDE = 18.0
Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Box:
    """A rounded box: centre ``x``, ``y``, size and corner ``radius``, in pixels, y downwards."""

    x: float
    y: float
    width: float
    height: float
    radius: float = 0.0


@dataclass(frozen=True, slots=True)
class Link:
    """An edge to be routed; a greater ``weight`` keeps it shorter and straighter."""

    source: str
    target: str
    weight: int = 1


@dataclass(frozen=True, slots=True)
class Layout:
    """Placed boxes by name, a cubic Bézier path a link with the arrow's tip last, and the height of every row."""

    boxes: Mapping[str, Box]
    routes: Sequence[Sequence[Point]]
    rows: Sequence[float]
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be placed.

    Attributes:
        boxes: sizes by name; positions are ignored.
        rows: names in each row, from top to bottom; an empty row is a gap.
        links: edges from an upper to a lower row.
        aside: more names by row, better placed beside the others. The engine treats this as a start for its search
            only, so small graphs are tried without it too, and the layout with the shorter lines is taken.
    """

    boxes: Mapping[str, Box]
    rows: Sequence[Sequence[str]]
    links: Sequence[Link]
    aside: Mapping[int, Sequence[str]] = field(default_factory=dict)

    def sources(self) -> list[str]:
        """What to try; equal requests give equal text, whatever the names."""
        hints = [True, False] if self.aside and len(self.boxes) <= SMALL else [True]
        return [_source(self, hint) for hint in hints]


def layered(requests: Sequence[Request]) -> list[Layout]:
    """Place boxes in given rows, top to bottom, without overlaps and with few crossings.

    The engine is started once, and equal requests are laid out once: a deep network's blocks are few layouts.

    Returns:
        The layouts, ``routes`` in the order of ``links``: first point, then three points a Bézier segment, then the
        tip.

    Raises:
        CompileError: the layout engine is not installed, or it failed.
    """
    sources = [request.sources() for request in requests]
    texts = list(dict.fromkeys(text for tries in sources for text in tries))
    answers = dict(zip(texts, _answers(_run("\n".join(texts))), strict=True)) if texts else {}
    return [
        min((_read(answers[text], request) for text in tries), key=_length)
        for request, tries in zip(requests, sources, strict=True)
    ]


def _answers(text: str) -> list[dict[str, Any]]:
    """The engine writes one JSON object a graph, one after the other."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while (at := text.find("{", at)) >= 0:
        answer, at = decoder.raw_decode(text, at)
        found.append(answer)
    return found


def _length(found: Layout) -> float:
    return sum(math.dist(a, b) for route in found.routes for a, b in pairwise(route))


def _source(request: Request, hint: bool) -> str:
    boxes, rows, links, aside = request.boxes, request.rows, request.links, request.aside
    number = {name: index for index, name in enumerate(boxes)}
    row_of = {name: index for index, row in (*enumerate(rows), *aside.items()) for name in row}
    bends = sum(row_of[link.target] - row_of[link.source] for link in links)
    effort = min(1.0, BENDS / max(bends, 1)) ** 2
    lines = [
        f"digraph {{ ranksep={GAP / 72:.3f}; nodesep={SIDE / 72:.3f}; splines=spline;"
        f" nslimit={20 * effort:.3f}; mclimit={effort:.3f};"
        ' node [label="" fixedsize=true]; edge [arrowsize=0.55];'
    ]
    for name, box in boxes.items():
        shape = "circle" if box.width == box.height == 2 * box.radius else "box"
        size = f"width={box.width / 72:.4f} height={box.height / 72:.4f}"
        lines.append(f"n{number[name]} [{size} shape={shape}];")
    for index, row in enumerate(rows):
        lines.append(f"r{index} [width=0.01 height=0.01 style=invis];")
        if index:
            lines.append(f"r{index - 1} -> r{index} [weight=100 style=invis];")
        beside = [f"n{number[name]}" for name in aside.get(index, ())]
        main = [f"n{number[name]}" for name in row]
        lines.append(f"{{rank=same; {'; '.join((f'r{index}', *main, *beside))}}}")
        if aside and hint:
            lines += [f"{name} -> r{index} [weight=0 style=invis];" for name in main]
            lines += [f"{a} -> {b} [weight=0 style=invis];" for a, b in pairwise((f"r{index}", *beside))]
    for index, link in enumerate(links):
        lines.append(f"n{number[link.source]} -> n{number[link.target]} [id={index} weight={link.weight}];")
    return "\n".join((*lines, "}"))


def _read(answer: dict[str, Any], request: Request) -> Layout:
    _, _, width, height = map(float, answer["bb"].split(","))
    at = {found["name"]: _point(found["pos"], height) for found in answer["objects"] if "pos" in found}
    routes: list[list[Point]] = [[] for _ in request.links]
    for edge in answer.get("edges", ()):
        if "id" in edge:
            marks = edge["pos"].split()
            tips = [mark[2:] for mark in marks if mark.startswith("e,")]
            points = [mark for mark in marks if mark[0] not in "es"]
            routes[int(edge["id"])] = [_point(mark, height) for mark in points + (tips or points[-1:])]
    boxes = {
        name: Box(*at[f"n{index}"], box.width, box.height, box.radius)
        for index, (name, box) in enumerate(request.boxes.items())
    }
    return Layout(boxes, routes, [at[f"r{index}"][1] for index in range(len(request.rows))], width, height)


def _point(text: str, height: float) -> Point:
    x, y = text.split(",")
    return float(x), height - float(y)


def _run(source: str) -> str:
    command = [_executable(), "-Kdot", "-Tjson"]
    try:
        done = subprocess.run(command, input=source, capture_output=True, encoding="utf-8", timeout=TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CompileError(
            f"the layout engine {ENGINE} could not draw the graph ({error})",
            "Save it as .dot, .mmd or .txt instead, which need no layout",
        ) from error
    if done.returncode:
        raise CompileError(
            f"the layout engine {ENGINE} refused the graph: {done.stderr.strip()[-300:]}",
            "Report it with the graph saved as .dot",
        )
    return done.stdout


@cache
def _executable() -> str:
    """Where the wheel installed the executable."""
    try:
        files = metadata.files(ENGINE) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        path = Path(str(file.locate()))
        if path.stem == ENGINE and path.suffix in ("", ".exe") and path.is_file():
            return str(path)
    found = shutil.which(ENGINE)
    if found is None:
        raise CompileError(f"the layout engine {ENGINE} is not installed", f"Install it with: pip install {ENGINE}")
    return found
