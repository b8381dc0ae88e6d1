"""What a drawing shows, before it is drawn: labels, sizes, rows, colours, hover texts; then everything placed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import networkx as nx

from gtddp_compile.graph import grouped
from gtddp_compile.tools.draw import style
from gtddp_compile.tools.draw.layout import Box, Layout, Link, Request, layered
from gtddp_compile.wording import listed, plural

NAME_SIZE, DETAIL_SIZE, FREE_SIZE = 12.0, 10.0, 11.0
GLYPHS = {"add": "+", "sub": "−", "mul": "×"}
LINE_COLOUR, WAIT_COLOUR = "#98a2b0", "#56657a"
OUTPUT = "\0output"
NOWHERE = Layout({}, (), (), 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Node:
    """One box: its lines of text (name, then detail), colours, form, hover text; whether it decides with others."""

    name: str
    lines: tuple[str, ...]
    colours: style.Family
    form: str
    """``"player"``, ``"free"``, ``"merge"``, ``"sign"`` (a merge drawn as ⊕) or ``"end"`` (inputs and output)."""
    accent: str
    tip: str
    stage: int
    coalition: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One stroke: an edge, or a piece of the trunk that a waiting value's edges share.

    Attributes:
        source, target: names of boxes; a trunk's joints have names of their own.
        colour: of the stroke.
        crosses: stages whose cuts it crosses between its ends.
        tip: hover text.
        strong: drawn thick, on a white halo.
        dashed: drawn dashed.
        arrow: whether it ends in an arrow head.
        ops: names of the operation whose value it carries and of those that it leads to.
    """

    source: str
    target: str
    colour: str
    crosses: tuple[int, ...]
    tip: str
    strong: bool = False
    dashed: bool = False
    arrow: bool = True
    ops: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Band:
    """One stage: its index, title, names in its cut, hover text, and its extent."""

    index: int
    title: str
    live: tuple[str, ...]
    tip: str
    top: float
    bottom: float


@dataclass(frozen=True, slots=True)
class Picture:
    """Boxes and lines, what the layout is asked for, and, once there is one, every place.

    Coordinates are those of the layout, the labels' column not included. ``joints``: stages of the trunks' joints by
    name; ``borders``: the empty row before every stage, and the one after all.
    """

    graph: nx.MultiDiGraph[str]
    nodes: Sequence[Node]
    lines: Sequence[Line]
    joints: Mapping[str, int]
    borders: Sequence[int]
    request: Request
    layout: Layout = NOWHERE
    bands: Sequence[Band] = ()

    def placed(self, layout: Layout) -> Picture:
        """The picture, once there is a layout."""
        return replace(self, layout=layout, bands=_bands(self.graph, layout, self.borders))


def picture(graph: nx.MultiDiGraph[str]) -> Picture:
    """Label, size and place a control graph, or a view of one."""
    drawn = sketch(graph)
    return drawn.placed(layered([drawn.request])[0])


def sketch(graph: nx.MultiDiGraph[str]) -> Picture:
    """The same before it is placed: many are placed at once."""
    data = graph.graph
    nodes = _nodes(graph)
    stage_of = {node.name: node.stage for node in nodes}
    players = {node.name for node in nodes if node.form in ("player", "block")}
    lines, joints = bundled([_line(graph, *edge) for edge in graph.edges(data=True)], stage_of, players)
    if data["outputs"]:
        last = len(data["stages"])
        nodes.append(Node(OUTPUT, ("output",), style.FREE, "end", style.FREE.line, "what the model returns", last))
        lines += [_returned(graph, name) for name in data["outputs"]]
    rows, borders = _rows(graph, nodes)
    boxes = {node.name: _size(node) for node in nodes} | dict.fromkeys(joints, Box(0, 0, 2, 2))
    aside = grouped(reversed(joints), lambda name: borders[joints[name]])  # what waits longest outermost
    row = {name: index for index, names in (*enumerate(rows), *aside.items()) for name in names}
    links = [
        Link(line.source, line.target, _weight(line, row[line.target] - row[line.source], line.source in joints))
        for line in lines
    ]
    return Picture(graph, nodes, lines, joints, borders, Request(boxes, rows, links, aside))


def bundled(
    lines: Sequence[Line], stage_of: Mapping[str, int], players: Collection[str]
) -> tuple[list[Line], dict[str, int]]:
    """Let a value that waits for several stages run as one trunk with a joint at the cut before each of them.

    What ``players`` read at the very next stage keeps a line of its own. Returns the strokes, and every joint's stage.
    """
    strong = (line for line in lines if line.strong and line.crosses)
    groups = grouped(strong, lambda line: (line.source, line.colour))
    trunks = {key[0]: key for key, members in groups.items() if len({stage_of[line.target] for line in members}) > 1}
    found = []
    for line in lines:
        thin = line.crosses and not (line.strong or line.dashed)
        if thin and line.source in trunks and line.target not in players:
            trunk = trunks[line.source]
            groups[trunk].append(replace(line, colour=trunk[1], strong=True))
        elif not (line.strong and line.crosses):
            found.append(line)
    joints: dict[str, int] = {}
    for (source, colour), members in groups.items():
        stages = sorted({stage_of[line.target] for line in members})
        at, before = source, -1
        for stage in stages if len(stages) > 1 else ():
            later = [line for line in members if stage_of[line.target] >= stage]
            readers = [line for line in later if stage_of[line.target] == stage]
            between = tuple(cut for cut in later[0].crosses if before < cut < stage)
            if len(later) > 1:
                joint = f"\0{source}\0{colour}\0{stage}"
                joints[joint] = stage
                ops = (source, *(line.target for line in later))
                tip = f"{source} → {', '.join(ops[1:])}"
                found.append(Line(at, joint, colour, between, tip, strong=True, arrow=False, ops=ops))
                at, before, between = joint, stage, ()
            else:
                between = (*between, stage)
            found += [replace(line, source=at, crosses=between) for line in readers]
        if len(stages) == 1:
            found += members
    return found, joints


def _weight(line: Line, span: int, from_joint: bool) -> int:
    """How straight: the path from operation to operation most, then trunks, then what branches off them."""
    if line.dashed or (from_joint and line.arrow):
        return 0
    if line.strong:
        return 40 if not line.arrow else 15 if len(line.crosses) < 2 else 1
    return 100 if span <= 2 else 3


def _rows(graph: nx.MultiDiGraph[str], nodes: Sequence[Node]) -> tuple[list[list[str]], list[int]]:
    """Rows of names with an empty row before every stage, and the index of these empty rows, the last after all."""
    depth: dict[str, int] = {}
    for name in nx.topological_sort(graph):
        stage = graph.nodes[name]["stage"]
        inside = [depth[n] for n in graph.predecessors(name) if graph.nodes[n]["stage"] == stage]
        depth[name] = max(inside, default=-1) + 1
    rows: list[list[str]] = []
    borders: list[int] = []
    for stage in range(-1, len(graph.graph["stages"]) + 1):
        here = [node.name for node in nodes if node.stage == stage]
        if stage >= 0:
            borders.append(len(rows))
            rows.append([])
        height = max((depth.get(name, 0) for name in here), default=-1) + 1
        rows += [[name for name in here if depth.get(name, 0) == level] for level in range(height)]
    return rows, borders


def _bands(graph: nx.MultiDiGraph[str], layout: Layout, borders: Sequence[int]) -> list[Band]:
    values = {value["name"]: value for value in graph.graph["values"]}
    found = []
    for position, stage in enumerate(graph.graph["stages"]):
        top, bottom = (layout.rows[index] for index in borders[position : position + 2])
        live = [
            f"{name}  {style.shape_text(values[name]['shape'])}" if name in values else name for name in stage["live"]
        ]
        title = style.stage_title(stage)
        tip = [f"{title}: {listed(stage['players'])}", "in the cut before it:"]
        tip += [f"  {text}" for text in live or ["nothing"]]
        if stage["merges"]:
            tip.append(f"merges here: {listed(stage['merges'])}")
        found.append(Band(stage["index"], title, tuple(stage["live"]), "\n".join(tip), top, bottom))
    return found


def _size(node: Node) -> Box:
    if node.form == "sign":
        return Box(0, 0, 24, 24, 12)
    if node.form in ("player", "block"):
        name, detail = style.text_width(node.lines[0], NAME_SIZE) * 1.07, style.text_width(node.lines[1], DETAIL_SIZE)
        return Box(0, 0, max(name, detail, 60) + 20, 36, 8)
    return Box(0, 0, max(style.text_width(node.lines[0], FREE_SIZE) + 22, 44), 22, 11)


def _nodes(graph: nx.MultiDiGraph[str]) -> list[Node]:
    batches = {(graph.nodes[name]["shape"] or [None])[0] for name in graph.graph["inputs"]}
    merged: dict[str, str] = {}
    for shortcut in graph.graph["shortcuts"]:
        merged.setdefault(shortcut["merge"], shortcut["kind"])
    players = {player["name"]: player for player in graph.graph["players"]}

    def sample_shape(shape: list[int] | None) -> str:
        """Without the batch axis, if the first size is the inputs' first size."""
        return style.shape_text(shape[1:] if shape and {shape[0]} == batches else shape)

    return [
        _node(name, data, sample_shape(data["shape"]), merged.get(name), tip(name, data, players.get(data["player"])))
        for name, data in graph.nodes(data=True)
    ]


def _node(name: str, data: dict[str, Any], shape: str, merged: str | None, words: str) -> Node:
    colours, accent, kind = style.FREE, style.FREE.line, data["kind"]
    lines: tuple[str, ...]
    if merged:
        accent = style.SHORTCUT_COLOURS[merged]
    if "block" in data:
        colours, form, accent = style.BLOCK, "block", style.BLOCK.line
        lines = (style.shortened(data["label"], 40), style.block_text(data["block"]))
    elif data["player"]:
        colours, form = style.family(kind), "player"
        accent = colours.line
        lines = (style.shortened(data.get("label", data["player"]), 34), f"{kind} · {shape}" if shape else kind)
    elif data["input"]:
        form, lines = "end", (" · ".join(filter(None, (style.shortened(data.get("label", name), 30), shape))),)
    elif kind in GLYPHS and data["merge"]:
        form, lines = "sign", (GLYPHS[kind],)
    else:
        form, lines = "merge" if data["merge"] else "free", (style.shortened(kind, 30),)
    return Node(name, lines, colours, form, accent, words, data["stage"], bool(data.get("coalition")))


def tip(name: str, data: dict[str, Any], player: dict[str, Any] | None) -> str:
    """Hover text of an operation, a folded block or a value that enters."""
    if "block" in data:
        return _block_tip(data)
    if "enters" in data:
        return f"{listed(data['enters'])}: from outside{_shape_line(data)}"
    lines = [f"{name}: {data['kind']}"]
    if data["shape"] is not None:
        lines.append(f"shape {style.shape_text(data['shape'])}")
    if player:
        lines.append(f"player {player['name']}, {player['size']:,} parameters")
        lines += [f"  {parameter}  {style.shape_text(shape)}" for parameter, shape in player["parameters"]]
    stage = data.get("true_stage", data["stage"])
    if stage >= 0:
        lines.append(f"stage {stage}")
    if data.get("coalition"):
        lines.append(f"coalition: {listed(data['coalition'])} decide together")
    live = data["live"]
    if live:
        readers = listed(list(map(str, live["readers"])))
        lines.append(f"waits for stage {readers}" if readers else "waits for the loss")
    if data["source"]:
        lines.append(data["source"])
    return "\n".join(lines)


def _block_tip(data: dict[str, Any]) -> str:
    block = data["block"]
    lines = [block["title"], f"{plural(block['operations'], 'operation')}, {plural(block['players'], 'player')}"]
    lines += [f"{block['repeats']} times the same structure"] if block["repeats"] > 1 else []
    lines += [f"{block['size']:,} parameters"] if block["size"] else []
    lines += [style.stages_text(block["stages"])] if block["stages"] else []
    return "\n".join(lines) + _shape_line(data, "gives ")


def _shape_line(data: dict[str, Any], word: str = "shape ") -> str:
    return f"\n{word}{style.shape_text(data['shape'])}" if data["shape"] is not None else ""


def _line(graph: nx.MultiDiGraph[str], source: str, target: str, data: dict[str, Any]) -> Line:
    crosses = tuple(data["crosses"])
    tip = [f"{listed(data.get('values') or [source])} → {target}"]
    colour, strong = LINE_COLOUR, False
    if data["control"]:
        colour = style.TIED_COLOUR
        tip.append(f"tied weights of {data['control']}")
    elif data["shortcut"]:
        colour, strong = style.SHORTCUT_COLOURS[data["shortcut"]], True
        tip.append(f"{data['shortcut'].replace('_', ' ')} shortcut")
    elif len(crosses) > 1:
        colour, strong = WAIT_COLOUR, True
    if crosses:
        stages = graph.graph["stages"]
        tip.append(f"in the cut before stage {listed([str(stages[at].get('first', at)) for at in crosses])}")
    dashed = bool(data["control"])
    return Line(source, target, colour, crosses, "\n".join(tip), strong=strong, dashed=dashed, ops=(source, target))


def _returned(graph: nx.MultiDiGraph[str], name: str) -> Line:
    first = graph.nodes[name]["stage"]
    crosses = tuple(s["index"] for s in graph.graph["stages"] if s["index"] > first and name in s["live"])
    colour = WAIT_COLOUR if crosses else LINE_COLOUR
    return Line(name, OUTPUT, colour, crosses, f"{name} is returned", strong=bool(crosses), ops=(name,))
