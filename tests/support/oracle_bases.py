"""Base methods written a second time, for the oracle: flat controls, one state a stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor


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
