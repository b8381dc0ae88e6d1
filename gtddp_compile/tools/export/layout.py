"""Lay out generated lines: the arguments of a call too long for a line fill lines of their own."""

from __future__ import annotations

import re

WIDTH = 110
INDENT = "    "
OPENING, CLOSING = "([{", ")]}"
KEYWORD = re.compile(r"\w+=[^=]")


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
    inner = _filled(items, room - len(INDENT))
    return [text[: start + 1], *(f"{INDENT}{line}" for line in inner), *fold(text[end:], room)]


def _filled(items: list[str], room: int) -> list[str]:
    """As many items a line as fit; keyword arguments begin a line of their own."""
    lines: list[str] = []
    keyword = False
    for item in items:
        pieces = fold(item, room - 1)
        starts = bool(KEYWORD.match(item)) and not keyword
        keyword = keyword or starts
        fits = bool(lines) and len(pieces) == 1 and len(lines[-1]) + len(item) + 2 <= room
        if fits and not starts and lines[-1].endswith(","):
            lines[-1] += f" {item},"
        else:
            lines += [*pieces[:-1], f"{pieces[-1]},"]
    return lines


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


def double_quoted(text: str) -> str:
    """String literals that hold no quotes, in double quotes."""
    return re.sub(r"'([^'\"\\\n]*)'", r'"\1"', text)
