"""Settings, couplings and batches for the oracle and for the package."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.networks import Case
from support.oracle import Options

TORCH = {"sgd": torch.optim.SGD, "rmsprop": torch.optim.RMSprop, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


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
    "full": Options(),
    "groups": Options(coupling=3),
    "samples": Options(coupling=1),
    "block": Options(coupling="block"),
    "substituted": Options("block", "substituted"),
    "printed": Options("block", "printed"),
    "open": Options(feedback="open"),
    "unclipped": Options(clip=None),
    "sum": Options(coupling=3, reduction="sum"),
    "base": Options(feedback=False),
    "geometric": Options(terminal="geometric"),
    "geometric_groups": Options(coupling=3, terminal="geometric"),
    "geometric_block": Options(coupling="block", terminal="geometric"),
    "geometric_substituted": Options("block", "substituted", terminal="geometric"),
}


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
