"""Shortcuts, schedules and cuts of named architectures."""

from __future__ import annotations

from dataclasses import replace

import pytest

from gtddp_compile.graph import (
    Op,
    Player,
    PlayerGraph,
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
