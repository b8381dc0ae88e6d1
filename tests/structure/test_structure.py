"""Shortcuts, schedules and cuts of named architectures."""

import pytest
import torch

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import Player, PlayerGraph, Ref
from gtddp_compile.passes.p03_find_shortcuts import find_shortcuts
from gtddp_compile.passes.p04_schedule import schedule
from gtddp_compile.passes.p05_augment import augment
from support.hand_built import SCHEDULES, X, build, control, cuts, layer, op, shortcuts


def test_chain() -> None:
    graph = build(X, layer("a", "x"), op("relu", "relu", "a"), layer("b", "relu"))
    assert shortcuts(graph) == []
    found = control(graph)
    assert cuts(found) == [("x",), ("relu",)]
    assert [stage.ops for stage in found.stages] == [("a", "relu"), ("b",)]
    lives = [(v.name, v.born, v.dies, v.fixed) for v in found.values]
    assert lives == [("x", -1, 0, True), ("relu", 0, 1, False), ("b", 1, 2, False)]
    assert found.values[0].shape == (3,)
    assert found.prologue == ("x",)
    last = found.stages[1]
    assert (last.consumed, last.carried, last.produced) == (("relu",), (), ("b",))


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


def test_parameter_expressions_are_no_operands() -> None:
    """``linear(x, weight * scale)``: a merge of nothing; decided where it is used."""
    base = build(
        X, layer("a", "x"), op("scaled", "mul", "", ("w", "s")), op("b", "linear", "a scaled"),
        op("c", "linear", "b scaled"),
    )  # fmt: skip
    tied = Player("w", "linear", ("w", "s"), "b", ("b", "c"), ("scaled",))
    graph = PlayerGraph(base.ops, (base.players[0], tied))
    assert shortcuts(graph) == []
    found = control(graph)
    assert found.stage_of["scaled"] == 1 and found.stages[1].ops == ("scaled", "b", "c")
    assert cuts(found) == [("x",), ("a",)]


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


def diamond() -> PlayerGraph:
    return build(X, layer("a", "x"), layer("b", "a"), layer("c", "a"), op("add", "add", "b c"), layer("d", "add"))


def test_mapping() -> None:
    found = schedule(find_shortcuts(diamond()), {"a": 0, "c": 5, "b": 10, "d": 20})
    assert [(p.name, p.stage) for p in found.players] == [("a", 0), ("c", 1), ("b", 2), ("d", 3)]
    assert (found.stages, found.name) == (4, "mapping")
    assert cuts(augment(found)) == [("x",), ("a",), ("a", "c"), ("add",)]


@pytest.mark.parametrize(("given_stages", "message"), [
    ({"a": 0, "b": 1, "c": 1}, r"gives no stage to 'd'.*Name every player"),
    ({"a": 0, "b": 1, "c": 1, "d": 2, "z": 0}, r"names 'z', but.*players are 'a', 'b', 'c', 'd'"),
    ({"a": 0, "b": 1, "c": 2, "d": 2}, r"module 'd'.*'d' at stage 2 depends on player 'c' at stage 2.*later stage"),
    ({"a": 3, "b": 1, "c": 4, "d": 5}, r"'b' at stage 1 depends on player 'a' at stage 3"),
    ({"a": 0, "b": 1, "c": "2", "d": 3}, r"player 'c' the stage '2'.*integers"),
])  # fmt: skip
def test_mapping_errors(given_stages: dict[str, int], message: str) -> None:
    with pytest.raises(CompileError, match=message):
        schedule(find_shortcuts(diamond()), given_stages)


def test_players_at_one_operation_share_a_stage() -> None:
    """A weight tied elsewhere and a bias that is not: two players, one decision."""
    base = build(X, layer("a", "x"), layer("b", "a"))
    bias = Player("bias", "linear", ("bias",), "b", ("b",))
    graph = find_shortcuts(PlayerGraph(base.ops, (*base.players, bias)))
    for how in SCHEDULES:
        assert [p.stage for p in schedule(graph, how).players] == [0, 1, 1]
    with pytest.raises(CompileError, match="'b' and 'bias' decide at the same operation"):
        schedule(graph, {"a": 0, "b": 1, "bias": 2})
