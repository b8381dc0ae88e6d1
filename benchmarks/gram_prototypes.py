"""Two cheaper Gram matrices that are no options, measured as the options are (``gram_fidelity.py``).

``bfloat16``: the products ``X Xᵀ``, ``G Gᵀ`` and ``γ γᵀ`` of rounded factors. ``refreshed(k)``: the matrix itself every
k steps; in between its diagonal, which needs no product of samples, and the last refresh's mean correlation for
everything beside it, ``Γ_ij ≈ ρ √(Γ_ii Γ_jj)``: with batches drawn anew that is what a Gram matrix of other samples
can say about these. ``refreshed(inf)`` never makes one: ρ = 0.

    python benchmarks/gram_prototypes.py --write
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch
import typer
from common import interleaved, machine, markdown, write_section
from gram_fidelity import EPOCHS, batches, distance, make, spread, trained, weights
from torch import Tensor, nn

from gtddp_compile import kernels

Grams = dict[str, Callable[..., tuple[Tensor, ...]]]
"""``gram_blocks`` of linear layers and ``joint_gram`` of per-sample gradients, spherical metric, the whole batch."""


def bfloat16() -> Grams:
    """Factors rounded, products in bfloat16."""

    def product(x: Tensor) -> Tensor:
        narrow = x.flatten(1).bfloat16()
        return (narrow @ narrow.mT).float()

    def layer(
        kernel: Any, operands: Any, g: Tensor, params: Any, wants: Any, metric: Any, rows: Any, **options: Any
    ) -> Any:
        return ((product(operands[0]) * metric[0] + metric[1]) * product(g),)

    def joint(gradients: Sequence[Tensor], metric: Any, rows: Any) -> Any:
        return (sum(product(gamma) * m for gamma, m in zip(gradients, metric, strict=True)),)

    return {"gram_blocks": layer, "joint_gram": joint}


def refreshed(every: float) -> Grams:
    """The matrix every so many steps, its diagonal and mean correlation in between."""
    seen: dict[Any, tuple[int, Tensor]] = {}

    def mixed(key: Any, exact: Callable[[], Tensor], diagonal: Callable[[], Tensor]) -> Any:
        step, correlation = seen.get(key, (0, torch.zeros(())))
        if math.isfinite(every) and step % every == 0:
            gram = exact()
            root = gram.diagonal().sqrt()
            total = root.sum().square() - root.square().sum()
            correlation = ((gram.sum() - gram.diagonal().sum()) / total).clamp(0, 1)
        else:
            root = diagonal().sqrt()
            gram = torch.outer(root, root) * correlation
            gram.diagonal().add_((1 - correlation) * root.square())
        seen[key] = step + 1, correlation
        return (gram,)

    def layer(
        kernel: Any, operands: Any, g: Tensor, params: Any, wants: Any, metric: Any, rows: Any, **options: Any
    ) -> Any:
        arguments = (operands, g, params, wants, metric)
        return mixed(params[0].shape, lambda: kernel(*arguments), lambda: kernels.linear_gram_diagonal(*arguments))

    def joint(gradients: Sequence[Tensor], metric: Any, rows: Any) -> Any:
        return mixed(
            gradients[0].shape,
            lambda: kernels.joint_gram(tuple(gradients), metric, rows)[0],
            lambda: kernels.rows_gram_diagonal(tuple(gradients), metric),
        )

    return {"gram_blocks": layer, "joint_gram": joint}


PROTOTYPES: dict[str, Callable[[], Grams]] = {
    "bfloat16": bfloat16,
    "refreshed(2)": lambda: refreshed(2),
    "refreshed(10)": lambda: refreshed(10),
    "refreshed(inf)": lambda: refreshed(math.inf),
}


def prototype(network: str, curvature: str, grams: Grams, seed: int) -> tuple[nn.Module, Any]:
    """A model and its optimizer, whose program makes its Gram matrices in another way."""
    model, optimizer = make(network, curvature, "exact", seed)
    ((_, backend),) = optimizer._specialisations._programs.values()
    backend._step.__globals__.update(grams)
    return model, optimizer


def error(network: str, curvature: str, name: str, every: int = 5) -> float:
    """Median relative error of ``w``, from the states of one exact run."""
    model, exact = make(network, curvature, "exact", 0)
    other, approximate = prototype(network, curvature, PROTOTYPES[name](), 0)
    found = []
    for index, (x, y) in enumerate(batches(0)):
        other.load_state_dict(copy.deepcopy(model.state_dict()))
        approximate.load_state_dict(copy.deepcopy(exact.state_dict()))
        exact.step(x, y)
        approximate.step(x, y)
        if index % every == 1:
            found.append(distance(approximate, weights(exact)))
    return statistics.median(found)


def speed(network: str, curvature: str, name: str, pairs: int) -> float:
    """A step's time against the exact one's."""
    x, y = batches(0)[0]
    _, exact = make(network, curvature, "exact", 0)
    _, other = prototype(network, curvature, PROTOTYPES[name](), 0)
    return interleaved(lambda: exact.step(x, y), lambda: other.step(x, y), pairs).ratio


def main(
    seeds: Annotated[int, typer.Option(help="training runs a row")] = 4,
    pairs: Annotated[int, typer.Option(help="interleaved pairs of steps")] = 40,
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md")] = False,
) -> None:
    """Measure; see the module's docstring."""
    torch.set_num_threads(1)
    rows = []
    for network in ("digits", "mlp"):
        runs = [trained(make(network, "sgd", "exact", seed), seed) for seed in range(seeds)]
        rows.append((network, "exact", "0.000", spread(runs), "1.00"))
        for name in PROTOTYPES:
            runs = [trained(prototype(network, "sgd", PROTOTYPES[name](), seed), seed) for seed in range(seeds)]
            rows.append((network, name, f"{error(network, 'sgd', name):.3f}", spread(runs),
                         f"{speed(network, 'sgd', name, pairs):.2f}"))  # fmt: skip
            print(*rows[-1], sep="  ", flush=True)
    if write:
        header = ("network", "Γ", "error of w", f"train loss after {EPOCHS} epochs", "step")
        text = (
            f"{machine(1)}. sgd; `benchmarks/gram_prototypes.py` says how; {seeds} seeds; step time against exact.\n\n"
        )
        write_section("gram prototypes", "## Gram matrices in lower precision, or of other batches\n\n" + text
                      + markdown(header, rows))  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
