"""What a model in shards (FSDP2) costs a rank, against AdamW: memory between steps and in one, bytes sent.

Resident memory of one of four gloo processes above its beginning, a network of equal layers, every side in processes of
its own.

    python benchmarks/shards.py            measures, and prints the table
    python benchmarks/shards.py --write    and writes it into docs/several-processes.md
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from common import DOCS, machine, markdown, peak, reset_peak, resident, start_again, torch_step, write_section
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gtddp_compile import compile_optimizer

RANKS, WIDTH, DEPTH, BATCH, STEPS, MIB = 4, 1024, 8, 8, 4, 2**20
SIDES = (("AdamW", False), ("AdamW", True), ("adam", False), ("adam", True), ("foof", False), ("foof", True))
"""A base method (AdamW: torch's own), and whether the model is in shards."""
SENT = {"all_gather of shards": RANKS - 1, "all_gather": RANKS - 1, "all_reduce": 2 * (RANKS - 1) / RANKS}
"""What a ring sends of a byte that is handed in."""


def made(name: str, divided: bool, width: int) -> tuple[Callable[[Tensor, Tensor], Tensor], Any]:
    """A step, and the compiled optimizer if it is one."""
    torch.manual_seed(0)
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


def run(name: str, divided: bool, width: int) -> tuple[float, float, float]:
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
    run(name, divided, 8)  # loads what steps load
    found = run(name, divided, WIDTH)
    if index == 0:
        results.put(found)
    dist.barrier()
    dist.destroy_process_group()


def text() -> str:
    """The table, and how it was made."""
    rows, results = [], mp.get_context("spawn").SimpleQueue()
    for index, (name, divided) in enumerate(SIDES):
        mp.spawn(rank, (20000 + (os.getpid() + index) % 20000, name, divided, results), RANKS)
        how = "fully_shard" if divided else "data parallel"
        rows.append((name if name == "AdamW" else f"`{name}`, local", how, *(f"{v:,.0f} MiB" for v in results.get())))
    size = 4 * DEPTH * WIDTH * (WIDTH + 1) / MIB
    return (
        f"Written by `benchmarks/shards.py --write`. {machine(1)}. {DEPTH} layers of width {WIDTH} in float32, P ="
        f" {size:.0f} MiB, {RANKS} gloo processes, {BATCH} samples each, divided layer by layer; resident memory of a"
        f" rank above its beginning; the last of {STEPS} steps, in which FOOF takes no statistics; what rings send of"
        " the bytes that a rank hands in (of AdamW on paper).\n\n"
        + markdown(("optimizer", "model", "between steps", "peak of a step", "sent in a step"), rows)
    )


def main() -> None:
    """Measure, print, and with ``--write`` put the table into the document."""
    settings = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    if any(os.environ.get(key) != value for key, value in settings.items()):
        start_again(settings)
    found = text()
    print(found)
    if "--write" in sys.argv[1:]:
        write_section("shards", found, DOCS / "several-processes.md")


if __name__ == "__main__":
    main()
