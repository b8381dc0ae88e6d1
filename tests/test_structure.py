"""Shortcuts, schedules and cuts of hand-built networks: architectures, and random graphs against brute force."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import networkx as nx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import (
    ControlGraph,
    Op,
    OpGraph,
    ParamRef,
    Player,
    PlayerGraph,
    Ref,
    Schedule,
    Shortcut,
    iter_leaves,
)
from gtddp_compile.passes.p03_shortcuts import find_shortcuts
from gtddp_compile.passes.p04_schedule import schedule
from gtddp_compile.passes.p05_augment import augment

SCHEDULES = ("asap", "alap", "sequential")


def op(
    name: str,
    kind: str,
    reads: str = "",
    params: tuple[str, ...] = (),
    shape: tuple[int, ...] | None = (2, 3),
    dtype: torch.dtype | None = torch.float32,
) -> Op:
    """One operation that reads the values named in ``reads``."""
    args = (*map(Ref, reads.split()), *map(ParamRef, params))
    return Op(name, kind, None, args, module=name, source="net.py:7", shape=shape, dtype=dtype if shape else None)


def layer(name: str, reads: str, kind: str = "linear", weight: str = "") -> Op:
    """An operation with a weight of its own, or another's."""
    return op(name, kind, reads, (weight or f"{name}.weight",))


def build(*ops: Op, output: Any = None) -> PlayerGraph:
    """The player graph: a parameter's first reader decides on it. The last operation is the output."""
    inputs = tuple(o.name for o in ops if o.kind == "input")
    players: dict[str, Player] = {}
    owner: dict[str, str] = {}
    for o in ops:
        own = tuple(p for p in o.parameters if p not in owner)
        if own:
            players[o.name] = Player(o.name, o.kind, own, o.name, (o.name,))
            owner.update(dict.fromkeys(own, o.name))
        for first in dict.fromkeys(owner[p] for p in o.parameters if p not in own):
            players[first] = replace(players[first], uses=(*players[first].uses, o.name))
    return PlayerGraph(OpGraph(ops, inputs, Ref(ops[-1].name) if output is None else output), tuple(players.values()))


X = op("x", "input")


def shortcuts(graph: PlayerGraph) -> list[tuple[str, str, str, tuple[str, ...], bool]]:
    """Fork, merge, kind, players and regularity of each."""
    return [(s.fork, s.merge, s.kind, s.players, s.regular) for s in find_shortcuts(graph).shortcuts]


def control(graph: PlayerGraph, how: str | Mapping[str, int] = "asap") -> ControlGraph:
    return augment(schedule(find_shortcuts(graph), how))


def cuts(graph: ControlGraph) -> list[tuple[str, ...]]:
    return [stage.live for stage in graph.stages]


# --- named architectures --------------------------------------------------------------------------


def test_chain() -> None:
    graph = build(X, layer("a", "x"), op("relu", "relu", "a"), layer("b", "relu"))
    assert shortcuts(graph) == []
    found = control(graph)
    assert cuts(found) == [("x",), ("relu",)]
    assert [stage.ops for stage in found.stages] == [("a", "relu"), ("b",)]
    assert [(v.name, v.born, v.dies, v.fixed) for v in found.values] == [
        ("x", -1, 0, True),
        ("relu", 0, 1, False),
        ("b", 1, 2, False),
    ]
    assert found.values[0].shape == (3,)
    assert found.prologue == ("x",)
    assert (
        found.stages[1].consumed == ("relu",) and found.stages[1].carried == () and found.stages[1].produced == ("b",)
    )


def basic_block(name: str, x: str, project: bool = False) -> list[Op]:
    """ResNet's: two convolutions with batch-norms, shortcut, relu after the addition."""
    ops = [
        layer(f"{name}.conv1", x, "conv"),
        layer(f"{name}.bn1", f"{name}.conv1", "batch_norm"),
        op(f"{name}.relu", "relu", f"{name}.bn1"),
        layer(f"{name}.conv2", f"{name}.relu", "conv"),
        layer(f"{name}.bn2", f"{name}.conv2", "batch_norm"),
    ]
    if project:
        ops += [
            layer(f"{name}.downsample.0", x, "conv"),
            layer(f"{name}.downsample.1", f"{name}.downsample.0", "batch_norm"),
        ]
        x = f"{name}.downsample.1"
    return [*ops, op(f"{name}.add", "add", f"{name}.bn2 {x}"), op(f"{name}.relu_1", "relu", f"{name}.add")]


def resnet() -> PlayerGraph:
    blocks = [*basic_block("layer1.0", "stem"), *basic_block("layer1.1", "layer1.0.relu_1")]
    blocks += basic_block("layer2.0", "layer1.1.relu_1", project=True)
    return build(X, layer("stem", "x", "conv"), *blocks, layer("fc", "layer2.0.relu_1"))


def test_resnet_shortcuts() -> None:
    projection = ("layer2.0.downsample.0", "layer2.0.downsample.1")
    assert shortcuts(resnet()) == [
        ("stem", "layer1.0.add", "identity", (), True),
        ("layer1.0.relu_1", "layer1.1.add", "identity", (), True),
        ("layer1.1.relu_1", "layer2.0.add", "parametric", projection, True),
    ]
    assert find_shortcuts(resnet()).shortcuts[2].ops == projection


def test_identity_shortcut_is_equation_8() -> None:
    """``(x_t, x_r)`` for t in (ts, tf], one value elsewhere; the addition belongs to tf."""
    graph = build(
        X, layer("a", "x"), layer("b", "a"), op("tanh", "tanh", "b"), layer("c", "tanh"),
        op("add", "add", "c a"), layer("d", "add"),
    )  # fmt: skip
    for how in SCHEDULES:
        found = control(graph, how)
        assert cuts(found) == [("x",), ("a",), ("a", "tanh"), ("add",)]
        assert found.stages[2].merges == ("add",)
        assert found.stages[1].consumed == ("a",) and found.stages[1].carried == ("a",)


def test_shortcut_from_the_input() -> None:
    graph = build(X, layer("a", "x"), op("add", "add", "a x"))
    assert shortcuts(graph) == [("x", "add", "identity", (), True)]


@pytest.mark.parametrize(
    ("how", "before", "after"),
    [
        ("asap", ("stem",), ("b.bn1", "b.down.0")),
        ("alap", ("stem", "b.relu"), ("b.conv2", "b.down.0")),
        ("sequential", ("stem", "b.bn2"), ("b.bn2", "b.down.0")),
    ],
)
def test_projection(how: str, before: tuple[str, ...], after: tuple[str, ...]) -> None:
    """``(x_t, x_r)`` before the shortcut mapping, ``(x_t, x_r')`` after it."""
    block = [replace_names(o) for o in basic_block("b", "stem", project=True)]
    graph = control(build(X, layer("stem", "x", "conv"), *block, layer("fc", "b.relu_1")), how)
    at = graph.player["b.down.0"].stage
    live = cuts(graph)
    expected = {"asap": ("b.conv1", "b.down.0"), "alap": after, "sequential": after}[how]
    assert live[at] == before
    assert live[at + 1] == expected
    assert graph.shortcuts[0].players == ("b.down.0", "b.down.1")
    merge = graph.stage_of["b.add"]
    assert graph.stages[merge].merges == ("b.add",)
    assert merge == max(graph.player["b.bn2"].stage, graph.player["b.down.1"].stage)
    if how == "asap":
        assert live[3] == ("b.relu", "b.down.1") and set(graph.stages[2].players) == {"b.bn1", "b.down.1"}
    if how == "alap":
        assert set(graph.stages[4].players) == {"b.bn2", "b.down.1"}


def replace_names(o: Op) -> Op:
    """``downsample`` written shorter."""
    short = {leaf: leaf.name.replace("downsample", "down") for leaf in o.leaves}
    args = tuple(type(leaf)(short[leaf]) for leaf in o.leaves)
    return replace(o, name=o.name.replace("downsample", "down"), args=args)


def test_nested() -> None:
    """A skip inside a skip; one that leaves from inside the branch forks there."""
    graph = build(
        X, layer("a", "x"), layer("b", "a"), layer("c", "b"), op("inner", "add", "c b"),
        layer("d", "inner"), op("outer", "add", "d a"), layer("e", "outer"),
    )  # fmt: skip
    assert shortcuts(graph) == [("b", "inner", "identity", (), True), ("a", "outer", "identity", (), True)]
    assert cuts(control(graph))[2:4] == [("a", "b"), ("a", "inner")]


def test_consecutive_with_one_fork() -> None:
    """``a`` is added twice: the first merge is not the only way out of ``a``."""
    graph = build(
        X, layer("a", "x"), layer("b", "a"), op("one", "add", "b a"), layer("c", "one"),
        op("two", "add", "c a"),
    )  # fmt: skip
    assert shortcuts(graph) == [("a", "one", "identity", (), False), ("a", "two", "identity", (), True)]


def test_overlapping() -> None:
    """a→add1 and b→add2 cross: neither region has a single exit and a single entry."""
    graph = build(
        X, layer("a", "x"), layer("b", "a"), layer("c", "b"), op("add1", "add", "c a"), layer("d", "add1"),
        op("add2", "add", "d b"),
    )  # fmt: skip
    assert shortcuts(graph) == [("a", "add1", "identity", (), False), ("b", "add2", "identity", (), False)]


def test_parameter_free() -> None:
    graph = build(X, layer("a", "x"), layer("b", "a"), op("pool", "avg_pool", "a"), op("add", "add", "b pool"))
    (found,) = find_shortcuts(graph).shortcuts
    assert found == Shortcut("a", "add", "parameter_free", (), ("pool",), True)
    assert control(graph).stages[0].ops == ("a", "pool")


def test_one_value_used_twice_is_no_merge() -> None:
    assert shortcuts(build(X, layer("a", "x"), op("square", "mul", "a a"), layer("b", "square"))) == []


def test_dense_concatenation() -> None:
    graph = build(
        X, layer("a", "x"), layer("b", "a"), op("cat1", "cat", "a b"), layer("c", "cat1"),
        op("cat2", "cat", "a b c"), layer("d", "cat2"),
    )  # fmt: skip
    assert [s[:3] for s in shortcuts(graph)] == [
        ("a", "cat1", "identity"),
        ("a", "cat2", "identity"),
        ("b", "cat2", "identity"),
    ]
    assert shortcuts(graph)[1][4] and not shortcuts(graph)[0][4]
    assert cuts(control(graph)) == [("x",), ("a",), ("a", "b", "cat1"), ("cat2",)]


def test_unet() -> None:
    graph = build(
        X, layer("e1", "x"), op("pool1", "max_pool", "e1"), layer("e2", "pool1"),
        op("pool2", "max_pool", "e2"), layer("mid", "pool2"), op("up2", "interpolate", "mid"),
        op("cat2", "cat", "up2 e2"), layer("d2", "cat2"), op("up1", "interpolate", "d2"),
        op("cat1", "cat", "up1 e1"), layer("d1", "cat1"),
    )  # fmt: skip
    assert shortcuts(graph) == [("e2", "cat2", "identity", (), True), ("e1", "cat1", "identity", (), True)]
    assert cuts(control(graph)) == [("x",), ("e1", "pool1"), ("e1", "e2", "pool2"), ("e1", "cat2"), ("cat1",)]


def test_inception() -> None:
    graph = build(
        X, layer("stem", "x"), layer("b1", "stem"), layer("b2.0", "stem"), layer("b2.1", "b2.0"),
        layer("b3.0", "stem"), layer("b3.1", "b3.0"), layer("b3.2", "b3.1"), op("pool", "max_pool", "stem"),
        layer("b4", "pool"), op("cat", "cat", "b1 b2.1 b3.2 b4"), layer("fc", "cat"),
    )  # fmt: skip
    found = find_shortcuts(graph).shortcuts
    assert [(s.fork, s.kind, s.ops, s.regular) for s in found] == [
        ("stem", "parametric", ("b1",), True),
        ("stem", "parametric", ("b2.0", "b2.1"), True),
        ("stem", "parametric", ("pool", "b4"), True),
    ]
    assert [stage.players for stage in control(graph).stages[1:3]] == [
        ("b1", "b2.0", "b3.0", "b4"),
        ("b2.1", "b3.1"),
    ]


def attention(name: str, x: str) -> list[Op]:
    return [
        *(layer(f"{name}.{p}", x) for p in "qkv"),
        op(f"{name}.t", "transpose", f"{name}.k"),
        op(f"{name}.scores", "matmul", f"{name}.q {name}.t"),
        op(f"{name}.masked", "add", f"{name}.scores mask"),
        op(f"{name}.softmax", "softmax", f"{name}.masked"),
        op(f"{name}.mix", "matmul", f"{name}.softmax {name}.v"),
        layer(f"{name}.out", f"{name}.mix"),
        op(f"{name}.add", "add", f"{name}.out {x}"),
    ]


def test_attention() -> None:
    """q, k, v: shortcuts with controls. The mask, on which no player acts, parts no paths in either layer."""
    graph = build(
        X, op("mask", "input"), layer("embed", "x"), *attention("0", "embed"), *attention("1", "0.add"),
        layer("fc", "1.add"),
    )  # fmt: skip
    expected = []
    for name, fork in (("0", "embed"), ("1", "0.add")):
        expected += [
            (fork, f"{name}.scores", "parametric", (f"{name}.q",), False),
            (fork, f"{name}.mix", "parametric", (f"{name}.v",), False),
            (fork, f"{name}.add", "identity", (), True),
        ]
    assert shortcuts(graph) == expected
    found = control(graph)
    assert found.stages[1].players == ("0.q", "0.k", "0.v")
    assert found.value["mask"].fixed and found.value["mask"].readers == (1, 3)
    assert found.stages[2].live == ("mask", "embed", "0.mix") and found.stages[2].carried == ("mask",)


def test_packed_attention() -> None:
    """One layer for q, k, v: the fork is the tuple that ``chunk`` gives."""
    graph = build(
        X, layer("qkv", "x"), op("chunk", "chunk", "qkv", shape=None),
        *(op(p, "getitem", "chunk") for p in "qkv"), op("scores", "matmul", "q k"),
        op("mix", "matmul", "scores v"), layer("out", "mix"),
    )  # fmt: skip
    assert [s[:4] for s in shortcuts(graph)] == [
        ("chunk", "scores", "parameter_free", ()),
        ("chunk", "mix", "parameter_free", ()),
    ]
    assert cuts(control(graph)) == [("x",), ("mix",)]


def test_gating() -> None:
    graph = build(
        X,
        layer("a", "x"),
        layer("gate", "a"),
        op("sigmoid", "sigmoid", "gate"),
        op("mul", "mul", "a sigmoid"),
    )
    assert shortcuts(graph) == [("a", "mul", "identity", (), True)]


def test_merge_of_inputs() -> None:
    graph = build(
        X, op("y", "input"), layer("a", "x"), layer("b", "y"), op("cat", "cat", "a b"), layer("c", "cat"),
        op("add", "add", "c cat"),
    )  # fmt: skip
    assert shortcuts(graph) == [("cat", "add", "identity", (), True)]
    found = control(graph)
    assert cuts(found) == [("x", "y"), ("cat",)]
    assert found.stages[0].players == ("a", "b")


def test_second_entry_is_irregular() -> None:
    """FiLM: the condition enters the region from outside, and players have acted on it."""
    graph = build(
        X, op("c", "input"), layer("a", "x"), layer("film", "c"), layer("b", "a"),
        op("mul", "mul", "b film"), op("add", "add", "mul a"),
    )  # fmt: skip
    assert shortcuts(graph) == [("a", "add", "identity", (), False)]


def test_dead_operations_part_no_paths() -> None:
    graph = build(
        X, layer("a", "x"), layer("b", "a"), op("dead", "add", "b a"), layer("c", "a"), output=Ref("c"),
    )  # fmt: skip
    assert shortcuts(graph) == []


def test_parameter_expressions_are_no_operands() -> None:
    """``linear(x, weight * scale)``: a merge of nothing; decided where it is used."""
    ops = (
        X,
        layer("a", "x"),
        op("scaled", "mul", "", ("w", "s")),
        op("b", "linear", "a scaled"),
        op("c", "linear", "b scaled"),
    )
    base = build(*ops)
    tied = Player("w", "linear", ("w", "s"), "b", ("b", "c"), ("scaled",))
    graph = PlayerGraph(base.ops, (base.players[0], tied))
    assert shortcuts(graph) == []
    found = control(graph)
    assert found.stage_of["scaled"] == 1 and found.stages[1].ops == ("scaled", "b", "c")
    assert cuts(found) == [("x",), ("a",)]


def test_parameter_free_branch_of_the_input() -> None:
    """No player acts on ``pool``, and yet its path and the main one part at the input."""
    graph = build(X, op("pool", "avg_pool", "x"), layer("a", "x"), op("add", "add", "a pool"))
    assert shortcuts(graph) == [("x", "add", "parameter_free", (), True)]


# --- tied weights, auxiliary values ---------------------------------------------------------------


def test_tied_weights() -> None:
    """The second use runs freely at its natural stage; the control waits for it in the state."""
    graph = build(X, layer("a", "x"), layer("b", "a"), layer("again", "b", weight="a.weight"), layer("c", "again"))
    found = control(graph)
    assert [stage.players for stage in found.stages] == [("a",), ("b",), ("c",)]
    assert found.stages[1].ops == ("b", "again")
    assert cuts(found) == [("x",), ("a", "params:a"), ("again",)]
    value = found.value["params:a"]
    assert (value.control, value.born, value.dies, value.readers, value.shape) == ("a", 0, 1, (1,), ())
    assert found.stages[1].consumed == ("a", "params:a")
    assert found.stages[0].produced == ("a", "params:a")


def test_tied_weights_in_the_same_stage_need_no_state() -> None:
    graph = build(X, layer("a", "x"), layer("again", "a", weight="a.weight"), layer("c", "again"))
    assert cuts(control(graph)) == [("x",), ("again",)]


def test_a_later_use_waits_for_the_decision() -> None:
    """No path of values leads from the first use to the second, and yet it comes later."""
    graph = build(
        X, op("y", "input"), layer("a", "x"), layer("b", "a"), layer("again", "y", weight="b.weight"),
        layer("c", "again"), op("add", "add", "b c"),
    )  # fmt: skip
    found = schedule(find_shortcuts(graph))
    assert found.stage_of["again"] == 1 and found.stage_of["c"] == 2
    with pytest.raises(CompileError, match=r"player 'c' at stage 1 depends on player 'b' at stage 1"):
        schedule(find_shortcuts(graph), {"a": 0, "b": 1, "c": 1})


def test_tied_expression_is_recomputed() -> None:
    ops = (
        X, op("scaled", "mul", "", ("w",)), op("a", "linear", "x scaled"), layer("b", "a"),
        op("again", "linear", "b scaled"), layer("c", "again"),
    )  # fmt: skip
    base = build(*ops)
    tied = Player("w", "linear", ("w",), "a", ("a", "again"), ("scaled",))
    found = control(PlayerGraph(base.ops, (tied, *base.players[1:])))
    assert cuts(found) == [("x",), ("a", "params:w"), ("again",)]


def test_auxiliary_values_are_no_state() -> None:
    """Integers and sizes are read across stages without being in a cut."""
    graph = build(
        op("ids", "input", dtype=torch.int64), op("mask", "ne", "ids", dtype=torch.bool),
        layer("embed", "ids", "embedding"), op("size", "size", "embed", shape=None), layer("a", "embed"),
        op("fill", "masked_fill", "a mask"), op("view", "view", "fill size"), op("zeros", "zeros", "size"),
        layer("b", "view"), op("add", "add", "b zeros"),
    )  # fmt: skip
    assert shortcuts(graph) == []
    found = control(graph)
    assert cuts(found) == [(), ("embed", "zeros"), ("view", "zeros")]
    assert found.prologue == ("ids", "mask")
    assert found.value["zeros"].fixed and not found.value["view"].fixed


def test_several_outputs() -> None:
    graph = build(X, layer("a", "x"), layer("b", "a"), layer("c", "b"), output={"hidden": Ref("a"), "out": [Ref("c")]})
    found = control(graph)
    assert cuts(found) == [("x",), ("a",), ("a", "b")]
    assert [v.name for v in found.values if v.dies == 3] == ["a", "c"]


def test_tuples_must_be_unpacked() -> None:
    base = (X, layer("a", "x"), op("chunk", "chunk", "a", shape=None))
    with pytest.raises(CompileError, match=r"module 'chunk', operation chunk, at net\.py:7: .* returned"):
        control(build(*base))
    with pytest.raises(CompileError, match="read by a later stage"):
        control(build(*base, op("part", "getitem", "chunk"), layer("b", "part"), op("cat", "cat", "chunk b")))


def test_no_players() -> None:
    found = control(build(X, op("relu", "relu", "x"), op("add", "add", "relu x")))
    assert found.stages == () and found.value["add"].fixed
    assert found.shortcuts == (Shortcut("x", "add", "identity"),)


# --- stages by hand -------------------------------------------------------------------------------


def diamond() -> PlayerGraph:
    return build(X, layer("a", "x"), layer("b", "a"), layer("c", "a"), op("add", "add", "b c"), layer("d", "add"))


def test_mapping() -> None:
    found = schedule(find_shortcuts(diamond()), {"a": 0, "c": 5, "b": 10, "d": 20})
    assert [(p.name, p.stage) for p in found.players] == [("a", 0), ("c", 1), ("b", 2), ("d", 3)]
    assert (found.stages, found.name) == (4, "mapping")
    assert cuts(augment(found)) == [("x",), ("a",), ("a", "c"), ("add",)]


@pytest.mark.parametrize(
    ("given_stages", "message"),
    [
        ({"a": 0, "b": 1, "c": 1}, r"gives no stage to 'd'.*Name every player"),
        ({"a": 0, "b": 1, "c": 1, "d": 2, "z": 0}, r"names 'z', but.*players are 'a', 'b', 'c', 'd'"),
        (
            {"a": 0, "b": 1, "c": 2, "d": 2},
            r"module 'd'.*'d' at stage 2 depends on player 'c' at stage 2.*later stage",
        ),
        ({"a": 3, "b": 1, "c": 4, "d": 5}, r"'b' at stage 1 depends on player 'a' at stage 3"),
        ({"a": 0, "b": 1, "c": "2", "d": 3}, r"player 'c' the stage '2'.*integers"),
    ],
)
def test_mapping_errors(given_stages: dict[str, int], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        schedule(find_shortcuts(diamond()), given_stages)


@pytest.mark.parametrize("how", ["soon", None, ["asap"]])
def test_unknown_schedule(how: Any) -> None:
    with pytest.raises(CompileError, match="'asap', 'alap', 'sequential', or a mapping"):
        schedule(find_shortcuts(diamond()), how)


def test_players_at_one_operation_share_a_stage() -> None:
    """A weight tied elsewhere and a bias that is not: two players, one decision."""
    base = build(X, layer("a", "x"), layer("b", "a"))
    bias = Player("bias", "linear", ("bias",), "b", ("b",))
    graph = find_shortcuts(PlayerGraph(base.ops, (*base.players, bias)))
    for how in SCHEDULES:
        assert [p.stage for p in schedule(graph, how).players] == [0, 1, 1]
    with pytest.raises(CompileError, match="'b' and 'bias' decide at the same operation"):
        schedule(graph, {"a": 0, "b": 1, "bias": 2})


# --- random graphs against brute force ------------------------------------------------------------


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


@settings(max_examples=400, deadline=None)
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


@settings(max_examples=200, deadline=None)
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


@settings(max_examples=200, deadline=None)
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
            above = {v.name, *(nx.ancestors(edges, v.name) if v.name in edges else ())}
            assert v.fixed == (not above & moved_at)
    order = list(ops.position)
    for stage in found.stages:
        names = [n.removeprefix("params:") for n in stage.live]
        assert names == sorted(names, key=order.index)
