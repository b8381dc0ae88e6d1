"""A control graph as Graphviz source, for those who have their own tools."""

from __future__ import annotations

import networkx as nx

from gtddp_compile.tools.draw.style import FREE, SHORTCUT_COLOURS, TIED_COLOUR, family, shape_text


def dot(graph: nx.MultiDiGraph[str]) -> str:
    """DOT source with one cluster a stage, labelled with its cut."""
    lines = [
        f"digraph {quoted(graph.graph['name'])} {{",
        '  graph [fontname="Helvetica" labeljust="l" style="filled,rounded" color="#e4e8ee" bgcolor="white"];',
        '  node [fontname="Helvetica" fontsize=11 shape=box style="filled,rounded" height=0.3];',
        '  edge [color="#8b95a3" arrowsize=0.6];',
    ]
    stage_of = {name: stage["index"] for stage in graph.graph["stages"] for name in stage["ops"]}
    lines += [_node(graph, name, "  ") for name in graph if name not in stage_of]
    for stage in graph.graph["stages"]:
        label = f"stage {stage['index']} · cut: {', '.join(stage['live']) or 'empty'}"
        lines.append(f"  subgraph cluster_{stage['index']} {{")
        lines.append(f'    label={quoted(label)}; fillcolor="{"#f6f8fa" if stage["index"] % 2 else "#fbfcfd"}";')
        lines += [_node(graph, name, "    ") for name in stage["ops"]]
        lines.append("  }")
    for source, target, data in graph.edges(data=True):
        lines.append(f"  {quoted(source)} -> {quoted(target)}{_edge(data)};")
    return "\n".join((*lines, "}")) + "\n"


def quoted(text: str) -> str:
    """A DOT string: quotes, backslashes and line breaks escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\r", "")
    return f'"{escaped}"'


def _node(graph: nx.MultiDiGraph[str], name: str, indent: str) -> str:
    data = graph.nodes[name]
    colours = family(data["kind"]) if data["player"] else FREE
    label = f"{data['player'] or name}\n{data['kind']} {shape_text(data['shape'])}"
    ring = " peripheries=2" if data["coalition"] else ""
    return (
        f'{indent}{quoted(name)} [label={quoted(label)} fillcolor="{colours.fill}" '
        f'color="{colours.line}" fontcolor="{colours.text}"{ring}];'
    )


def _edge(data: dict[str, object]) -> str:
    if data["control"]:
        return f' [style=dashed color="{TIED_COLOUR}"]'
    if data["shortcut"]:
        return f' [color="{SHORTCUT_COLOURS[str(data["shortcut"])]}" penwidth=1.8]'
    return ""
