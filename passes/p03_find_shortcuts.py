"""Shortcuts: where paths part and where they meet again.

Takes the normal form with its players; guarantees a :class:`ShortcutGraph` with every shortcut region once,
in the order of the merges and, at a merge, of its operands. What the words mean here:

* *Carriers* are the operations through which a change of the state travels: differentiable tensors that
  depend on an input, and the tuples such tensors come in (``chunk``, an LSTM's result). Parameters and what
  is computed from parameters alone are none, nor are sizes, masks of integers, and what never reaches the
  output.
* A *side input* is a value that no player has acted on (an attention mask, a positional table), read together
  with one that players have acted on. It never changes within a step, so it parts no paths: its edge is left
  out of "path", "ancestor" and "dominates" below. A raw input that is itself processed by players (``x +
  f(x)``) is still the fork.
* A *merge* reads two or more different values. Its *main* operand has the most players on the longest path to
  it; ties go to the longest path, then to the first operand.
* Another operand ``o`` that is an ancestor of the main operand arrives by an **identity** shortcut, whose
  fork is ``o`` itself. So a skip that leaves from inside a branch forks there, not where the branch does, and
  the operands of a dense concatenation are identity shortcuts one and all.
* For any other ``o`` the fork is the nearest common dominator of ``o`` and the main operand. The shortcut's
  operations are those on paths from the fork to ``o`` that are not on paths to the main operand:
  **parametric** if they use any player's parameters, else **parameter_free**. Two branches that only the
  inputs dominate together are a merge of inputs, not a shortcut.
* A shortcut is *regular* if the fork dominates the merge and the merge post-dominates the fork.

Dominators are networkx's, over the graph with a virtual root before all inputs and a virtual exit after all
outputs. The operations of a branch are found by walking back from the merge, latest operation first, only
until its branches have reached their forks or the main path: linear in the region, and constant for an
identity shortcut whose fork dominates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import networkx as nx

from gtddp_compile.graph import OpGraph, PlayerGraph, Shortcut, ShortcutGraph, ShortcutKind, grouped

ROOT, EXIT = -1, -2
MAIN = 1
Pair = tuple[int, int]


@dataclass(frozen=True)
class Flow:
    """Carriers by position in the trace.

    Attributes:
        reads: carriers that each reads.
        entries: the same without side inputs.
        readers: by how many ``entries`` each is read.
        after: the tree of immediate post-dominators, from the virtual exit.
    """

    reads: Mapping[int, tuple[int, ...]]
    entries: Mapping[int, tuple[int, ...]]
    readers: Counter[int]
    after: nx.DiGraph[int]


@dataclass(frozen=True)
class Candidate:
    """An operand of a merge beside its main one; ``fork`` is their nearest common dominator."""

    merge: int
    main: int
    operand: int
    fork: int


# --- what carries a change of the state -----------------------------------------------------------


def carriers(graph: OpGraph) -> frozenset[str]:
    """Operations whose values gradients can pass through: differentiable tensors, and tuples of tensors."""
    smooth = (op.name for op in graph.ops if op.is_tensor and op.is_differentiable)
    return graph.downstream(smooth, lambda op: not op.is_tensor and not op.is_size)


def depends_on_inputs(graph: OpGraph, carrying: frozenset[str]) -> frozenset[str]:
    """Operations that tensors reach from an input (a size of the input is not the input)."""
    return graph.downstream(graph.inputs, lambda op: op.is_tensor or op.name in carrying)


def side_inputs(reads: Iterable[int], moved: set[int]) -> set[int]:
    """Those of ``reads`` that no player has acted on, if there are others."""
    names = set(reads)
    return names - moved if names & moved else set()


def find_flow(graph: PlayerGraph) -> Flow:
    """The carriers that an input and the output are connected to."""
    ops, position = graph.ops, graph.ops.position
    carrying = carriers(ops)
    nodes = carrying & depends_on_inputs(ops, carrying)
    reads = {
        position[op.name]: tuple(position[o] for o in op.operands if o in nodes) for op in ops.ops if op.name in nodes
    }
    outputs = tuple(position[name] for name in ops.output_names if name in nodes)
    after = dominator_tree(_after(reads, outputs).reverse(copy=False), EXIT)
    reads = {node: operands for node, operands in reads.items() if node in after}
    moved: set[int] = set()
    entries = {}
    for node, operands in reads.items():
        left_out = side_inputs(operands, moved)
        entries[node] = tuple(o for o in operands if o not in left_out)
        if ops.ops[node].name in graph.player_using or any(o in moved for o in operands):
            moved.add(node)
    return Flow(reads, entries, Counter(o for operands in entries.values() for o in operands), after)


def _before(entries: Mapping[int, tuple[int, ...]]) -> nx.DiGraph[int]:
    """Carriers as a networkx graph, from a root before every carrier that reads none."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_node(ROOT)
    graph.add_edges_from((o, node) for node, operands in entries.items() for o in operands or (ROOT,))
    return graph


def _after(reads: Mapping[int, tuple[int, ...]], outputs: tuple[int, ...]) -> nx.DiGraph[int]:
    """Carriers as a networkx graph, to an exit after every output."""
    graph: nx.DiGraph[int] = nx.DiGraph()
    graph.add_node(EXIT)
    graph.add_edges_from((node, EXIT) for node in outputs)
    graph.add_edges_from((o, node) for node, operands in reads.items() for o in operands)
    return graph


# --- forks ----------------------------------------------------------------------------------------


def dominator_tree(graph: nx.DiGraph[int], start: int) -> nx.DiGraph[int]:
    """The tree of immediate dominators (some networkx versions list the start as its own)."""
    tree: nx.DiGraph[int] = nx.DiGraph()
    tree.add_node(start)
    tree.add_edges_from((above, node) for node, above in nx.immediate_dominators(graph, start).items() if node != start)
    return tree


def nearest_common(tree: nx.DiGraph[int], root: int, pairs: set[Pair]) -> dict[Pair, int]:
    """Lowest common ancestors of pairs of nodes, all at once."""
    return dict(nx.tree_all_pairs_lowest_common_ancestor(tree, root, iter(pairs))) if pairs else {}


def path_lengths(graph: PlayerGraph, flow: Flow) -> dict[int, tuple[int, int]]:
    """Most uses of players' parameters, then most operations, on a path to each carrier, itself included."""
    players: dict[int, int] = {}
    steps: dict[int, int] = {}
    for node, operands in flow.entries.items():
        uses = graph.ops.ops[node].name in graph.player_using
        players[node] = max((players[o] for o in operands), default=0) + uses
        steps[node] = max((steps[o] for o in operands), default=0) + 1
    return {node: (players[node], steps[node]) for node in players}


def find_candidates(graph: PlayerGraph, flow: Flow, tree: nx.DiGraph[int]) -> list[Candidate]:
    """Every operand beside the main one, with the nearest common dominator of both."""
    length = path_lengths(graph, flow)
    found = []
    for merge, operands in flow.reads.items():
        main = max(operands, key=length.__getitem__, default=merge)  # the first of equals
        found += [(merge, main, operand) for operand in operands if operand != main]
    forks = nearest_common(tree, ROOT, {(main, operand) for _, main, operand in found})
    return [Candidate(merge, main, operand, forks[main, operand]) for merge, main, operand in found]


# --- branches -------------------------------------------------------------------------------------


def walk_back(candidates: list[Candidate], flow: Flow) -> dict[int, list[int]]:
    """Operations of each branch of one merge, by operand; none if the operand is an ancestor of the main one.

    Marks travel from the operands against the edges, ``MAIN`` from the main one, a bit from each other.
    The latest operation is always next, so its marks are complete when its turn comes; what has no other
    reader is complete at once. Without ``MAIN`` it is on the branches whose bits it has. The walk ends when
    all that still wait are on the main path.
    """
    bit = {c.operand: 2 << index for index, c in enumerate(candidates)}
    operand_of = {mark: operand for operand, mark in bit.items()}
    ends: dict[int, int] = {}
    for c in candidates:
        ends[c.fork] = ends.get(c.fork, 0) | bit[c.operand]
    no_fork = ends.pop(ROOT, 0)
    found: dict[int, list[int]] = {operand: [] for operand in bit}
    marks = {c.operand: bit[c.operand] for c in candidates if c.operand != c.fork}
    apart = len(marks)
    marks[candidates[0].main] = MAIN
    sole = set(flow.entries[candidates[0].merge])
    others = [operand for operand in bit if operand in marks]
    ready = [operand for operand in others if flow.readers[operand] == (operand in sole)]
    waiting = [-node for node in set(marks).difference(ready)]
    heapify(waiting)
    while apart:
        node = ready.pop() if ready else -heappop(waiting)
        mark = marks.pop(node)
        if mark & MAIN:
            mark = MAIN
        else:
            apart -= 1
            for branch in _bits(mark):
                found[operand_of[branch]].append(node)
            mark &= ~no_fork
        for operand in flow.entries[node]:
            old, new = marks.get(operand, 0), mark & ~ends.get(operand, 0)
            if not new:
                continue
            if not old:
                apart += not new & MAIN
                if new & MAIN or flow.readers[operand] > 1:
                    heappush(waiting, -operand)
                else:
                    ready.append(operand)
            elif new & MAIN and not old & MAIN:
                apart -= 1
            marks[operand] = old | new
    return {operand: sorted(nodes) for operand, nodes in found.items()}


def _bits(mark: int) -> list[int]:
    """The single bits of a number."""
    found = []
    while mark:
        found.append(mark & -mark)
        mark &= mark - 1
    return found


def kind_of(branch: list[int], players: tuple[str, ...]) -> ShortcutKind:
    """What arrives at the merge: the forked value itself, or a function of it with or without controls."""
    if not branch:
        return "identity"
    return "parametric" if players else "parameter_free"


# --- the rewrite ----------------------------------------------------------------------------------


def find_shortcuts(graph: PlayerGraph) -> ShortcutGraph:
    """The graph with every shortcut, sorted by the merge's position, at a merge in the order of its operands."""
    flow = find_flow(graph)
    tree = dominator_tree(_before(flow.entries), ROOT)
    at_merge = grouped(find_candidates(graph, flow, tree), lambda candidate: candidate.merge)
    regions: list[tuple[int, int, list[int]]] = []
    for merge, candidates in at_merge.items():
        branches = walk_back(candidates, flow)
        for c in candidates:
            fork = c.fork if branches[c.operand] else c.operand
            if fork != ROOT:
                regions.append((fork, merge, branches[c.operand]))
    regular = _regular(flow, tree, {(fork, merge) for fork, merge, _ in regions})
    names = [op.name for op in graph.ops.ops]
    shortcuts = []
    for fork, merge, branch in regions:
        ops = tuple(names[node] for node in branch)
        players = tuple(dict.fromkeys(player.name for op in ops for player in graph.player_using.get(op, ())))
        kind = kind_of(branch, players)
        shortcuts.append(Shortcut(names[fork], names[merge], kind, players, ops, (fork, merge) in regular))
    return ShortcutGraph(graph, tuple(shortcuts))


def _regular(flow: Flow, tree: nx.DiGraph[int], regions: set[Pair]) -> set[Pair]:
    """Regions with a single entry and a single exit."""
    into = nearest_common(tree, ROOT, regions)
    out = nearest_common(flow.after, EXIT, regions)
    return {(fork, merge) for fork, merge in regions if into[fork, merge] == fork and out[fork, merge] == merge}
