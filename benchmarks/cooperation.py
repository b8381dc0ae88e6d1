"""gt-ekfac against ekfac on the architecture of Fig. 7a, on scikit-learn's digits: writes docs/cooperation.md.

Three convolution modules of two parallel players each, a fully connected one, a last layer; tanh, batches of 12. Both
run without feedback and with it; the learning rate of each is the best of a small grid on seeds of its own.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

OUT = Path(__file__).resolve().parent.parent / "docs" / "cooperation.md"
METHODS: dict[str, dict[str, Any]] = {
    "ekfac": {"feedback": False, "cooperative": False},
    "gt-ekfac": {"feedback": False, "cooperative": True},
    "gt-ddp-ekfac": {"feedback": True, "cooperative": False},
    "gt-ddp-gt-ekfac": {"feedback": True, "cooperative": True},
}
BATCH, DAMPING, RATES, TUNED = 12, 0.1, (0.01, 0.03, 0.1, 0.3), (100,)


class Module(nn.Module):
    """Two players of the same input whose outputs are added (Fig. 7a)."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.u, self.v = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.u(x) + self.v(x))


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)

    def conv(channels: int, outputs: int, stride: int) -> Module:
        return Module(*(nn.Conv2d(channels, outputs, 3, stride, padding=1) for _ in range(2)))

    return nn.Sequential(
        conv(1, 6, 1), conv(6, 8, 2), conv(8, 8, 2), nn.Flatten(),
        Module(nn.Linear(32, 24), nn.Linear(32, 24)), nn.Linear(24, 10),
    )  # fmt: skip


def data() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """1,500 images to train, the rest to test; pixels standardised by one mean and deviation."""
    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8)
    x, y = (x - x[:1500].mean()) / x[:1500].std(), torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    return (x[:1500], y[:1500]), (x[1500:], y[1500:])


def train(method: str, rate: float, seed: int, steps: int) -> tuple[list[float], float, float]:
    """Training loss (all images) at four points on the way, test accuracy, seconds."""
    (x, y), (test_x, test_y) = data()
    model, loss = network(seed), nn.CrossEntropyLoss()
    opt = compile_optimizer(model, x[:BATCH], loss=loss, curvature="ekfac", lr=rate, damping=DAMPING, **METHODS[method])
    source, curve, begin = torch.Generator().manual_seed(seed), [], time.perf_counter()
    for step in range(1, steps + 1):
        batch = torch.randint(len(x), (BATCH,), generator=source)
        opt.step(x[batch], y[batch])
        if step % (steps // 4) == 0:
            with torch.no_grad():
                curve.append(float(loss(model(x), y)))
    seconds = time.perf_counter() - begin
    with torch.no_grad():
        accuracy = float((model(test_x).argmax(1) == test_y).float().mean())
    return [value if value == value else float("inf") for value in curve], accuracy, seconds


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def best_rate(method: str, steps: int) -> tuple[float, str]:
    """The rate with the lowest mean final loss on seeds that are not among the reported ones."""
    final = {rate: statistics.mean(train(method, rate, seed, steps)[0][-1] for seed in TUNED) for rate in RATES}
    shown = ", ".join(f"{rate:g}: {value:.3f}" for rate, value in final.items())
    return min(final, key=lambda rate: final[rate]), shown


def report(methods: list[str], seeds: int, steps: int) -> str:
    rows, found = [], {}
    for method in track(methods, description="methods"):
        rate, grid = best_rate(method, steps)
        runs = [train(method, rate, seed, steps) for seed in range(seeds)]
        found[method] = runs
        losses = [spread([run[0][k] for run in runs]) for k in range(4)]
        accuracy, seconds = spread([100 * run[1] for run in runs]), statistics.mean(run[2] for run in runs)
        rows.append((method, f"{rate:g}", *losses, accuracy, f"{1000 * seconds / steps:.1f}", grid))
    points = [steps * k // 4 for k in (1, 2, 3, 4)]
    heading = [
        "method",
        "lr",
        *(f"loss at {p}" for p in points),
        "test %",
        "ms a step",
        "final loss by lr (another seed)",
    ]
    table = [heading, ["---"] * len(heading), *rows]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    pairs = [("ekfac", "gt-ekfac"), ("gt-ddp-ekfac", "gt-ddp-gt-ekfac")]
    verdicts = [verdict(found, base, other) for base, other in pairs if base in found and other in found]
    return TEXT.format(seeds=seeds, steps=steps, damping=DAMPING, batch=BATCH, table="\n".join(lines),
                       verdicts="\n".join(f"- {line}" for line in verdicts))  # fmt: skip


def verdict(found: dict[str, Any], base: str, other: str) -> str:
    """How often, seed by seed, the cooperative method is ahead, early and at the end."""
    pairs = list(zip(found[base], found[other], strict=True))
    ahead = [sum(theirs[0][k] <= mine[0][k] for mine, theirs in pairs) for k in (0, 3)]
    return (
        f"`{other}` has a training loss at most that of `{base}` on {ahead[0]} of {len(pairs)} seeds after a quarter of"
        f" the steps, on {ahead[1]} of {len(pairs)} at the end."
    )


TEXT = """# Cooperation: Corollary 7 on the architecture of Fig. 7a

Written by `benchmarks/cooperation.py`. Three convolution modules of two parallel players, a fully connected one, a last
layer; tanh; batches of {batch}; scikit-learn's digits (1,500 images to train, 297 to test); {steps} steps; {seeds}
seeds, mean ± standard deviation; damping {damping:g}. The learning rate is each method's best of a grid on another
seed. `ekfac` and `gt-ekfac` have no feedback, `gt-ddp-` has.

{table}

{verdicts}
"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.write_text(report(arguments.methods, arguments.seeds, arguments.steps), encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))
