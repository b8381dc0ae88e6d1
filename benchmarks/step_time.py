"""Time and memory of one step against torch.optim's step of the same base method on the same network.

A step is what a training loop does with a batch: forward, backward and update; the compiled one adds the backward sweep
of gains and the second forward sweep. Both are timed in turns in one process, after a comparison that the first losses
agree; peak memory is that of a process of its own, above what the imports take.

    python benchmarks/step_time.py                       every network and curvature; writes docs/performance.md
    python benchmarks/step_time.py mlp gpt6 --curvature sgd
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import torch
import typer
from common import Ratio, in_process, interleaved, machine, markdown, peak, reset_peak, resident, write_section
from networks import NETWORKS, Network
from rich.console import Console
from rich.progress import track
from rich.table import Table

from gtddp_compile import compile_optimizer

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-4}),
    "adam": (torch.optim.Adam, {"lr": 1e-4}),
}
"""torch.optim's class and the options that both sides get."""

HEADER = ("network", "batch", "curvature", "options", "torch.optim", "compiled", "ratio (quartiles)", "peak memory")


def base_step(network: Network, curvature: str, batch: int) -> Callable[[], torch.Tensor]:
    """torch.optim's step."""
    torch.manual_seed(0)
    model, (x, y) = network.build(), network.data(batch)
    kind, options = BASES[curvature]
    optimizer = kind(model.parameters(), **options)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        loss = network.loss(model(x), y)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def compiled_step(network: Network, curvature: str, batch: int, options: dict[str, Any]) -> Callable[[], torch.Tensor]:
    """The compiled step, of the same weights on the same batch."""
    torch.manual_seed(0)
    model, (x, y) = network.build(), network.data(batch)
    optimizer = compile_optimizer(
        model, x, loss=network.losses, curvature=curvature, **BASES[curvature][1], **options
    )  # fmt: skip
    return lambda: optimizer.step(x, y)


def measure(network: Network, curvature: str, batch: int, options: dict[str, Any], pairs: int, clock: str) -> Ratio:
    """Time both in turns.

    Raises:
        RuntimeError: their first losses differ, so that they do not train the same network.
    """
    base, ours = base_step(network, curvature, batch), compiled_step(network, curvature, batch, options)
    first, second = float(base()), float(ours())
    if abs(first - second) > 1e-3 * abs(first):
        raise RuntimeError(f"{network.name}, {curvature}: the first losses are {first} and {second}")
    return interleaved(base, ours, pairs, clock, warm=1)


def peak_memory(network: Network, curvature: str, batch: int, options: dict[str, Any], side: str) -> float:
    """Peak of this process over two steps after the first, above what it held before the model was built, MiB."""
    torch.manual_seed(0)
    before = resident()
    step = base_step(network, curvature, batch) if side == "base" else compiled_step(network, curvature, batch, options)
    step()
    reset_peak()
    step()
    step()
    return peak() - before


def main(
    names: Annotated[list[str] | None, typer.Argument(help="networks; all if none is given")] = None,
    curvature: Annotated[list[str] | None, typer.Option(help="base methods; all if none is given")] = None,
    option: Annotated[list[str] | None, typer.Option(help="compile options as JSON, one set each")] = None,
    batch: Annotated[int, typer.Option(help="samples a step; 0: the network's own")] = 0,
    pairs: Annotated[int, typer.Option(help="interleaved pairs; 0: the network's own")] = 0,
    clock: Annotated[str, typer.Option(help="cpu or wall")] = "wall",
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md")] = False,
    side: Annotated[str, typer.Option(hidden=True, help="base or ours: print the peak memory of one side")] = "",
) -> None:
    """Compare steps; see the module's docstring."""
    torch.set_num_threads(threads)
    chosen = [NETWORKS[name] for name in names or NETWORKS]
    sets = [json.loads(text) for text in option or ["{}"]]
    if side:
        (network,), (kind,), (options,) = chosen, curvature or [], sets
        print(json.dumps({"peak": peak_memory(network, kind, batch or network.batch, options, side)}))
        return
    cases = [(network, kind, options) for network in chosen for kind in curvature or BASES for options in sets]
    console, rows = Console(), []
    for network, kind, options in track(cases, description="timing", console=console):
        size = batch or network.batch
        found = measure(network, kind, size, options, pairs or network.pairs, clock)
        used = "–"
        if memory:
            arguments = [network.name, "--curvature", kind, "--option", json.dumps(options), "--batch", str(size)]
            base, ours = (
                in_process(__file__, *arguments, "--side", side, "--threads", str(threads))["peak"]
                for side in ("base", "ours")
            )
            used = f"{ours:.0f} / {base:.0f} MiB = {ours / base:.2f}"
        rows.append(
            (network.name, str(size), kind, shown(options), f"{1e3 * found.base:.1f} ms", f"{1e3 * found.ours:.1f} ms",
             f"{found.ratio:.2f} ({found.low:.2f}–{found.high:.2f})", used)
        )  # fmt: skip
        console.print(*rows[-1], sep="  ")
    table = Table(*HEADER)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if write:
        text = f"{machine(threads)}. Medians of interleaved pairs, {clock} time; quartiles of the pairs' ratios.\n\n"
        write_section("step time", "## One step against torch.optim\n\n" + text + markdown(HEADER, rows))


def shown(options: dict[str, Any]) -> str:
    """Compile options for a table."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "default"


if __name__ == "__main__":
    typer.run(main)
