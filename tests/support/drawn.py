"""Control graphs built by hand, without the passes, for the tests of the drawings."""

from __future__ import annotations

import dataclasses

import torch

from gtddp_compile.graph import (
    ControlGraph,
    Op,
    OpGraph,
    ParameterInfo,
    ParamRef,
    Player,
    Ref,
    Shortcut,
    ShortcutKind,
    Stage,
    Value,
)

Line = tuple[str, str, tuple[int, ...], str, tuple[int, ...] | None]


def control_graph(lines: list[Line], shortcuts: tuple[Shortcut, ...] = (), name: str = "net") -> ControlGraph:
    """A control graph from lines ``(name, kind, shape, "operands", weight shape or None)``.

    Stages are depths over players, as the schedule "asap"; the last line is the output.
    """
    ops: list[Op] = []
    infos: list[ParameterInfo] = []
    depth: dict[str, int] = {}
    players: list[Player] = []
    for op, kind, shape, operands, weight in lines:
        names = operands.split()
        own = () if weight is None else (f"{op}.weight",)
        infos += [ParameterInfo(n, weight or (), torch.float32) for n in own]
        args = (*map(Ref, names), *map(ParamRef, own))
        ops.append(Op(op, kind, None, args, module=op, source="net.py:7", shape=(32, *shape), dtype=torch.float32))
        depth[op] = max((depth[n] for n in names), default=-1) + bool(own)
        if own:
            players.append(Player(op, kind, own, op, (op,), stage=depth[op]))
    users: dict[str, list[str]] = {op.name: [] for op in ops}
    for op in ops:
        for operand in op.operands:
            users[operand].append(op.name)
    count, output = max(depth.values()) + 1, ops[-1].name
    dies = {n: count if n == output else max(depth[u] for u in use) for n, use in users.items()}
    stages = []
    at: dict[int, list[str]] = {}
    waiting: dict[int, list[str]] = {}
    for op in ops:
        at.setdefault(depth[op.name], []).append(op.name)
        for t in range(depth[op.name] + 1, dies[op.name] + 1):
            waiting.setdefault(t, []).append(op.name)
    deciding = {player.op: player.name for player in players}
    merging = {s.merge for s in shortcuts}
    for t in range(count):
        here, live = at.get(t, []), tuple(waiting.get(t, ()))
        merges = tuple(n for n in here if n in merging)
        stages.append(
            Stage(
                t,
                tuple(deciding[n] for n in here if n in deciding),
                live,
                tuple(n for n in live if any(depth[u] == t for u in users[n])),
                tuple(n for n in live if dies[n] > t),
                tuple(n for n in here if dies[n] > t),
                tuple(here),
                merges,
            )
        )
    values = tuple(
        Value(
            op.name,
            op.shape[1:],
            depth[op.name],
            dies[op.name],
            tuple(sorted({depth[u] for u in users[op.name]})),
            depth[op.name] < 0,
        )
        for op in ops
        if op.shape and dies[op.name] > depth[op.name]
    )
    inputs = tuple(op.name for op in ops if op.kind == "input")
    return ControlGraph(
        OpGraph(tuple(ops), inputs, Ref(output), tuple(infos)),
        tuple(players),
        tuple(stages),
        shortcuts,
        values,
        tuple(op.name for op in ops if depth[op.name] < 0),
        name=name,
    )


def residual() -> ControlGraph:
    """Eight operations, a projection shortcut."""
    return control_graph(
        [
            ("x", "input", (16,), "", None),
            ("stem", "linear", (32,), "x", (32, 16)),
            ("relu", "relu", (32,), "stem", None),
            ("block.fc1", "linear", (64,), "relu", (64, 32)),
            ("block.tanh", "tanh", (64,), "block.fc1", None),
            ("block.fc2", "linear", (64,), "block.tanh", (64, 64)),
            ("block.project", "linear", (64,), "relu", (64, 32)),
            ("block.add", "add", (64,), "block.fc2 block.project", None),
            ("head", "linear", (10,), "block.add", (10, 64)),
        ],
        (Shortcut("relu", "block.add", "parametric", ("block.project",), ("block.project",)),),
        "residual",
    )


def resnet18() -> ControlGraph:
    """ResNet-18's operations: identity and projection shortcuts, batch-norm everywhere."""
    lines: list[Line] = [("x", "input", (3, 224, 224), "", None)]
    shortcuts: list[Shortcut] = []

    def conv_bn(prefix: str, source: str, shape: tuple[int, ...], inner: int, conv: str, norm: str) -> str:
        lines.append((f"{prefix}{conv}", "conv", shape, source, (shape[0], inner, 3, 3)))
        lines.append((f"{prefix}{norm}", "batch_norm", shape, f"{prefix}{conv}", (shape[0],)))
        return f"{prefix}{norm}"

    last = conv_bn("", "x", (64, 112, 112), 3, "conv1", "bn1")
    lines += [
        ("relu", "relu", (64, 112, 112), last, None),
        ("maxpool", "max_pool", (64, 56, 56), "relu", None),
    ]
    last, inner = "maxpool", 64
    for layer, width, size in ((1, 64, 56), (2, 128, 28), (3, 256, 14), (4, 512, 7)):
        for index in range(2):
            prefix, shape = f"layer{layer}.{index}.", (width, size, size)
            fork = last
            out = conv_bn(prefix, fork, shape, inner, "conv1", "bn1")
            lines.append((f"{prefix}relu", "relu", shape, out, None))
            out = conv_bn(prefix, f"{prefix}relu", shape, width, "conv2", "bn2")
            side, path = fork, tuple[str, ...]()
            if inner != width:
                side = conv_bn(prefix, fork, shape, inner, "downsample.0", "downsample.1")
                path = (f"{prefix}downsample.0", f"{prefix}downsample.1")
            lines.append((f"{prefix}add", "add", shape, f"{out} {side}", None))
            lines.append((f"{prefix}relu_1", "relu", shape, f"{prefix}add", None))
            kind: ShortcutKind = "parametric" if path else "identity"
            shortcuts.append(Shortcut(fork, f"{prefix}add", kind, path, path))
            last, inner = f"{prefix}relu_1", width
    lines += [
        ("avgpool", "adaptive_avg_pool", (512, 1, 1), last, None),
        ("flatten", "flatten", (512,), "avgpool", None),
        ("fc", "linear", (1000,), "flatten", (1000, 512)),
    ]
    return control_graph(lines, tuple(shortcuts), "ResNet-18")


def unet() -> ControlGraph:
    """A U-Net of three levels: concatenations of values that wait for long."""
    lines: list[Line] = [("x", "input", (3, 64, 64), "", None)]
    shortcuts: list[Shortcut] = []
    last, inner = "x", 3
    kept: list[tuple[str, tuple[int, ...]]] = []
    for level, width in enumerate((32, 64, 128)):
        shape: tuple[int, ...] = (width, 64 >> level, 64 >> level)
        for index in range(2):
            lines.append((f"down{level}.conv{index}", "conv", shape, last, (width, inner, 3, 3)))
            lines.append((f"down{level}.relu{index}", "relu", shape, f"down{level}.conv{index}", None))
            last, inner = f"down{level}.relu{index}", width
        if level < 2:
            kept.append((last, shape))
            lines.append((f"down{level}.pool", "max_pool", (width, *(s // 2 for s in shape[1:])), last, None))
            last = f"down{level}.pool"
    for level in (1, 0):
        fork, shape = kept[level]
        width = shape[0]
        lines.append((f"up{level}.up", "conv_transpose", shape, last, (inner, width, 2, 2)))
        lines.append((f"up{level}.cat", "cat", (2 * width, *shape[1:]), f"{fork} up{level}.up", None))
        shortcuts.append(Shortcut(fork, f"up{level}.cat", "identity"))
        last, inner = f"up{level}.cat", 2 * width
        for index in range(2):
            lines.append((f"up{level}.conv{index}", "conv", shape, last, (width, inner, 3, 3)))
            lines.append((f"up{level}.relu{index}", "relu", shape, f"up{level}.conv{index}", None))
            last, inner = f"up{level}.relu{index}", width
    lines.append(("head", "conv", (2, 64, 64), last, (2, 32, 1, 1)))
    return control_graph(lines, tuple(shortcuts), "U-Net")


def tied() -> ControlGraph:
    """An embedding whose weights are read again by the head: its control waits."""
    graph = control_graph(
        [
            ("tokens", "input", (5,), "", None),
            ("embed", "embedding", (5, 8), "tokens", (20, 8)),
            ("body", "linear", (5, 8), "embed", (8, 8)),
            ("head", "matmul", (5, 20), "body", None),
        ],
        name="tied",
    )
    control = "params:embed"
    player = dataclasses.replace(graph.players[0], uses=("embed", "head"))
    stage = dataclasses.replace(graph.stages[1], live=(*graph.stages[1].live, control))
    value = Value(control, (), 0, 1, (1,), control="embed")
    return dataclasses.replace(
        graph,
        players=(player, graph.players[1]),
        stages=(graph.stages[0], stage),
        values=(*graph.values, value),
        unused=("spare.weight",),
    )


def dense() -> ControlGraph:
    """Every layer reads all before it: values that wait for many stages."""
    lines: list[Line] = [("x", "input", (4,), "", None)]
    for index in range(7):
        read = " ".join(["x", *(f"tanh{i}" for i in range(index))])
        lines.append((f"cat{index}", "cat", (4 * index + 4,), read, None))
        lines.append((f"fc{index}", "linear", (4,), f"cat{index}", (4, 4 * index + 4)))
        lines.append((f"tanh{index}", "tanh", (4,), f"fc{index}", None))
    return control_graph(lines, name="dense")


def two_outputs() -> ControlGraph:
    """Two returned values, one of them early: it is live to the end."""
    graph = control_graph(
        [
            ("x", "input", (4,), "", None),
            ("early", "linear", (4,), "x", (4, 4)),
            ("fc1", "linear", (4,), "early", (4, 4)),
            ("fc2", "linear", (4,), "fc1", (4, 4)),
        ],
        name="two outputs",
    )
    stages = tuple(
        dataclasses.replace(stage, live=("early", *(n for n in stage.live if n != "early"))) if stage.index else stage
        for stage in graph.stages
    )
    values = tuple(dataclasses.replace(v, dies=3) if v.name == "early" else v for v in graph.values)
    ops = dataclasses.replace(graph.ops, output=(Ref("early"), Ref("fc2")))
    return dataclasses.replace(graph, ops=ops, stages=stages, values=values)


def hostile() -> ControlGraph:
    """Names that mean something in every output language."""
    first, second, third = 'x"<script>alert(1)</script>', "a&b;\\n\x01`#[](){}|", "重み" * 30
    lines: list[Line] = [
        (first, "input", (3,), "", None),
        (second, "linear", (3,), first, (3, 3)),
        (third, "}{kind|", (3,), second, None),
    ]
    return control_graph(lines, name='<b>&"name')
