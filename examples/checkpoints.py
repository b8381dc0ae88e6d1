"""Save a run and go on with it, bit for bit: by torch.save, or by safetensors, which stores nothing but tensors.

python examples/checkpoints.py
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from plain_loop import Residual, moons
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from gtddp_compile import CompiledOptimizer, compile_optimizer

# --- torch.save -------------------------------------------------------------------------------------------------------


def save(path: Path, model: nn.Module, optimizer: CompiledOptimizer) -> None:
    """Model, optimizer and the random generator (dropout draws from it)."""
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, path
    )


def load(path: Path, model: nn.Module, optimizer: CompiledOptimizer) -> None:
    """Into a model and an optimizer that were built alike."""
    found = torch.load(path, weights_only=True)
    model.load_state_dict(found["model"])
    optimizer.load_state_dict(found["optimizer"])
    torch.set_rng_state(found["random"])


# --- safetensors ------------------------------------------------------------------------------------------------------


def save_tensors(path: Path, model: nn.Module, optimizer: CompiledOptimizer) -> None:
    """The same; tensors by name, everything that is none (options, numbers in the state) as JSON in the header."""
    stored = optimizer.state_dict()
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    numbers: dict[str, Any] = {}
    for index, entry in stored["state"].items():
        for key, value in entry.items():
            (tensors if isinstance(value, torch.Tensor) else numbers)[f"state/{index}/{key}"] = value
    tensors["random"] = torch.get_rng_state()
    header = {"groups": json.dumps(stored["param_groups"]), "numbers": json.dumps(numbers)}
    # Cloned: tied parameters share memory, which the format does not have.
    save_file({name: value.detach().clone().contiguous() for name, value in tensors.items()}, path, metadata=header)


def load_tensors(path: Path, model: nn.Module, optimizer: CompiledOptimizer) -> None:
    """Into a model and an optimizer that were built alike."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = file.metadata()
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **json.loads(header["numbers"])}.items():
        if name.startswith("state/"):
            _, index, key = name.split("/", 2)
            state.setdefault(int(index), {})[key] = value
    prefix = "model/"
    model.load_state_dict({name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)})
    optimizer.load_state_dict({"state": state, "param_groups": json.loads(header["groups"])})
    torch.set_rng_state(tensors["random"])


def main() -> None:
    batches, losses = moons(), []
    with tempfile.TemporaryDirectory() as folder:
        for seed, saving, loading in ((0, save, None), (1, save_tensors, load), (2, None, load_tensors)):
            torch.manual_seed(seed)  # every model starts elsewhere; what is loaded is what counts
            model = Residual()
            optimizer = compile_optimizer(model, batches[0][0], loss=nn.CrossEntropyLoss(), curvature="ekfac", lr=0.05)
            if loading is not None:
                loading(Path(folder) / f"run{seed - 1}", model, optimizer)
            losses += [float(optimizer.step(x, y)) for x, y in batches]
            if saving is not None:
                saving(Path(folder) / f"run{seed}", model, optimizer)
    print(f"three runs, one training: loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
