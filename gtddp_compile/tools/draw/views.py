"""A control graph seen with some of its blocks folded: again a graph that every drawing takes.

A view has one node an item (an operation, or a folded block), one for each value that enters from outside, and the
edges between them, several values on the same way as one edge. Stages that one block spans become one band.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import Any

import networkx as nx

from gtddp_compile.graph import grouped
from gtddp_compile.tools.draw.blocks import Block, Item, signatures, start_of, stop_of, tree
from gtddp_compile.tools.draw.style import stages_text, summary
from gtddp_compile.wording import plural

PORTS = 6
"""So many values that enter are shown one by one."""
ENTERS = "\0enters "
NOTHING: dict[str, Any] = {
    "shape": None, "stage": -1, "player": None, "parameters": [], "merge": False, "input": False, "output": False,
    "module": "", "source": "", "live": None,
}  # fmt: skip
"""What an operation has and a block or a value that enters has not."""
Span = tuple[int, int]
Edges = dict[tuple[str, str, Any, Any], tuple[list[str], set[int]]]
"""Values and the stages whose cuts they cross, by source, target, kind of shortcut and tied player."""


class Views:
    """Views of one control graph."""

    def __init__(self, graph: nx.MultiDiGraph[str]) -> None:
        self.graph = graph
        self.names = list(graph)
        self.root = tree(graph)
        self._position = {name: index for index, name in enumerate(self.names)}
        self._player = {player["name"]: player for player in graph.graph["players"]}
        self._value = {value["name"]: value for value in graph.graph["values"]}
        self._merged = grouped(graph.graph["shortcuts"], lambda shortcut: shortcut["merge"])
        self._summary = summary(graph)

    def folded(self, boxes: int) -> nx.MultiDiGraph[str]:
        """The whole graph in about as many boxes at most; the graph itself if it has no more operations."""
        if len(self.graph) <= boxes or not self.root.children:
            return self.graph
        return self.view(self.frontier(boxes), "")[0]

    def view(self, items: Sequence[Item], base: str) -> tuple[nx.MultiDiGraph[str], dict[str, Item]]:
        """Neighbouring items, in order and without gaps, with the values that enter and leave them.

        Labels are shortened by the module path ``base``. Returns the view and the item of each of its nodes.
        """
        keys = self._keys(items)
        owner = {at: key for key, item in keys.items() for at in range(start_of(item), stop_of(item))}
        spans = {key: self._span(item) for key, item in keys.items()}
        edges, ports = self._edges(owner)
        edges = self._plain(edges)
        bands, band_of = _banded(spans, edges)
        starts = {first: index for index, (first, _) in enumerate(bands)}
        leaving = self._leaving(owner)
        found: nx.MultiDiGraph[str] = nx.MultiDiGraph(**self.graph.graph)
        for port, values in ports.items():
            found.add_node(port, **self._port(values, base))
        for key, item in keys.items():
            found.add_node(key, **self._node(key, item, base, band_of[key]))
        found.graph.update(
            summary=self._summary,
            values=self._cut_values(bands),
            stages=[self._band(span, [k for k in keys if band_of[k] == at], at) for at, span in enumerate(bands)],
            outputs=list(dict.fromkeys(owner[at] for at in leaving)),
            players=[self._player[found.nodes[key]["player"]] for key in keys if found.nodes[key]["player"]],
            shortcuts=[shortcut for key in keys for shortcut in self._merged.get(key, ())],
            inputs=[*ports, *(key for key in keys if key in self.graph and self.graph.nodes[key]["input"])],
        )
        for (source, target, kind, control), (values, crosses) in edges.items():
            cuts = sorted(starts[stage] for stage in crosses if stage in starts)
            found.add_edge(source, target, shortcut=kind, control=control, crosses=cuts, values=values)
        return found, keys

    def _keys(self, items: Sequence[Item]) -> dict[str, Item]:
        keys: dict[str, Item] = {}
        for item in items:
            key = self.names[item] if isinstance(item, int) else item.title
            while key in keys or (isinstance(item, Block) and key in self._position):
                key += " "
            keys[key] = item
        return keys

    def _span(self, item: Item) -> Span | None:
        """First and last stage of an item; none if it runs before all stages.

        What runs ahead of a block's first player, at the stage of the player before it, does not count.
        """
        nodes = [self.graph.nodes[self.names[at]] for at in range(start_of(item), stop_of(item))]
        stages = [node["stage"] for node in nodes if node["stage"] >= 0]
        deciding = [node["stage"] for node in nodes if node["player"]]
        return (min(deciding or stages), max(stages)) if stages else None

    def _band(self, span: Span, ops: list[str], index: int) -> dict[str, Any]:
        first, last = span
        inside = self.graph.graph["stages"][first : last + 1]
        return {
            **inside[0],
            "index": index,
            "title": stages_text(span),
            "first": first,
            "last": last,
            "players": [name for part in inside for name in part["players"]],
            "ops": ops,
            "merges": [name for part in inside for name in part["merges"]],
        }

    def _edges(self, owner: dict[int, str]) -> tuple[Edges, dict[str, list[str]]]:
        edges: Edges = {}
        outside: dict[str, list[tuple[str, dict[str, Any]]]] = {}
        for at, key in owner.items():
            for source, _, data in self.graph.in_edges(self.names[at], data=True):
                known = owner.get(self._position[source])
                if known is None:
                    outside.setdefault(source, []).append((key, data))
                elif known != key:
                    _join(edges, known, key, source, data)
        groups = [[name] for name in outside] if len(outside) <= PORTS else [list(outside)]
        ports = {f"{ENTERS}{' '.join(group[:1])}": group for group in groups if group}
        for port, group in ports.items():
            for name in group:
                for key, data in outside[name]:
                    _join(edges, port, key, name, data)
        return edges, ports

    def _cut_values(self, bands: list[Span]) -> list[dict[str, Any]]:
        """The values in the bands' cuts."""
        stages = self.graph.graph["stages"]
        names = dict.fromkeys(name for first, _ in bands for name in stages[first]["live"])
        return [self._value[name] for name in names if name in self._value]

    @staticmethod
    def _plain(edges: Edges) -> Edges:
        """Without a shortcut's line beside a plain one that carries the same values between the same items."""
        plain = {(s, t): values for (s, t, kind, control), (values, _) in edges.items() if not (kind or control)}
        return {
            key: found
            for key, found in edges.items()
            if not key[2] or key[3] or not set(found[0]) <= set(plain.get(key[:2], ()))
        }

    def _leaving(self, owner: dict[int, str]) -> list[int]:
        """Operations whose value is read outside, or returned."""
        graph = self.graph
        return [
            at
            for at in owner
            if graph.nodes[self.names[at]]["output"]
            or any(self._position[user] not in owner for user in graph.successors(self.names[at]))
        ]

    def _port(self, values: list[str], base: str) -> dict[str, Any]:
        found = {**NOTHING, "kind": "values", "label": plural(len(values), "value"), "input": True, "enters": values}
        if len(values) == 1:
            only = self.graph.nodes[values[0]]
            found |= {"kind": "value", "label": _step(values[0], base), "shape": only["shape"], "live": only["live"]}
        return found

    def _node(self, key: str, item: Item, base: str, band: int) -> dict[str, Any]:
        if isinstance(item, int):
            data = self.graph.nodes[key]
            found = {**data, "true_stage": data["stage"], "stage": band}
            if data["player"] and base:
                found["label"] = _step(data["player"], base)
            return found
        inside = [self.graph.nodes[name] for name in self.names[item.start : item.stop]]
        players = [self._player[node["player"]] for node in inside if node["player"]]
        block = {
            "title": item.title, "operations": len(inside), "players": len(players),
            "size": sum(player["size"] for player in players), "stages": self._span(item), "repeats": item.repeats,
        }  # fmt: skip
        label = " – ".join(_step(part, base) for part in item.title.split(" – "))
        shown = {"kind": "block", "label": label, "shape": inside[-1]["shape"], "stage": band, "module": item.path}
        return {**NOTHING, **shown, "block": block}

    def frontier(self, boxes: int) -> list[Item]:
        """The items of a still picture of at most ``boxes`` boxes (or as few as the outermost blocks are).

        Blocks are opened level by level, each structure once (its shapes left out); of a row of equal blocks the first
        is shown, and the rest as one.
        """
        kinds = [
            (self.graph.nodes[name]["kind"], back[-1])
            for name, back in zip(self.names, signatures(self.graph), strict=True)
        ]
        items = list(exemplified(self.root.children, kinds))
        seen: set[Hashable] = set()
        while True:
            opened: list[Item] = []
            grown = False
            for index, item in enumerate(items):
                inside = exemplified(item.children, kinds) if isinstance(item, Block) else ()
                kind = tuple(kinds[start_of(item) : stop_of(item)])
                fits = len(opened) + len(inside) + len(items) - index - 1 <= boxes
                if inside and kind not in seen and fits:
                    seen.add(kind)
                    opened += inside
                    grown = True
                else:
                    opened.append(item)
            items = opened
            if not grown:
                return items


def exemplified(children: Sequence[Item], kinds: Sequence[Hashable]) -> list[Item]:
    """Children with runs of equal blocks as the first of them and one block of the rest."""
    leaves = [leaf for child in children for leaf in _leaves(child)]
    found: list[Item] = []
    for _, members in groupby(leaves, lambda leaf: tuple(kinds[start_of(leaf) : stop_of(leaf)])):
        alike = list(members)
        blocks = [leaf for leaf in alike if isinstance(leaf, Block)]
        if len(blocks) < max(3, len(alike)):
            found += alike
            continue
        rest = blocks[1:]
        title = f"{rest[0].title.split(' – ')[0]} – {rest[-1].title.split(' – ')[-1]}"
        found += [blocks[0], Block(rest[0].path, title, (), rest[0].start, rest[-1].stop, len(rest))]
    return found


def _leaves(item: Item) -> Iterator[Item]:
    """The repeated members of a group, groups inside it opened; any other item itself."""
    if isinstance(item, Block) and item.repeats > 1:
        for child in item.children:
            yield from _leaves(child)
    else:
        yield item


def _step(name: str, base: str) -> str:
    """A name without the module path it lies under; ``blocks.7`` stays as it is: a number alone says nothing."""
    short = name[len(base) + 1 :] if base and name.startswith(f"{base}.") else name
    return f"{base.rpartition('.')[2]}.{short}" if short != name and short[0].isdecimal() else short


def _banded(spans: dict[str, Span | None], edges: Edges) -> tuple[list[Span], dict[str, int]]:
    """Bands of stages, and the band of every item (-1: before all): no edge leads to an earlier band."""
    joined = [span for span in spans.values() if span]
    while True:
        bands = _bands(joined)
        band_of = {stage: index for index, (first, last) in enumerate(bands) for stage in range(first, last + 1)}
        found = {key: band_of[span[0]] if span else -1 for key, span in spans.items()}
        back = [(target, source) for source, target, *_ in edges if found.get(source, -1) > found[target] >= 0]
        if not back:
            return bands, found
        joined += [(bands[found[target]][0], bands[found[source]][1]) for target, source in back]


def _bands(spans: list[Span]) -> list[Span]:
    """Spans that overlap, as one."""
    found: list[Span] = []
    for first, last in sorted(spans):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return found


def _join(edges: Edges, source: str, target: str, value: str, data: dict[str, Any]) -> None:
    values, crosses = edges.setdefault((source, target, data["shortcut"], data["control"]), ([], set()))
    if value not in values:
        values.append(value)
    crosses.update(data["crosses"])
