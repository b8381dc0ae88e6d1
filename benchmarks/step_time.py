"""Time and memory of one step against torch.optim's step of the same base method on the same network.

A step is what a training loop does with a batch: forward, backward and update; the compiled one (linear rollout: the
joint step) adds the Gram matrices and one factor. Both are timed in turns in one process, after a comparison that the
first losses agree; peak memory is that of a process of its own, above what the imports take. FOOF, K-FAC and EK-FAC,
which torch.optim has not, are timed against SGD's step, in blocks of ten steps, so that their refreshes count and the
first steps, which refresh every time, do not; K-FAC and EK-FAC against a peer's (``peers.py``) too. Every
finished row is kept in ``step_time.json`` and not measured again.

    python benchmarks/step_time.py --write --quick       the tables of docs/performance.md, in half an hour
    python benchmarks/step_time.py mlp gpt6 --curvature sgd --option '{"gram": "exact"}'
    python benchmarks/step_time.py vit-small --curvature sgd --option '{"gram": "Sketch(16)"}'
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import (
    DOCS,
    Ratio,
    in_process,
    interleaved,
    keep_heap,
    machine,
    markdown,
    measured,
    peak,
    reset_peak,
    resident,
    torch_step,
    write_section,
)
from networks import NETWORKS, Network
from peers import PEERS, REFRESH, available, peer_step
from rich.console import Console
from rich.progress import track

from gtddp_compile import Sketch, compile_optimizer

OPTIM: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (torch.optim.SGD, {"lr": 0.05}),
    "rmsprop": (torch.optim.RMSprop, {"lr": 1e-4}),
    "adam": (torch.optim.Adam, {"lr": 1e-4}),
}
"""torch.optim's class and the options that both sides get."""

KRONECKER: dict[str, dict[str, Any]] = {"foof": {"lr": 1e-3}, "kfac": {"lr": 1e-3}, "ekfac": {"lr": 1e-3}}
"""Base methods without a class in torch.optim."""

SMALL = ("digits", "mnist", "mlp")
"""Networks for EK-FAC and the peers: others' factors are up to 4,608 wide, a minute's eigendecomposition each."""

RESULTS = Path(__file__).with_name("step_time.json")
WHEN = "%d %B, %H:%M"
HEADER = (
    "network", "batch", "curvature", "options", "against", "its step", "compiled", "ratio (quartiles)", "aim",
    "peak memory",
)  # fmt: skip
DEEP = ("resnet18", "resnet50", "vit-small", "gpt6")
AIMS: dict[tuple[str, str, str], float] = {
    **{(name, "sgd", "{}"): 1.25 for name in ("mlp", *DEEP)},
    **{(name, curvature, "{}"): 1.6 for name in ("mlp", *DEEP) for curvature in ("rmsprop", "adam")},
    **{(name, curvature, "{}"): 2.0 for name in ("digits", "mnist") for curvature in ("kfac", "foof")},
    **{("mlp", curvature, "{}"): 1.5 for curvature in ("kfac", "foof")},
}
"""Ratios that were aimed at, by network, curvature and options; against a peer 1, of the peak memory 1.25."""

Step = Callable[[], torch.Tensor]


def optim_step(network: Network, curvature: str, batch: int) -> Step:
    """torch.optim's step of the same base method; SGD's where it has not that."""
    torch.manual_seed(0)
    model, (x, y) = network.build(), network.data(batch)
    kind, options = OPTIM.get(curvature, OPTIM["sgd"])
    step = torch_step(model, kind(model.parameters(), **options), network.loss)
    return lambda: step(x, y)


def compiled_step(network: Network, curvature: str, batch: int, options: dict[str, Any]) -> Step:
    """The compiled step, of the same weights on the same batch."""
    torch.manual_seed(0)
    model, (x, y) = network.build(), network.data(batch)
    own = OPTIM[curvature][1] if curvature in OPTIM else KRONECKER[curvature]
    options = {key: option_of(value) for key, value in options.items()}
    optimizer = compile_optimizer(model, x, loss=network.losses, curvature=curvature, **own, **options)
    for group in optimizer.param_groups:
        if group.get("averaging"):
            group["averaging"] = 1.0  # from the second step on what it is after the first 20
    return lambda: optimizer.step(x, y)


def option_of(value: Any) -> Any:
    """An option from JSON; ``"Sketch(16)"`` stands for an object."""
    found = re.fullmatch(r"(Sketch)\((.*)\)", value) if isinstance(value, str) else None
    if found is None:
        return value
    return Sketch(*json.loads(f"[{found[2]}]"))


def base_step(network: Network, curvature: str, against: str, batch: int) -> Step:
    """What the compiled step is compared with."""
    if against in PEERS:
        return peer_step(against, network, curvature, batch, KRONECKER[curvature]["lr"])
    return optim_step(network, curvature, batch)


def measure(base: Step, ours: Step, count: int, pairs: int, clock: str) -> Ratio:
    """Time both in turns, per step, in blocks of ``count`` steps.

    Raises:
        RuntimeError: their first losses differ, so that they do not train the same network.
    """
    first, second = float(base()), float(ours())
    if abs(first - second) > 1e-3 * abs(first):
        raise RuntimeError(f"the first losses are {first} and {second}")
    found = interleaved(_block(base, count), _block(ours, count), max(3, pairs // count), clock, warm=1)
    return Ratio(found.base / count, found.ours / count, found.ratio, found.low, found.high)


def _block(step: Step, count: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(count):
            step()

    return run


def peak_memory(network: Network, curvature: str, batch: int, options: dict[str, Any], side: str) -> float:
    """Peak of this process over the second step, above what it held before the model was built, MiB."""
    torch.manual_seed(0)
    before = resident()
    step = (
        compiled_step(network, curvature, batch, options)
        if side == "ours"
        else base_step(network, curvature, side, batch)
    )
    step()
    reset_peak()
    step()
    return peak() - before


def cases(networks: list[str], curvatures: list[str], sets: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """(network, curvature, options, against), what matters most first."""
    found = [
        (name, curvature, options, "torch.optim")
        for curvature in curvatures
        if curvature in OPTIM
        for name in networks
        for options in sets
    ]
    found += [
        (name, curvature, {}, against)
        for curvature in curvatures
        if curvature in KRONECKER
        for name in names_of(curvature, networks)
        for against in ["torch.optim SGD", *(available(curvature) if name in SMALL else ())]
    ]
    return found


def names_of(curvature: str, networks: list[str]) -> list[str]:
    """The networks that a base method is timed on."""
    return [name for name in networks if curvature != "ekfac" or name in SMALL]


def row(case: tuple[Any, ...], batch: int, pairs: int, clock: str, threads: int, memory: bool) -> tuple[str, ...]:
    """One line of the table, measured."""
    name, curvature, options, against = case
    network = NETWORKS[name]
    base = base_step(network, curvature, against, batch)
    count = REFRESH if curvature in KRONECKER else 1
    found = measure(base, compiled_step(network, curvature, batch, options), count, pairs, clock)
    used = "–"
    if memory:
        arguments = [name, "--curvature", curvature, "--option", json.dumps(options), "--batch", str(batch)]
        other, ours = (
            in_process(__file__, *arguments, "--side", side, "--threads", str(threads))["peak"]
            for side in (against, "ours")
        )
        used = f"{ours:.0f} / {other:.0f} MiB = {ours / other:.2f}"
    return (name, str(batch), curvature, shown(options), against, f"{1e3 * found.base:.1f} ms",
            f"{1e3 * found.ours:.1f} ms", f"{found.ratio:.2f} ({found.low:.2f}–{found.high:.2f})", used)  # fmt: skip


def main(
    names: Annotated[list[str] | None, typer.Argument(help="networks; all if none is given")] = None,
    curvature: Annotated[list[str] | None, typer.Option(help="base methods; all if none is given")] = None,
    option: Annotated[list[str] | None, typer.Option(help="compile options as JSON; none")] = None,
    batch: Annotated[int, typer.Option(help="samples a step; 0: the network's own")] = 0,
    pairs: Annotated[int, typer.Option(help="interleaved pairs; 0: the network's own")] = 0,
    quick: Annotated[bool, typer.Option(help="few pairs; memory for sgd alone")] = False,
    clock: Annotated[str, typer.Option(help="cpu or wall")] = "cpu",
    threads: Annotated[int, typer.Option(help="torch threads")] = 1,
    memory: Annotated[bool, typer.Option(help="measure peak memory too")] = True,
    fresh: Annotated[bool, typer.Option(help="forget the rows that were measured before")] = False,
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md")] = False,
    side: Annotated[str, typer.Option(hidden=True, help="print the peak memory of one side")] = "",
) -> None:
    """Compare steps; see the module's docstring."""
    torch.set_num_threads(threads)
    sets = [json.loads(text) for text in option or ["{}"]]
    chosen, kinds = names or list(NETWORKS), curvature or [*OPTIM, *KRONECKER]
    if side:
        size = batch or NETWORKS[chosen[0]].batch
        print(json.dumps({"peak": peak_memory(NETWORKS[chosen[0]], kinds[0], size, sets[0], side)}))
        return
    console = Console()
    known: dict[str, list[str]] = json.loads(RESULTS.read_text()) if RESULTS.exists() and not fresh else {}
    for case in track(cases(chosen, kinds, sets), description="timing", console=console):
        network = NETWORKS[case[0]]
        size = batch or network.batch
        key = json.dumps([*case, size, clock, threads])
        if key not in known:
            count = pairs or (min(network.pairs, 30 if network.pairs > 30 else 5) if quick else network.pairs)
            found = row(case, size, count, clock, threads, memory and (case[1] == "sgd" or not quick))
            known[key] = [*found, measured(), machine(threads)]
            RESULTS.write_text(json.dumps(known, indent=1, ensure_ascii=False), encoding="utf-8")
            if write:
                write_pages(known)
        console.print(*known[key], sep="  ")
    if write:
        write_pages(known)


def in_order(known: dict[str, list[str]]) -> dict[str, list[str]]:
    """Rows as they are looked for, whatever was measured last: by base method, network and options."""
    kinds, names = [*OPTIM, *KRONECKER], list(NETWORKS)

    def place(key: str) -> tuple[int, int, int]:
        name, curvature, options, *_ = json.loads(key)
        return kinds.index(curvature), names.index(name), len(options)

    return dict(sorted(known.items(), key=lambda item: place(item[0])))


def text(known: dict[str, list[str]]) -> str:
    """The section of docs/performance.md."""
    stamps = sorted((row[-2] for row in known.values()), key=lambda at: datetime.strptime(at[: at.index(" (")], WHEN))
    clocks = " and ".join(dict.fromkeys(json.loads(key)[5] for key in known))
    where = "; ".join(dict.fromkeys(row[-1] for row in known.values()))
    return (
        f"## One step\n\n{where}; `benchmarks/step_time.py`, rows measured from {stamps[0]} to {stamps[-1]}. Medians of"
        f" interleaved pairs, {clocks} time. The ratio is the median of the pairs' ratios, not the ratio of the medians"
        " beside it; quartiles likewise. Both sides with `MALLOC_TRIM_THRESHOLD_`"
        " and `MALLOC_MMAP_THRESHOLD_` so high that freed memory is kept for the next step (peak memory without)."
        " The aim for peak memory is 1.25 everywhere.\n\n" + table(known)
    )


def table(known: dict[str, list[str]]) -> str:
    """Every case that was measured."""
    return markdown(HEADER, [(*row[:8], _aim(key), row[8]) for key, row in in_order(known).items()])


def write_pages(known: dict[str, list[str]]) -> None:
    """The section of docs/performance.md, and what docs/index.md says of it."""
    write_section("step time", text(known))
    write_section("price", price(known), DOCS / "index.md")


def price(known: dict[str, list[str]]) -> str:
    """What the front page says of the default's step."""
    own = [row for row in known.values() if row[2:5] == ["foof", "default", "torch.optim SGD"]]
    low, *_, high = sorted(own, key=lambda row: float(row[7].split()[0]))
    return (
        f"A step of the default costs {low[7].split()[0]} ({low[0]}) to {high[7].split()[0]} ({high[0]}) of one of SGD,"
        f" on {len(own)} networks that were timed ([one step](performance.md#one-step))."
    )


def _aim(key: str) -> str:
    """What a row's ratio should be at most."""
    name, curvature, options, against, *_ = json.loads(key)
    aim = 1.0 if against in PEERS else AIMS.get((name, curvature, json.dumps(options)))
    return "–" if aim is None else f"{aim:g}"


def shown(options: dict[str, Any]) -> str:
    """Compile options for a table."""
    return ", ".join(f"{name}={value!r}" for name, value in options.items()) or "default"


if __name__ == "__main__":
    keep_heap()
    typer.run(main)
