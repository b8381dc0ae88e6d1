"""What benchmarks/robustness.py compares: tasks (a network, its data and batch size) and training methods."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import torch_step
from digit_images import Images, digits, mnist_5k
from networks import DigitsNet, ResidualTwos, SmallViT, small_resnet, tanh_mlp
from torch import Tensor, nn

from gtddp_compile import FOOF, CompiledOptimizer, Geometric, Sketch, compile_optimizer
from gtddp_compile.methods.curvature import updates
from gtddp_compile.options import SUGGESTED

RATES = tuple(float(f"{digit}e{power}") for power in range(-5, 4) for digit in (1, 3))
"""What a sweep may come to: every rate is about three times the one before."""
LOSS = nn.CrossEntropyLoss()
Step = Callable[[Tensor, Tensor], Tensor]


# --- tasks ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A network on a data set.

    Attributes:
        name: key.
        build: the network, random weights.
        batch, steps: samples a step, steps of a run.
        every: steps between evaluations.
        load: the images.
        sample: training images that the train loss is taken over (0: all).
        seeds: of the default and of the rivals; other methods have three at most.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    steps: int
    every: int
    load: Callable[[], Images] = digits
    sample: int = 0
    seeds: int = 3


TASKS = {
    task.name: task
    for task in (
        Task("digits-128", DigitsNet, 128, 120, 2, seeds=5),
        Task("digits-32", DigitsNet, 32, 360, 5, seeds=5),
        Task("digits-8", DigitsNet, 8, 1440, 10, seeds=5),
        Task("resnet-64", small_resnet, 64, 132, 2),
        Task("vit-64", SmallViT, 64, 480, 10),
        Task("digits-512", DigitsNet, 512, 60, 2, seeds=5),
        Task("residual-mlp-64", lambda: ResidualTwos(64, 48, 6), 64, 240, 4),
        Task("mnist-5k-128", lambda: DigitsNet(16, 28), 128, 240, 4, mnist_5k, 1000),
        Task("tanh-30-64", lambda: tanh_mlp(64, 48, 30), 64, 200, 5),
    )
}


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: key, as tables show it.
        optim: class of torch.optim; ``None``: ``compile_optimizer``.
        options: of either.
        rates: learning rates to begin a sweep with; none: nothing is tuned.
        ramp: steps after which inertia is half of what it tends to; ``None``: the package's.
    """

    name: str
    optim: type[torch.optim.Optimizer] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    ramp: float | None = None

    def make(self, model: nn.Module, example: Tensor, rate: float | None) -> Step:
        """One training step on this model."""
        options = self.options if rate is None else {**self.options, "lr": rate}
        if self.optim is None:
            optimizer = compile_optimizer(model, example, loss=LOSS, on_nonfinite="skip", **options)
            return optimizer.step if self.ramp is None else ramped(optimizer, self.ramp)
        return torch_step(model, self.optim(model.parameters(), **options), LOSS)


def ramped(optimizer: CompiledOptimizer, ramp: float) -> Step:
    """Steps of an inertia that grows otherwise than the package's, which has no option for it."""

    def step(x: Tensor, y: Tensor) -> Tensor:
        own, updates.RAMP = updates.RAMP, ramp
        try:
            return optimizer.step(x, y)
        finally:
            updates.RAMP = own

    return step


LIKE_DEFAULT = {**SUGGESTED["foof"], "lr": FOOF().lr, "damping": FOOF().damping}
"""FOOF's settings, for K-FAC; refresh periods are the same anyway."""


def ours(name: str, *rates: float, **options: Any) -> Method:
    """A compiled optimizer."""
    return Method(name, None, options, rates)


RIVALS = (
    Method("torch SGD Nesterov", torch.optim.SGD, {"momentum": 0.9, "nesterov": True}, (0.01, 0.03, 0.1, 0.3)),
    Method("torch Adam", torch.optim.Adam, {}, (1e-3, 3e-3, 0.01, 0.03)),
)
DEFAULT = ours("default")
METHODS = {
    method.name: method
    for method in (
        DEFAULT,
        *RIVALS,
        ours("lr / 3", lr=1.0),
        ours("lr × 3", lr=9.0),
        ours("damping 0.01", damping=0.01),
        ours("damping 1", damping=1.0),
        ours("inertia 0", inertia=0.0),
        ours("inertia 0.7", inertia=0.7),
        Method("inertia at once", ramp=1e-9),
        Method("inertia, ramp 1", ramp=1.0),
        Method("inertia, ramp 10", ramp=10.0),
        *(ours(f"aim {aim} flat", terminal=Geometric(aim)) for aim in (0.1, 0.3, 1.0, 2.0)),
        ours("aim 0.6 B/(B + 16)", terminal=Geometric(0.6, half=16.0)),
        ours("refresh 1", refresh=1, stat_every=1),
        ours("kfac damping 0.1", curvature="kfac", **LIKE_DEFAULT),
        ours("kfac damping 0.01", curvature="kfac", **{**LIKE_DEFAULT, "damping": 0.01}),
        ours("sgd linear", 0.1, 0.3, 1.0, 3.0, curvature="sgd"),
        ours("adam linear", 1e-3, 3e-3, 0.01, 0.03, curvature="adam"),
        ours("nonlinear", rollout="nonlinear"),
        ours("open", feedback="open"),
        ours("exact Γ", gram="exact"),
        ours("Γ of 64 columns", gram=Sketch(64)),
    )
}
"""By name."""
