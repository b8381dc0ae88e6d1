"""What the page is made of, as JSON: blocks, their layouts, and every text once.

A block's inside is laid out by itself, as if nothing in it were open; the page stretches a layout where a child is
opened. Blocks of one structure share a layout, and equal lines of hover texts and derivations are stored once, so that
the page of a deep network is small.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import networkx as nx

from gtddp_compile.tools.draw import style
from gtddp_compile.tools.draw.blocks import Block, Item
from gtddp_compile.tools.draw.layout import Point, layered
from gtddp_compile.tools.draw.picture import OUTPUT, Line, Node, Picture, sketch, tip
from gtddp_compile.tools.draw.svg import endpoints
from gtddp_compile.tools.draw.views import Views

SMALL, FIRST = 60, 40
"""A network of at most ``SMALL`` operations opens whole; of others, outer blocks up to ``FIRST`` boxes."""
STRONG, DASHED, ARROW = 1, 2, 4
COLOURS = (*style.FAMILIES, style.FREE, style.BLOCK)


class Texts:
    """Lines of text by number, equal ones once."""

    def __init__(self) -> None:
        self._number: dict[str, int] = {}

    def numbers(self, text: str) -> list[int]:
        """The lines of a text."""
        return [self._number.setdefault(line, len(self._number)) for line in text.split("\n")]

    @property
    def lines(self) -> list[str]:
        """All lines, by number."""
        return list(self._number)


def page_data(graph: nx.MultiDiGraph[str], notes: Mapping[int, str]) -> dict[str, Any]:
    """Everything that the page's script reads; ``notes`` are texts for stages by their index.

    ``lines`` of text, by number; ``ops``: name, hover text (numbers of lines), stage and innermost block of every
    operation; ``stages``: hover text, cut and note of every stage; ``layouts``; ``blocks``, the network itself first;
    ``open``: blocks open at first; ``colours`` of the boxes; ``kinds``: what a line's colour means; ``ring``:
    colour of a coalition's outline.
    """
    views, texts = Views(graph), Texts()
    blocks = list(views.root.blocks())
    number = {id(block): index for index, block in enumerate(blocks)}
    seen = [views.view(block.children, block.path) for block in blocks]
    sketches = [sketch(view) for view, _ in seen]
    placed = layered([drawn.request for drawn in sketches])
    layouts: dict[str, int] = {}
    entries = []
    for block, (view, keys), drawn, layout in zip(blocks, seen, sketches, placed, strict=True):
        found = drawn.placed(layout)
        text = json.dumps(_layout(found), ensure_ascii=False, separators=(",", ":"))
        entry = _block(view, keys, found, number, texts)
        entries.append({"t": layouts.setdefault(text, len(layouts)), "title": block.title, "path": block.path, **entry})
    return {
        "ops": _ops(graph, blocks, texts),
        "stages": _stages(graph, notes, texts),
        "layouts": [json.loads(text) for text in layouts],
        "blocks": entries,
        "open": _opened(blocks, number, len(graph)),
        "colours": [[found.fill, found.line, found.text, found.detail] for found in COLOURS],
        "kinds": {style.SHORTCUT_COLOURS[kind]: words for kind, words in style.SHORTCUT_WORDS.items()}
        | {style.TIED_COLOUR: "tied weights"},
        "ring": style.COALITION_COLOUR,
        "lines": texts.lines,
    }


def _layout(found: Picture) -> dict[str, Any]:
    """What blocks of one structure share.

    ``nodes``: centre, size, radius, form, colour, accent, whether it is in a coalition, and lines of text (none for
    what enters: its name differs); ``lines``: numbers of the nodes it joins, colour, flags, points, bands whose cuts it
    crosses, numbers of the nodes whose values it carries or that read them; ``bands``: top and bottom.
    """
    index = {node.name: at for at, node in enumerate(found.nodes)}
    index |= {joint: len(index) + at for at, joint in enumerate(found.joints)}
    return {
        "size": _rounded((found.layout.width, found.layout.height)),
        "nodes": [_node(node, found) for node in found.nodes],
        "joints": [_rounded((found.layout.boxes[name].x, found.layout.boxes[name].y)) for name in found.joints],
        "lines": [
            _line(line, route, found, index)
            for line, route in zip(found.lines, found.layout.routes, strict=True)
            if len(route) >= 5
        ],
        "bands": [_rounded((band.top, band.bottom)) for band in found.bands],
    }


def _node(node: Node, found: Picture) -> list[Any]:
    box = found.layout.boxes[node.name]
    words = ("",) if node.form == "end" and node.name != OUTPUT else node.lines
    place = _rounded((box.x, box.y, box.width, box.height, box.radius))
    return [*place, node.form, COLOURS.index(node.colours), node.accent, int(node.coalition), *words]


def _line(line: Line, route: Sequence[Point], found: Picture, index: Mapping[str, int]) -> list[Any]:
    start, tip_ = endpoints(found, line, route)
    points = [start, *route[1:-1], tip_]
    flags = STRONG * line.strong + DASHED * line.dashed + ARROW * line.arrow
    ops = [index[name] for name in line.ops if name in index]
    return [
        index[line.source], index[line.target], line.colour, flags,
        _rounded(number for point in points for number in point), list(line.crosses), ops,
    ]  # fmt: skip


def _block(
    view: nx.MultiDiGraph[str], keys: Mapping[str, Item], found: Picture, number: Mapping[int, int], texts: Texts
) -> dict[str, Any]:
    """What is a block's own.

    ``kids``: of every node the operation's position, or ``-1 - number`` of a block, or nothing; ``words``: text and
    hover text of what enters and of blocks, by the node's number; ``bands``: first and last stage; ``values``: what a
    line carries.
    """
    kids: list[int | None] = []
    words: dict[int, list[Any]] = {}
    for at, node in enumerate(found.nodes):
        item = keys.get(node.name)
        kids.append(item if item is None or isinstance(item, int) else -1 - number[id(item)])
        if node.form == "end" and node.name != OUTPUT:
            words[at] = [node.lines[0], texts.numbers(node.tip)]
        elif isinstance(item, Block):
            words[at] = [style.block_text(view.nodes[node.name]["block"]), texts.numbers(node.tip)]
    return {"kids": kids, "words": words, "bands": [[stage["first"], stage["last"]] for stage in view.graph["stages"]]}


def _ops(graph: nx.MultiDiGraph[str], blocks: Sequence[Block], texts: Texts) -> list[list[Any]]:
    players = {player["name"]: player for player in graph.graph["players"]}
    inside = {at: index for index, block in enumerate(blocks) for at in block.children if isinstance(at, int)}
    found: list[list[Any]] = []
    for at, name in enumerate(graph):
        data = graph.nodes[name]
        words = texts.numbers(tip(name, data, players.get(data["player"])))
        found.append([name, words, data["stage"], inside[at]])
    return found


def _stages(graph: nx.MultiDiGraph[str], notes: Mapping[int, str], texts: Texts) -> list[dict[str, list[int]]]:
    """``says``: a stage's players and merges; ``cut``: live values with shapes; ``names``: without; ``note``."""
    shapes = {value["name"]: style.shape_text(value["shape"]) for value in graph.graph["values"]}
    found = []
    for stage in graph.graph["stages"]:
        says = [f"players: {', '.join(stage['players'])}"] if stage["players"] else []
        says += [f"merges here: {', '.join(stage['merges'])}"] if stage["merges"] else []
        said = {
            "says": "\n".join(says),
            "cut": "\n".join(f"{name}  {shapes.get(name, '')}".rstrip() for name in stage["live"]),
            "names": "\n".join(stage["live"]),
            "note": notes.get(stage["index"], ""),
        }
        found.append({key: texts.numbers(text) if text else [] for key, text in said.items()})
    return found


def _opened(blocks: Sequence[Block], number: Mapping[int, int], size: int) -> list[int]:
    """Blocks that are open when the page is: outer ones, repeated ones not, as far as the whole is still seen."""
    if size <= SMALL:
        return list(range(len(blocks)))
    found, count = [0], len(blocks[0].children)
    level = [child for child in blocks[0].children if isinstance(child, Block)]
    while level:
        growth = sum(len(block.children) - 1 for block in level if block.repeats == 1)
        if count + growth > FIRST:
            break
        count += growth
        opening = [block for block in level if block.repeats == 1]
        found += [number[id(block)] for block in opening]
        level = [child for block in opening for child in block.children if isinstance(child, Block)]
    return found


def _rounded(numbers: Iterable[float]) -> list[float]:
    return [int(number) if number == int(number) else round(number, 1) for number in numbers]
