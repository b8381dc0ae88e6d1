"""A model that ``fully_shard`` (FSDP2) divided among ranks: whole while a step runs, shards between steps.

A step reads whole parameters, so before it every rank gathers them into parameters of its own that stand in the model
meanwhile, without FSDP's hooks and classes. What a rank writes back when the step is done is its shard alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from itertools import chain, starmap
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
FOLDER = os.path.join("torch", "distributed", "fsdp")
MARKS = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""How names begin that fully_shard gives a module's attributes."""


def is_shard(value: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    return hasattr(value, "device_mesh")


def _fsdp() -> Any:
    """torch's FSDP2, if anybody has imported it: half a second's work."""
    return sys.modules.get("torch.distributed.fsdp")


def divided_modules(model: nn.Module) -> list[Any]:
    """Modules that ``fully_shard`` was called with, each with its parameters registered as shards."""
    found = [m for m in model.modules() if isinstance(m, _fsdp().FSDPModule)] if _fsdp() else []
    for module in found:
        module.reshard()  # a forward pass leaves the outermost one's whole
    return found


def mesh_of(model: nn.Module) -> Any:
    """The mesh of ranks that a model's parameters are divided over; ``None``: they are whole.

    Raises:
        CompileError: they are divided in a way that a step cannot gather or write.
    """
    ours: dict[int, Any] = {}
    for module in divided_modules(model):
        for group in module._get_fsdp_state()._fsdp_param_groups:
            ours |= {id(own.sharded_param): (group, own) for own in group.fsdp_params}
    first: dict[Any, str] = {}
    mesh = None
    for name, parameter in model.named_parameters():
        if is_shard(parameter):
            _check(name, parameter, *ours.get(id(parameter), (None, None)))
            mesh = mesh or parameter.device_mesh
            if parameter.device_mesh != mesh:
                raise _refused(name, "is on another mesh than the parameters before it", "Give all units one mesh=")
        origin = getattr(ours[id(parameter)][1] if id(parameter) in ours else parameter,
                         "_orig_param_uid" if id(parameter) in ours else "_fsdp_orig_uid", None)  # fmt: skip
        if origin is not None and first.setdefault(origin, name) != name:
            raise _refused(name, f"was shared with {first[origin]!r}, and fully_shard has parted them",
                           "Give both modules to one call: fully_shard([module_a, module_b])")  # fmt: skip
    return mesh


def _check(name: str, parameter: Any, group: Any, own: Any) -> None:
    """Refuse one shard that a step cannot make whole or write back."""
    plain = "Leave it out: a step computes in the parameters' dtype and under torch.autocast, on their device"
    if own is None or own.is_dtensor:
        raise _refused(name, "is a DTensor that fully_shard did not make (tensor parallelism)",
                       "Divide the model by fully_shard alone")  # fmt: skip
    if parameter.device_mesh.ndim != 1 or not all(p.is_shard() for p in parameter.placements):
        raise _refused(name, f"lies as {parameter.placements} over {parameter.device_mesh.ndim} dimensions of ranks",
                       "Give fully_shard a mesh of one dimension that has all ranks")  # fmt: skip
    if group.mp_policy != _fsdp().MixedPrecisionPolicy():
        raise _refused(name, f"is divided with {group.mp_policy}", plain)
    if own.offload_to_cpu:
        raise _refused(name, "is divided with an offload_policy", plain)


def _refused(name: str, why: str, remedy: str) -> CompileError:
    return CompileError(f"parameter {name!r} {why}", remedy, module=name.rpartition(".")[0])


# --- parts of tensors -------------------------------------------------------------------------------------------------


def own_part(shard: Any, whole: Tensor) -> Tensor:
    """What a rank has of a whole tensor, a view of it; divided as a shard is."""
    ((axis, size, place),) = ((p.dim, shard.device_mesh.size(), shard.device_mesh.get_local_rank())
                              for p in shard.placements)  # fmt: skip
    parts = whole.chunk(size, axis)
    return parts[place] if place < len(parts) else whole.narrow(axis, 0, 0)


def divided(
    parameter: Any, state: Mapping[str, Any], before: Mapping[str, Any], held: Mapping[str, Any],
    copies: list[tuple[Tensor, Tensor]],
) -> dict[str, Any]:  # fmt: skip
    """A parameter's state between steps: what has its shape as shards, all else whole on every rank.

    Args:
        parameter: a shard.
        state: after the step, whole.
        before: whole, as the step read it.
        held: as it lies; its shards take the new values.
        copies: gets the shards to be written, and with what.
    """
    found: dict[str, Any] = {}
    for key, value in state.items():
        known = held.get(key)
        if known is not None and value is before.get(key):
            found[key] = known
        elif not isinstance(value, Tensor) or value.shape != parameter.shape or is_shard(value):
            found[key] = value
        elif is_shard(known) and known.dtype == value.dtype:
            copies.append((known.to_local(), own_part(parameter, value)))
            found[key] = known
        else:
            found[key] = type(parameter.detach()).from_local(
                own_part(parameter, value).clone(), parameter.device_mesh, parameter.placements, run_check=False,
                shape=value.shape, stride=value.stride(),
            )  # fmt: skip
    return found


class Shards:
    """A model's parameters as they lie and as a step has them.

    Args:
        model: as ``fully_shard`` left it, or any other, of which nothing is changed.
        gather: from a shard to the whole tensor, on every rank; ``None``: torch's own.

    Attributes:
        working: the parameters that stand in the model during a step, by name: of shards, others.
    """

    def __init__(self, model: nn.Module, gather: Callable[[Any], Tensor] | None = None) -> None:
        self._model, self._divided = model, divided_modules(model)
        self._gather = gather or methodcaller("full_tensor")
        named = dict(model.named_parameters())
        self.working: dict[str, nn.Parameter] = {
            name: nn.Parameter(p.to_local().detach().new_empty(0)) if is_shard(p) else p for name, p in named.items()
        }
        self._whole = {id(named[name]): (named[name], own) for name, own in self.working.items() if own is not named[name]}

    def whole(self, state: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
        """A parameter's state with its shards gathered."""
        if not self._whole:
            return state
        return {key: self._gather(value) if is_shard(value) else value for key, value in state.items()}

    @contextmanager
    def together(self) -> Iterator[None]:
        """With whole parameters in the model, and without what fully_shard hung on its modules."""
        if not self._whole:
            yield
            return
        divided_modules(self._model)
        swaps = [swap for module in self._model.modules() for swap in self._swaps(module)]
        classes = [(module, "__class__", type(module)) for module in self._divided]
        back = chain(
            starmap(dict.update, [(where, outside) for where, _, outside in swaps]),
            starmap(object.__setattr__, classes),
        )
        try:
            for shard, own in self._whole.values():
                own.data = self._gather(shard.detach())
                own.requires_grad_(shard.requires_grad)
            for where, inside, outside in swaps:
                for key in outside.keys() - inside.keys():
                    del where[key]
                where.update(inside)
            for module, _, kind in classes:
                module.__class__ = next(c for c in kind.__mro__ if not issubclass(c, _fsdp().FSDPModule))
            yield
        finally:
            list(back)  # calls of C alone: no interrupt leaves it half done
            for _, own in self._whole.values():
                own.data = own.data.new_empty(0)

    def _swaps(self, module: nn.Module) -> Iterator[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
        """Dictionaries of a module, with the entries that a step has there and those between steps."""
        parameters = module._parameters
        whole = {key: self._whole[id(p)][1] for key, p in parameters.items() if id(p) in self._whole}
        yield parameters, whole, {key: parameters[key] for key in whole}
        own = vars(module)
        hung = {key: value for key, value in own.items() if key.startswith(MARKS) or _of_fsdp(value)}
        hooks = {key: type(own[key])((n, h) for n, h in own[key].items() if not _of_fsdp(h)) for key in HOOKS}
        yield own, hooks, {**hung, **{key: own[key] for key in HOOKS}}


def _of_fsdp(value: Any) -> bool:
    """A hook or method that gathers and frees parameters."""
    return FOLDER in getattr(getattr(value, "__code__", None), "co_filename", "")
