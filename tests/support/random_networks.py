"""Random networks: forks, merges, mappings, folds, shared modules, several inputs and outputs (a hypothesis strategy).

A network is a list of steps over the values computed so far; every value is (B, WIDTH), so any two can be merged.
"""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import Case, seeded

BATCH, WIDTH = 3, 2
ACTIVATIONS = {"tanh": torch.tanh, "sin": torch.sin, "sigmoid": torch.sigmoid, "neg": torch.neg, "same": torch.clone}
MERGES = ("add", "sub", "mul", "cat", "gate", "inner", "outer")


@dataclass(frozen=True)
class Step:
    """``kind`` on the values numbered ``reads``; ``layer`` is the number of the weights it uses, if any."""

    kind: str
    reads: tuple[int, ...]
    layer: int = -1
    act: str = "tanh"


@dataclass(frozen=True)
class Plan:
    inputs: int
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    layers: int

    def case(self) -> Case:
        return Case(seeded(lambda: Network(self)), loss=loss, draw=lambda seed, size: self.batch(seed))

    def batch(self, seed: int) -> tuple[tuple[Tensor, ...], Tensor]:
        source = torch.Generator().manual_seed(seed)
        inputs = (torch.randn(BATCH, WIDTH, generator=source, dtype=torch.float64) for _ in range(self.inputs))
        return tuple(inputs), torch.randn(BATCH, WIDTH, generator=source, dtype=torch.float64)


class Network(nn.Module):
    """Runs a plan. A layer's weights are ``WIDTH × WIDTH``; a concatenation is projected back by one of its own."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan
        wide = {step.layer for step in plan.steps if step.kind == "cat"}
        self.layers = nn.ModuleList(
            nn.Linear(2 * WIDTH if i in wide else WIDTH, WIDTH, bias=i % 2 == 0) for i in range(plan.layers)
        )

    def forward(self, *inputs: Tensor) -> Any:
        values = list(inputs)
        for step in self.plan.steps:
            values.append(self._run(step, [values[i] for i in step.reads]))
        outputs = tuple(values[i] for i in self.plan.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _run(self, step: Step, read: list[Tensor]) -> Tensor:
        x, act = read[0], ACTIVATIONS[step.act]
        if step.kind == "layer":
            return act(self.layers[step.layer](x))
        if step.kind == "tied":  # the same matrix, transposed
            return act(F.linear(x, self.layers[step.layer].weight.T))
        if step.kind == "map":
            return act(x)
        if step.kind == "cat":
            return act(self.layers[step.layer](torch.cat(read, 1)))
        if step.kind == "inner":  # both values of a sample, one after the other
            rows = torch.stack(read, 1).flatten(0, 1)
            return act(self.layers[step.layer](rows)).unflatten(0, (-1, 2)).sum(1)
        if step.kind == "outer":  # one value of all samples, then the other
            first, second = act(self.layers[step.layer](torch.cat(read))).chunk(2)
            return first * second
        if step.kind == "gate":
            return torch.sigmoid(x) * read[1]
        return {"add": torch.add, "sub": torch.sub, "mul": torch.mul}[step.kind](x, read[1])


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """Three to eight layers, some used again, between random merges."""
    inputs = draw(st.integers(1, 2))
    steps: list[Step] = []
    square: list[int] = []
    count = 0

    def value() -> int:
        return draw(st.integers(max(0, inputs + len(steps) - 4), inputs + len(steps) - 1))

    for _ in range(draw(st.integers(3, 9))):
        kind = draw(st.sampled_from(("layer", "layer", "layer", "again", "tied", "map", *MERGES)))
        act = draw(st.sampled_from(tuple(ACTIVATIONS)))
        if kind in ("again", "tied"):
            layer = draw(st.sampled_from(square)) if square else -1
            kind = {"again": "layer"}.get(kind, kind) if square else "map"
            steps.append(Step(kind, (value(),), layer, act))
        elif kind in ("layer", "cat", "inner", "outer"):
            steps.append(Step(kind, tuple(value() for _ in range(1 + (kind != "layer"))), count, act))
            square += [count] if kind != "cat" else []
            count += 1
        elif kind == "map":
            steps.append(Step(kind, (value(),), act=act))
        else:
            steps.append(Step(kind, (value(), value())))
    last = inputs + len(steps) - 1
    steps.append(Step("layer", (last,), count))
    outputs = (last + 1, *draw(st.sets(st.integers(inputs, last), max_size=1)))
    return Plan(inputs, tuple(steps), outputs, count + 1)


def loss(outputs: Any, targets: Tensor) -> Tensor:
    """Squared error of every output, a sample."""
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.stack([((output - targets) ** 2).sum(1) for output in outputs]).sum(0)
