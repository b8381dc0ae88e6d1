"""What benchmarks/wall_clock.py compares: data sets with their networks, and training methods with their grids."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from common import torch_step
from digit_images import Images, digits, mnist_5k
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

BATCH = 128
LOSS = nn.CrossEntropyLoss()
Step = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Data:
    """A data set with its network.

    Attributes:
        name: key.
        load: the images.
        side, width: of the network.
        every: steps between evaluations.
        sample: training images that the train loss is taken over (0: all).
        most: steps after which a run is given up.
        seeds: of the runs with the best rates.
    """

    name: str
    load: Callable[[], Images]
    side: int
    width: int
    every: int
    sample: int
    most: int
    seeds: tuple[int, ...]


DATA = {
    data.name: data
    for data in (
        Data("digits", digits, 8, 16, 5, 0, 300, (0, 1, 2)),
        Data("mnist-5k", mnist_5k, 28, 8, 5, 1000, 500, (0, 1)),
    )
}


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: as tables show it.
        side: ``"torch"``, ``"asdl"`` or ``"ours"``.
        rates: grid of learning rates for the sweep.
        options: of the optimizer, or of ``compile_optimizer``.
    """

    name: str
    side: str
    rates: tuple[float, ...]
    options: dict[str, Any] = field(default_factory=dict)


KRONECKER = {"damping": 1e-2, "refresh": 10, "stat_every": 10}
"""Of our K-FAC and EK-FAC; the peer's are the same (its ``preconditioner_upd_interval``)."""

KFAC_HIGH = (0.1, 0.3, 1.0, 3.0, 10.0)
HIGH, LOW = (0.1, 0.3, 1.0, 3.0, 10.0), (3e-3, 1e-2, 3e-2, 0.1)
PEER = (1e-3, 3e-3, 0.01, 0.03)
METHODS = {
    method.name: method
    for method in (
        Method("torch SGD", "torch", HIGH, {"kind": "SGD"}),
        Method("torch SGD, momentum 0.9", "torch", (0.03, 0.1, 0.3, 1.0), {"kind": "SGD", "momentum": 0.9}),
        Method("torch RMSprop", "torch", (1e-3, *LOW[:3]), {"kind": "RMSprop"}),
        Method("torch Adam", "torch", LOW, {"kind": "Adam"}),
        Method("ASDL K-FAC", "asdl", PEER),
        Method("ASDL K-FAC, averaged", "asdl", PEER, {"ema_decay": 0.05}),
        Method("ours, sgd", "ours", HIGH, {"curvature": "sgd"}),
        Method("ours, sgd, momentum 0.9", "ours", HIGH[:4], {"curvature": "sgd", "momentum": 0.9}),
        Method("ours, rmsprop", "ours", LOW, {"curvature": "rmsprop"}),
        Method("ours, adam", "ours", (*LOW, 0.3), {"curvature": "adam"}),
        Method("ours, adam, coarse", "ours", LOW, {"curvature": "adam", "gram": "coarse"}),
        Method("ours, kfac", "ours", KFAC_HIGH, {"curvature": "kfac", **KRONECKER}),
        Method("ours, kfac, open", "ours", KFAC_HIGH, {"curvature": "kfac", **KRONECKER, "feedback": "open"}),
        Method("ours, ekfac", "ours", KFAC_HIGH, {"curvature": "ekfac", **KRONECKER}),
        Method("ours, kfac, feedback off", "ours", PEER,
               {"curvature": "kfac", **KRONECKER, "feedback": False}),
    )
}  # fmt: skip


PAIRS = {
    "sgd": ("torch SGD", "ours, sgd"),
    "sgd, momentum 0.9": ("torch SGD, momentum 0.9", "ours, sgd, momentum 0.9"),
    "rmsprop": ("torch RMSprop", "ours, rmsprop"),
    "adam": ("torch Adam", "ours, adam"),
    "kfac (ASDL's without)": ("ASDL K-FAC", "ours, kfac"),
    "kfac (ours without)": ("ours, kfac, feedback off", "ours, kfac"),
}
"""Without and with feedback, by base method."""


def make(method: Method, rate: float, model: nn.Module, example: Tensor) -> Step:
    """One training step of a method on this model."""
    options = dict(method.options)
    if method.side == "ours":
        return compile_optimizer(model, example, loss=LOSS, lr=rate, **options).step
    if method.side == "asdl":
        return _peer(model, rate, **options)
    optimizer = getattr(torch.optim, options.pop("kind"))(model.parameters(), lr=rate, **options)
    return torch_step(model, optimizer, LOSS)


@contextmanager
def _unmarked(*_: object, **__: object) -> Iterator[None]:
    """ASDL marks ranges for a profiler of CUDA builds; elsewhere that raises."""
    yield


def _peer(model: nn.Module, rate: float, **options: float) -> Step:
    """ASDL's K-FAC with the empirical Fisher matrix, damping and refresh period as ours.

    By default its factors are those of the last batch it looked at; its ``ema_decay`` is the weight of the new ones, so
    that 0.05 stands for our ``stat_decay=0.95``.
    """
    torch.cuda.nvtx.range = _unmarked
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    config = PreconditioningConfig(data_size=BATCH, damping=1e-2, preconditioner_upd_interval=10, **options)
    maker = KfacGradientMaker(model, config, fisher_type="fisher_emp")

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        maker.setup_loss_call(LOSS, maker.setup_model_call(model, x), y)
        _, loss = maker.forward_and_backward()
        optimizer.step()
        return loss.detach()

    return step
