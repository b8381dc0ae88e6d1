"""A control graph as a Mermaid flowchart, for READMEs and wikis that draw it themselves."""

from __future__ import annotations

import networkx as nx

from gtddp_compile.tools.draw import style
from gtddp_compile.tools.draw.views import Views
from gtddp_compile.wording import listed

TEXT, EDGES = 50_000, 500
"""What Mermaid refuses by default, and GitHub with it: more characters or more edges in one diagram."""
BOXES = (150, 100, 70, 50, 35, 20, 1)
"""Sizes tried where the whole is more than that: the first fold that is within the limits is taken."""


def mermaid(graph: nx.MultiDiGraph[str]) -> str:
    """A flowchart with one subgraph a stage, titled with its cut; folded into blocks beyond Mermaid's limits."""
    whole = len(graph) <= BOXES[0] and graph.number_of_edges() <= EDGES
    text = flowchart(graph) if whole else ""
    if whole and len(text) <= TEXT:
        return text
    views = Views(graph)
    for boxes in BOXES:
        view = views.folded(boxes)
        text = flowchart(view)
        if len(text) <= TEXT and view.number_of_edges() <= EDGES:
            break
    return text


def flowchart(graph: nx.MultiDiGraph[str]) -> str:
    """The flowchart of a graph as it is."""
    short = {name: f"n{index}" for index, name in enumerate(graph)}
    lines = ["flowchart TB"]
    staged = {name for stage in graph.graph["stages"] for name in stage["ops"]}
    lines += [_node(graph, name, short[name], "  ") for name in graph if name not in staged]
    for stage in graph.graph["stages"]:
        title = f"{style.stage_title(stage)} · cut: {listed(stage['live'], 6) or 'empty'}"
        lines.append(f'  subgraph stage{stage["index"]}["{escaped(title)}"]')
        lines += [_node(graph, name, short[name], "    ") for name in stage["ops"]]
        lines.append("  end")
    styles: dict[str, list[str]] = {}
    for index, (source, target, data) in enumerate(graph.edges(data=True)):
        arrow = "-.->" if data["control"] else "==>" if data["shortcut"] else "-->"
        lines.append(f"  {short[source]} {arrow} {short[target]}")
        colour = style.TIED_COLOUR if data["control"] else style.SHORTCUT_COLOURS.get(data["shortcut"])
        if colour:
            styles.setdefault(colour, []).append(str(index))
    for index, colours in enumerate((*style.FAMILIES, style.FREE, style.BLOCK)):
        lines.append(f"  classDef f{index} fill:{colours.fill},stroke:{colours.line},color:{colours.text}")
        members = [short[name] for name in graph if _family(graph, name) is colours]
        if members:
            lines.append(f"  class {','.join(members)} f{index}")
    together = [short[name] for name, data in graph.nodes(data=True) if data.get("coalition")]
    if together:
        lines += [
            f"  classDef coalition stroke:{style.COALITION_COLOUR},stroke-width:3px",
            f"  class {','.join(together)} coalition",
        ]
    lines += [f"  linkStyle {','.join(edges)} stroke:{colour}" for colour, edges in styles.items()]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Text inside a quoted Mermaid label: markup characters as entity codes, line breaks as blanks."""
    codes = {"&": "#amp;", '"': "#quot;", "<": "#lt;", ">": "#gt;", "#": "#35;", "`": "#96;", ";": "#59;"}
    return "".join(codes.get(character, character) for character in " ".join(text.split()))


def _family(graph: nx.MultiDiGraph[str], name: str) -> object:
    data = graph.nodes[name]
    if "block" in data:
        return style.BLOCK
    return style.family(data["kind"]) if data["player"] else style.FREE


def _node(graph: nx.MultiDiGraph[str], name: str, short: str, indent: str) -> str:
    data = graph.nodes[name]
    if "block" in data:
        return f'{indent}{short}[["{escaped(name)}<br/>{escaped(style.block_text(data["block"]))}"]]'
    label = f"{escaped(data['player'] or name)}<br/>{escaped(data['kind'])} {style.shape_text(data['shape'])}"
    left, right = ("[", "]") if data["player"] else ("([", "])")
    return f'{indent}{short}{left}"{label}"{right}'
