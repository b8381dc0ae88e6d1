"""Players: the operations that own parameters.

Takes the normal form; guarantees a :class:`PlayerGraph` in which every use of every trained parameter that reaches the
output is owned by exactly one player, proved at the end. What the words mean here:

* A *parameter expression* is an operation on parameters, buffers, literals and sizes alone, with a trained parameter
  among them (``weight * scale``, ``cls_token.expand(B, -1, -1)``): it is part of whoever reads it.
* A *use* is any other operation that reads trained parameters, itself or through expressions.
* A parameter belongs to the player that decides at its first use; parameters with the same first use have one player.
  Tied weights and a module called twice are one player with several uses.
* Parameters without a differentiable path to the output are *unused*: named, and left untouched.
"""

from __future__ import annotations

from collections.abc import Iterable

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import Op, OpGraph, Player, PlayerGraph, grouped

Reads = dict[str, tuple[str, ...]]
"""Trained parameters by operation."""


# --- predicates -------------------------------------------------------------------------------------------------------


def reaches_output(graph: OpGraph) -> frozenset[str]:
    """Operations from which a gradient can come back: on a differentiable path to an output."""
    found = graph.upstream(graph.output_names, lambda op: op.carries_gradient)
    return frozenset(name for name in found if graph.by_name[name].carries_gradient)


# --- reading ----------------------------------------------------------------------------------------------------------


def find_expressions(graph: OpGraph, trained: frozenset[str]) -> Reads:
    """Parameter expressions, with the trained parameters they read, directly or through others."""
    found: Reads = {}
    for op in graph.ops:
        if op.name in graph.reached or op.random or op.advances or not op.carries_gradient:
            continue
        if names := read_by(op, found, trained):
            found[op.name] = names
    return found


def read_by(op: Op, expressions: Reads, trained: frozenset[str]) -> tuple[str, ...]:
    """Trained parameters that an operation reads, itself or through expressions."""
    own = [name for name in op.parameters if name in trained]
    through = [name for operand in op.operands for name in expressions.get(operand, ())]
    return tuple(dict.fromkeys([*own, *through]))


def find_uses(graph: OpGraph, expressions: Reads, trained: frozenset[str]) -> Reads:
    """Operations that read trained parameters and are no expressions; an expression that is returned is a use too."""
    reached, outputs = reaches_output(graph), frozenset(graph.output_names)
    found: Reads = {}
    for op in graph.ops:
        if op.name not in reached or (op.name in expressions and op.name not in outputs):
            continue
        if names := read_by(op, expressions, trained):
            found[op.name] = names
    return found


# --- the rewrite ------------------------------------------------------------------------------------------------------


def find_players(graph: OpGraph) -> PlayerGraph:
    """Find every player of a model.

    Raises:
        CompileError: nothing that is trained reaches the output, or a parameter is read in a way that no gradient
            can follow.
    """
    trained = frozenset(info.name for info in graph.parameters if info.trainable)
    expressions = find_expressions(graph, trained)
    uses = find_uses(graph, expressions, trained)
    uses_of: dict[str, list[str]] = {}
    for use, names in uses.items():
        for name in names:
            uses_of.setdefault(name, []).append(use)
    owned = grouped(uses_of, lambda name: uses_of[name][0])
    if not owned:
        raise CompileError(
            "no trained parameter has a differentiable path to the output",
            "Set requires_grad on the parameters to train, and return what they compute",
            module="",
        )
    naming = _Naming(graph, owned)
    players = tuple(
        Player(
            name=naming.of(op, parameters),
            kind=graph.by_name[op].kind,
            parameters=tuple(parameters),
            op=op,
            uses=tuple(sorted({u for p in parameters for u in uses_of[p]}, key=graph.position.__getitem__)),
            expressions=_expressions_of(graph, expressions, set(parameters)) if expressions else (),
        )
        for op, parameters in sorted(owned.items(), key=lambda item: graph.position[item[0]])
    )
    unused = tuple(info.name for info in graph.parameters if info.trainable and info.name not in uses_of)
    found = PlayerGraph(graph, players, unused)
    prove_owned(found)
    return found


def _expressions_of(graph: OpGraph, expressions: Reads, parameters: set[str]) -> tuple[str, ...]:
    return tuple(op.name for op in graph.ops if parameters & set(expressions.get(op.name, ())))


class _Naming:
    """A player's name: its module's, if it owns all that is the module's own; else its parameter's."""

    def __init__(self, graph: OpGraph, owned: dict[str, list[str]]) -> None:
        self._taken: set[str] = set()
        self._owners: dict[str, set[str]] = {}
        for op, parameters in owned.items():
            for name in parameters:
                self._owners.setdefault(_module(name), set()).add(op)
        modules = {_module(info.name) for info in graph.parameters}
        self._containers = {parent for module in modules for parent in _parents(module)}

    def of(self, op: str, parameters: list[str]) -> str:
        modules = {_module(name) for name in parameters}
        (first, *others) = modules
        whole = not others and first and self._owners[first] == {op} and first not in self._containers
        base = first if whole else parameters[0] if len(parameters) == 1 else op
        found, count = base, 1
        while found in self._taken:
            found, count = f"{base}_{count}", count + 1
        self._taken.add(found)
        return found


def _module(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _parents(module: str) -> Iterable[str]:
    while module:
        module = module.rpartition(".")[0]
        yield module


# --- the proof --------------------------------------------------------------------------------------------------------


def prove_owned(found: PlayerGraph) -> None:
    """Every use of every trained parameter that a gradient can come back from belongs to exactly one player.

    Follows each parameter through the graph by itself, without what the search found: to the operations that read it,
    and on through those that its owner calls expressions.
    """
    graph = found.ops
    owner = _owners(found)
    trained = frozenset(info.name for info in graph.parameters if info.trainable)
    reached, moving = reaches_output(graph), graph.reached
    carried: Reads = {}
    for op in graph.ops:
        for name in read_by(op, carried, trained) if op.name in reached else ():
            if name not in owner:
                raise _unowned(op, name, "no player owns it")
            if op.name in owner[name].expressions and op.name not in moving:
                carried[op.name] = (*carried.get(op.name, ()), name)
            elif op.name not in owner[name].uses:
                raise _unowned(op, name, "its player does not know this use")
    for player in found.players:
        for use in player.uses:
            _check_single(graph.by_name[use], player)


def _owners(found: PlayerGraph) -> dict[str, Player]:
    owner: dict[str, Player] = {}
    for player in found.players:
        for name in player.parameters:
            if name in owner:
                op = found.ops.by_name[player.op]
                raise _unowned(op, name, f"two players own it, {owner[name].name} and {player.name}")
            owner[name] = player
    return owner


def _check_single(op: Op, player: Player) -> None:
    if not op.is_tensor:
        raise op.refusal(
            f"it reads the trained {', '.join(player.parameters)} and gives several values at once",
            "Freeze these parameters, or return one tensor from it",
        )


def _unowned(op: Op, parameter: str, why: str) -> CompileError:
    return op.refusal(
        f"parameter {parameter!r} is read here, but {why}",
        "Report the model: the compiler must own every use of a parameter",
    )
