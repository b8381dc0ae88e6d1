"""Steps of several gloo processes: what every rank runs, and the one-process steps they are compared with."""

import faulthandler
import os
import tempfile
import traceback
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from pathlib import Path
from queue import Empty
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from gtddp_compile import CompileError, GraphBatches, NonFiniteError, compile_optimizer
from gtddp_compile.lowering.traffic import gram_way, traffic
from support.networks import make

STEPS = 2
EXAMPLE = 4
"""Samples of the example inputs: the same on every rank, whatever its shard."""


class Case(NamedTuple):
    """Steps to compare: a network, options of the program, the sizes of the shards."""

    network: str
    options: Mapping[str, Any]
    shards: tuple[int, ...]


def convolutional() -> nn.Module:
    """A convolution, a layer norm, linear layers."""
    first = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(first, nn.Linear(12, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3))


def normalised() -> nn.Module:
    """Batch-norms of all ranks, one behind the other, of pixels and of vectors."""
    first = nn.Sequential(nn.Conv2d(1, 3, 3, stride=2, bias=False), nn.SyncBatchNorm(3), nn.ReLU(), nn.Flatten())
    second = nn.Sequential(nn.Linear(12, 5, bias=False), nn.SyncBatchNorm(5), nn.Tanh())
    return nn.Sequential(first, second, nn.Linear(5, 3))


def tokens() -> nn.Module:
    """Attention, whose projections decide together, a weight used twice and a bare parameter."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = x.flatten(1, 2) + net.shift
        h = torch.softmax(net.q(x) @ net.k(x).mT / 6**0.5, -1) @ net.v(x)
        return net.head(net.out(torch.tanh(net.out(x + h))).mean(1))

    layers = dict.fromkeys(("q", "k", "v", "out"), (6, 6))
    return make(forward, **layers, shift=lambda: nn.Parameter(torch.randn(6) * 0.1), head=(6, 3))


class Rings(nn.Module):
    """A message along every edge, and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.head = nn.Linear(3, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor, edge_index: Tensor, batch: Tensor, num_graphs: int) -> Tensor:
        h = torch.tanh(self.a(x))
        h = torch.sin(h + torch.zeros_like(h).index_add(0, edge_index[1], h[edge_index[0]]))
        return self.head(h.new_zeros(num_graphs, 4).index_add(0, batch, h))  # type: ignore[no-any-return]


def rings(sizes: tuple[int, ...]) -> tuple[dict[str, Tensor], Tensor]:
    """Rings of so many nodes, and their classes; of one size they are alike."""
    nodes = [torch.randn(n, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in sizes]
    edges = [torch.stack([torch.arange(n), torch.arange(n).roll(1)]) + sum(sizes[:i]) for i, n in enumerate(sizes)]
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return {"x": torch.cat(nodes), "edge_index": torch.cat(edges, 1), "batch": batch}, torch.tensor(sizes) % 3


NETWORKS: dict[str, Callable[[], nn.Module]] = {"conv": convolutional, "norms": normalised, "tokens": tokens}


def batch(samples: int, step: int) -> tuple[Tensor, Tensor]:
    """Inputs and classes of a joined batch; a class that losses may ignore is the last sample's."""
    source = torch.Generator().manual_seed(step)
    x = torch.randn(samples, 1, 6, 6, generator=source, dtype=torch.float64)
    return x, torch.randint(3, (samples,), generator=source)


def shard(shards: tuple[int, ...], rank: int) -> slice:
    """A rank's samples."""
    return slice(sum(shards[:rank]), sum(shards[: rank + 1]))


def optimizer(case: Case, divide: Any = None, **options: Any) -> tuple[nn.Module, Any]:
    """A model, which may be divided among ranks (``support.sharded``), and its optimizer."""
    torch.manual_seed(0)
    model, given = NETWORKS[case.network]().double(), {"loss": nn.CrossEntropyLoss(), **case.options, **options}
    if divide is not None:
        divide(model)
    return model, compile_optimizer(model, batch(EXAMPLE, 0)[0], **given)


def trained(case: Case, own: slice, **options: Any) -> list[Tensor]:
    """Losses, parameters, buffers and states after some steps on a part of the batches."""
    model, opt = optimizer(case, **options)
    found = []
    for step in range(STEPS):
        x, y = batch(sum(case.shards), step)
        if isinstance(case.options.get("loss"), nn.MSELoss):  # several numbers a sample
            y = F.one_hot(y, 3).double()
        found.append(opt.step(x[own], y[own]))
    found += model.state_dict().values()
    derived = {"map_x", "map_g", "inverse_x", "inverse_g"}  # forms of the same factors
    states = [opt.state[p] for p in model.parameters()]
    found += [s[k] for s in states for k in sorted(s) if isinstance(s[k], Tensor) and k not in derived]
    return whole(value.detach() for value in found)


def whole(values: Iterable[Any]) -> list[Any]:
    """Tensors, gathered where ranks have shards of them."""
    return [value.full_tensor() if hasattr(value, "full_tensor") else value for value in values]


def alone(case: Case) -> list[Tensor]:
    """The same of one process with the whole batches."""
    coupling = max(case.shards) if case.options.get("coupling") == "local" else "full"
    return trained(case, slice(None), coupling=coupling)


def furthest(found: list[Tensor], wanted: list[Tensor]) -> float:
    """The largest difference, relative to each tensor's largest entry."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-3)) for a, b in pairs)


# --- jobs of a rank ---------------------------------------------------------------------------------------------------


def differences(rank: int, cases: Mapping[str, Case], divide: Any = None) -> dict[str, float]:
    """How far every case is from one process; the ranks share out what one process does, and are alike to the bit."""
    size, own = dist.get_world_size(), {}
    for index, (name, case) in enumerate(cases.items()):
        if index % size == rank:
            own[name] = alone(case)
    every: list[Any] = [None] * size
    dist.all_gather_object(every, own)
    wanted = {name: found for part in every for name, found in part.items()}
    far = {}
    for name, case in cases.items():
        found = trained(case, shard(case.shards, rank), divide=divide, process_group="world")
        dist.all_gather_object(every, found)
        alike = all(torch.equal(a, b) for other in every for a, b in zip(found, other, strict=True))
        far[name] = furthest(found, wanted[name]) if alike else float("inf")
    return far


def counted(rank: int, cases: Mapping[str, Case]) -> dict[str, Any]:
    """Of every case: the way to Γ, and of two steps calls and bytes by collective: on paper, and counted."""
    found: dict[str, Any] = {}
    for name, case in cases.items():
        _, opt = optimizer(case, process_group="world")
        for step in range(4):
            x, y = batch(sum(case.shards), step)
            own = shard(case.shards, rank)
            opt.step(x[own], y[own])
            paper: dict[str, tuple[int, int]] = {}
            program = opt.program
            for one in traffic(program.lowered.plan, program.compiled_for, case.shards[0]):
                if one.every_step or step == 0:
                    calls, size = paper.get(one.collective, (0, 0))
                    width = 4 if one.what == "agreement" else 8
                    paper[one.collective] = (calls + one.calls, size + width * one.elements)
            if step in (0, 3):
                found[f"{name} {step}"] = (gram_way(program.lowered.plan), paper, dict(opt.diagnostics["sent"]))
    return found


def of_graphs(rank: int, sizes: tuple[tuple[int, ...], ...]) -> float:
    """How far steps on graphs, of which every rank has its own, are from one process."""
    found = []
    for own, group in ((sum(sizes, ()), None), (sizes[rank], "world")):
        torch.manual_seed(0)
        model = GraphBatches(Rings().double(), nodes=8, edges=12)
        opt = compile_optimizer(model, loss=nn.CrossEntropyLoss(), process_group=group)
        for _ in range(STEPS):
            opt.step(*rings(own))
        found.append([p.detach() for p in model.parameters()])
    return furthest(*found)


def wrapped(rank: int, case: Case) -> tuple[float, float]:
    """A model in DistributedDataParallel, whose own communication may not be asked for, against the bare one."""
    torch.manual_seed(0)
    model = NETWORKS[case.network]().double()
    ddp = DistributedDataParallel(model)

    ddp.register_comm_hook(None, lambda state, bucket: pytest.fail("gradients were reduced"))
    opt = compile_optimizer(ddp, batch(EXAMPLE, 0)[0], loss=nn.CrossEntropyLoss(), **case.options)
    x, y = batch(sum(case.shards), 0)
    own = shard(case.shards, rank)
    opt.step(x[own], y[own])
    bare, other = optimizer(case, process_group="world")
    other.step(x[own], y[own])
    return furthest(list(model.parameters()), list(bare.parameters())), float(opt.diagnostics["loss"])


def said(call: Callable[[], Any], kind: type[Exception] = CompileError) -> str:
    """What the error says that a call ends with."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def refusals(rank: int, cases: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """What is said to options that are not for several ranks, and to ranks that are not alike."""
    found = {name: said(lambda: optimizer(Case("conv", options, ()), process_group="world"))  # noqa: B023
             for name, options in cases.items()}  # fmt: skip
    with pytest.raises(CompileError, match="Give GraphBatches nodes= and edges="):
        compile_optimizer(GraphBatches(convolutional()), loss=nn.CrossEntropyLoss(), process_group="world")
    case = Case("conv", {"curvature": "sgd"}, (2, 2))
    model, opt = optimizer(case, process_group="world")
    x, y = batch(4, 0)
    for name, change in (("parameters", lambda: model[1].bias.data.add_(rank)),
                         ("options", lambda: opt.param_groups[0].update(lr=0.1 * (1 + rank))),
                         ("program", lambda: model[1].bias.requires_grad_(rank == 0))):  # fmt: skip
        before = [p.clone() for p in model.parameters()]
        change()
        found[name] = said(lambda: opt.step(x[:2], y[:2]))
        model[1].bias.requires_grad_()
        for p, value in zip(model.parameters(), before, strict=True):
            p.data.copy_(value)
    opt.param_groups[0].update(lr=0.1)
    found["accumulate"] = said(lambda: opt.accumulate(x, y))
    found["export"] = said(lambda: opt.program.export("a.py"))
    poisoned = x[:2] * (float("nan") if rank else 1.0)
    before = [p.clone() for p in model.parameters()]
    said(lambda: opt.step(poisoned, y[:2]), NonFiniteError)
    same = all(map(torch.equal, model.parameters(), before))
    _, other = optimizer(Case("tokens", {}, ()), process_group="world")
    other.step(x[:2], y[:2])
    found["shapes"] = said(lambda: other.step(x[:2, :, rank:], y[:2]))
    found["one rank's loss is not finite"] = f"skipped {opt.diagnostics['skipped']}, unchanged {same}"
    return found


def late(rank: int, case: Case) -> str:
    """The last rank does not come to the second step; what the others say when the group's time is out."""
    group = dist.new_group(timeout=timedelta(seconds=3))
    model, opt = optimizer(case, process_group=group)
    x, y = batch(2, rank)
    opt.step(x, y)
    before, told = [p.clone() for p in model.parameters()], "late"
    if rank < dist.get_world_size() - 1:
        told = said(lambda: opt.step(x, y), RuntimeError)
    dist.barrier()
    return f"{told}, unchanged {all(map(torch.equal, model.parameters(), before))}"


def left(rank: int, case: Case) -> bool:
    """Whether a group that its user destroys is gone, and gloo's threads with it, while there is an optimizer of it."""
    group = dist.new_group()
    _, opt = optimizer(case, process_group=group)
    x, y = batch(2, rank)
    opt.step(x, y)
    there = weakref.ref(group)
    dist.destroy_process_group(group)
    del group
    assert "process_group was destroyed" in said(lambda: opt.step(x, y))
    return there() is None


def killed(rank: int, folder: Path) -> None:
    """The last rank ends between two steps; what the others say, and whether they are where they were."""
    case = Case("conv", {"curvature": "kfac"}, (2,) * dist.get_world_size())
    model, opt = optimizer(case, process_group="world")
    x, y = batch(2, rank)
    opt.step(x, y)
    if rank == dist.get_world_size() - 1:
        os._exit(1)
    before = [p.clone() for p in model.parameters()]
    told = said(lambda: opt.step(x, y), RuntimeError)
    (folder / f"{rank}").write_text(f"{told}\nunchanged {all(map(torch.equal, model.parameters(), before))}")


def _rank(rank: int, size: int, meet: Path, jobs: Mapping[str, tuple[Any, Any]], results: Any, folder: Path) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meet}", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    try:
        results.put((rank, {name: job(rank, given) for name, (job, given) in jobs.items()}))
    except Exception:
        results.put((rank, traceback.format_exc()))
    results.close()
    results.join_thread()
    killed(rank, folder)


def on_ranks(size: int, jobs: Mapping[str, tuple[Any, Any]], folder: Path) -> list[Any]:
    """What jobs return on every rank of new gloo processes, an error as text; then the last one is killed.

    Processes that a signal ends are started again once, with a warning: gloo's threads can abort one where a group ends
    (pytorch/pytorch#190489). An error, a wrong value or an end with a status of its own is not tried again.
    """
    try:
        return _once_on_ranks(size, jobs, folder)
    except Signalled as error:
        warnings.warn(f"{error}: started again", stacklevel=1)
        return _once_on_ranks(size, jobs, folder)


class Signalled(AssertionError):
    """A signal has ended a rank before it had anything to say."""


def _once_on_ranks(size: int, jobs: Mapping[str, tuple[Any, Any]], folder: Path) -> list[Any]:
    meet = Path(tempfile.mkdtemp(dir=folder)) / "store"  # no port that another run could have
    context = mp.get_context("forkserver")
    once = ["gtddp_compile", "torch._dynamo", "torch.distributed.checkpoint.state_dict"]
    context.set_forkserver_preload(once)  # imported once for all
    results = context.Queue()
    given = (size, meet, jobs, results, folder)
    processes = [context.Process(target=_rank, args=(rank, *given), daemon=True) for rank in range(size)]
    for process in processes:
        process.start()
    found: dict[int, Any] = {}
    for _ in range(60 + size):
        ended = [rank for rank, process in enumerate(processes) if process.exitcode is not None and rank not in found]
        if len(found) == size:
            break
        try:
            found.update([results.get(timeout=5)])
        except Empty:
            if ended:
                status = processes[ended[0]].exitcode or 0
                said = f"rank {ended[0]} of {size} ended with {status} and found nothing"
                for process in processes:
                    process.kill()
                raise (Signalled if status < 0 else AssertionError)(said) from None
    for process in processes:
        process.join(timeout=60)
    return [found[rank] for rank in range(size)]
