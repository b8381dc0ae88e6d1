"""The blocks a large network is folded into: its modules, and what repeats among them.

A block is an interval of the operations' order. Any interval of a topological order is convex (no path leaves it and
comes back), so however blocks are folded, what is drawn stays acyclic. Modules give most of the intervals, since a
module's operations are recorded one after the other; long rows of children are cut where structure repeats.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import networkx as nx

from gtddp_compile.tools.draw.repeats import runs

FEW, MOST = 8, 40
"""A row of at most ``FEW`` children is left as it is; no block has more than ``MOST``."""
SIZES = (5, 10, 20, 25, 40)


@dataclass(frozen=True, slots=True)
class Block:
    """Operations ``start`` to ``stop - 1`` of the network's order.

    Attributes:
        path: the module's qualified name, ``""`` for the network itself; that of the surrounding module for a group.
        title: as it is shown.
        children: operations (their positions) and blocks, in order.
        start, stop: the interval.
        repeats: how many children of the same structure it is made of; 1 if they differ.
    """

    path: str
    title: str
    children: tuple[int | Block, ...]
    start: int
    stop: int
    repeats: int = 1

    def blocks(self) -> Iterator[Block]:
        """The block itself and all blocks inside it, outer ones first."""
        yield self
        for child in self.children:
            if isinstance(child, Block):
                yield from child.blocks()


Item = int | Block


def tree(graph: nx.MultiDiGraph[str]) -> Block:
    """The network as blocks inside blocks.

    Args:
        graph: as made by ``ControlGraph.to_networkx``; its nodes are in topological order.
    """
    builder = _Builder(graph)
    children = builder.grouped(builder.modules_in(0, len(builder.names), 0), "")
    if not children:
        return Block("", graph.graph["name"], (), 0, 0)
    return builder.block(children, "", graph.graph["name"])


class _Builder:
    """Names, modules and structure of the operations, by position."""

    def __init__(self, graph: nx.MultiDiGraph[str]) -> None:
        self.names = list(graph)
        self.modules = [tuple(part for part in graph.nodes[n]["module"].split(".") if part) for n in self.names]
        self.signatures = signatures(graph)

    def block(self, members: Sequence[Item], path: str, title: str) -> Block:
        """Neighbours as one block."""
        return Block(path, title, tuple(members), start_of(members[0]), stop_of(members[-1]), self.repeats(members))

    def modules_in(self, start: int, stop: int, depth: int) -> list[Item]:
        """Children of an interval whose operations share the first ``depth`` parts of their module's name."""
        found: list[Item] = []
        for part, members in groupby(range(start, stop), lambda at: self.modules[at][depth : depth + 1]):
            inside = list(members)
            if not part:
                found += inside
                continue
            path = ".".join(self.modules[inside[0]][: depth + 1])
            children = self.grouped(self.modules_in(inside[0], inside[-1] + 1, depth + 1), path)
            # A layer, or a module that only holds another, is no block of its own.
            found += children if len(children) == 1 else [self.block(children, path, path)]
        return found

    def grouped(self, children: list[Item], path: str) -> list[Item]:
        """Fold what repeats in a long row of children, then cut what is still too long."""
        if len(children) > FEW:
            found: list[Item] = []
            at = 0
            for run in runs([self.shape(child) for child in children]):
                starts = range(run.start, run.stop, run.period)
                members = [self.group(children[first : first + run.period], path) for first in starts]
                whole = run.stop - run.start == len(children)
                if not whole and run.stop - run.start >= FEW:
                    members = [self.group(self.cut(members, path), path)]
                found += children[at : run.start] + members
                at = run.stop
            children = found + children[at:]
        return self.cut(children, path)

    def cut(self, children: list[Item], path: str) -> list[Item]:
        """At most ``MOST`` children, the rest one level down."""
        while len(children) > MOST:
            size = next((size for size in SIZES if len(children) <= size * MOST), MOST)
            children = [self.group(children[at : at + size], path) for at in range(0, len(children), size)]
        return children

    def group(self, members: Sequence[Item], path: str) -> Item:
        """Neighbours as one block named after the first and the last; one alone stays what it is."""
        if len(members) == 1:
            return members[0]
        return self.block(members, path, f"{self.first(members[0])} – {self.last(members[-1])}")

    def first(self, item: Item) -> str:
        """Name of the first thing in an item."""
        return self.names[item] if isinstance(item, int) else item.title.split(" – ")[0]

    def last(self, item: Item) -> str:
        """Name of the last thing in an item."""
        return self.names[item] if isinstance(item, int) else item.title.split(" – ")[-1]

    def shape(self, item: Item) -> Hashable:
        """Structure of an item; items of one structure are drawn alike."""
        return tuple(self.signatures[start_of(item) : stop_of(item)]), isinstance(item, int)

    def repeats(self, children: Sequence[Item]) -> int:
        """How many children there are, groups among them opened, if all have one structure; else 1."""
        groups = [child for child in children if isinstance(child, Block) and child.repeats > 1]
        if groups and len(groups) == len(children):
            firsts = {self.shape(group.children[0]) for group in groups}
            return sum(group.repeats for group in groups) if len(firsts) == 1 else 1
        alike = len({self.shape(child) for child in children}) == 1
        return len(children) if alike and not isinstance(children[0], int) else 1


def start_of(item: Item) -> int:
    """Position of its first operation."""
    return item if isinstance(item, int) else item.start


def stop_of(item: Item) -> int:
    """One past the position of its last operation."""
    return item + 1 if isinstance(item, int) else item.stop


def signatures(graph: nx.MultiDiGraph[str]) -> list[tuple[Hashable, ...]]:
    """What an operation is, names left out: kind, shape, player or not, how far back its operands are."""
    position = {name: index for index, name in enumerate(graph)}
    found: list[tuple[Hashable, ...]] = []
    for index, name in enumerate(graph):
        data = graph.nodes[name]
        back = tuple(sorted(index - position[source] for source in graph.predecessors(name)))
        found.append((data["kind"], tuple(data["shape"] or ()), bool(data["player"]), back))
    return found
