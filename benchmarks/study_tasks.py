"""What the studies train: a network, its data, loss, batch and target. Nothing is downloaded but MNIST's images."""

from __future__ import annotations

import math
import pydoc_data.topics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from digit_images import Images, digits, mnist_5k
from networks import GPT, DigitsNet, ResidualTwos, SmallViT, small_resnet, tanh_mlp
from sklearn.datasets import load_diabetes
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "pde"))
import poisson

Batch = tuple[Any, ...]
"""What a step takes: inputs and targets; of Poisson's equation the sets of points alone."""
CLASSES = nn.CrossEntropyLoss()
Score = tuple[float, float]
"""Mean loss and accuracy; the accuracy of a regression is not a number."""


@dataclass(frozen=True)
class Data:
    """What a task trains on and is scored by.

    Attributes:
        train, valid: inputs and targets.
        draw: a fresh batch of so many samples, where samples are made and not kept.
    """

    train: Batch
    valid: Batch
    draw: Callable[[torch.Generator, int], Batch] | None = None

    def batches(self, size: int, seed: int) -> Iterator[Batch]:
        """The batches of a run: epochs in an order of its own, what is left over dropped."""
        drawn = torch.Generator().manual_seed(seed)
        while True:
            if self.draw is not None:
                yield self.draw(drawn, size)
                continue
            x, y = self.train
            for index in torch.randperm(len(y), generator=drawn).split(size):
                if len(index) == size:
                    yield x[index], y[index]


@dataclass(frozen=True)
class Task:
    """A network on a data set.

    Attributes:
        name: key.
        build: the network, random weights.
        batch, steps: samples a step, steps of a run.
        every: steps between evaluations.
        load: the data.
        target: of the mean loss, in evaluation mode, over training data; of ``watch`` "valid" over validation data.
        loss: mean loss of a batch (for torch.optim), or one loss a sample.
        sample: training samples that the train loss is taken over (0: all).
        watch: "train" or "valid".
        seeds: of the default and of the rivals; other methods have three at most.
        says: a line for the page.
    """

    name: str
    build: Callable[[], nn.Module]
    batch: int
    steps: int
    every: int
    load: Callable[[], Data]
    target: float = 0.05
    loss: Callable[[Any, Any], Tensor] = CLASSES
    sample: int = 0
    watch: str = "train"
    seeds: int = 5
    says: str = ""

    def objective(self, model: nn.Module, *batch: Any) -> Tensor:
        """Mean loss of a batch."""
        if isinstance(model, poisson.Terms):
            return pinn_loss(model, *batch)
        x, y = batch
        return self.loss(model(x), y).mean()

    @torch.no_grad()
    def score(self, model: nn.Module, part: Batch) -> Score:
        """Mean loss (infinite if it is not a number) and accuracy, in evaluation mode."""
        x, y = part
        if isinstance(model, poisson.Terms):
            return float((model.net(x)[:, 0] - y).norm() / y.norm()), math.nan
        model.eval()
        outputs = torch.cat([model(piece) for piece in x.split(256)])
        model.train()
        loss = float(self.loss(outputs, y).mean())
        hits = y.dtype == torch.int64 and float((outputs.argmax(-1) == y).float().mean())
        return loss if math.isfinite(loss) else math.inf, math.nan if hits is False else hits

    def parts(self, data: Data) -> tuple[Batch, Batch]:
        """What is scored: some training data, and the validation data."""
        x, y = data.train
        return (x[: self.sample or None], y[: self.sample or None]), data.valid


# --- images -----------------------------------------------------------------------------------------------------------


def images(load: Callable[[], Images]) -> Callable[[], Data]:
    """Grey images as (B, 1, side, side), and labels."""

    @lru_cache(maxsize=1)
    def loaded() -> Data:
        found = load()
        side = math.isqrt(found.train[0][0].numel())
        train, valid = ((x.view(-1, 1, side, side), y) for x, y in (found.train, found.valid))
        return Data(train, valid)

    return loaded


def codes() -> Data:
    """MNIST's flat images, to be reconstructed."""
    found = mnist_5k()
    return Data(*((x, x) for x, _ in (found.train, found.valid)))


def noisy() -> Data:
    """scikit-learn's digits with noise of deviation 0.5, drawn anew for every batch, and without."""
    found = digits()
    train, valid = (x.view(-1, 1, 8, 8) for x, _ in (found.train, found.valid))

    def noise(drawn: torch.Generator, clean: Tensor) -> Batch:
        return clean + 0.5 * torch.randn(clean.shape, generator=drawn), clean

    def draw(drawn: torch.Generator, size: int) -> Batch:
        return noise(drawn, train[torch.randint(len(train), (size,), generator=drawn)])

    fixed = torch.Generator().manual_seed(5)
    return Data(noise(fixed, train), noise(fixed, valid), draw)


def reconstruction(outputs: Tensor, images: Tensor) -> Tensor:
    """Cross-entropy of pixels in [0, 1], their mean, (B,)."""
    return F.binary_cross_entropy_with_logits(outputs, images, reduction="none").mean(1)


def squares(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error of a sample, (B,)."""
    return (outputs - targets).square().flatten(1).mean(1)


class StemmedResNet(nn.Sequential):
    """ResNet's basic blocks behind a stem of stride 2, for images of 28 pixels; ``norm=False``: with biases instead."""

    def __init__(self, width: int = 16, *, norm: bool) -> None:
        net = small_resnet(width)
        net[0] = nn.Conv2d(1, width, 3, 2, 1, bias=not norm)
        if not norm:
            for parent in list(net.modules()):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.BatchNorm2d):
                        setattr(parent, name, nn.Identity())
                    elif isinstance(child, nn.Conv2d):
                        child.bias = child.bias if child.bias is not None else nn.Parameter(torch.zeros(width))
        super().__init__(*net)


def glorot(net: nn.Sequential) -> nn.Sequential:
    """With the initial weights that tanh layers keep the size of values by; torch's own shrink them by 0.6 a layer."""
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.xavier_normal_(layer.weight)
            nn.init.zeros_(layer.bias)
    return net


def autoencoder(*sizes: int) -> nn.Sequential:
    """Linear layers there and back with tanh between them; the code is linear. Glorot's initial weights."""
    widths, layers = (*sizes, *sizes[-2::-1]), []
    for index in range(len(widths) - 1):
        layers += [nn.Linear(widths[index], widths[index + 1]), nn.Tanh()]
    layers[2 * len(sizes) - 3] = nn.Identity()
    return glorot(nn.Sequential(*layers[:-1]))


class UNet(nn.Module):
    """Two levels down and up again, concatenated, for images of 8 pixels."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        w = width
        self.enter, self.down1, self.down2 = (nn.Conv2d(i, o, 3, s, 1) for i, o, s in
                                              ((1, w, 1), (w, 2 * w, 2), (2 * w, 2 * w, 2)))  # fmt: skip
        self.up2, self.up1, self.leave = (nn.Conv2d(i, o, 3, 1, 1) for i, o in ((4 * w, w), (2 * w, w), (w, 1)))

    def forward(self, x: Tensor) -> Tensor:
        full = torch.relu(self.enter(x))
        half = torch.relu(self.down1(full))
        low = torch.relu(self.down2(half))
        half = torch.relu(self.up2(torch.cat([F.interpolate(low, scale_factor=2.0), half], 1)))
        full = torch.relu(self.up1(torch.cat([F.interpolate(half, scale_factor=2.0), full], 1)))
        return self.leave(full)


# --- text, sequences, tables, an equation -----------------------------------------------------------------------------

LENGTH = 16
"""Characters of context."""


@lru_cache(maxsize=1)
def python_text() -> Data:
    """Python's own language reference, as ``help()`` has it: samples of ``LENGTH`` characters, targets the next."""
    text = "\n".join(pydoc_data.topics.topics[name] for name in sorted(pydoc_data.topics.topics))
    codes = torch.tensor([min(ord(character), 127) for character in text])
    rows = codes[: len(codes) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(2020))]
    return Data(*((part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in (rows[128:], rows[:128])))


def characters(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of a sequence, mean over positions, (B,)."""
    return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape).mean(1)


class Recurrent(nn.Module):
    """A tanh recurrent network that answers at the end of a sequence."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.cells, self.head = nn.RNN(2, width, batch_first=True), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cells(x)[0][:, -1])[:, 0]


def adding(length: int = 16) -> Data:
    """The adding problem: the sum of the two numbers of a sequence that are marked."""

    def draw(drawn: torch.Generator, size: int) -> Batch:
        numbers, marks = torch.rand(size, length, generator=drawn), torch.zeros(size, length)
        first, second = (torch.randint(length // 2, (size, 1), generator=drawn) for _ in range(2))
        marks.scatter_(1, first, 1.0).scatter_(1, second + length // 2, 1.0)
        return torch.stack([numbers, marks], 2), (numbers * marks).sum(1)

    train, valid = (draw(torch.Generator().manual_seed(seed), 1000) for seed in (6, 7))
    return Data(train, valid, draw)


def diabetes() -> Data:
    """scikit-learn's diabetes data, columns of mean 0 and deviation 1: 342 patients to train on, 100 others."""
    bunch = load_diabetes()
    x, y = (torch.tensor(part, dtype=torch.float32) for part in (bunch.data, bunch.target))
    x, y = (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(2020))
    return Data((x[order[:342]], y[order[:342], None]), (x[order[342:]], y[order[342:], None]))


def table_net() -> nn.Sequential:
    """Two hidden layers for ten columns."""
    return nn.Sequential(nn.Linear(10, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))


def pinn() -> nn.Module:
    """Poisson's equation on the square, by a network smaller than the published one."""
    terms = poisson.problem(2).terms
    return poisson.Terms(poisson.network(2, 32, 32, 1), terms.terms)


def pinn_points() -> Data:
    """Points drawn anew for every step, a fifth of them on the boundary; scored by the relative error at others."""

    def draw(drawn: torch.Generator, size: int) -> Batch:
        x, b = torch.rand(size, 2, generator=drawn, dtype=torch.float64), poisson.boundary(drawn, size // 5, 2)
        right = -2 * math.pi**2 * poisson.plane(x)
        return ({"interior": (x, right), "boundary": (b, poisson.plane(b))},)

    where = torch.rand(2000, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    found = where, poisson.plane(where)
    return Data(found, found, draw)


def pinn_loss(model: poisson.Terms, points: dict[str, tuple[Tensor, Tensor]]) -> Tensor:
    """As ``Terms`` has it, each term at its own points alone."""
    terms = [(model.terms[name](model.net, x).flatten(), y) for name, (x, y) in points.items()]
    return torch.stack([0.5 * (left - right).square().mean() for left, right in terms]).sum()


# --- the tasks --------------------------------------------------------------------------------------------------------

TASKS = {
    task.name: task
    for task in (
        Task("digits-128", DigitsNet, 128, 120, 1, images(digits), says="the paper's convolutional network on digits"),
        Task("digits-8", DigitsNet, 8, 1440, 5, images(digits), says="the same, small batches"),
        Task("mnist-bn-64", lambda: StemmedResNet(norm=True), 64, 234, 3, images(mnist_5k), 0.05, sample=500,
             says="two residual blocks with batch-norm on MNIST-5k"),
        Task("mnist-plain-64", lambda: StemmedResNet(norm=False), 64, 312, 4, images(mnist_5k), 0.05, sample=500,
             says="the same without normalisation"),
        Task("autoencoder-128", lambda: autoencoder(784, 400, 200, 100, 30), 128, 300, 1, codes, 0.2, reconstruction,
             500, says="784-400-200-100-30 and back, tanh, MNIST-5k's pixels by cross-entropy"),
        Task("tanh-40-64", lambda: glorot(tanh_mlp(64, 48, 40)), 64, 400, 5, images(digits), 0.3, sample=500,
             says="forty tanh layers with neither normalisation nor shortcuts on digits"),
        Task("characters-16", lambda: GPT(128, LENGTH, 128, 4, 4), 16, 240, 5, python_text, 2.4, characters, 64,
             "valid", says="a causal transformer, 4 layers, 128 wide, 16 characters of Python's language reference"),
        Task("poisson-300", pinn, 300, 900, 5, pinn_points, 0.05, watch="valid",
             says="Poisson's equation on the square, two layers of 32 tanh, float64; the target is the relative error"),
        Task("adding-64", Recurrent, 64, 1000, 2, adding, 0.01, nn.MSELoss(), 200, "valid",
             says="a tanh recurrent network on the adding problem, 16 numbers"),
        Task("denoise-64", UNet, 64, 264, 2, noisy, 0.04, squares, 200, "valid",
             says="a U-shaped network that takes noise from digits"),
        Task("diabetes-32", table_net, 32, 200, 1, diabetes, 0.5, squares, 0, "valid",
             says="regression on scikit-learn's diabetes data, two layers of 64 tanh"),
        Task("digits-32", DigitsNet, 32, 360, 1, images(digits), says="as digits-128"),
        Task("resnet-64", small_resnet, 64, 132, 1, images(digits), seeds=3, says="batch-normed residual blocks"),
        Task("vit-64", SmallViT, 64, 480, 5, images(digits), seeds=3, says="a vision transformer on digits"),
        Task("residual-mlp-64", lambda: ResidualTwos(64, 48, 6), 64, 240, 2, images(digits), seeds=3,
             says="twelve residual layers without normalisation on digits"),
        Task("mnist-5k-128", lambda: DigitsNet(16, 28), 128, 240, 2, images(mnist_5k), sample=1000, seeds=3,
             says="the paper's network on MNIST-5k"),
        Task("digits-512", DigitsNet, 512, 60, 2, images(digits)),
        Task("tanh-30-64", lambda: tanh_mlp(64, 48, 30), 64, 200, 5, images(digits), seeds=3),
    )
}  # fmt: skip
"""By name."""

RACED = tuple(task for task in TASKS.values() if task.says)
"""Those of benchmarks/time_to_target.py."""

DECIDED = tuple(TASKS[name] for name in (
    "digits-128", "digits-32", "digits-8", "resnet-64", "vit-64", "digits-512", "residual-mlp-64", "mnist-5k-128",
    "tanh-30-64"))  # fmt: skip
"""Those of benchmarks/robustness.py."""
