"""A model that ``fully_shard`` (FSDP2) divided among ranks: whole while a step runs, shards between steps.

A step reads whole parameters, so before it every rank gathers them into parameters of its own that stand in the model
meanwhile, without FSDP's hooks and classes. What a rank writes back when the step is done is its shard alone.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain, starmap
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

from gtddp_compile.errors import CompileError

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
FOLDER = os.path.join(os.path.dirname(torch.__file__), "distributed", "fsdp", "")
MARKS = ("__composable_api_state_key", "_is_fsdp_managed_module", "_fsdp_use_orig_params")
"""How names begin that fully_shard gives a module's attributes."""


def is_shard(value: Any) -> bool:
    """Whether a tensor is a DTensor, without importing what makes them."""
    return hasattr(value, "device_mesh")


def _fsdp() -> Any:
    """Torch's FSDP2, if anybody has imported it: half a second's work."""
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
    if _fsdp() and any(isinstance(module, _fsdp().FullyShardedDataParallel) for module in model.modules()):
        raise CompileError("the model is wrapped by FullyShardedDataParallel, whose ranks would wait for each other",
                           "Divide it by fully_shard")  # fmt: skip
    states = [module._get_fsdp_state() for module in divided_modules(model)]
    if not all(hasattr(state, "_fsdp_param_groups") for state in states):
        raise CompileError(f"fully_shard is read as torch 2.13 has it, and this is torch {torch.__version__}",
                           "Use torch 2.13, or process_group='world' without fully_shard")  # fmt: skip
    groups = [group for state in states for group in state._fsdp_param_groups]
    ours = {id(own.sharded_param): (group, own) for group in groups for own in group.fsdp_params}
    mesh, first = None, dict[Any, str]()
    parameters: dict[str, Any] = dict(model.named_parameters())
    for name, parameter in parameters.items():
        group, own = ours.get(id(parameter), (None, None))
        if is_shard(parameter):
            _check(name, parameter, group, own)
            mesh = mesh or parameter.device_mesh
            if parameter.device_mesh != mesh:
                raise _refused(name, "is on another mesh than the parameters before it", "Give all units one mesh=")
        origin = own._orig_param_uid if own else getattr(parameter, "_fsdp_orig_uid", name)
        if first.setdefault(origin, name) != name:
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


def shard_of(value: Any) -> Tensor:
    """What a rank has of a divided tensor: its memory."""
    found: Tensor = value.detach().to_local()
    return found


def own_part(shard: Any, whole: Tensor) -> Tensor:
    """What a rank has of a whole tensor, a view of it; divided as a shard is."""
    ((axis, size, place),) = ((p.dim, shard.device_mesh.size(), shard.device_mesh.get_local_rank())
                              for p in shard.placements)  # fmt: skip
    parts = whole.chunk(size, axis)
    return parts[place] if place < len(parts) else whole.narrow(axis, 0, 0)


def divided(parameter: Any, state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state between steps: of a shard, what has the parameter's shape is divided like it."""
    if not is_shard(parameter):
        return dict(state)

    def own(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.shape != parameter.shape or is_shard(value):
            return value
        mesh, part = parameter.device_mesh, own_part(parameter, value).clone()
        return type(parameter).from_local(part, mesh, parameter.placements, run_check=False, shape=value.shape,
                                          stride=value.stride())  # fmt: skip

    return {key: own(value) for key, value in state.items()}


class GatheredStates(dict[str, Mapping[str, Any]]):
    """States of one step by parameter: those of the module that is asked for are whole, all others lie divided.

    A program asks for a module's states once a sweep, on every rank in the same order; ``values()`` are as they lie.

    Args:
        states: as they lie.
        owner: the parameter of every name.
        gather: from a shard to the whole tensor.
    """

    def __init__(
        self, states: Mapping[str, Mapping[str, Any]], owner: Mapping[str, Tensor], gather: Callable[[Any], Tensor]
    ) -> None:
        super().__init__(states)
        self._owner, self._gather, self._module = owner, gather, ""
        self._whole: dict[str, Mapping[str, Any]] = {}

    def _enter(self, name: str) -> None:
        if self._module != (module := name.rpartition(".")[0]):
            self._module = module
            self._whole.clear()

    def __getitem__(self, name: str) -> Mapping[str, Any]:
        self._enter(name)
        if name not in self._whole:
            found = super().__getitem__(name).items()
            self._whole[name] = {key: self._gather(value) if is_shard(value) else value for key, value in found}
        return self._whole[name]

    def __setitem__(self, name: str, state: Mapping[str, Any]) -> None:
        self._enter(name)
        lies, known = super().__getitem__(name), self._whole.get(name, {})
        same = {key: lies[key] for key, value in state.items() if key in lies and value is known.get(key)}
        self._whole[name] = state
        super().__setitem__(name, divided(self._owner[name], {**state, **same}))

    def update(self, pairs: Any) -> None:  # type: ignore[override]
        """As of any dictionary."""
        for name, state in dict(pairs).items():
            self[name] = state


def lying(states: dict[str, Mapping[str, Any]], name: str) -> Mapping[str, Any]:
    """A state as it lies, of which nothing is gathered."""
    return super(GatheredStates, states).__getitem__(name) if isinstance(states, GatheredStates) else states[name]


class Shards:
    """A model's parameters as they lie and as a step has them.

    Args:
        model: as ``fully_shard`` left it, or any other, of which nothing is changed.
        gather: from a shard to the whole tensor, on every rank; ``None``: torch's own.

    Attributes:
        divided: the modules that ``fully_shard`` was called with.
        working: the parameters that stand in the model during a step, by name: of shards, others.
    """

    def __init__(self, model: nn.Module, gather: Callable[[Any], Tensor] | None = None) -> None:
        self._model, self.divided = model, divided_modules(model)
        self._gather = gather or methodcaller("full_tensor")
        named = dict(model.named_parameters())
        self.working: dict[str, nn.Parameter] = {
            name: nn.Parameter(shard_of(p).new_empty(0)) if is_shard(p) else p for name, p in named.items()
        }
        self._whole = {
            id(named[name]): (named[name], own) for name, own in self.working.items() if own is not named[name]
        }

    def inside(self, parameter: Tensor) -> Tensor:
        """What stands in a parameter's place during a step."""
        return self._whole[id(parameter)][1] if id(parameter) in self._whole else parameter

    def states(self, states: dict[str, Mapping[str, Any]], owner: Mapping[str, Tensor]) -> dict[str, Mapping[str, Any]]:
        """States by parameter's name as a step reads and writes them."""
        return GatheredStates(states, owner, self._gather) if self._whole else states

    @contextmanager
    def together(self) -> Iterator[None]:
        """With whole parameters in the model, and without what fully_shard hung on its modules."""
        empty = [(own, "data", own.data) for _, own in self._whole.values() if not own.numel()]
        if not empty:  # nothing is divided, or a step within a step
            yield
            return
        divided_modules(self._model)
        swaps = [swap for module in self._model.modules() for swap in self._swaps(module)]
        classes = [(module, "__class__", type(module)) for module in self.divided]
        back = chain(
            starmap(dict.update, [(where, outside) for where, _, outside in swaps]),
            starmap(object.__setattr__, classes),
            starmap(setattr, empty),
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
    return getattr(getattr(value, "__code__", None), "co_filename", "").startswith(FOLDER)
