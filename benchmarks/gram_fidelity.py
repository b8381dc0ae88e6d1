"""What approximate Gram matrices keep of the update and of the training curve.

Two networks on scikit-learn's digits, batch 128: the convolutional one of ``examples/digits.py`` and a multi-layer
perceptron. ``error of w``: the relative error of a stage's weights against the exact ones, from the same parameters and
state, median over stages, at every 5th step of an exact run. ``loss``: mean over seeds of the train loss after the
epochs, with its standard deviation. ``step``: CPU time of a step against the exact one's, in turns.

    python benchmarks/gram_fidelity.py --write
"""

from __future__ import annotations

import copy
import statistics
from typing import Annotated, Any

import torch
import typer
from common import interleaved, machine, markdown, write_section
from digit_images import digits
from networks import DigitsNet, mlp
from torch import Tensor, nn

from gtddp_compile import Sketch, compile_optimizer

BASES: dict[str, float] = {"sgd": 0.5, "rmsprop": 2e-3, "adam": 3e-3, "ekfac": 0.05}
"""Learning rates at which the base methods train well."""

GRAMS: dict[str, Any] = {
    "exact": "exact", "auto": "auto", "separable": "separable", "Sketch(8)": Sketch(8), "Sketch(32)": Sketch(32),
    "coarse": "coarse",
}  # fmt: skip
KRONECKER = ("exact", "auto")
"""What there is to choose for EK-FAC: its diagonal separated or not."""

EPOCHS, BATCH = 5, 128


class Flat(nn.Module):
    """Images as rows, for the perceptron; as one channel, for the convolutional network."""

    def __init__(self, network: str) -> None:
        super().__init__()
        self.body = mlp((64, 256, 256, 256, 10)) if network == "mlp" else DigitsNet()
        self.shape = (64,) if network == "mlp" else (1, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.body(x.reshape(-1, *self.shape))
        return found


def make(network: str, curvature: str, gram: Any, seed: int) -> tuple[nn.Module, Any]:
    """A fresh model and its optimizer."""
    torch.manual_seed(seed)
    model = Flat(network)
    loss = nn.CrossEntropyLoss()
    return model, compile_optimizer(
        model, torch.zeros(BATCH, 64), loss=loss, curvature=curvature, lr=BASES[curvature], gram=gram
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


def errors(network: str, curvature: str) -> dict[str, float]:
    """Median relative error of ``w`` by option, from the states of one exact run."""
    model, optimizer = make(network, curvature, "exact", 0)
    others = {name: make(network, curvature, gram, 0) for name, gram in GRAMS.items() if name != "exact"}
    if curvature == "ekfac":
        others = {"auto": others["auto"]}
    found: dict[str, list[float]] = {name: [] for name in others}
    for index, (x, y) in enumerate(batches(0)):
        before, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
        optimizer.step(x, y)
        exact = weights(optimizer)
        for name, (other, approximate) in others.items() if index % 5 == 0 else ():
            other.load_state_dict(before)
            approximate.load_state_dict(state)
            approximate.step(x, y)
            found[name].append(distance(approximate, exact))
    return {"exact": 0.0, **{name: statistics.median(values) for name, values in found.items()}}


def speed(network: str, curvature: str, gram: Any, pairs: int) -> float:
    """A step's time against the exact one's."""
    x, y = batches(0)[0]
    (_, exact), (_, other) = make(network, curvature, "exact", 0), make(network, curvature, gram, 0)
    return interleaved(lambda: exact.step(x, y), lambda: other.step(x, y), pairs).ratio


def main(
    seeds: Annotated[int, typer.Option(help="training runs a row")] = 4,
    pairs: Annotated[int, typer.Option(help="interleaved pairs of steps")] = 15,
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md")] = False,
) -> None:
    """Measure; see the module's docstring."""
    torch.set_num_threads(1)
    rows = []
    for network in ("digits", "mlp"):
        for curvature in BASES:
            error = errors(network, curvature)
            for name, gram in {**GRAMS, "base method": None}.items():
                if curvature == "ekfac" and gram is not None and name not in KRONECKER:
                    continue
                if gram is None:
                    losses = [trained(base(network, curvature, seed), seed) for seed in range(seeds)]
                    said, ratio = "–", "–"
                else:
                    losses = [trained(make(network, curvature, gram, seed), seed) for seed in range(seeds)]
                    said, ratio = f"{error[name]:.3f}", f"{speed(network, curvature, gram, pairs):.2f}"
                rows.append((network, curvature, name, said, spread(losses), ratio))
                print(*rows[-1], sep="  ", flush=True)
    if write:
        header = ("network", "curvature", "gram", "error of w", f"train loss after {EPOCHS} epochs", "step")
        text = f"{machine(1)}. `benchmarks/gram_fidelity.py` says how; {seeds} seeds; step time against `exact`.\n\n"
        write_section("gram fidelity", "## Approximate Gram matrices\n\n" + text + markdown(header, rows))


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.4f} ± {statistics.pstdev(values):.4f}"


def base(network: str, curvature: str, seed: int) -> tuple[nn.Module, Any]:
    """The base method alone: ``feedback=False`` is torch.optim's own update (Proposition 4)."""
    torch.manual_seed(seed)
    model = Flat(network)
    return model, compile_optimizer(
        model, torch.zeros(BATCH, 64), loss=nn.CrossEntropyLoss(), curvature=curvature, lr=BASES[curvature],
        feedback=False,
    )  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
