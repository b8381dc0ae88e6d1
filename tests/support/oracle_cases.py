"""Settings, couplings and batches for the oracle and for the package."""

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


def arguments(setting: str, options: Options) -> dict[str, Any]:
    """The package's words for a setting and the oracle's options; the oracle rolls out on the network itself."""
    name, keywords = SETTINGS[setting]
    loss = torch.nn.CrossEntropyLoss(reduction=options.reduction)
    return {
        "loss": loss, "curvature": name, "coupling": options.coupling, "recursion": options.recursion,
        "feedback": options.feedback, "feedback_clip": options.clip, "terminal": options.terminal,
        "rollout": "nonlinear", **keywords,
    }  # fmt: skip


@dataclass
class Base:
    """A base method written a second time: flat controls, one memory a stage. ``metric`` is asked before ``update``."""

    kind: str
    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    alpha: float = 0.99
    centered: bool = False
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    memory: dict[tuple[str, int], Any] = field(default_factory=dict)

    def linear(self, u: Tensor) -> Tensor:
        return (0.0 if self.kind == "adamw" else self.weight_decay) * u

    def average(self, name: str, t: int, beta: float, new: Tensor) -> Tensor:
        self.memory[name, t] = beta * self.memory.get((name, t), torch.zeros_like(new)) + (1 - beta) * new
        return self.memory[name, t]

    def metric(self, t: int, q_u: Tensor) -> Tensor:
        count = self.memory["count", t] = self.memory.get(("count", t), 0) + 1
        if self.kind == "sgd":
            return torch.full_like(q_u, 1 / self.lr)
        beta = self.alpha if self.kind == "rmsprop" else self.betas[1]
        second = self.average("second", t, beta, q_u**2)
        if self.centered:
            second = second - self.average("mean", t, beta, q_u) ** 2
        second = second if self.kind == "rmsprop" else second / (1 - beta**count)
        self.memory["root", t] = second.sqrt() + self.eps
        return self.memory["root", t] / self.lr

    def update(self, t: int, u: Tensor, g: Tensor) -> Tensor:
        if self.kind in ("adam", "adamw"):
            first = self.average("first", t, self.betas[0], g) / (1 - self.betas[0] ** self.memory["count", t])
            decayed = self.weight_decay * u if self.kind == "adamw" else 0.0
            return -self.lr * (first / self.memory["root", t] + decayed)
        step = g / self.memory["root", t] if self.kind == "rmsprop" else g
        if self.momentum:
            kept = self.memory["momentum", t] = self.momentum * self.memory.get(("momentum", t), 0.0) + step
            step = step + self.momentum * kept if self.nesterov else kept
        return -self.lr * step


BASES: dict[str, Callable[..., Base]] = {name: partial(Base, name) for name in ("sgd", "rmsprop", "adam", "adamw")}
