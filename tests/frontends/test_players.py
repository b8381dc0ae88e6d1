"""Players: who owns which parameter, by which uses, and the proof that nothing was missed."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompileError
from gtddp_compile.graph import Player, PlayerGraph
from gtddp_compile.passes import find_players, normalise
from gtddp_compile.passes.p02_find_players import prove_owned
from support.architectures import EXAMPLES
from support.compared import assert_base, assert_equal
from support.networks import Case, make
from support.recorded import FRONT_ENDS


@dataclass
class Expected:
    """A forward function, bare parameters by name and shape, layers a (4 to 5) and b (5 to 3), and the players."""

    forward: Callable[[Any, Tensor], Tensor]
    players: dict[str, tuple[str, ...]]
    bare: dict[str, tuple[int, ...]] = field(default_factory=dict)
    uses: dict[str, tuple[str, ...]] = field(default_factory=dict)
    expressions: dict[str, tuple[str, ...]] = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def model_of(expected: Expected) -> nn.Module:
    bare = {name: lambda shape=shape: nn.Parameter(torch.rand(shape)) for name, shape in expected.bare.items()}
    model = make(expected.forward, a=(4, 5), b=(5, 3), **bare)
    for name in expected.frozen:
        model.get_parameter(name).requires_grad_(False)
    return model


A, B = ("a.weight", "a.bias"), ("b.weight", "b.bias")


def head_on_three(net: Any, x: Tensor) -> Tensor:
    return net.b(torch.tanh(net.a(x)))


def token(net: Any, x: Tensor) -> Tensor:
    tokens = torch.cat([net.cls_token.expand(x.shape[0], -1, -1), x.unsqueeze(1)], 1) + net.position
    return net.b(torch.tanh(net.a(tokens)).mean(1))


def stopped(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = net.a(x)
    return net.b(y)


PLAYERS: dict[str, Expected] = {
    "plain": Expected(head_on_three, {"a": A, "b": B}),
    "frozen layer": Expected(head_on_three, {"b": B}, frozen=A),
    "frozen weight": Expected(head_on_three, {"a": ("a.bias",), "b": B}, frozen=("a.weight",)),
    "unused": Expected(
        lambda net, x: net.b(x @ net.a.weight.T), {"a": ("a.weight",), "b": B}, expressions={"a": ("T",)},
        unused=("a.bias",)),
    "without gradient": Expected(stopped, {"b": B}, unused=A),
    "used twice": Expected(
        lambda net, x: net.b(torch.tanh(net.a(x)) + net.a(x**2)), {"a": A, "b": B}, uses={"a": ("a", "a_1")}),
    "used again later": Expected(
        lambda net, x: net.b(net.a(torch.tanh(net.a(x))[:, :4])), {"a": A, "b": B}, uses={"a": ("a", "a_1")}),
    "tied to a later layer": Expected(
        lambda net, x: net.b(torch.tanh(F.linear(net.b(torch.tanh(net.a(x))), net.b.weight.T))), {"a": A, "b": B},
        uses={"b": ("b", "linear", "b_1")}, expressions={"b": ("T",)}),
    "scaled weight": Expected(
        lambda net, x: net.b(torch.tanh(F.linear(x, net.a.weight * net.scale, net.a.bias))),
        {"linear": ("a.bias", "a.weight", "scale"), "b": B}, bare={"scale": (5, 1)}, expressions={"linear": ("mul",)}),
    "tokens and positions": Expected(
        token, {"cls_token": ("cls_token",), "position": ("position",), "a": A, "b": B},
        bare={"cls_token": (1, 1, 4), "position": (2, 4)}, expressions={"cls_token": ("expand",)}),
    "bare shift": Expected(
        lambda net, x: net.b(torch.tanh(net.a(x)) + net.shift), {"a": A, "shift": ("shift",), "b": B},
        bare={"shift": (5,)}),
    "bare gain at the output": Expected(
        lambda net, x: net.gain * net.b(torch.tanh(net.a(x))), {"a": A, "b": B, "gain": ("gain",)}, bare={"gain": ()}),
}  # fmt: skip


def inputs(size: int) -> Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(size)).double()


@pytest.mark.parametrize("front_end", ["fx", "export"])
@pytest.mark.parametrize("name", PLAYERS)
def test_players(name: str, front_end: str) -> None:
    expected = PLAYERS[name]
    found = find_players(normalise(model_of(expected), (inputs(6),), (FRONT_ENDS[front_end],)))
    assert {player.name: player.parameters for player in found.players} == expected.players
    for player in found.players:
        assert player.uses == expected.uses.get(player.name, (player.op,))
        assert player.uses[0] == player.op
        assert player.expressions == expected.expressions.get(player.name, ())
    assert found.unused == expected.unused


@pytest.mark.parametrize("name", PLAYERS)
def test_updates(name: str) -> None:
    """Every use of every parameter counts in its gradient; frozen and unused ones stay as they are."""
    expected = PLAYERS[name]
    case = Case(model_of(expected), (4,))
    run = assert_base(case, curvature="sgd", lr=0.3, momentum=0.9, weight_decay=0.1)
    assert run.optimizer.graph.unused == expected.unused
    assert_equal(case, curvature="rmsprop", lr=0.1, coupling=4)


def test_one_parameter_under_two_names_is_one_player() -> None:
    layers = {"encode": (4, 4), "decode": (4, 4), "head": (4, 3)}
    tied = make(lambda net, x: net.head(net.decode(torch.tanh(net.encode(x)))), **layers)
    tied.decode.weight = tied.encode.weight
    for front_end in (FRONT_ENDS["fx"], FRONT_ENDS["export"]):
        found = find_players(normalise(tied, (inputs(6),), (front_end,)))
        players = {player.name: (player.parameters, player.uses) for player in found.players}
        assert players == {
            "encode": (("encode.weight", "encode.bias"), ("encode", "decode")),
            "decode": (("decode.bias",), ("decode",)),
            "head": (("head.weight", "head.bias"), ("head",)),
        }
        (info,) = (info for info in found.ops.parameters if info.aliases)
        assert (info.name, info.aliases) == ("encode.weight", ("decode.weight",))


def found_in(name: str) -> PlayerGraph:
    return find_players(normalise(model_of(PLAYERS[name]), (inputs(6),)))


def with_player(found: PlayerGraph, name: str, **changes: Any) -> PlayerGraph:
    players = tuple(replace(player, **changes) if player.name == name else player for player in found.players)
    return PlayerGraph(found.ops, players, found.unused)


def test_the_proof_sees_a_missed_use() -> None:
    found = found_in("tied to a later layer")
    prove_owned(found)
    for missed, said in (("linear", r"'b\.weight'"), ("b_1", r"'b\.weight'")):
        uses = tuple(use for use in found.players[1].uses if use != missed)
        with pytest.raises(CompileError, match=f"{said} is read here, but its player does not know this use") as error:
            prove_owned(with_player(found, "b", uses=uses))
        assert error.value.operation == "linear" and error.value.source.startswith("test_players.py:")


def test_the_proof_sees_a_missed_expression() -> None:
    with pytest.raises(CompileError, match="does not know this use"):
        prove_owned(with_player(found_in("scaled weight"), "linear", expressions=()))


def test_the_proof_sees_a_parameter_without_an_owner() -> None:
    """A player that lost a parameter: its use reads something nobody decides on."""
    with pytest.raises(CompileError, match=r"'a\.bias' is read here, but no player owns it"):
        prove_owned(with_player(found_in("plain"), "a", parameters=("a.weight",)))
    found = found_in("plain")
    with pytest.raises(CompileError, match="but no player owns it"):
        prove_owned(PlayerGraph(found.ops, found.players[1:], found.unused))


def test_the_proof_sees_two_owners() -> None:
    found = found_in("plain")
    thief = Player("thief", "linear", ("a.weight",), "b", ("b",))
    with pytest.raises(CompileError, match="two players own it, a and thief"):
        prove_owned(PlayerGraph(found.ops, (*found.players, thief), found.unused))


def test_the_proof_sees_an_operation_added_after_the_search() -> None:
    found = found_in("plain")
    *ops, last = found.ops.ops
    last = replace(last, args=(replace(last.args[0], name="again"), *last.args[1:]))
    doctored = replace(found.ops, ops=(*ops, replace(ops[1], name="again"), last))
    with pytest.raises(CompileError, match="its player does not know this use"):
        prove_owned(PlayerGraph(doctored, found.players, found.unused))


def test_every_example_is_proved() -> None:
    for build in EXAMPLES.values():
        example = build()
        prove_owned(find_players(normalise(example.model, example.inputs)))
