"""Shortcuts, schedules and cuts of named architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gtddp_compile.graph import (
    Op,
    Player,
    PlayerGraph,
    Ref,
    Shortcut,
)
from gtddp_compile.passes.p03_find_shortcuts import find_shortcuts
from support.hand_built import SCHEDULES, X, build, control, cuts, layer, op, shortcuts

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
