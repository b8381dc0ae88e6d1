"""Programs that are written to ``.json``."""

from typing import Any

import torch
from torch import nn

from gtddp_compile import Geometric, MonteCarlo, compile_optimizer
from support.architectures import Example
from support.networks import mlp


def compiled(example: Example, **options: Any) -> Any:
    options = {"loss": nn.CrossEntropyLoss(), "curvature": "adam", "lr": 0.02, **options}
    return compile_optimizer(example.model, example.inputs, **options)


def small() -> Example:
    case = mlp()
    return Example(case.model, (case.batch(0)[0],))


SETTINGS: dict[str, dict[str, Any]] = {
    "groups": {"coupling": 3, "feedback_clip": None, "curvature": "sgd", "weight_decay": 0.1},
    "paper": {"coupling": "block", "recursion": "printed", "curvature": "rmsprop"},
    "base": {"feedback": False, "curvature": "adamw"},
    "schedule": {"schedule": {"a": 0, "b": 1, "c": 2}},
    "sampled": {"terminal": MonteCarlo(2)},
    "aimed": {"terminal": Geometric(2.0, own=4.0)},
    "loss": {"loss": nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1)},
    "tensor lr": {"curvature": "sgd", "lr": torch.tensor(0.1)},
}
