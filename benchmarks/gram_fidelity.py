"""What approximate Gram matrices keep of the update and of the training curve.

Networks on scikit-learn's digits, batch 128: the convolutional one of ``examples/digits.py``, with 16 channels and with
32, a multi-layer perceptron, and a transformer that takes an image's rows for tokens. ``error of w``: the relative
error of a stage's weights against the exact ones, from the same parameters and state, median over stages, at every 5th
step of an exact run. ``loss``: mean over seeds of the train loss after the
epochs, with its standard deviation. ``step``: CPU time of a step against the exact one's, in turns.

    python benchmarks/gram_fidelity.py     what gram_fidelity.csv has not, then the section of docs/performance.md
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from common import Row, interleaved, machines, markdown, measure_missing, write_section
from digit_images import digits
from networks import DigitsNet, TransformerBlock, mlp
from torch import Tensor, nn

from gtddp_compile import Sketch, compile_optimizer

BASES: dict[str, float] = {"sgd": 0.5, "rmsprop": 2e-3, "adam": 3e-3, "ekfac": 0.05}
"""Learning rates at which the base methods train well."""

GRAMS: dict[str, Any] = {
    "exact": "exact", "auto": "auto", "separable": "separable", "Sketch(8)": Sketch(8), "Sketch(32)": Sketch(32),
}  # fmt: skip
KRONECKER = ("exact", "auto")
"""What there is to choose for EK-FAC: its diagonal separated or not."""

BASE, ERROR, LOSS, STEP = "base method", "error of w", "train loss", "step"
"""A row without feedback; what is measured of a row."""

SEEDS, PAIRS, RAW = range(4), 15, Path(__file__).with_suffix(".csv")


class Tokens(nn.Module):
    """A transformer of two blocks; the head reads the tokens' mean."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed, self.position = nn.Linear(8, width), nn.Parameter(0.02 * torch.randn(1, 8, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, 4, False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.head(self.norm(self.blocks(self.embed(rows) + self.position)).mean(1))
        return found


@dataclass(frozen=True)
class Network:
    """A network to train.

    Attributes:
        build: makes it.
        shape: of a sample, as it takes it.
        bases: the base methods that are measured.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    bases: tuple[str, ...] = tuple(BASES)


NETWORKS: dict[str, Network] = {
    "digits": Network(DigitsNet, (1, 8, 8)),
    "digits, 32": Network(lambda: DigitsNet(32), (1, 8, 8), ("sgd", "adam")),
    "mlp": Network(lambda: mlp((64, 256, 256, 256, 10)), (64,)),
    "tokens": Network(Tokens, (8, 8), ("sgd", "adam")),
}

EPOCHS, BATCH = 5, 128


class Flat(nn.Module):
    """Images as a network takes them: flat, as one channel, or row by row."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.body, self.shape = network.build(), network.shape

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x.reshape(-1, *self.shape))
        return found


def make(network: str, curvature: str, seed: int, **options: Any) -> tuple[nn.Module, Any]:
    """A fresh model and its optimizer; ``feedback=False`` is torch.optim's own update (Proposition 4)."""
    torch.manual_seed(seed)
    model = Flat(NETWORKS[network])
    loss = nn.CrossEntropyLoss()
    return model, compile_optimizer(
        model, torch.zeros(BATCH, 64), loss=loss, curvature=curvature, lr=BASES[curvature], **options
    )


def batches(seed: int) -> list[tuple[Tensor, Tensor]]:
    """All batches of all epochs."""
    x, y = digits().train
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(len(y), generator=generator) for _ in range(EPOCHS)]
    return [(x[part], y[part]) for order in orders for part in order.split(BATCH) if len(part) == BATCH]


def trained(made: tuple[nn.Module, Any], seed: int) -> float:
    """Train a model by its optimizer; mean loss of the training images at the end."""
    model, optimizer = made
    for x, y in batches(seed):
        optimizer.step(x, y)
    x, y = digits().train
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(x), y))


def weights(optimizer: Any) -> list[Tensor]:
    """``w`` of every stage of the last step."""
    stages = optimizer._diagnostics._stages
    return [stages[t]["weights"] for t in sorted(stages) if "weights" in stages[t]]


def distance(approximate: Any, exact: list[Tensor]) -> float:
    """Median relative error of ``w`` over the stages."""
    pairs = zip(weights(approximate), exact, strict=True)
    return statistics.median(float((w - e).norm() / e.norm()) for w, e in pairs)


@cache
def errors(network: str, curvature: str) -> dict[str, float]:
    """Median relative error of ``w`` by option, from the states of one exact run."""
    model, optimizer = make(network, curvature, 0, gram="exact")
    others = {name: make(network, curvature, 0, gram=GRAMS[name]) for name in rows_of(curvature)[1:]}
    found: dict[str, list[float]] = {name: [] for name in others}
    for index, (x, y) in enumerate(batches(0)):
        before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.step(x, y)
        exact = weights(optimizer)
        for name, (other, approximate) in others.items():
            if index % 5 == 4:
                other.load_state_dict(before)
                load(approximate, state)
                approximate.step(x, y)
                found[name].append(distance(approximate, exact))
    return {"exact": 0.0, **{name: statistics.median(values) for name, values in found.items()}}


def rows_of(curvature: str) -> tuple[str, ...]:
    """Options that say something about a base method."""
    return KRONECKER if curvature == "ekfac" else tuple(GRAMS)


def load(optimizer: Any, state: dict[str, Any]) -> None:
    """Give an optimizer the state of another, but for what it holds of its own Gram matrices.

    The state is copied: as torch.optim's, a loaded state is the optimizer's own from then on, and written in place.
    """
    held = {p: {k: v for k, v in own.items() if k.startswith("gram_")} for p, own in optimizer.state.items()}
    optimizer.load_state_dict(copy.deepcopy(state))
    for parameter, own in held.items():
        optimizer.state[parameter].update(own)


def speed(network: str, curvature: str, gram: Any) -> float:
    """A step's time against the exact one's."""
    x, y = batches(0)[0]
    (_, exact), (_, other) = (make(network, curvature, 0, gram=one) for one in ("exact", gram))
    return interleaved(lambda: exact.step(x, y), lambda: other.step(x, y), PAIRS, warm=1).ratio


def run(network: str, curvature: str, gram: str, quantity: str, seed: int) -> tuple[float]:
    """One number."""
    if quantity == ERROR:
        return (errors(network, curvature)[gram],)
    if quantity == STEP:
        return (speed(network, curvature, GRAMS[gram]),)
    options = {"feedback": False} if gram == BASE else {"gram": GRAMS[gram]}
    return (trained(make(network, curvature, seed, **options), seed),)


def text(rows: list[Row]) -> str:
    """The section of the rows."""
    table, keys = [], ("network", "curvature", "gram")
    for key in dict.fromkeys(tuple(row[name] for name in keys) for row in rows):
        own = [(row["quantity"], float(row["value"])) for row in rows if tuple(row[name] for name in keys) == key]
        losses = [value for quantity, value in own if quantity == LOSS]
        once = dict(own)
        error = "–" if ERROR not in once else f"{once[ERROR]:.3f}"
        ratio = "–" if STEP not in once else f"{once[STEP]:.2f}"
        table.append((*key, error, f"{statistics.mean(losses):.4f} ± {statistics.pstdev(losses):.4f}", ratio))
    header = (*keys, ERROR, f"train loss after {EPOCHS} epochs", STEP)
    said = f"{machines(rows)}. `benchmarks/gram_fidelity.py` says how; {len(SEEDS)} seeds; step time against `exact`."
    return f"## Approximate Gram matrices\n\n{said}\n\n{markdown(header, table)}"


def main() -> None:
    """Measure what is missing; write the section."""
    torch.set_num_threads(1)
    wanted: list[tuple[object, ...]] = []
    for network, found in NETWORKS.items():
        for curvature in found.bases:
            for gram in (*rows_of(curvature), BASE):
                wanted += [] if gram == BASE else [(network, curvature, gram, what, 0) for what in (ERROR, STEP)]
                wanted += [(network, curvature, gram, LOSS, seed) for seed in SEEDS]
    rows = measure_missing(RAW, ("network", "curvature", "gram", "quantity", "seed"), ("value",), wanted, run)
    write_section("gram fidelity", text(rows))


if __name__ == "__main__":
    main()
