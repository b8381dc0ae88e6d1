"""Small networks for the tests; for `CASES` also the same network as hand-written stages for the oracle.

The stages follow docs/theory.md#state: parameter-free operations run in the stage of the last player they
depend on, a state holds the values already computed that are still needed. A batch-norm layer is one player:
its normalisation runs with its affine parameters, as the one operation that torch records.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import BatchNorm2d, Conv2d, Linear
from torch.nn import functional as F

from support.oracle import Params, Stage, State

Outputs = Callable[[State, Params], State]
Combine = Callable[[State, State], State]


def same(state: State, heads: State) -> State:
    """`combine` of a stage whose players' outputs are the whole next state."""
    return heads


def squash(state: State, heads: State) -> State:
    return (torch.tanh(heads[0]),)


def squash_and_keep(state: State, heads: State) -> State:
    return torch.tanh(heads[0]), *state


def stage(names: str, outputs: Outputs, combine: Combine = same) -> Stage:
    """A stage of the players `names`; a name ends in "-" where the layer has no bias."""
    parameters = []
    for name in names.split():
        parameters += [f"{name.rstrip('-')}.weight"] + ([] if name.endswith("-") else [f"{name}.bias"])
    return Stage(tuple(parameters), outputs, combine)


def linear(name: str, x: Tensor, p: Params) -> Tensor:
    return F.linear(x, p[f"{name}.weight"], p.get(f"{name}.bias"))


def layer(name: str, position: int = 0) -> Outputs:
    """Outputs of a stage with one linear layer that reads the value at `position`."""
    return lambda state, p: (linear(name, state[position], p),)


def readers(*names: str) -> Outputs:
    """Outputs of a coalition of linear layers that all read the first value."""
    return lambda state, p: tuple(linear(name, state[0], p) for name in names)


@dataclass
class Case:
    """A module, the shape of one sample, its stages under every schedule that is named, and its loss.

    `draw(seed, size)` gives other inputs and targets than normal numbers and classes.
    """

    model: nn.Module
    shape: tuple[int, ...] = ()
    stages: dict[str, list[Stage]] = field(default_factory=dict)
    loss: Any = field(default_factory=nn.CrossEntropyLoss)
    draw: Callable[[int, int], tuple[Any, Tensor]] | None = None

    def batch(self, seed: int, size: int = 7) -> tuple[Any, Tensor]:
        if self.draw is not None:
            return self.draw(seed, size)
        source = torch.Generator().manual_seed(seed)
        x = torch.randn(size, *self.shape, dtype=torch.float64, generator=source)
        return x, torch.randint(3, (size,), generator=source)


STEM, HEAD = stage("stem", layer("stem"), squash), stage("head", layer("head"))


def everywhere(stages: list[Stage]) -> dict[str, list[Stage]]:
    return dict.fromkeys(("asap", "alap", "sequential"), stages)


class Net(nn.Module):
    """Named layers, parameters and buffers, and a forward function over them: `run(net, *inputs)`."""

    def __init__(self, run: Callable[..., object], **layers: nn.Module | Tensor) -> None:
        super().__init__()
        self.run = run
        for name, layer in layers.items():
            if isinstance(layer, nn.Module | nn.Parameter):
                setattr(self, name, layer)
            else:
                self.register_buffer(name, layer)

    def forward(self, *inputs: Tensor) -> object:
        return self.run(self, *inputs)


def seeded(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return build().double()


def make(run: Callable[..., object], seed: int = 0, **layers: Any) -> Net:
    """A `Net` of layers, each a constructor or the arguments of a linear layer."""

    def build() -> Net:
        made = {name: Linear(*spec) if isinstance(spec, tuple) else spec() for name, spec in layers.items()}
        return Net(run, **made)

    return seeded(build, seed)


def conv(*sizes: int, kernel: int = 3, bias: bool = True) -> Callable[[], nn.Module]:
    return lambda: Conv2d(*sizes, kernel, padding=kernel // 2, bias=bias)


# Networks with an oracle ------------------------------------------------------------------------------------


def mlp(seed: int = 0) -> Case:
    model = make(lambda net, x: net.c(torch.tanh(net.b(torch.tanh(net.a(x))))), seed, a=(4, 5), b=(5, 4), c=(4, 3))
    stages = [stage("a", layer("a"), squash), stage("b", layer("b"), squash), stage("c", layer("c"))]
    return Case(model, (4,), everywhere(stages))


def residual(seed: int = 0, act: Callable[[Tensor], Tensor] = torch.tanh) -> Case:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        return net.head(act(x + net.b(torch.tanh(net.a(x)))))

    model = make(forward, seed, stem=(4, 5), a=(5, 4), b=(4, 5), head=(5, 3))
    beside = stage("a", layer("a"), squash_and_keep), stage("b", layer("b"), lambda state, h: (act(state[1] + h[0]),))
    return Case(model, (4,), everywhere([STEM, *beside, HEAD]))


def nested(seed: int = 0) -> Case:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        outer = torch.tanh(net.stem(x))
        inner = torch.tanh(net.a(outer))
        y = torch.tanh(inner + net.c(torch.tanh(net.b(inner))))
        return net.head(torch.tanh(outer + net.d(y)))

    return Case(make(forward, seed, stem=(4, 4), a=(4, 5), b=(5, 3), c=(3, 5), d=(5, 4), head=(4, 3)), (4,))


def consecutive(seed: int = 0) -> Case:
    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        x = torch.tanh(x + net.b(torch.tanh(net.a(x))))
        return net.head(x + net.d(torch.tanh(net.c(x))))

    return Case(make(forward, seed, stem=(4, 4), a=(4, 3), b=(3, 4), c=(4, 5), d=(5, 4), head=(4, 3)), (4,))


def projection(seed: int = 0) -> Case:
    """Two layers beside a mapping; forward computes the mapping last, so "sequential" puts it after both."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        return net.head(torch.tanh(net.b(torch.tanh(net.a(x))) + net.short(x)))

    model = make(forward, seed, stem=(4, 4), a=(4, 3), b=(3, 5), short=(4, 5), head=(5, 3))
    wait = stage("a", layer("a"), squash_and_keep)
    return Case(model, (4,), {
        "asap": [
            STEM, stage("a short", readers("a", "short"), lambda state, h: (torch.tanh(h[0]), h[1])),
            stage("b", layer("b"), lambda state, h: (torch.tanh(h[0] + state[1]),)), HEAD,
        ],
        "alap": [
            STEM, wait, stage("b short", lambda s, p: (linear("b", s[0], p), linear("short", s[1], p)),
                              lambda state, h: (torch.tanh(h[0] + h[1]),)), HEAD,
        ],
        "sequential": [
            STEM, wait, stage("b", layer("b"), lambda state, h: (h[0], state[1])),
            stage("short", layer("short", 1), lambda state, h: (torch.tanh(state[0] + h[0]),)), HEAD,
        ],
    })  # fmt: skip


def gated(seed: int = 0) -> Case:
    """A gate beside a value, concatenated with the input of both, and a second one around a layer."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        joined = torch.cat([torch.sigmoid(net.gate(x)) * torch.tanh(net.value(x)), x], 1)
        return net.head(torch.cat([torch.tanh(net.mix(joined)), x], 1))

    model = make(forward, seed, stem=(4, 3), gate=(3, 4), value=(3, 4), mix=(7, 3), head=(6, 3))
    mix = stage("mix", layer("mix"), lambda state, h: (torch.cat([torch.tanh(h[0]), state[1]], 1),))

    def join(gate: Tensor, value: Tensor, x: Tensor) -> State:
        return torch.cat([gate * torch.tanh(value), x], 1), x

    both = stage("gate value", readers("gate", "value"), lambda state, h: join(torch.sigmoid(h[0]), h[1], state[0]))
    apart = [
        stage("gate", layer("gate"), lambda state, h: (torch.sigmoid(h[0]), state[0])),
        stage("value", layer("value", 1), lambda state, h: join(state[0], h[0], state[1])),
    ]
    return Case(model, (4,), everywhere([STEM, both, mix, HEAD]) | {"sequential": [STEM, *apart, mix, HEAD]})


def attention(seed: int = 0) -> Case:
    """One head over three tokens, with a shortcut; keys without bias, which the softmax would not see."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        scores = torch.softmax(net.q(x) @ net.k(x).transpose(1, 2), -1)
        return net.head(torch.tanh(x + net.out(scores @ net.v(x))).mean(1))

    model = make(forward, seed, stem=(2, 3), q=(3, 2), k=(3, 2, False), v=(3, 4), out=(4, 3), head=(3, 3))
    rest = [stage("out", layer("out"), lambda state, h: (torch.tanh(state[1] + h[0]).mean(1),)), HEAD]

    def scores(q: Tensor, k: Tensor) -> Tensor:
        return torch.softmax(q @ k.transpose(1, 2), -1)

    together = stage("q k- v", readers("q", "k", "v"), lambda state, h: (scores(h[0], h[1]) @ h[2], state[0]))
    apart = [
        stage("q", layer("q"), lambda state, h: (h[0], state[0])),
        stage("k-", layer("k", 1), lambda state, h: (scores(state[0], h[0]), state[1])),
        stage("v", layer("v", 1), lambda state, h: (state[0] @ h[0], state[1])),
    ]
    return Case(model, (3, 2), everywhere([STEM, together, *rest]) | {"sequential": [STEM, *apart, *rest]})


def conv_residual(seed: int = 0, training: bool = True) -> Case:
    """A residual block of 3 × 3 convolutions with batch-norm; each convolution and each norm is a stage."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.relu(net.n0(net.c0(x)))
        y = torch.relu(net.n1(net.c1(x)))
        return net.head(torch.relu(x + net.n2(net.c2(y))).mean((2, 3)))

    conv3, bn = partial(conv, bias=False), partial(partial, BatchNorm2d)
    model = make(
        forward, seed, c0=conv3(1, 2), n0=bn(2), c1=conv3(2, 3), n1=bn(3), c2=conv3(3, 2), n2=bn(2), head=(2, 3)
    ).train(training)

    def weights(name: str) -> Outputs:
        return lambda state, p: (F.conv2d(state[0], p[f"{name}.weight"], padding=1),)

    def normalise(name: str) -> Outputs:
        def apply(state: State, p: Params) -> State:
            x, shape = state[0], (1, -1, 1, 1)
            mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
            if not training:
                mean, variance = torch.zeros_like(mean), torch.ones_like(variance)
            x = (x - mean.reshape(shape)) / (variance.reshape(shape) + 1e-5).sqrt()
            return (x * p[f"{name}.weight"].reshape(shape) + p[f"{name}.bias"].reshape(shape),)

        return apply

    def carry(state: State, h: State) -> State:
        return h[0], state[-1]

    return Case(model, (1, 4, 4), everywhere([
        stage("c0-", weights("c0")), stage("n0", normalise("n0"), lambda state, h: (torch.relu(h[0]),)),
        stage("c1-", weights("c1"), carry),
        stage("n1", normalise("n1"), lambda state, h: (torch.relu(h[0]), state[-1])),
        stage("c2-", weights("c2"), carry),
        stage("n2", normalise("n2"), lambda state, h: (torch.relu(state[-1] + h[0]).mean((2, 3)),)), HEAD,
    ]))  # fmt: skip


CASES: dict[str, Callable[[], Case]] = {"residual_relu": lambda: residual(act=torch.relu)} | {
    build.__name__: build for build in (mlp, residual, projection, gated, attention)
}
