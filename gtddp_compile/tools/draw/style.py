"""Words, widths and colours shared by all drawings."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import networkx as nx

from gtddp_compile.wording import few, plural


@dataclass(frozen=True, slots=True)
class Family:
    """A family of players that share a colour: ``fill`` and ``line`` of the box, ``text`` and ``detail`` on it."""

    name: str
    fill: str
    line: str
    text: str
    detail: str


LINEAR = Family("linear", "#dbe7fb", "#4a7bd0", "#1d3f7a", "#3a5f9e")
CONV = Family("convolution", "#d9f0e4", "#35936a", "#14523a", "#2c6e50")
NORM = Family("normalisation", "#fcecc9", "#c8922a", "#6e4a08", "#8a6114")
EMBEDDING = Family("embedding", "#fadfe6", "#c9567a", "#7a1f3c", "#96405c")
OTHER = Family("other players", "#e8e2f8", "#7d65c1", "#402a80", "#5b46a0")
FREE = Family("no parameters", "#ffffff", "#b9c0ca", "#414a57", "#667284")
BLOCK = Family("block", "#eceff4", "#6f7c8e", "#262f3c", "#5c6878")
FAMILIES = (LINEAR, CONV, NORM, EMBEDDING, OTHER)

SHORTCUT_COLOURS = {"identity": "#e0662f", "parametric": "#b0348c", "parameter_free": "#1792a8"}
SHORTCUT_WORDS = {
    "identity": "identity shortcut",
    "parametric": "shortcut with players",
    "parameter_free": "shortcut without players",
}
TIED_COLOUR = "#8a6d00"
COALITION_COLOUR, COALITION_WORDS = "#3a4556", "coalition: decides together"

_WORDS = ((NORM, ("norm",)), (EMBEDDING, ("embedding",)), (CONV, ("conv",)), (LINEAR, ("linear", "addmm")))


def family(kind: str) -> Family:
    """The colour family of a player's kind, by the words in it."""
    return next((found for found, words in _WORDS if any(word in kind for word in words)), OTHER)


def shape_text(shape: Iterable[int] | None) -> str:
    """``64×8×8``; ``()`` for a scalar, nothing for what is not one tensor."""
    if shape is None:
        return ""
    return "×".join(str(size) for size in shape) or "()"


def stages_text(span: Sequence[int] | None) -> str:
    """``stage 3``, ``stages 3–8``; nothing for what runs before all stages."""
    if span is None:
        return ""
    return f"stage {span[0]}" if span[0] == span[1] else f"stages {span[0]}–{span[1]}"


def stage_title(stage: dict[str, Any]) -> str:
    """What a stage is called, or a band of several."""
    return str(stage.get("title", f"stage {stage['index']}"))


def block_text(block: dict[str, Any]) -> str:
    """What a folded block holds, in one line."""
    parts = [f"{block['repeats']} alike"] if block["repeats"] > 1 else []
    parts += [plural(block["players"], "player")] if block["players"] else [plural(block["operations"], "operation")]
    parts += [stages_text(block["stages"])] if block["stages"] else []
    return " · ".join(parts)


def widest_cut(graph: nx.MultiDiGraph[str]) -> tuple[int, int]:
    """Number of values in the widest cut and the first stage that has it; ``(0, 0)`` without stages."""
    widths: Sequence[tuple[int, int]] = [(len(stage["live"]), -stage["index"]) for stage in graph.graph["stages"]]
    width, index = max(widths, default=(0, 0))
    return width, -index


def summary(graph: nx.MultiDiGraph[str]) -> str:
    """One line: players, stages, widest cut, shortcuts, parameters without effect, operations that mix samples."""
    data = graph.graph
    if "summary" in data:  # a view carries that of the whole
        return str(data["summary"])
    width, index = widest_cut(graph)
    parts = [
        plural(len(data["players"]), "player"),
        plural(len(data["stages"]), "stage"),
        f"widest cut {plural(width, 'value')} (stage {index})",
        plural(len(data["shortcuts"]), "shortcut"),
    ]
    if data["unused"]:
        parts.append(f"{plural(len(data['unused']), 'unused parameter')}: {', '.join(data['unused'])}")
    if data["mixing"]:
        parts.append(f"{plural(len(data['mixing']), 'operation')} mixing samples: {few(data['mixing'])}")
    return ", ".join(parts)


def chars_wide(character: str) -> float:
    """Width of a character in units of the font size, for a common sans-serif face, on the generous side."""
    if character in "ijl.,:;|'!I()[]ft /":
        return 0.36
    if character in "mwMW@%×→":
        return 0.94
    if character.isupper() or ord(character) > 0x7F:
        return 0.74 if ord(character) < 0x2E80 else 1.1
    return 0.6


def text_width(text: str, size: float) -> float:
    """Generous estimate of a text's width in pixels at a font size."""
    return size * sum(map(chars_wide, text))


def escape(text: str) -> str:
    """Text for XML and HTML, in elements and in quoted attributes; characters that XML forbids are shown as ``�``."""
    legal = (
        c if c in "\t\n\r" or "\x20" <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" or c > "\uffff" else "�"
        for c in text
    )
    return html.escape("".join(legal))


def shortened(text: str, limit: int) -> str:
    """The text with its middle left out if it is longer than ``limit`` characters."""
    if len(text) <= limit:
        return text
    tail = (limit - 1) * 2 // 3
    return f"{text[: limit - 1 - tail]}…{text[-tail:]}"
