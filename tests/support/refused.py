"""Models with something in their forward pass that a test puts there, and what a refusal must say."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from support.compared import torch_step
from support.networks import seeded
from support.recorded import batch

LOSS = nn.CrossEntropyLoss()
TARGETS = torch.arange(6) % 3


@dataclass
class Options:
    """A model's own options."""

    power: ClassVar[int] = 1
    gain: float = 2.0
    masks: list[Tensor] = field(default_factory=list)


class Layer(nn.Module):
    """A layer with something in its forward pass that is put there by a test."""

    shift = 0.0

    def __init__(self, forward: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.options: Any = Options()
        self.fc, self.run = nn.Linear(4, 4), forward
        self.register_buffer("mean", torch.zeros(4))
        self.scale, self.calls, self.state = 2.0, 0, torch.zeros(4)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Model(nn.Module):
    def __init__(self, forward: Callable[[Any, Tensor], Any] = lambda layer, x: layer.fc(x)) -> None:
        super().__init__()
        self.block, self.act, self.out = nn.ModuleList([Layer(forward)]), nn.Tanh(), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.block[0](x)))


def model(forward: Callable[[Any, Tensor], Any] | None = None) -> Any:
    return seeded(lambda: Model() if forward is None else Model(forward))


def compiled(net: nn.Module, inputs: Any = None, **options: Any) -> CompiledOptimizer:
    return compile_optimizer(net, batch(6) if inputs is None else inputs, loss=LOSS, **{"curvature": "sgd", **options})


def everything(opt: CompiledOptimizer, net: nn.Module) -> str:
    """Parameters, buffers, optimizer state and random state, as text."""
    return f"{net.state_dict()} {opt.state_dict()} {torch.get_rng_state().sum()} {net.training}"


def refused(call: Callable[[], Any], *said: str) -> CompileError:
    with pytest.raises(CompileError) as caught:
        call()
    for text in said:
        assert text in str(caught.value), str(caught.value)
    assert caught.value.why and caught.value.remedy
    return caught.value


def expect_the_base_methods_update(
    opt: CompiledOptimizer, net: nn.Module, inputs: Any, size: int = 6, plain: Any = None, loss: Any = F.cross_entropy
) -> None:
    """``plain(*inputs)``: what the model computes, of its own parameters, where it is not asked itself."""
    twin = copy.deepcopy(net)
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    outputs = twin(*given) if plain is None else plain(twin, *given)
    torch_step(torch.optim.SGD(twin.parameters(), lr=0.5), loss(outputs, TARGETS[:size]).mean())
    opt.step(inputs, TARGETS[:size])
    torch.testing.assert_close(net.state_dict(), twin.state_dict(), rtol=0, atol=1e-12)
