"""Shortcuts, schedules and cuts of random graphs against brute force."""

from typing import Any

import networkx as nx
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtddp_compile.graph import PlayerGraph, Ref, Schedule, Shortcut, iter_leaves
from gtddp_compile.passes.p03_find_shortcuts import find_shortcuts
from gtddp_compile.passes.p04_schedule import schedule
from gtddp_compile.passes.p05_augment import augment
from support.hand_built import SCHEDULES, build, op


@st.composite
def graphs(draw: st.DrawFn) -> PlayerGraph:
    """Up to 14 operations: one or two inputs, layers, tied layers, integers, dead ends, outputs."""
    count = draw(st.integers(1, 2))
    ops = [op(f"x{i}", "input") for i in range(count)]
    weights: list[str] = []
    for i in range(draw(st.integers(1, 12))):
        tensors = [o.name for o in ops if o.is_differentiable]
        reads = draw(st.lists(st.sampled_from(tensors[-5:] + tensors[:1]), min_size=1, max_size=3))
        integers = [o.name for o in ops if o.is_tensor and not o.is_differentiable]
        reads += draw(st.lists(st.sampled_from(integers), max_size=1)) if integers else []
        what = draw(st.sampled_from(["layer", "layer", "free", "free", "free", "tied", "integer"]))
        if what == "layer" or (what == "tied" and not weights):
            weights.append(f"op{i}.weight")
            ops.append(op(f"op{i}", "linear", " ".join(reads), (weights[-1],)))
        elif what == "tied":
            ops.append(op(f"op{i}", "linear", " ".join(reads), (draw(st.sampled_from(weights)),)))
        elif what == "integer":
            ops.append(op(f"op{i}", "argmax", " ".join(reads), dtype=torch.int64))
        else:
            ops.append(op(f"op{i}", "add", " ".join(reads)))
    tensors = [o.name for o in ops if o.is_differentiable]
    outputs = dict.fromkeys([tensors[-1], *draw(st.lists(st.sampled_from(tensors), max_size=1))])
    return build(*ops, output=tuple(map(Ref, outputs)))


def dominates(graph: Any, root: str, above: str, below: str) -> bool:
    """Whether every path from the root to ``below`` passes ``above``: by removing it."""
    if above == below:
        return True
    without = graph.copy()
    without.remove_node(above)
    return root == above or not nx.has_path(without, root, below)


def expected_shortcuts(graph: PlayerGraph) -> tuple[Shortcut, ...]:
    """The definition, word for word."""
    ops, uses = graph.ops, graph.player_using
    tensors: Any = nx.DiGraph()
    for o in ops.ops:
        if o.is_differentiable:
            tensors.add_node(o.name)
            tensors.add_edges_from((r, o.name) for r in o.operands if ops.by_name[r].is_differentiable)
    sources = {n for n in tensors if tensors.in_degree(n) == 0}
    tensors.add_edges_from((name, "exit") for name in ops.output_names)
    tensors = tensors.subgraph({*nx.ancestors(tensors, "exit"), "exit"}).copy()
    moved = {n for n in tensors if n in uses or any(m in uses for m in nx.ancestors(tensors, n))}
    paths = tensors.copy()
    for n in ops.position:
        if n in tensors and set(tensors.pred[n]) & moved:
            paths.remove_edges_from([(r, n) for r in tensors.pred[n] if r not in moved])
    paths.add_edges_from(("root", n) for n in sources if n in paths)
    length: dict[str, tuple[int, int]] = {}
    for n in ops.position:
        if n in tensors:
            before = [length[r] for r in paths.pred[n] if r != "root"]
            length[n] = tuple(max((b[k] for b in before), default=0) + (n in uses, 1)[k] for k in (0, 1))  # type: ignore[assignment]
    found = []
    for merge in ops.ops:
        operands = [r for r in merge.operands if r in tensors] if merge.name in tensors else []
        main = max(operands, key=length.__getitem__, default="")
        to_main = {main, *nx.ancestors(paths, main)} if operands else set()
        for other in operands:
            if other == main:
                continue
            branch: tuple[str, ...] = ()
            if other in to_main:
                fork = other
            else:
                common = [n for n in paths if dominates(paths, "root", n, other) and dominates(paths, "root", n, main)]
                fork = max(common, key=lambda n: sum(dominates(paths, "root", m, n) for m in common))
                if fork == "root":
                    continue
                branch = tuple(
                    n for n in ops.position
                    if n in ({other, *nx.ancestors(paths, other)} & set(nx.descendants(paths, fork))) - to_main
                )  # fmt: skip
            players = tuple(dict.fromkeys(p.name for n in branch for p in uses.get(n, ())))
            kind: Any = ("parametric" if players else "parameter_free") if branch else "identity"
            regular = dominates(paths, "root", fork, merge.name) and dominates(
                tensors.reverse(), "exit", merge.name, fork
            )
            found.append(Shortcut(fork, merge.name, kind, players, branch, regular))
    return tuple(found)


@settings(max_examples=200, deadline=None)
@given(graphs())
def test_shortcuts_against_brute_force(graph: PlayerGraph) -> None:
    assert find_shortcuts(graph).shortcuts == expected_shortcuts(graph)


def dependencies(graph: PlayerGraph) -> Any:
    """The graph of all operations, first uses before later ones."""
    found: Any = nx.DiGraph()
    found.add_nodes_from(graph.ops.position)
    found.add_edges_from((r, o.name) for o in graph.ops.ops for r in o.operands)
    found.add_edges_from((p.op, use) for p in graph.players for use in p.uses if use != p.op)
    return found


def player_order(graph: PlayerGraph) -> Any:
    """Players, an edge from each to all that depend on it."""
    before = dependencies(graph)
    found: Any = nx.DiGraph()
    found.add_nodes_from(p.name for p in graph.players)
    for p in graph.players:
        below = nx.descendants(before, p.op)
        found.add_edges_from((p.name, q.name) for q in graph.players if q.op in below)
    return found


def longest(graph: Any, start: str) -> int:
    """Edges on the longest path from a node, by trying all."""
    return max((1 + longest(graph, n) for n in graph.successors(start)), default=0)


def check_schedule(found: Schedule) -> None:
    """What every schedule guarantees."""
    graph = found.base.base
    stage = {p.name: p.stage for p in found.players}
    assert set(stage.values()) == set(range(found.stages))
    assert all(stage[p] < stage[q] for p, q in player_order(graph).edges)
    assert [p.stage for p in found.players] == sorted(stage.values())
    before = dependencies(graph)
    for name in graph.ops.position:
        above = {name, *nx.ancestors(before, name)}
        assert found.stage_of[name] == max((stage[p.name] for p in graph.players if p.op in above), default=-1)


@settings(max_examples=100, deadline=None)
@given(graphs())
def test_schedules_against_brute_force(graph: PlayerGraph) -> None:
    order, base = player_order(graph), find_shortcuts(graph)
    stages = {how: {p.name: p.stage for p in schedule(base, how).players} for how in SCHEDULES}
    for how in SCHEDULES:
        check_schedule(schedule(base, how))
        check_schedule(schedule(base, {name: 3 * stage - 7 for name, stage in stages[how].items()}))
    count = schedule(base).stages
    assert schedule(base, "alap").stages == count
    assert schedule(base, "sequential").stages == len(graph.players)
    for p in graph.players:
        assert stages["asap"][p.name] == longest(order.reverse(), p.name)
        assert stages["alap"][p.name] == count - 1 - longest(order, p.name)
        assert stages["asap"][p.name] <= stages["alap"][p.name]


@settings(max_examples=100, deadline=None)
@given(graphs(), st.sampled_from(SCHEDULES), st.data())
def test_cuts_against_brute_force(graph: PlayerGraph, how: str, data: st.DataObject) -> None:
    placed = schedule(find_shortcuts(graph), how)
    found = augment(placed)
    ops, stage_of, count = graph.ops, placed.stage_of, placed.stages
    outputs = {leaf.name for leaf in iter_leaves(ops.output)}
    readers = {
        **{o.name: {stage_of[u.name] for u in ops.ops if o.name in u.operands} for o in ops.ops if o.is_differentiable},
        **{f"params:{p.name}": {stage_of[u] for u in p.uses} for p in graph.players if len(p.uses) > 1},
    }
    born = {**stage_of, **{f"params:{p.name}": p.stage for p in placed.players}}

    def cut(t: int) -> set[str]:
        return {n for n, at in readers.items() if born[n] < t and (n in outputs or any(r >= t for r in at))}

    for stage in found.stages:
        t = stage.index
        live, after = set(stage.live), cut(t + 1)
        assert live == cut(t) and len(stage.live) == len(live)
        assert set(stage.consumed) == {n for n in live if t in readers[n]}
        assert set(stage.carried) == live & after
        assert set(stage.produced) == {n for n in after if born[n] == t}
        assert stage.ops == tuple(n for n in ops.position if stage_of[n] == t)
        assert stage.merges == tuple(n for n in stage.ops if n in {s.merge for s in found.shortcuts})
        assert set(stage.players) == {p.name for p in placed.players if p.stage == t}
    assert {v.name for v in found.values} == set().union(*(cut(t) for t in range(count + 1)))
    moved_at = {use for p in graph.players for use in p.uses}
    edges = nx.DiGraph([(r, o.name) for o in ops.ops for r in o.operands])
    for v in found.values:
        assert v.dies == (count if v.name in outputs else max(readers[v.name]))
        assert set(v.readers) == {r for r in readers[v.name] if v.control is None or r > v.born}
        if v.control is None:
            above, below = (
                {v.name, *(way(edges, v.name) if v.name in edges else ())} for way in (nx.ancestors, nx.descendants)
            )
            assert v.fixed == (not above & moved_at or not below & outputs)
    order = list(ops.position)
    for stage in found.stages:
        names = [n.removeprefix("params:") for n in stage.live]
        assert names == sorted(names, key=order.index)
