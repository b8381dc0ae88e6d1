"""The processes of a group that have a shard of one batch each: collectives of a step, counted.

Tensors of one call travel together. Shards may differ in size: rows are padded to the longest for the way.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.kernels import Layer, Operation, Rows
from gtddp_compile.lowering.lowered import Lowered
from gtddp_compile.runtime.method import BaseMethod
from gtddp_compile.runtime.shards import mesh_of


class Ranks:
    """A process group.

    Args:
        group: of torch.distributed; ``None`` for the default one.

    Attributes:
        size, rank: how many processes there are, and which this is.
        sizes: samples of every rank in this step.
        agreed: programs whose first steps began alike, and a number for each.
        sent: calls and bytes that this rank has handed in since the step began, by collective.

    Raises:
        CompileError: torch.distributed is not initialised, or this process is not in the group.
    """

    def __init__(self, group: Any = None) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise CompileError(
                "process_group was given, but torch.distributed is not initialised",
                "Call torch.distributed.init_process_group first (torchrun sets what it reads)",
            )
        self._own = None if group is None or group is dist.group.WORLD else weakref.ref(group)
        self.size, self.rank = dist.get_world_size(self._group), dist.get_rank(self._group)
        if self.rank < 0:
            raise CompileError("this process is not in process_group", "Pass a group that it is in")
        self.sizes: tuple[int, ...] = ()
        self.agreed: list[tuple[Lowered, int]] = []
        self.sent: dict[str, tuple[int, int]] = {}

    @property
    def _group(self) -> Any:
        # Not held: gloo's threads end, within destroy_process_group, when nobody holds a group. Threads that are there
        # when the interpreter ends can abort it (pytorch/pytorch#190489).
        group = dist.group.WORLD if self._own is None else self._own()
        if group is None:
            raise CompileError("process_group was destroyed", "Call destroy_process_group after the last step")
        return group

    def __reduce__(self) -> tuple[Any, ...]:
        if self._own is not None:
            raise CompileError(
                "an optimizer of a process group of one's own cannot be pickled: the group is of running processes",
                "Save opt.state_dict() instead",
            )
        return Ranks, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    @property
    def share(self) -> float:
        """The rank's part of the samples."""
        return self.sizes[self.rank] / sum(self.sizes)

    # --- collectives --------------------------------------------------------------------------------------------------

    def all_reduce(self, value: Any) -> Any:
        """The sum over ranks of a tensor, or of each in nested tuples."""

        def together(flat: Tensor) -> Tensor:
            self._call("all_reduce", flat, lambda: dist.all_reduce(flat, group=self._group))
            return flat

        return _flattened(value, together)

    def first(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """The first rank's tensors by name, on every rank."""
        first = dist.get_global_rank(self._group, 0)

        def together(flat: Tensor) -> Tensor:
            self._call("broadcast", flat, lambda: dist.broadcast(flat, first, group=self._group))
            return flat

        return dict(zip(values, _flattened(tuple(values.values()), together), strict=True))

    def tables(self, row: Tensor) -> Tensor:
        """A vector of every rank, ``(R, n)``."""
        found = [torch.empty_like(row) for _ in range(self.size)]
        self._call("all_gather", row, lambda: dist.all_gather(found, row, group=self._group))
        return torch.stack(found)

    def all_samples(self, own: Any, owner: int | None = None) -> Any:
        """What every rank has of its samples, one rank after the other; ``None`` where another rank is the owner.

        Args:
            own: a tensor ``(b, …)``, a layer, rows of one, or nested tuples of them.
            owner: the rank that gets it; ``None``: each.
        """
        every = list(_samples(own))
        tensors = list({id(value): value for value in every}.values())  # what several layers read travels once
        packed, longest = [value.detach() for value in map(_narrowed, tensors)], max(self.sizes)
        received: dict[int, Tensor] = {}
        for _, found in groupby(sorted(range(len(packed)), key=lambda i: str(packed[i].dtype)),
                                key=lambda i: packed[i].dtype):  # fmt: skip
            places = list(found)
            flat = torch.cat(
                [packed[i].flatten(1) if packed[i].dim() > 1 else packed[i].unsqueeze(1) for i in places], 1
            )
            flat = torch.nn.functional.pad(flat, (0, 0, 0, longest - len(flat))).contiguous()
            parts = self._gathered(flat, owner)
            if parts is None:
                continue
            whole = torch.cat([part[:size] for part, size in zip(parts, self.sizes, strict=True)])
            for i, piece in zip(places, whole.split([packed[i][0].numel() for i in places], 1), strict=True):
                shape = packed[i].shape[1:]
                received[id(tensors[i])] = piece.reshape(len(whole), *shape).expand(len(whole), *tensors[i].shape[1:])
        if owner is not None and owner != self.rank:
            return None
        return _with_samples(own, iter([received[id(value)] for value in every]))

    def _gathered(self, flat: Tensor, owner: int | None) -> list[Tensor] | None:
        here = owner is None or owner == self.rank
        parts = [torch.empty_like(flat) for _ in range(self.size)] if here else None
        if owner is None:
            self._call("all_gather", flat, lambda: dist.all_gather(parts, flat, group=self._group))
        else:
            to = dist.get_global_rank(self._group, owner)
            self._call("gather", flat, lambda: dist.gather(flat, parts, dst=to, group=self._group))
        return parts

    def own_samples(self, whole: Tensor) -> Tensor:
        """The rank's part of a vector over all samples."""
        found: Tensor = whole.split(list(self.sizes))[self.rank]
        return found

    def whole(self, shard: Any) -> Tensor:
        """A tensor of which every rank has a part that torch divided (``fully_shard``)."""
        found: list[Tensor] = []
        self._call("all_gather of shards", shard.to_local(), lambda: found.append(shard.full_tensor()))
        return found[0]

    def _call(self, name: str, value: Tensor, run: Callable[[], Any]) -> None:
        calls, size = self.sent.get(name, (0, 0))
        self.sent[name] = calls + 1, size + value.numel() * value.element_size()
        try:
            run()
        except RuntimeError as error:  # torch's own for lost connections and time-outs
            raise RuntimeError(
                f"rank {self.rank} of {self.size}: {name} failed: another process ended, raised, or did not come within"
                " the group's time-out. The step was given up: parameters and states here are those before it. End"
                " this process and start all of them again from the last checkpoint"
            ) from error

    # --- agreement ----------------------------------------------------------------------------------------------------

    def begin_alike(
        self, lowered: Lowered, m: BaseMethod, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor],
        inputs: tuple[Any, ...],
    ) -> None:  # fmt: skip
        """Before every step, whether all ranks run the same program; before its first, from the same place.

        Collectives of two programs would meet, and gloo ends processes whose sizes do not fit.

        Args:
            lowered: the program.
            m: the base method, with options and states.
            params, buffers: as they are.
            inputs: of the step. Where rows of all ranks come together, a sample's have to have one shape.

        Raises:
            CompileError: something differs; on every rank.
        """
        known = next((number for one, number in self.agreed if one is lowered), None)
        number = fingerprint(*lowered.instructions) if known is None else known
        joint = lowered.plan.gathers and lowered.plan.form.name == "joint"
        shapes = fingerprint(*(value.shape[1:] for value in inputs)) if joint else 0
        device = next(iter(params.values())).device
        if self._differ(ALIKE[:2], (number, shapes, known is None or m.first), device):
            sent = dict(self.sent)
            states = (fingerprint(*chain(*sorted(m.states[name].items()))) for name in m.states)
            values = [*params.values(), *buffers.values()]
            self._differ(ALIKE[2:], (fingerprint(*values), fingerprint(m.options, *states), 0), device)
            if known is None:
                self.agreed.append((lowered, number))
            self.sent = sent

    def _differ(self, told: tuple[tuple[str, str], ...], seen: tuple[int, int, int], device: torch.device) -> bool:
        """Refuse ranks of which the first two numbers differ; whether any has a third."""
        found = self.tables(torch.tensor(seen, dtype=torch.int64, device=device)).tolist()
        for index, (what, remedy) in enumerate(told):
            other = next((rank for rank in range(self.size) if found[rank][index] != found[0][index]), None)
            if other is not None:
                raise CompileError(f"the {what} of rank {other} are not those of rank 0", remedy)
        return any(row[2] for row in found)


ALIKE = (
    (
        "instructions of the program",
        "Give compile_optimizer example inputs of one shape, and set modes and attributes of modules, on every rank",
    ),
    ("shapes of a sample", "Pad to one length on every rank, or pass coupling='local'"),
    ("parameters or buffers", "Load the same on every rank, or call torch.manual_seed before the model is made"),
    ("options or states of the optimizer", "Load the same checkpoint on every rank"),
)
"""What ranks begin with, two and two, and what to do where they do not begin alike."""


def check_shared_model(graph: ControlGraph, model: nn.Module) -> None:
    """Refuse models that ranks could run through differently, and norms whose statistics would not be of all ranks."""
    for op in graph.guards:
        raise op.refusal(
            "the path through the model depends on values, and with process_group ranks could take different ones",
            "Replace the decision by torch.where",
        )

    norms = [name for name, m in model.named_modules() if isinstance(m, nn.SyncBatchNorm) and m.training]
    if len(norms) != sum(bool(op.kwargs.get("sync")) for op in graph.ops.ops):
        raise CompileError(
            "a SyncBatchNorm in a model that torch.fx could not record: its statistics would be of one rank's samples",
            "Use BatchNorm, whose statistics are of a shard, or write the forward so that torch.fx can trace it",
            module=norms[0],
        )


def of_processes(model: Any, group: Any) -> tuple[Any, Ranks | None]:
    """The module that is trained, and the ranks that share its batches (``None``: there is one process).

    Args:
        model: a module, or one wrapped by DistributedDataParallel or divided by ``fully_shard``, whose group is taken
            where none is given.
        group: ``"world"``, a process group, or ``None``.

    Raises:
        CompileError: parameters are divided as a step cannot take them, or over other ranks; the group is none.
    """
    if isinstance(model, DistributedDataParallel):  # its hooks are on backward(), which a step does not call
        model, group = model.module, model.process_group if group is None else group
    if isinstance(model, nn.Module):
        mesh = mesh_of(model)
        if mesh is not None:
            own = dist.get_process_group_ranks(mesh.get_group())
            if group is not None and own != dist.get_process_group_ranks(None if group == "world" else group):
                raise CompileError(f"process_group has other ranks than fully_shard's mesh, {own}", "Leave it out")
            group = mesh.get_group()
    if group is None:
        return model, None
    if group != "world" and not isinstance(group, dist.ProcessGroup):
        raise CompileError(f"process_group={group!r}", "Pass 'world', or a group from torch.distributed.new_group")
    return model, Ranks(None if isinstance(group, str) else group)


def fingerprint(*values: Any) -> int:
    """A number that is the same for the same tensors and words."""
    found = 0
    for value in values:
        if isinstance(value, Tensor):
            found = zlib.crc32(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data, found)
        else:
            found = zlib.crc32(repr(value).encode(), found)
    return found


# --- tensors in structures --------------------------------------------------------------------------------------------


def _flattened(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same structure with its tensors changed as one vector a dtype."""
    leaves, spec = tree_flatten(value)
    for dtype in dict.fromkeys(leaf.dtype for leaf in leaves if isinstance(leaf, Tensor)):
        own = [(i, leaf) for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dtype == dtype]
        whole = change(torch.cat([tensor.reshape(-1) for _, tensor in own]))
        for (i, tensor), piece in zip(own, whole.split([tensor.numel() for _, tensor in own]), strict=True):
            leaves[i] = piece.reshape(tensor.shape)
    return tree_unflatten(leaves, spec)


def _narrowed(value: Tensor) -> Tensor:
    """Without the repetitions of an expanded axis."""
    for axis, (size, stride) in enumerate(zip(value.shape, value.stride(), strict=True)):
        if axis and size > 1 and stride == 0:
            value = value.narrow(axis, 0, 1)
    return value


def _by_sample(layer: Layer) -> tuple[bool, ...]:
    """Which operands have a part for each sample."""
    how = layer.how
    if isinstance(how, Operation) and how.mixes:
        raise CompileError(
            "coupling='full' over ranks: per-sample gradients of an operation that mixes samples are made from the "
            "operands of a whole batch, and a rank has a shard",
            "Use coupling='local', or take the operation out",
        )
    return (isinstance(how, Operation) and how.batched) or (True,) * len(layer.operands)


def _samples(value: Any) -> Iterator[Tensor]:
    """Tensors ``(b, …)`` of a rank's samples."""
    if isinstance(value, Rows):
        yield from _samples(value.layer)
    elif isinstance(value, Layer):
        yield from (x for x, own in zip(value.operands, _by_sample(value), strict=True) if own)
        yield value.g
    else:
        yield from (part for one in value for part in _samples(one)) if isinstance(value, tuple) else (value,)


def _with_samples(value: Any, found: Iterator[Any]) -> Any:
    """The same with the tensors of all ranks' samples."""
    if isinstance(value, Rows):
        return value._replace(layer=_with_samples(value.layer, found))
    if isinstance(value, Layer):
        operands = tuple(next(found) if own else x for x, own in zip(value.operands, _by_sample(value), strict=True))
        return value._replace(operands=operands, g=next(found))
    return tuple(_with_samples(one, found) for one in value) if isinstance(value, tuple) else next(found)
