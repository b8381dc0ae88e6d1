"""A control graph as a standalone SVG: one band a stage, players as filled boxes, waiting values in accent colours."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import networkx as nx

from gtddp_compile.graph import grouped
from gtddp_compile.tools.draw import style
from gtddp_compile.tools.draw.layout import Box, Point
from gtddp_compile.tools.draw.picture import (
    DETAIL_SIZE,
    FREE_SIZE,
    LINE_COLOUR,
    NAME_SIZE,
    OUTPUT,
    WAIT_COLOUR,
    Band,
    Line,
    Node,
    Picture,
    picture,
)
from gtddp_compile.tools.draw.views import Views

FONT = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
MARGIN, HEAD, LABELS = 20.0, 56.0, 190.0
STAGE_SIZE, CUT_SIZE, LEGEND_SIZE = 12.0, 10.5, 11.0
BANDS = ("#f5f7fa", "#fcfdfe")


BOXES = 150
"""A graph of more operations is folded into blocks."""


def svg(graph: nx.MultiDiGraph[str], boxes: int = BOXES) -> str:
    """The drawing, with hover texts; every text is escaped and nothing is loaded from elsewhere.

    A graph of more operations than ``boxes`` is folded into so many blocks (or as few as its outermost blocks are).
    """
    graph = Views(graph).folded(boxes) if len(graph) > boxes else graph
    found = picture(graph)
    labels = _label_width(found)
    total = style.summary(graph)
    title = f"{graph.graph['name']}"
    left = MARGIN + labels + 16
    inner = max(labels + 16 + found.layout.width + 16, style.text_width(title, 18) * 1.1, 520.0)
    left += (inner - (labels + 16 + found.layout.width + 16)) / 2
    top = MARGIN + HEAD
    legend, legend_height = _legend(found, MARGIN, top + found.layout.height + 26, inner)
    width, height = inner + 2 * MARGIN, top + found.layout.height + 26 + legend_height + MARGIN - 8
    lines = [f'<g transform="translate({left:.1f} {top:.1f})">']
    number = {node.name: index for index, node in enumerate(found.nodes) if node.name != OUTPUT}
    lines += _edges(found, number)
    lines.append(_crossings(found))
    lines += [_node(node, found.layout.boxes[node.name], number.get(node.name)) for node in found.nodes]
    summary_lines = _wrapped(total.split(", "), inner, 11.5, 2)
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height:.0f}" '
            f'viewBox="0 0 {width:.0f} {height:.0f}" font-family="{FONT}" role="img" '
            f'aria-label="{style.escape(title)}: {style.escape(total)}">',
            f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>',
            _text(MARGIN, MARGIN + 15, title, 18, "#1f2733", weight=700),
            *(
                _text(MARGIN, MARGIN + 34 + 14 * index, line, 11.5, "#667284")
                for index, line in enumerate(summary_lines)
            ),
            _text(MARGIN + 12, top + 15, "inputs", STAGE_SIZE, "#8390a1", weight=600) if found.bands else "",
            *(_band(band, top, MARGIN, inner, labels) for band in found.bands),
            *lines,
            "</g>",
            legend,
            "</svg>\n",
        )
    )


def _text(x: float, y: float, text: str, size: float, fill: str, weight: int = 400, anchor: str = "start") -> str:
    bold = f' font-weight="{weight}"' if weight != 400 else ""
    middle = f' text-anchor="{anchor}"' if anchor != "start" else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}"{bold}{middle}>{style.escape(text)}</text>'


def _wrapped(words: Sequence[str], width: float, size: float, limit: int) -> list[str]:
    """Words with commas between, at most ``limit`` lines; what does not fit is counted at the end."""
    lines: list[str] = []
    for index, word in enumerate(words):
        while style.text_width(word, size) > width and len(word) > 6:
            word = style.shortened(word, len(word) - 2)
        joined = f"{lines[-1]}, {word}" if lines else word
        rest = len(words) - index
        if lines and style.text_width(joined, size) <= width - (34 if len(lines) == limit and rest > 1 else 0):
            lines[-1] = joined
        elif len(lines) < limit:
            if lines:
                lines[-1] += ","
            lines.append(word)
        else:
            lines[-1] += f", +{rest}"
            break
    return lines


def _label_width(found: Picture) -> float:
    wanted = [style.text_width("stage 999", STAGE_SIZE)]
    wanted += [style.text_width(", ".join(band.live), CUT_SIZE) + 30 for band in found.bands]
    return min(max(wanted), LABELS)


def _band(band: Band, offset: float, x: float, width: float, labels: float) -> str:
    top, bottom = offset + band.top, offset + band.bottom
    room = max(1, int((bottom - top - 28) / 13))
    cut = _wrapped(band.live, labels - 24, CUT_SIZE, room) if band.live else ["empty"]
    lines = [
        f'<g class="stage" data-stage="{band.index}"><title>{style.escape(band.tip)}</title>',
        f'<rect x="{x:.1f}" y="{top:.1f}" width="{width:.1f}" height="{bottom - top:.1f}" '
        f'fill="{BANDS[band.index % 2]}"/>',
        f'<path d="M{x:.1f} {top:.1f}h{width:.1f}" stroke="#d5dbe3" stroke-dasharray="2 3"/>',
        _text(x + 12, top + 19, band.title, STAGE_SIZE, "#3a4556", weight=600),
        _text(x + 12, top + 34, "cut", CUT_SIZE, "#9aa4b2"),
    ]
    lines += [_text(x + 33, top + 34 + 13 * index, text, CUT_SIZE, "#667284") for index, text in enumerate(cut)]
    return "".join((*lines, "</g>"))


def _node(node: Node, box: Box, number: int | None) -> str:
    left, top = box.x - box.width / 2, box.y - box.height / 2
    fill = "#3a4556" if node.form == "end" else node.colours.fill
    stroke = "#3a4556" if node.form == "end" else node.accent
    thick = 1.8 if node.form in ("sign", "merge") else 1.2
    op = "" if number is None else f' data-op="{number}"'
    parts = [
        f'<g class="op {node.form}"{op}><title>{style.escape(node.tip)}</title>',
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{box.width:.1f}" height="{box.height:.1f}" '
        f'rx="{box.radius:g}" fill="{fill}" stroke="{stroke}" stroke-width="{thick}"/>',
    ]
    ink = node.colours.text
    if node.form == "block":
        parts.insert(1, _stack(box, node))
    if node.coalition:
        parts.append(_ring(left, top, box.width, box.height, box.radius))
    if node.form in ("player", "block"):
        parts.append(_text(box.x, box.y - 2.5, node.lines[0], NAME_SIZE, ink, 600, "middle"))
        parts.append(_text(box.x, box.y + 11, node.lines[1], DETAIL_SIZE, node.colours.detail, anchor="middle"))
    elif node.form == "sign":
        parts.append(_text(box.x, box.y + 5.8, node.lines[0], 17, node.accent, 600, "middle"))
    else:
        ink = "#ffffff" if node.form == "end" else ink
        parts.append(_text(box.x, box.y + 3.9, node.lines[0], FREE_SIZE, ink, anchor="middle"))
    return "".join((*parts, "</g>"))


def _ring(left: float, top: float, width: float, height: float, radius: float) -> str:
    """The inner outline of a player that decides together with others."""
    return (
        f'<rect x="{left + 3:.1f}" y="{top + 3:.1f}" width="{width - 6:.1f}" height="{height - 6:.1f}" '
        f'rx="{radius - 3:g}" fill="none" stroke="{style.COALITION_COLOUR}" stroke-width="1.2"/>'
    )


def _stack(box: Box, node: Node) -> str:
    """The edge of a second sheet behind a block: there is more inside."""
    left, bottom = box.x - box.width / 2, box.y + box.height / 2
    return (
        f'<path d="M{left + 4:.1f} {bottom - 4:.1f}v4q0 3 3 3h{box.width - 14:.1f}q3 0 3 -3v-4" fill="none" '
        f'stroke="{node.accent}" stroke-width="1.2"/>'
    )


def _edges(found: Picture, number: Mapping[str, int]) -> Iterator[str]:
    """Thin lines, then thick ones; the pieces of one value's trunk share a halo, so none cuts another."""
    routed = [pair for pair in zip(found.lines, found.layout.routes, strict=True) if len(pair[1]) >= 5]
    groups = grouped(routed, lambda pair: (pair[0].strong, pair[0].ops[0], pair[0].colour))
    for key in sorted(groups, key=lambda key: key[0]):
        paths = [_path(found, line, route) for line, route in groups[key]]
        if key[0]:
            joined = "".join(path for path, _ in paths)
            yield f'<path d="{joined}" fill="none" stroke="#ffffff" stroke-width="5.2" opacity="0.85"/>'
        for (line, _), (path, head) in zip(groups[key], paths, strict=True):
            ops = " ".join(str(number[name]) for name in line.ops if name in number)
            dash = ' stroke-dasharray="5 4"' if line.dashed else ""
            yield (
                f'<g class="edge" fill="none" data-ops="{ops}"><title>{style.escape(line.tip)}</title>'
                f'<path d="{path}" stroke="{line.colour}" stroke-width="{2.2 if line.strong else 1.4}" '
                f'stroke-linejoin="round" stroke-linecap="{"butt" if line.arrow else "round"}"{dash}/>{head}</g>'
            )


def endpoints(found: Picture, line: Line, route: Sequence[Point]) -> tuple[Point, Point]:
    """Where a line starts and ends, on the outlines of its boxes."""
    return _rim(found.layout.boxes[line.source], route[0]), _rim(found.layout.boxes[line.target], route[-1])


def _path(found: Picture, line: Line, route: Sequence[Point]) -> tuple[str, str]:
    """A line's path, from outline to outline of its boxes, and its arrow head."""
    start, tip = endpoints(found, line, route)
    base = _towards(tip, route[-2], math.dist(route[-2], route[-1])) if line.arrow else tip
    points = [f"{x:.1f} {y:.1f}" for x, y in (start, *route[1:-1], base)]
    path = f"M{points[0]}C{' '.join(points[1:-1])}L{points[-1]}"
    return path, _arrow(base, tip, line) if line.arrow else ""


def _rim(box: Box, point: Point) -> Point:
    """The point of a rounded box's outline nearest to a point on its bounding rectangle."""
    across, down = box.width / 2 - box.radius, box.height / 2 - box.radius
    x = min(max(point[0], box.x - across), box.x + across)
    y = min(max(point[1], box.y - down), box.y + down)
    distance = math.hypot(point[0] - x, point[1] - y)
    if not distance:
        return point
    return x + (point[0] - x) * box.radius / distance, y + (point[1] - y) * box.radius / distance


def _towards(start: Point, aim: Point, length: float) -> Point:
    """The point ``length`` away from ``start`` on the line to ``aim``."""
    distance = math.dist(start, aim)
    share = length / distance if distance else 0.0
    return start[0] + (aim[0] - start[0]) * share, start[1] + (aim[1] - start[1]) * share


def _arrow(base: Point, tip: Point, line: Line) -> str:
    dx, dy = tip[0] - base[0], tip[1] - base[1]
    half = (3.6 if line.strong else 2.9) / (math.hypot(dx, dy) or 1.0)
    corners = ((base[0] - dy * half, base[1] + dx * half), tip, (base[0] + dy * half, base[1] - dx * half))
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    return f'<polygon points="{points}" fill="{line.colour}"/>'


def _crossings(found: Picture) -> str:
    """A small ring wherever a line crosses a cut that holds its value: together the augmented state."""
    height = {band.index: band.top for band in found.bands}
    rings = []
    for line, route in zip(found.lines, found.layout.routes, strict=True):
        points = [(_crossing(route, height[stage]), height[stage]) for stage in line.crosses if stage in height]
        if line.target in found.joints:
            points.append((found.layout.boxes[line.target].x, found.layout.boxes[line.target].y))
        rings += [_crossed(f"{x:.1f}", f"{y:.1f}", line.colour) for x, y in points if x is not None]
    return "".join(rings)


def _crossing(route: Sequence[Point], y: float) -> float | None:
    """Where a path of Bézier segments first reaches height ``y``."""
    points = route[:-1]
    for start in range(0, len(points) - 3, 3):
        p0, p1, p2, p3 = points[start : start + 4]
        if not min(p0[1], p3[1]) <= y <= max(p0[1], p3[1]):
            continue
        low, high = 0.0, 1.0
        for _ in range(30):
            t = (low + high) / 2
            a, b, c, d = (1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t * t * (1 - t), t**3
            if (a * p0[1] + b * p1[1] + c * p2[1] + d * p3[1] < y) == (p0[1] < p3[1]):
                low = t
            else:
                high = t
        return a * p0[0] + b * p1[0] + c * p2[0] + d * p3[0]
    return None


def _legend(found: Picture, x: float, y: float, width: float) -> tuple[str, float]:
    """What the colours mean, those that occur; and the height it takes."""
    forms = {node.form for node in found.nodes}
    used = {node.colours.name for node in found.nodes if node.form == "player"}
    boxes = [(colours, colours.name) for colours in style.FAMILIES if colours.name in used]
    boxes += [(style.BLOCK, "folded block")] if "block" in forms else []
    entries = [(_swatch(paint, 3.5), word) for paint, word in boxes]
    if any(node.coalition for node in found.nodes):
        outer = f'<rect y="-10" width="18" height="13" rx="4" fill="none" stroke="{style.COALITION_COLOUR}"/>'
        entries.append((outer + _ring(0, -10, 18, 13, 4), style.COALITION_WORDS))
    if "free" in forms:
        entries.append((_swatch(style.FREE, 5.5), style.FREE.name))
    words = {colour: style.SHORTCUT_WORDS[kind] for kind, colour in style.SHORTCUT_COLOURS.items()}
    words |= {WAIT_COLOUR: "value that waits", style.TIED_COLOUR: "tied weights"}
    drawn = {line.colour for line in found.lines}
    for colour in (colour for colour in words if colour in drawn):
        dash = ' stroke-dasharray="5 4"' if colour == style.TIED_COLOUR else ""
        entries.append((f'<path d="M0 -3.5h18" stroke="{colour}" stroke-width="2.2"{dash}/>', words[colour]))
    entries.append((_crossed("8", "-3.5", LINE_COLOUR), "crosses a cut"))
    parts, at, row = [], 0.0, 0
    for mark, word in entries:
        step = 24 + style.text_width(word, LEGEND_SIZE) + 18
        if at and at + step > width:
            at, row = 0.0, row + 1
        text = _text(24, 0.5, word, LEGEND_SIZE, "#4a5566")
        parts.append(f'<g transform="translate({x + at:.1f} {y + 19 * row + 8:.1f})">{mark}{text}</g>')
        at += step
    return "".join(parts), 19.0 * (row + 1)


def _swatch(paint: style.Family, radius: float) -> str:
    return f'<rect y="-9" width="16" height="11" rx="{radius}" fill="{paint.fill}" stroke="{paint.line}"/>'


def _crossed(x: str, y: str, colour: str) -> str:
    return f'<circle cx="{x}" cy="{y}" r="2.9" fill="#ffffff" stroke="{colour}" stroke-width="1.5"/>'
