"""A network with a shortcut, rewritten by hand as a feedforward one over the augmented state: same game.

The rewritten module carries z = [x, r] from layer to layer; names and values are the same. Nothing
in it is a shortcut any more, so its update comes out of the feedforward derivation: both agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from support.networks import Case, Net, nested, projection, residual
from support.oracle_cases import COUPLINGS, REGIMES, arguments, batches, distance, parameters


def residual_over_z(net: nn.Module, x: Tensor) -> Tensor:
    x = torch.tanh(net.stem(x))
    z = torch.cat([x, x], 1)
    z = torch.cat([torch.tanh(net.a(z[:, :5])), z[:, 5:]], 1)
    return net.head(torch.tanh(z[:, 4:] + net.b(z[:, :4])))


def nested_over_z(net: nn.Module, x: Tensor) -> Tensor:
    z = torch.tanh(net.stem(x))
    z = torch.cat([torch.tanh(net.a(z)), z], 1)
    z = torch.cat([torch.tanh(net.b(z[:, :5])), z], 1)
    inner, outer = z[:, 3:8], z[:, 8:]
    z = torch.cat([torch.tanh(inner + net.c(z[:, :3])), outer], 1)
    return net.head(torch.tanh(z[:, 5:] + net.d(z[:, :5])))


def projection_over_z(net: nn.Module, x: Tensor) -> Tensor:
    """The mapping decides beside the first layer; both read z."""
    z = torch.tanh(net.stem(x))
    z = torch.cat([torch.tanh(net.a(z)), net.short(z)], 1)
    return net.head(torch.tanh(net.b(z[:, :3]) + z[:, 3:]))


def rewritten(case: Case, run: Callable[..., Tensor]) -> nn.Module:
    layers = {
        name: type(layer)(layer.in_features, layer.out_features).double() for name, layer in case.model.named_children()
    }
    module = Net(run, **layers)
    module.load_state_dict(case.model.state_dict())
    return module


@pytest.mark.parametrize("regime", [*REGIMES, "joint"])
@pytest.mark.parametrize("setting", ["momentum", "rmsprop", "adam"])
@pytest.mark.parametrize(
    ("build", "run"), [(residual, residual_over_z), (nested, nested_over_z), (projection, projection_over_z)]
)
def test_same_update(build: Callable[[], Case], run: Callable[..., Tensor], setting: str, regime: str) -> None:
    case = build()
    module = rewritten(case, run)
    data = batches(case, 5)
    options = arguments(setting, COUPLINGS["full" if regime == "joint" else regime])
    if regime == "joint":
        options["rollout"] = "linear"
    first = compile_optimizer(case.model, data[0][0][0], **options)
    second = compile_optimizer(module, data[0][0][0], **options)
    before = parameters(module)
    for (x,), y in data:
        torch.testing.assert_close(first.step(x, y), second.step(x, y), rtol=1e-9, atol=1e-9)
    assert distance(parameters(module), parameters(case.model)) < 1e-9
    assert distance(parameters(module), before) > 1e-3
