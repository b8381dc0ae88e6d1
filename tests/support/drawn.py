"""Control graphs of named networks, operation by operation, for the tests of the drawings."""

from dataclasses import replace
from typing import Any

import torch

from gtddp_compile.graph import ControlGraph, Op, OpGraph, ParameterInfo, ParamRef, Player, PlayerGraph, Ref
from gtddp_compile.options import Options
from gtddp_compile.runtime.compiler import build_graph
from support.architectures import resnet18_like
from support.hand_built import control

Line = tuple[str, str, tuple[int, ...], str, tuple[int, ...] | None]


def control_graph(lines: list[Line], name: str = "net", output: Any = None, tied: str = "") -> ControlGraph:
    """From lines ``(name, kind, shape, "operands", weight shape or None)``; the last is the output, or reads `tied`."""
    ops, infos, players = [], [], []
    for op, kind, shape, operands, weight in lines:
        own = () if weight is None else (f"{op}.weight",)
        infos += [ParameterInfo(n, weight or (), torch.float32) for n in own]
        shared = (f"{tied}.weight",) if tied and op == lines[-1][0] else ()
        args = (*map(Ref, operands.split()), *map(ParamRef, own + shared))
        ops.append(Op(op, kind, None, args, module=op, source="net.py:7", shape=(32, *shape), dtype=torch.float32))
        if own:
            players.append(Player(op, kind, own, op, (op, lines[-1][0]) if op == tied else (op,)))
    inputs = tuple(op.name for op in ops if op.kind == "input")
    graph = OpGraph(tuple(ops), inputs, Ref(ops[-1].name) if output is None else output, tuple(infos))
    return replace(control(PlayerGraph(graph, tuple(players), ("spare.weight",) if tied else ())), name=name)


def residual() -> ControlGraph:
    """Eight operations, a projection shortcut."""
    return control_graph([
        ("x", "input", (16,), "", None), ("stem", "linear", (32,), "x", (32, 16)),
        ("relu", "relu", (32,), "stem", None), ("block.fc1", "linear", (64,), "relu", (64, 32)),
        ("block.tanh", "tanh", (64,), "block.fc1", None), ("block.fc2", "linear", (64,), "block.tanh", (64, 64)),
        ("block.project", "linear", (64,), "relu", (64, 32)),
        ("block.add", "add", (64,), "block.fc2 block.project", None),
        ("head", "linear", (10,), "block.add", (10, 64)),
    ], "residual")  # fmt: skip


def resnet18() -> ControlGraph:
    """Identity and projection shortcuts, batch-norm everywhere: a network as it is recorded."""
    given = resnet18_like()
    return build_graph(given.model, given.inputs, Options())


def tied() -> ControlGraph:
    """An embedding whose weights are read again by the head: its control waits."""
    return control_graph([
        ("tokens", "input", (5,), "", None), ("embed", "embedding", (5, 8), "tokens", (20, 8)),
        ("body", "linear", (5, 8), "embed", (8, 8)), ("head", "matmul", (5, 20), "body", None),
    ], "tied", tied="embed")  # fmt: skip


def dense() -> ControlGraph:
    """Every layer reads all before it: values that wait for many stages."""
    lines: list[Line] = [("x", "input", (4,), "", None)]
    for index in range(7):
        read = " ".join(["x", *(f"tanh{i}" for i in range(index))])
        lines.append((f"cat{index}", "cat", (4 * index + 4,), read, None))
        lines.append((f"fc{index}", "linear", (4,), f"cat{index}", (4, 4 * index + 4)))
        lines.append((f"tanh{index}", "tanh", (4,), f"fc{index}", None))
    return control_graph(lines, "dense")


def two_outputs() -> ControlGraph:
    """Two returned values, one of them early: it is live to the end."""
    lines: list[Line] = [("x", "input", (4,), "", None), ("early", "linear", (4,), "x", (4, 4))]
    lines += [("fc1", "linear", (4,), "early", (4, 4)), ("fc2", "linear", (4,), "fc1", (4, 4))]
    return control_graph(lines, "two outputs", (Ref("early"), Ref("fc2")))


def hostile() -> ControlGraph:
    """Names that mean something in every output language."""
    first, second, third = 'x"<script>alert(1)</script>', "a&b;\\n\x01`#[](){}|", "重み" * 30
    lines: list[Line] = [(first, "input", (3,), "", None), (second, "linear", (3,), first, (3, 3))]
    return control_graph([*lines, (third, "}{kind|", (3,), second, None)], name='<b>&"name')
