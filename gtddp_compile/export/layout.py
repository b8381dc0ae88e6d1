"""Lay out generated lines: a call too long for a line gets one argument a line, as formatters do it."""

from __future__ import annotations

WIDTH = 110
INDENT = "    "
OPENING, CLOSING = "([{", ")]}"


def lay_out(line: str, indent: str = "", note: str = "", width: int = WIDTH) -> list[str]:
    """One logical line as physical lines, its note behind it where that fits, above it where not."""
    room = width - len(indent)
    if note and len(line) + len(note) + 4 <= room:
        return [f"{indent}{line}  # {note}"]
    comment = [f"{indent}# {note}"] if note else []
    return comment + [f"{indent}{part}" for part in fold(line, room)]


def fold(text: str, room: int) -> list[str]:
    """Break a line at the commas of its longest bracket, and what is still too long again."""
    if len(text) <= room:
        return [text]
    bracket = _breakable(text)
    if bracket is None:
        return [text]
    start, end = bracket
    items = split_commas(text[start + 1 : end])
    together = ", ".join(items)
    if len(together) + len(INDENT) <= room and not (len(items) == 1 and text[start + 1 : end].rstrip().endswith(",")):
        inner = [together]
    else:
        inner = [line for item in items for line in _with_comma(fold(item, room - len(INDENT) - 1))]
    return [text[: start + 1], *(f"{INDENT}{line}" for line in inner), *fold(text[end:], room)]


def _with_comma(lines: list[str]) -> list[str]:
    return [*lines[:-1], f"{lines[-1]},"]


def split_commas(text: str) -> list[str]:
    """Split at the commas outside brackets and strings; an empty end is dropped."""
    pieces, depth, start = [], 0, 0
    for position, character in _code(text):
        depth += (character in OPENING) - (character in CLOSING)
        if character == "," and depth == 0:
            pieces.append(text[start:position].strip())
            start = position + 1
    return [piece for piece in [*pieces, text[start:].strip()] if piece]


def _breakable(text: str) -> tuple[int, int] | None:
    """The longest outermost bracket whose content may be spread: calls, and displays of several items."""
    found: list[tuple[int, int]] = []
    depth, start = 0, 0
    for position, character in _code(text):
        if character in OPENING:
            start = position if depth == 0 else start
            depth += 1
        elif character in CLOSING:
            depth -= 1
            if depth == 0 and _may_break(text, start, position):
                found.append((start, position))
    return max(found, key=lambda pair: pair[1] - pair[0], default=None)


def _may_break(text: str, start: int, end: int) -> bool:
    """A comma after the last item must change nothing: not in ``x[i]``, not in ``(a + b)``."""
    content, before = text[start + 1 : end], text[:start]
    follows_name = bool(before) and (before[-1].isalnum() or before[-1] in "_)]")
    if not content.strip() or " for " in content:
        return False
    if text[start] == "(" and follows_name:
        return True
    several = len(split_commas(content)) > 1 or content.rstrip().endswith(",")
    return several and not (text[start] == "[" and follows_name)


def _code(text: str) -> list[tuple[int, str]]:
    """Characters outside string literals, with their positions."""
    found, quote, escaped = [], "", False
    for position, character in enumerate(text):
        if quote:
            if escaped:
                escaped = False
            elif character == "\\":
                escaped = True
            elif character == quote:
                quote = ""
        elif character in "'\"":
            quote = character
        else:
            found.append((position, character))
    return found
