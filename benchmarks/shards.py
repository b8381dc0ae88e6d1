"""What a model in shards (FSDP2) costs a rank, against AdamW: memory between steps and in one, bytes sent.

Resident memory of one of four gloo processes above its beginning, a network of equal layers, every side in processes of
its own.

    python benchmarks/shards.py     what shards.csv has not, then the table in docs/several-processes.md
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import (
    DOCS,
    Row,
    machines,
    markdown,
    measure_missing,
    peak,
    reset_peak,
    resident,
    start_again,
    torch_step,
    write_section,
)
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gtddp_compile import compile_optimizer

RANKS, WIDTH, DEPTH, BATCH, STEPS, MIB = 4, 1024, 8, 8, 4, 2**20
RAW, SEED, WHOLE, DIVIDED = Path(__file__).with_suffix(".csv"), 0, "data parallel", "fully_shard"
SIDES = [(name, model, SEED) for name in ("AdamW", "adam", "foof") for model in (WHOLE, DIVIDED)]
"""A base method (AdamW: torch's own), how ranks have the model, and the seed of its weights."""
VALUES = ("between_mib", "peak_mib", "sent_mib")
SENT = {"all_gather of shards": RANKS - 1, "all_gather": RANKS - 1, "all_reduce": 2 * (RANKS - 1) / RANKS}
"""What a ring sends of a byte that is handed in."""


def made(name: str, divided: bool, width: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Any]:
    """A step, and the compiled optimizer if it is one."""
    torch.manual_seed(SEED)
    layers = [layer for _ in range(DEPTH) for layer in (nn.Linear(width, width), nn.Tanh())]
    model, loss = nn.Sequential(*layers), nn.CrossEntropyLoss()
    if divided:
        for layer in model[::2]:
            fully_shard(layer)
        fully_shard(model)
    elif name == "AdamW":
        model = DistributedDataParallel(model)  # type: ignore[assignment]
    if name == "AdamW":
        return torch_step(model, torch.optim.AdamW(model.parameters(), lr=1e-4), loss), None
    opt = compile_optimizer(model, loss=loss, curvature=name, coupling="local", process_group="world")
    return opt.step, opt


def steps(name: str, divided: bool, width: int) -> tuple[float, float, float]:
    """MiB above the beginning between steps and in one, and of what the step sends."""
    before, source = resident(), torch.Generator().manual_seed(dist.get_rank())
    step, opt = made(name, divided, width)
    for _ in range(STEPS):
        x, y = torch.randn(BATCH, width, generator=source), torch.randint(width, (BATCH,), generator=source)
        reset_peak()
        step(x, y)
    parameters = 4 * DEPTH * width * (width + 1) / MIB
    sent = (3 if divided else 2) * parameters * (RANKS - 1) / RANKS  # on paper: gathered twice, and reduced
    if opt is not None:
        sent = sum(SENT[what] * size for what, (_, size) in opt.diagnostics["sent"].items()) / MIB
    return resident() - before, peak() - before, sent


def rank(index: int, port: int, name: str, divided: bool, results: Any) -> None:
    """One process."""
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=index, world_size=RANKS)
    steps(name, divided, 8)  # loads what steps load
    found = steps(name, divided, WIDTH)
    if index == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def run(name: str, model: str, _: int) -> tuple[float, float, float]:
    """What one of the ranks has found."""
    results = mp.get_context("spawn").SimpleQueue()
    mp.spawn(rank, (20000 + os.getpid() % 20000, name, model == DIVIDED, results), RANKS)
    found: tuple[float, float, float] = results.get()
    return found


def text(rows: list[Row]) -> str:
    """The table of the rows, and how it was made."""
    table = []
    for row in rows:
        name = row["optimizer"] if row["optimizer"] == "AdamW" else f"`{row['optimizer']}`, local"
        table.append((name, row["model"], *(f"{float(row[value]):,.0f} MiB" for value in VALUES)))
    size = 4 * DEPTH * WIDTH * (WIDTH + 1) / MIB
    return (
        f"Written by `benchmarks/shards.py`. {machines(rows)}. {DEPTH} layers of width {WIDTH} in float32, P ="
        f" {size:.0f} MiB, {RANKS} gloo processes, {BATCH} samples each, divided layer by layer; resident memory of a"
        f" rank above its beginning; the last of {STEPS} steps, in which FOOF takes no statistics; what rings send of"
        " the bytes that a rank hands in (of AdamW on paper).\n\n"
        + markdown(("optimizer", "model", "between steps", "peak of a step", "sent in a step"), table)
    )


def main() -> None:
    """Measure what is missing; write the table."""
    settings = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        start_again(settings)
    rows = measure_missing(RAW, ("optimizer", "model", "seed"), VALUES, SIDES, run)
    write_section("shards", text(rows), DOCS / "several-processes.md")


if __name__ == "__main__":
    main()
