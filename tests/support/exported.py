"""Exported modules in tests: loaded from their file, and run where there is torch and nothing else."""

import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompiledOptimizer, compile_optimizer
from support.architectures import Example

ALONE = """
import sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
for absent in ("gtddp_compile", "rich", "typer", "pytest"):
    try:
        __import__(absent)
    except ModuleNotFoundError:
        continue
    raise SystemExit(absent + " is here")
"""


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Copies of parameters and buffers by torch's own names."""
    params = {name: value.detach().clone() for name, value in model.named_parameters()}
    return params, {name: value.clone() for name, value in model.named_buffers()}


def torch_only(folder: Path) -> Path:
    """A folder to import from that has torch, what torch requires, and nothing else."""
    folder.mkdir()
    pending, seen = ["torch"], set()
    while pending:
        try:
            distribution = metadata.distribution(pending.pop())
        except metadata.PackageNotFoundError:  # required on another platform
            continue
        if distribution.name not in seen:
            seen.add(distribution.name)
            required = [r for r in distribution.requires or () if "extra ==" not in r and "platform_system ==" not in r]
            pending += [found[0] for found in map(re.compile(r"[\w.-]+").match, required) if found]
            for top in {file.parts[0] for file in distribution.files or () if ".." not in file.parts}:
                if not (link := folder / top).exists():
                    link.symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def run_alone(script: str, *paths: Path) -> str:
    """Run a script by an isolated interpreter that sees the given folders only; its output."""
    text = ALONE.format(path=[str(path) for path in paths]) + script
    done = subprocess.run([sys.executable, "-I", "-S", "-c", text], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest(left: Any, right: Any) -> float:
    """Largest difference of two nested dictionaries of tensors with the same keys."""
    if isinstance(left, Tensor):
        return float((left.detach().double() - right.detach().double()).abs().max()) if left.numel() else 0.0
    if isinstance(left, (int, float)):
        return abs(left - right)
    assert left.keys() == right.keys()
    return max((largest(left[key], right[key]) for key in left), default=0.0)


def targets_for(classes: int, batch: int) -> Tensor:
    return torch.randint(classes, (batch,), generator=torch.Generator().manual_seed(5))


def compiled(example: Example, **options: Any) -> CompiledOptimizer:
    options = {"loss": nn.CrossEntropyLoss(), "curvature": "sgd", "lr": 0.05, **options}
    return compile_optimizer(example.model, example.inputs, **options)


def state_by_name(opt: CompiledOptimizer, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    return {name: dict(opt.state[parameter]) for name, parameter in model.named_parameters() if parameter in opt.state}


def pseudo_huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """A loss of one's own, with a helper."""
    return root(F.mse_loss(outputs, targets, reduction="none").mean(1) + 1)


def root(x: Tensor) -> Tensor:
    return torch.sqrt(x)
