"""Steps of several gloo processes: what every rank runs, and the one-process step they are compared with."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from gtddp_compile import compile_optimizer

Case = tuple[str, Mapping[str, Any], tuple[int, ...]]
"""Network, options and the sizes of the shards."""

STEPS = 3
EXAMPLE = 4
"""Samples of the example inputs: the same on every rank, whatever its shard."""


def convolutional() -> nn.Module:
    """Convolutions, a layer norm, linear layers, a shortcut."""
    first = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 3, stride=2), nn.Tanh())
    return nn.Sequential(first, nn.Flatten(), nn.Linear(16, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


class Tokens(nn.Module):
    """Attention over tokens, its projections side by side, a tied weight and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(6, 6) for _ in range(4))
        self.shift, self.head = nn.Parameter(torch.randn(6) * 0.1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1).reshape(len(x), 6, 6) + self.shift
        h = torch.softmax(self.q(x) @ self.k(x).mT / 6**0.5, -1) @ self.v(x)
        return self.head(self.out(torch.tanh(self.out(x + h))).mean(1))


def normalised() -> nn.Module:
    """Batch-norms of all ranks: 4-dimensional, and behind one another."""
    conv = nn.Sequential(nn.Conv2d(1, 3, 3), nn.SyncBatchNorm(3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.SyncBatchNorm(2))
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(8, 5), nn.SyncBatchNorm(5), nn.Tanh(), nn.Linear(5, 3))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"conv": convolutional, "tokens": Tokens, "norms": normalised}


def batch(samples: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes of a joined batch."""
    source = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 1, 6, 6, generator=source, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=source)


def trained(case: Case, own: slice | None, **options: Any) -> tuple[nn.Module, Any, list[Tensor]]:
    """Some steps on a shard (``None``: the whole batch): the model, its optimizer and the losses."""
    name, given, shards = case
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    rest = {"loss": nn.CrossEntropyLoss(), **given, **options}
    opt = compile_optimizer(model, batch(EXAMPLE, 0)[0], **rest)
    losses = []
    for step in range(STEPS):
        x, y = batch(sum(shards), step)
        losses.append(opt.step(x, y) if own is None else opt.step(x[own], y[own]))
    return model, opt, losses


def shard(shards: tuple[int, ...], rank: int) -> slice:
    """A rank's samples."""
    return slice(sum(shards[:rank]), sum(shards[: rank + 1]))


def difference(case: Case, rank: int) -> float:
    """How far this rank's parameters, states and losses are from those of one process with the joined batch."""
    name, options, shards = case
    coupling = max(shards) if options.get("coupling") == "local" else "full"
    one, ours, losses = trained((name, {**options, "coupling": coupling}, shards), None)
    many, opt, found = trained(case, shard(shards, rank), process_group="world")
    pairs = [*zip(losses, found, strict=True), *zip(one.state_dict().values(), many.state_dict().values(), strict=True)]
    for mine, other in zip(one.parameters(), many.parameters(), strict=True):
        states = ours.state[mine], opt.state[other]
        keys = states[0].keys() & states[1].keys() - {"map_x", "map_g", "inverse_x", "inverse_g"}
        pairs += [(states[0][key], states[1][key]) for key in keys if isinstance(states[0][key], Tensor)]
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


def _rank(rank: int, size: int, port: int, job: Callable[..., Any], given: Any, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=size)
    try:
        results.put((rank, job(rank, given)))
    except Exception:
        results.put((rank, traceback.format_exc()))
    dist.destroy_process_group()


def on_ranks(size: int, job: Callable[[int, Any], Any], given: Any) -> list[Any]:
    """What a job returns on every rank of new gloo processes; an error as text."""
    context = mp.get_context("spawn")
    results, port = context.Queue(), 20000 + os.getpid() % 20000 + size
    processes = [context.Process(target=_rank, args=(r, size, port, job, given, results)) for r in range(size)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=300) for _ in processes)
    for process in processes:
        process.join()
    return [found[rank] for rank in range(size)]


def table(rank: int, cases: Mapping[str, Case]) -> dict[str, Any]:
    """The difference of every case."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = difference(case, rank)
        except Exception:
            found[name] = traceback.format_exc()
            break
    return found
