"""What the optimizer sees of the user's model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils.rnn import PackedSequence

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.attributes import OWN, Reader
from gtddp_compile.frontends.keywords import by_name, named_by_place
from gtddp_compile.graph import grouped
from gtddp_compile.runtime.overlaps import aliases
from gtddp_compile.runtime.precision import Precision
from gtddp_compile.runtime.shards import HOOKS, Shards
from gtddp_compile.terms import Terms


def as_batch(model: nn.Module, inputs: Any, targets: Any) -> tuple[Any, Any]:
    """Inputs and targets: of sets of points in tensors, others as they are.

    Raises:
        CompileError: there are targets beside them.
    """
    if not isinstance(inputs, Mapping) or not isinstance(model, Terms):
        return inputs, targets
    if targets is not None:
        raise CompileError(
            "sets of points come with their right-hand sides",
            'Pass {"name": (points, right-hand sides)} alone, or tensors',
        )
    return model.batch(inputs)


def as_inputs(inputs: Any, model: nn.Module) -> tuple[Any, ...]:
    """Arguments of the model: a tensor, or a tuple, list or mapping of them (in which ``None`` is one left out).

    Raises:
        CompileError: there are none, or others than tensors.
    """
    several = isinstance(inputs, tuple | list) and not isinstance(inputs, PackedSequence)
    if several and any(value is None for value in inputs):
        inputs = named_by_place(inputs, model)
    elif not several and not isinstance(inputs, Mapping):
        inputs = (inputs,)
    found = by_name(inputs, model) if isinstance(inputs, Mapping) else tuple(inputs)
    for value in found:
        if not isinstance(value, Tensor):
            raise CompileError(
                f"inputs must be tensors, got {type(value).__name__}",
                "Pass a tensor, a tuple of tensors in the order of the model's arguments, or a dict of them by name "
                "(sequences padded); other arguments are for a module around the model to pass",
            )
        _check_input(value, model)
    if not found:
        raise CompileError("there are no inputs", "Pass a tensor, or a tuple or dict of tensors")
    return found


def _check_input(value: Tensor, model: nn.Module) -> None:
    """Refuse tensors in which samples are no rows of numbers, and those that somebody waits for a gradient of."""
    where = next((parameter.device for parameter in model.parameters()), value.device)
    kind = "a nested tensor" if value.is_nested else f"a tensor of layout {value.layout}"
    if value.is_nested or value.layout != torch.strided:
        raise CompileError(f"an input is {kind}", "Give a dense one: x.to_dense(), or x.to_padded_tensor(0.0)")
    if value.device.type != where.type:
        raise CompileError(
            f"an input is on {value.device}, the model's parameters are on {where}", "Move one of them: x.to(device)"
        )
    if value.grad_fn is not None:
        raise CompileError(
            f"an input was computed with a graph ({type(value.grad_fn).__name__}): a step gives no gradient to what "
            "made it",
            "Detach it, or put what made it into the model",
        )


def check_batch(inputs: tuple[Any, ...], targets: Any) -> tuple[Any, ...]:
    """The inputs; an empty batch, inputs without a batch axis, and inference mode are refused."""
    if torch.is_inference_mode_enabled():
        raise CompileError("torch.inference_mode() is on, under which nothing has a gradient", "Train outside it")
    sizes = {value.shape[0] if value.dim() else None for value in inputs}
    if None in sizes:
        raise CompileError("an input has no batch axis", "Give every input a leading batch axis")
    if 0 in sizes:
        raise CompileError("the batch is empty", "Skip empty batches, or drop the last one in the loader")
    if isinstance(targets, Tensor) and targets.dim() and targets.shape[0] == 0:
        raise CompileError("the targets are empty", "Give one target a sample")
    return inputs


REFUSED: dict[type[nn.Module], str] = {
    torch.jit.ScriptModule: "Compile the module it was made from",
    nn.DataParallel: "Compile its .module",
    DistributedDataParallel: "Compile its .module",
}
"""Wrappers whose forward pass no front end can follow, with what to do."""
UNUSABLE: tuple[tuple[Callable[[Tensor], bool], str, str], ...] = (
    (lambda p: p.layout != torch.strided, "is a sparse tensor",
     "Keep its values as a dense parameter and its places as a buffer"),
    (torch.is_complex, "is complex",
     "Keep its real and imaginary parts as two real parameters, and join them by torch.complex in forward"),
    (lambda p: 0 in p.stride() and p.numel() > 1, "is expanded: its entries are one number in memory",
     "Make the parameter as large as what it holds, and expand it in forward"),
    (lambda p: p.is_meta, "is on the meta device, without values",
     "Give it memory and values first: model.to_empty(device=...), then load or initialise them"),
)  # fmt: skip
"""Parameters that no step can move, in the order in which they are asked about, with what to do."""


class ModelView:
    """Parameters and buffers by canonical name, without copying them.

    Args:
        model: a module.
        gather: from a parameter that ``fully_shard`` divided to the whole of it; ``None``: torch's own.

    Raises:
        CompileError: the model is not a module, or trains nothing.
    """

    def __init__(self, model: nn.Module, gather: Callable[[Any], Tensor] | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise CompileError(f"a {type(model).__name__} is not a torch.nn.Module", "Pass the module itself")
        for kind, remedy in REFUSED.items():
            if isinstance(model, kind):
                raise CompileError(f"a {type(model).__name__} cannot be compiled", remedy, module="")
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):
            raise CompileError(
                "the model is wrapped by torch.compile",
                "Pass the module that was given to torch.compile, and compile=True to have the step compiled",
            )
        lazy = [name for name, value in model.named_parameters() if isinstance(value, UninitializedParameter)]
        if lazy:
            raise CompileError(
                f"parameters have no shape yet: {', '.join(lazy)}",
                "Run the model on one batch first",
                module=lazy[0].rpartition(".")[0],
            )
        self.model, self.shards = model, Shards(model, gather)
        self.named: dict[str, nn.Parameter] = dict(model.named_parameters())
        if not any(p.requires_grad for p in self.named.values()):
            raise CompileError("the model has no trainable parameters", "Set requires_grad on those to train")
        for unusable, what, remedy in UNUSABLE:
            for name in (name for name, value in self.named.items() if unusable(value)):
                raise CompileError(f"parameter {name!r} {what}", remedy, module=name.rpartition(".")[0])
        self.aliases = aliases(self.named, dict(self._tensors()))
        """Buffers in a trained parameter's memory, which a step writes."""
        with self.shards.together():
            self._placed = _placed(_modules(model))
        _say_unheard(self.named, model)
        self._said = False

    def say_unread(self) -> None:
        """Warn, once, of gradients in ``p.grad``: whatever was done to them is without effect."""
        if not self._said and any(p.grad is not None for p in self.named.values()):
            self._said = True
            warnings.warn(
                "parameters have p.grad, which a compiled step does not read: backward() and what is done to gradients "
                "after it (clip_grad_norm_, scaling), has no effect. Clip by compile_optimizer(max_grad_norm=...), "
                "and leave out backward()",
                stacklevel=5,
            )

    def groups(self) -> list[dict[str, Any]]:
        """One param_group for every module that owns parameters, with its name.

        Frozen ones too, as torch.optim has them: they may be trained later.
        """
        modules = grouped(self.named, lambda name: name.rpartition(".")[0])
        return [{"params": [self.named[name] for name in names], "name": path} for path, names in modules.items()]

    def parameters(self) -> dict[str, Tensor]:
        """Every parameter, detached (it shares the model's memory)."""
        return {name: parameter.detach() for name, parameter in self.shards.working.items()}

    def buffers(self) -> dict[str, Tensor]:
        """Buffers and constant tensor attributes by qualified name."""
        return dict(self._tensors())

    def constants(self) -> dict[str, Tensor]:
        """Tensors that are plain attributes, which torch's ``named_buffers`` does not list."""
        named = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        return {name: value for name, value in self._tensors() if name not in named}

    def buffer(self, name: str) -> Tensor:
        """One buffer."""
        path, _, attribute = name.rpartition(".")
        found: Tensor = getattr(self.model.get_submodule(path), attribute)
        return found

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, module in _walk(self.model, "", {}).values():
            for name, value in module._buffers.items():
                if value is not None:
                    yield f"{prefix}{name}", value
            for name, value in vars(module).items():
                if name not in OWN and isinstance(value, Tensor):
                    yield f"{prefix}{name}", value

    def signature(self, skipped: set[tuple[Any, str]]) -> tuple[Any, ...]:
        """What the program depends on: the modules with their attributes (a dropout's ``p``, a stride, an activation, a
        field of a configuration) and forward hooks, and which parameters are trained.

        Args:
            skipped: attributes that do not count, see :meth:`owned`; those that lead out of the model are added.

        Raises:
            CompileError: a parameter was added, removed or replaced since the optimizer was made.
        """
        modules = _modules(self.model)
        if _placed(modules) != self._placed:
            self._check_parameters()
            self._placed = _placed(modules)
        params = self.named.values()
        found = tuple(Reader(self.model).attributes([(id(module), module) for module in modules], skipped))
        hooks = tuple((id(m), *map(id, vars(m)[name].values())) for m in modules for name in HOOKS if vars(m)[name])
        return found, hooks, tuple(p.requires_grad for p in params), Precision.around(params)

    def owned(self, names: tuple[str, ...]) -> set[tuple[Any, str]]:
        """Attributes of modules, by qualified name, as :meth:`signature` skips them."""
        modules = dict(self.model.named_modules())
        parts = [name.rpartition(".") for name in names]
        return {(id(modules[path]), name) for path, _, name in parts if path in modules}

    def _check_parameters(self) -> None:
        current = dict(self.model.named_parameters())
        wanted = self.shards.working
        for name in {**current, **wanted}:
            if current.get(name) is not wanted.get(name):
                raise CompileError(
                    f"parameter {name!r} was added, removed or replaced after compilation",
                    "Call compile_optimizer again; load_state_dict carries the state over",
                    module=name.rpartition(".")[0],
                )


def _walk(module: nn.Module, prefix: str, found: dict[int, tuple[str, nn.Module]]) -> dict[int, tuple[str, nn.Module]]:
    """The module and everything below it, each once, with what its names begin with: ``named_modules`` in a fraction of
    the time, every step.
    """
    if id(module) not in found:
        found[id(module)] = prefix, module
        for name, child in module._modules.items():
            if child is not None:
                _walk(child, f"{prefix}{name}.", found)
    return found


def _modules(root: nn.Module) -> list[nn.Module]:
    """The module and everything below it, each once."""
    return [module for _, module in _walk(root, "", {}).values()]


def _placed(modules: list[nn.Module]) -> list[tuple[object, ...]]:
    """Which parameters the modules have, and what they and the modules below are called."""
    return [
        (*module._modules, *((name, id(parameter)) for name, parameter in module._parameters.items()))
        for module in modules
    ]


def _say_unheard(parameters: Mapping[str, nn.Parameter], model: nn.Module) -> None:
    """Hooks on gradients would be passed over in silence."""
    names = [n for n, p in parameters.items() if p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None)]
    names += [repr(n) for n, m in model.named_modules() if m._backward_hooks or m._backward_pre_hooks]
    if names:
        warnings.warn(
            f"gradient hooks of {', '.join(names)} do not run: a compiled step makes no p.grad; "
            "put what they do into the model or the loss",
            stacklevel=4,
        )
