"""Losses with a floor: targets that nobody can foretell or reach, sparse inputs. Against AdamW at three rates.

    python benchmarks/floors.py         what floors.csv has not, then the table in docs/research.md

Every batch is drawn anew, but of words and digits, where there are as many; 300 steps of 64; mean loss of 4,096 other
samples at the end. *falling*: the rate falls over the last third. *as before*: without shrinkage of FOOF's factors.
*least unknown*: the same loss as a function of one's own, of which nobody knows what it can fall to. *newest*:
parameters that hold no average. *average*: AdamW's, of about the last tenth of the steps. *behind*: of the newest, the
slope of the next batch's loss along the step that was just made, over that of its own before it, mean of the steps from
the 20th on: above 0 a step goes too far for other samples than its own.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import DOCS, Row, last_tenth, machines, markdown, measure_missing, torch_step, write_section
from digit_images import digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR

from gtddp_compile import compile_optimizer

RAW = Path(__file__).with_suffix(".csv")
STEPS, BATCH, OTHERS, WORDS = 300, 64, 4096, 2000
Loss = Callable[[Any, Tensor], Tensor]


class Encoder(nn.Module):
    """A variational autoencoder of digits: reconstruction, mean and logarithm of the variance."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.mean, self.spread = nn.Linear(64, 128), nn.Linear(128, 8), nn.Linear(128, 8)
        self.back = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The code is drawn anew at every call."""
        hidden = torch.relu(self.into(x))
        mean, spread = self.mean(hidden), self.spread(hidden)
        return self.back(mean + torch.randn_like(mean) * torch.exp(0.5 * spread)), mean, spread


def evidence(outputs: tuple[Tensor, Tensor, Tensor], x: Tensor) -> Tensor:
    """The bound on the evidence, negative, of every sample."""
    back, mean, spread = outputs
    fitted = F.binary_cross_entropy_with_logits(back, x, reduction="none").sum(1)
    return fitted - 0.5 * (1 + spread - mean**2 - spread.exp()).sum(1)


def plain(inputs: int, outputs: int) -> nn.Module:
    """Two layers of 64."""
    hidden = nn.Linear(inputs, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU()
    return nn.Sequential(*hidden, nn.Linear(64, outputs))


def noisy(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """A function of two numbers, and noise of variance 1."""
    x = torch.randn(size, 8, generator=source)
    return x, torch.sin(2 * x[:, :1]) * x[:, 1:2] + torch.randn(size, 1, generator=source)


def relabelled(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three classes, 35 % of the labels drawn anew."""
    x, mixed = torch.randn(size, 8, generator=source), torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    own = (x @ mixed + 0.5 * (x @ mixed) ** 2).argmax(1)
    drawn = torch.randint(3, (size,), generator=source)
    return x, torch.where(torch.rand(size, generator=source) < 0.35, drawn, own)


def counts(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Counts of a rate that is the exponential of two terms."""
    x = torch.randn(size, 8, generator=source)
    rate = torch.exp(0.8 * x[:, :1] + 0.5 * torch.sin(3 * x[:, 1:2]))
    return x, torch.poisson(rate, generator=source)


def images(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Digits, those for validation for who asks for many."""
    x = (digits().train if size == BATCH else digits().valid)[0].flatten(1)
    x = x[torch.randint(len(x), (size,), generator=source)]
    return x, x


def labelled(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """The same digits and their classes."""
    x, y = digits().train if size == BATCH else digits().valid
    chosen = torch.randint(len(x), (size,), generator=source)
    return x[chosen].flatten(1), y[chosen]


def words(size: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """Texts of 60 words of ten subjects, a word counting the less the commoner it is."""
    fixed = torch.Generator().manual_seed(1)
    often = torch.exp(0.9 * torch.randn(10, WORDS, generator=fixed)) / torch.arange(1, WORDS + 1)
    y = torch.randint(10, (size,), generator=source)
    drawn = torch.multinomial(often[y], 60, replacement=True, generator=source)
    x = torch.zeros(size, WORDS).scatter_add_(1, drawn, torch.ones(size, 60)).log1p()
    return F.normalize(x * torch.arange(2, WORDS + 2).log()), y


@dataclass(frozen=True)
class Kind:
    """A model, batches and a loss, one number a sample; ``module``: torch's own of it."""

    model: Callable[[], nn.Module]
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Loss
    module: nn.Module | None = None


def classified(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every sample."""
    return F.cross_entropy(outputs, y, reduction="none")


KINDS = {
    "noise on a number": Kind(lambda: plain(8, 1), noisy, lambda out, y: (out - y).square().flatten(1).mean(1)),
    "labels drawn anew": Kind(lambda: plain(8, 3), relabelled, classified),
    "counts": Kind(lambda: plain(8, 1), counts, lambda out, y: (out.exp() - y * out).flatten(1).mean(1)),
    "digits, variational": Kind(Encoder, images, evidence),
    "words": Kind(lambda: plain(WORDS, 10), words, classified),
}


def poisson(outputs: Tensor, y: Tensor) -> Tensor:
    """Of every sample."""
    return F.poisson_nll_loss(outputs, y, reduction="none").mean(1)


def smoothed(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every sample with a tenth of the label for all classes."""
    return F.cross_entropy(outputs, y, reduction="none", label_smoothing=0.1)


def pixels(outputs: Tensor, y: Tensor) -> Tensor:
    """Cross-entropy of every image's shades of grey."""
    return F.binary_cross_entropy_with_logits(outputs, y, reduction="none").mean(1)


def narrow() -> nn.Module:
    """An autoencoder of digits."""
    into = nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8), nn.Linear(8, 128), nn.ReLU()
    return nn.Sequential(*into, nn.Linear(128, 64))


KNOWN = {
    "digits, smoothed labels": Kind(
        lambda: plain(64, 10), labelled, smoothed, nn.CrossEntropyLoss(label_smoothing=0.1)
    ),
    "counts, PoissonNLLLoss": Kind(lambda: plain(8, 1), counts, poisson, nn.PoissonNLLLoss()),
    "shades of digits": Kind(narrow, images, pixels, nn.BCEWithLogitsLoss()),
}
"""Of torch's own losses, whose least value is known."""
ALL = KINDS | KNOWN
AVERAGED = ", averaged"
UNKNOWN: dict[str, dict[str, Any]] = {"default": {}, "newest": {"averaging": 0}, "least unknown": {}}
OURS: dict[str, dict[str, Any]] = {"default": {}, "falling": {}, "newest": {"averaging": 0},
                                   "as before": {"shrinkage": 0.0},
                                   "adam, coupled": {"curvature": "adam", "lr": 0.01}}  # fmt: skip
RIVALS = {"AdamW, 0.001": 1e-3, "AdamW, 0.003": 3e-3, "AdamW, 0.01": 1e-2}
LEVEL = {name + AVERAGED: rate for name, rate in RIVALS.items()}
"""The rivals' averages."""
SEEDS = range(3)


def behind(kind: Kind, model: nn.Module, batch: tuple[Tensor, Tensor], step: list[Tensor]) -> float:
    """Slope of a batch's mean loss along a step."""
    with torch.random.fork_rng():
        found = torch.autograd.grad(kind.loss(model(batch[0]), batch[1]).mean(), list(model.parameters()))
    return float(sum((g * d).sum() for g, d in zip(found, step, strict=True)))


def run(task: str, method: str, seed: int) -> tuple[float, float]:
    """Loss of other samples at the end, and how far a step goes too far."""
    torch.manual_seed(seed)
    kind, source = ALL[task], torch.Generator().manual_seed(seed)
    model, (x, y) = kind.model(), kind.draw(BATCH, source)
    schedule, slopes = None, list[tuple[float, float]]()
    if method in OURS | UNKNOWN:
        loss = kind.loss if kind.module is None or method == "least unknown" else kind.module
        optimizer = compile_optimizer(model, x, loss=loss, on_nonfinite="skip", **(UNKNOWN | OURS)[method])
        step: Callable[..., Any] = optimizer.step
        if method == "falling":
            schedule = LambdaLR(optimizer, lambda taken: min(1.0, 3 * (1 - taken / STEPS)))
    else:
        rival = torch.optim.AdamW(model.parameters(), lr=(RIVALS | LEVEL)[method])
        step = torch_step(model, rival, lambda out, y: kind.loss(out, y).mean())
    copied = last_tenth(model)
    for taken in range(STEPS):
        looks = method == "newest" and taken >= 20
        before = [p.detach().clone() for p in model.parameters()] if looks else []
        own, (x_next, y_next) = (x, y), kind.draw(BATCH, source)
        step(x, y)
        copied.update_parameters(model)
        x, y = x_next, y_next
        if looks:
            made = [p.detach() - old for p, old in zip(model.parameters(), before, strict=True)]
            after = behind(kind, model, (x, y), made)
            with torch.no_grad():
                torch._foreach_sub_(list(model.parameters()), made)
            if (down := -behind(kind, model, own, made)) > 0:  # not where a step was left out
                slopes.append((after, down))
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), [b + d for b, d in zip(before, made, strict=True)])
        if schedule is not None:
            schedule.step()
    x, y = kind.draw(OTHERS, torch.Generator().manual_seed(10_000))
    with torch.no_grad():
        loss = float(kind.loss((copied if method.endswith(AVERAGED) else model)(x), y).mean())
    return loss, statistics.median(after / own for after, own in slopes) if slopes else float("nan")


def text(rows: Iterable[Row]) -> str:
    """The section of docs/research.md."""
    rows = list(rows)

    def found(task: str, method: str, of: str = "loss") -> list[float]:
        return [float(row[of]) for row in rows if (row["task"], row["method"]) == (task, method)]

    def cell(task: str, method: str) -> str:
        own = found(task, method)
        return f"{statistics.median(own):.3g} ({min(own):.2g} to {max(own):.2g})"

    def best(task: str) -> tuple[str, ...]:
        return tuple(
            cell(task, min(names, key=lambda name: statistics.median(found(task, name)))) for names in (RIVALS, LEVEL)
        )

    rivals = "AdamW, the best of three rates", "the best average"
    table = markdown(
        ("task", *OURS, *rivals, "behind"),
        [(task, *(cell(task, name) for name in OURS), *best(task),
          f"{statistics.median(found(task, 'newest', 'behind')):.2f}") for task in KINDS],
    )  # fmt: skip
    known = markdown(
        ("task", *UNKNOWN, *rivals),
        [(task, *(cell(task, name) for name in UNKNOWN), *best(task)) for task in KNOWN],
    )
    said = f"Mean loss of other samples after {STEPS} steps of {BATCH}, medians and ranges of three seeds."
    beside = "Of torch's own losses the least that targets leave is known; *least unknown*: as a function of one's own."
    return f"{said}\n\n{table}\n\n{beside}\n\n{known}\n\nMachine: {machines(rows)}."


def main() -> None:
    """Measure what is missing; write the table."""
    torch.set_num_threads(1)
    wanted = itertools.chain(
        itertools.product(KINDS, (*OURS, *RIVALS, *LEVEL), SEEDS),
        itertools.product(KNOWN, (*UNKNOWN, *RIVALS, *LEVEL), SEEDS),
    )
    rows = measure_missing(RAW, ("task", "method", "seed"), ("loss", "behind"), wanted, run)
    write_section("floors", text(rows), DOCS / "research.md")


if __name__ == "__main__":
    main()
