"""Models that FSDP2 divided among gloo processes: what every rank runs."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gtddp_compile import SGD, NonFiniteError, compile_optimizer
from support.ranked import Case, batch, convolutional, differences, furthest, optimizer, said, shard, whole

FULL = StateDictOptions(full_state_dict=True)
CASE = Case("conv", {"curvature": "foof"}, (5, 3))
SAVED = Case("conv", {"curvature": "soap", "eps": 1e-2}, (5, 3))


def by_layers(model: nn.Module) -> None:
    """Every layer for itself, and the rest."""
    for child in model.children():
        fully_shard(child)
    fully_shard(model)


def apart(rank: int, cases: Mapping[str, Case]) -> dict[str, float]:
    """How far models in shards, by layers or in one unit, are from one process."""
    local = {name: case for name, case in cases.items() if case.options["coupling"] == "local"}
    rest = {name: case for name, case in cases.items() if name not in local}
    return differences(rank, local, fully_shard) | differences(rank, rest, by_layers)


def step(model: Any, opt: Any, rank: int, number: int) -> Tensor:
    """One step on a rank's shard of a batch, and what a forward pass of FSDP2 finds after it."""
    x, y = batch(sum(CASE.shards), number)
    opt.step(x[shard(CASE.shards, rank)], y[shard(CASE.shards, rank)])
    with torch.no_grad():
        return model(x)  # type: ignore[no-any-return]


class Anchored(SGD):
    """Keeps where a parameter began."""

    def init_state(self, param: Tensor, group: Any) -> dict[str, Any]:
        return {**super().init_state(param, group), "anchor": param.clone()}


def anchored(rank: int) -> bool:
    """Whether a first state is made from whole parameters."""
    model, opt = optimizer(CASE._replace(options={"curvature": Anchored(lr=0.1)}), by_layers)
    before = whole(model.state_dict().values())
    step(model, opt, rank, 0)
    return all(map(torch.equal, whole(opt.state[p]["anchor"] for p in model.parameters()), before))


def within(opt: Any, rank: int) -> None:
    """A step within a step."""
    x, y = (value[shard(CASE.shards, rank)] for value in batch(sum(CASE.shards), 0))
    opt.step(x, y, closure=lambda: opt.step(x, y))


def between_steps(rank: int, _: None) -> dict[str, bool]:
    """What lies on a rank between steps, and after one that fails."""
    plain, other = optimizer(CASE, process_group="world")
    model, opt = optimizer(CASE, by_layers)
    outputs = [(step(model, opt, rank, n), step(plain, other, rank, n)) for n in range(2)]
    for one in (opt, other):
        within(one, rank)
    outputs.append((step(model, opt, rank, 2), step(plain, other, rank, 2)))
    held, last = dict(model.named_parameters()), dict(opt.state[model[1].weight])
    step(model, opt, rank, 2)
    model.reshard()
    before = [p.to_local().clone() for p in model.parameters()]
    x, y = batch(2, 3)
    with pytest.raises(NonFiniteError):
        opt.step(x * (float("nan") if rank else 1.0), y)
    size = sum(p.to_local().numel() * 8 for p in model.parameters())
    found = {
        "a forward pass reads the new parameters": all(torch.allclose(a, b, atol=1e-12) for a, b in outputs),
        "parameters are the same shards": all(p is held[n] for n, p in model.named_parameters()),
        "states are the same tensors": all(opt.state[model[1].weight][k] is v for k, v in last.items() if v.dim()),
        "the last step is a shard": isinstance(last["last_step"], DTensor),
        "a failed step changes nothing": all(map(torch.equal, (p.to_local() for p in model.parameters()), before)),
        "modules are divided": all(isinstance(m, FSDPModule) for m in model.children()),
        "nothing whole is left": not any(p.numel() for p in opt._view.shards.working.values())
        and all(isinstance(kind, type) for kind in opt._committed),
    }
    found["a first state is of the whole parameter"] = anchored(rank)
    step(model, opt, rank, 4)
    found["what was sent"] = opt.diagnostics["sent"]["all_gather of shards"] == (3 * len(held), 3 * size)
    return found


# --- checkpoints ------------------------------------------------------------------------------------------------------


def _by_whole_states(saved: Any, twin: Any, folder: Path) -> None:
    step(*twin, dist.get_rank(), 5)  # a state has its entries from the first step on
    states = copy.deepcopy(get_state_dict(*saved, options=FULL))
    set_state_dict(*twin, model_state_dict=states[0], optim_state_dict=states[1], options=FULL)


def _by_shards(saved: Any, twin: Any, folder: Path) -> None:
    states = copy.deepcopy(get_state_dict(*saved))
    set_state_dict(*twin, model_state_dict=states[0], optim_state_dict=states[1])


def _by_files(saved: Any, twin: Any, folder: Path) -> None:
    dcp.save(dict(zip("mo", get_state_dict(*saved), strict=True)), checkpoint_id=folder)
    step(*twin, dist.get_rank(), 5)
    found = dict(zip("mo", get_state_dict(*twin), strict=True))
    dcp.load(found, checkpoint_id=folder)
    set_state_dict(*twin, model_state_dict=found["m"], optim_state_dict=found["o"])


def _from_one_process(saved: Any, twin: Any, folder: Path) -> None:
    _, opt = optimizer(SAVED)
    opt.load_state_dict(copy.deepcopy(get_full(saved)))
    twin[0].load_state_dict(saved[0].state_dict())
    twin[1].load_state_dict(opt.state_dict())


def get_full(saved: Any) -> Any:
    """What one process would have saved."""
    state = saved[1].state_dict()
    return state | {"state": {i: dict(zip(s, whole(s.values()), strict=True)) for i, s in state["state"].items()}}


RESUMED = {"whole": _by_whole_states, "shards": _by_shards, "files": _by_files, "one process": _from_one_process}


def resumed(rank: int, folder: Path) -> dict[str, float]:
    """How far going on from a checkpoint is from going on: moments in shards, factors whole."""
    saved = optimizer(SAVED, by_layers)
    step(*saved, rank, 0)
    twins = {name: optimizer(SAVED, by_layers) for name in RESUMED}
    for name, way in RESUMED.items():
        way(saved, twins[name], folder)
    step(*saved, rank, 1)
    for twin in twins.values():
        step(*twin, rank, 1)
    wanted = whole(saved[0].state_dict().values())
    return {name: furthest(whole(model.state_dict().values()), wanted) for name, (model, _) in twins.items()}


# --- refusals ---------------------------------------------------------------------------------------------------------


def _tied(model: Any) -> None:
    model[3], model[4] = nn.Linear(5, 5), nn.Linear(5, 5)
    model[4].weight = model[3].weight
    by_layers(model)


def _tensor_parallel(model: Any) -> None:
    model[1].weight = nn.Parameter(distribute_tensor(model[1].weight.detach(), init_device_mesh("cpu", (2,))))


def _two_meshes(model: Any) -> None:
    fully_shard(model[1], mesh=DeviceMesh("cpu", [1, 0]))
    fully_shard(model)


REFUSED_SHARDS = {
    "mixed precision": "parameter '0.0.weight' is divided with MixedPrecisionPolicy(param_dtype=torch.bfloat16",
    "offload": "parameter '0.0.weight' is divided with an offload_policy",
    "tied": "parameter '4.weight' was shared with '3.weight', and fully_shard has parted them",
    "tensor parallel": "parameter '1.weight' is a DTensor that fully_shard did not make",
    "two dimensions": "parameter '0.0.weight' lies as (Replicate(), Shard(dim=0)) over 2 dimensions of ranks",
    "two meshes": "parameter '1.weight' is on another mesh",
    "other ranks": "process_group has other ranks than fully_shard's mesh, [0, 1]",
}
"""What is said of shards that no step takes."""
WAYS = {
    "mixed precision": lambda m: fully_shard(m, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
    "offload": lambda m: fully_shard(m, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "tied": _tied,
    "tensor parallel": _tensor_parallel,
    "two dimensions": lambda m: fully_shard(m, mesh=init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))),
    "two meshes": _two_meshes,
    "other ranks": fully_shard,
}


def refused_shards(rank: int, _: None) -> dict[str, str]:
    """What is said to models that are divided otherwise."""
    found, alone = {}, [dist.new_group([one]) for one in range(dist.get_world_size())][rank]
    for name, divide in WAYS.items():
        model, group = convolutional(), alone if name == "other ranks" else None
        divide(model)
        found[name] = said(lambda: compile_optimizer(model, loss=nn.CrossEntropyLoss(), process_group=group))  # noqa: B023
    return found
