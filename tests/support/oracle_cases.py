"""Settings, couplings and batches for the oracle and for the package."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import Case
from support.oracle import Options

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("sgd", {"lr": 0.7}),
    "momentum": ("sgd", {"lr": 0.5, "momentum": 0.8, "weight_decay": 0.05}),
    "nesterov": ("sgd", {"lr": 0.3, "momentum": 0.8, "nesterov": True}),
    "rmsprop": ("rmsprop", {"lr": 0.03, "alpha": 0.9, "weight_decay": 0.02}),
    "centered": ("rmsprop", {"lr": 0.01, "alpha": 0.9, "centered": True, "momentum": 0.5}),
    "adam": ("adam", {"lr": 0.05, "weight_decay": 0.02}),
    "adamw": ("adamw", {"lr": 0.05, "weight_decay": 0.1}),
}


COUPLINGS: dict[str, Options] = {
    "full": Options(), "groups": Options(coupling=3), "samples": Options(coupling=1),
    "block": Options(coupling="block"), "substituted": Options("block", "substituted"),
    "printed": Options("block", "printed"), "open": Options(feedback="open"), "unclipped": Options(clip=None),
    "sum": Options(coupling=3, reduction="sum"), "geometric": Options(terminal="geometric"),
    "geometric_groups": Options(coupling=3, terminal="geometric"),
    "geometric_block": Options(coupling="block", terminal="geometric"),
    "geometric_substituted": Options("block", "substituted", terminal="geometric"),
}  # fmt: skip


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none")


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def batches(case: Case, steps: int) -> list[tuple[tuple[Tensor, ...], Tensor]]:
    return [((x,), y) for x, y in (case.batch(seed) for seed in range(steps))]


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Largest difference of two sets of parameters, relative where the second's are above one."""
    return max(float((left[n] - v).abs().max() / v.abs().max().clamp_min(1)) for n, v in right.items())


REGIMES = ["full", "groups", "block", "substituted", "printed"]


def arguments(setting: str, options: Options) -> dict[str, Any]:
    """The package's words for a setting and the oracle's options; the oracle rolls out on the network itself."""
    name, keywords = SETTINGS[setting]
    loss = torch.nn.CrossEntropyLoss(reduction=options.reduction)
    return {
        "loss": loss,
        "curvature": name,
        "coupling": options.coupling,
        "recursion": options.recursion,
        "feedback": options.feedback,
        "feedback_clip": options.clip,
        "terminal": options.terminal,
        "rollout": "nonlinear",
        **keywords,
    }


# --- base methods written a second time, for the oracle: flat controls, one state a stage ---


@dataclass
class SGD:
    lr: float = 1e-3
    momentum: float = 0.0
    dampening: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    state: dict[int, Tensor] = field(default_factory=dict)

    def linear(self, u: Tensor) -> Tensor:
        return self.weight_decay * u

    def metric(self, t: int, q_u: Tensor) -> Tensor:
        return torch.full_like(q_u, 1 / self.lr)

    def update(self, t: int, u: Tensor, g: Tensor) -> Tensor:
        if not self.momentum:
            return -self.lr * g
        self.state[t] = self.momentum * self.state[t] + (1 - self.dampening) * g if t in self.state else g
        return -self.lr * (g + self.momentum * self.state[t] if self.nesterov else self.state[t])


@dataclass
class RMSprop:
    lr: float = 1e-2
    alpha: float = 0.99
    eps: float = 1e-8
    weight_decay: float = 0.0
    momentum: float = 0.0
    centered: bool = False
    square: dict[int, Tensor] = field(default_factory=dict)
    mean: dict[int, Tensor] = field(default_factory=dict)
    buffer: dict[int, Tensor] = field(default_factory=dict)
    denominator: dict[int, Tensor] = field(default_factory=dict)

    linear = SGD.linear

    def metric(self, t: int, q_u: Tensor) -> Tensor:
        zero = torch.zeros_like(q_u)
        self.square[t] = self.alpha * self.square.get(t, zero) + (1 - self.alpha) * q_u**2
        variance = self.square[t]
        if self.centered:
            self.mean[t] = self.alpha * self.mean.get(t, zero) + (1 - self.alpha) * q_u
            variance = variance - self.mean[t] ** 2
        self.denominator[t] = variance.sqrt() + self.eps
        return self.denominator[t] / self.lr

    def update(self, t: int, u: Tensor, g: Tensor) -> Tensor:
        step = g / self.denominator[t]
        self.buffer[t] = self.momentum * self.buffer.get(t, torch.zeros_like(g)) + step
        return -self.lr * self.buffer[t]


@dataclass
class Adam:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    decoupled: bool = False
    first: dict[int, Tensor] = field(default_factory=dict)
    second: dict[int, Tensor] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)
    denominator: dict[int, Tensor] = field(default_factory=dict)

    def linear(self, u: Tensor) -> Tensor:
        return (0.0 if self.decoupled else self.weight_decay) * u

    def metric(self, t: int, q_u: Tensor) -> Tensor:
        beta = self.betas[1]
        self.count[t] = self.count.get(t, 0) + 1
        self.second[t] = beta * self.second.get(t, torch.zeros_like(q_u)) + (1 - beta) * q_u**2
        self.denominator[t] = (self.second[t] / (1 - beta ** self.count[t])).sqrt() + self.eps
        return self.denominator[t] / self.lr

    def update(self, t: int, u: Tensor, g: Tensor) -> Tensor:
        beta = self.betas[0]
        self.first[t] = beta * self.first.get(t, torch.zeros_like(g)) + (1 - beta) * g
        step = -self.lr * self.first[t] / (1 - beta ** self.count[t]) / self.denominator[t]
        return step - self.lr * self.weight_decay * u if self.decoupled else step


AdamW = partial(Adam, decoupled=True)
BASES: dict[str, Callable[..., Any]] = {"sgd": SGD, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW}
