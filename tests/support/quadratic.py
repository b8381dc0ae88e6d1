"""Linear dynamics with a quadratic loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from support import networks


def only_biases(model: nn.Module) -> nn.Module:
    """Additive controls: weights are the (time-varying) dynamics, biases decide."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model


def chain() -> nn.Module:
    """``x_{t+1} = A_t x_t + u_t``, four stages of different widths."""
    return only_biases(
        networks.make(lambda net, x: net.d(net.c(net.b(net.a(x)))), a=(4, 3), b=(3, 5), c=(5, 4), d=(4, 2))
    )


def shortcut() -> nn.Module:
    """The same with a waiting state and a coalition: ``A_4 (A_2 A_1 x + A_3 x)`` and their controls."""
    return only_biases(
        networks.make(
            lambda net, x: net.head(net.b(net.a(net.stem(x))) + net.short(net.stem(x)) + net.stem(x)),
            stem=(4, 3), a=(3, 4), b=(4, 3), short=(3, 3), head=(3, 2),
        )
    )  # fmt: skip


def single() -> nn.Module:
    """Linear least squares: one layer, weight and bias."""
    return networks.make(lambda net, x: net.a(x), a=(4, 3))


PROBLEMS = {"single": single, "chain": chain, "shortcut": shortcut}


def data(model: nn.Module, size: int = 6) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(1)
    x = torch.randn(size, 4, dtype=torch.float64, generator=source)
    with torch.no_grad():
        outputs = model(x)
    return x, torch.randn(outputs.shape, dtype=torch.float64, generator=source)
