"""What a forward pass carries to the next one, found by watching it: a compiled program carries nothing.

The model is run on the example inputs and then, with whatever it has kept, on others. Run on those alone it must
compute the same. Kept values that nothing reads (an attention map for inspection) do no harm; what is read is refused,
and so is whatever a pass draws from other generators than torch's own, and every number that it changes.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.utils import _pytree as pytree

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.attributes import NUMBERS, Record, State, generators, read, untouched
from gtddp_compile.frontends.changes import differs, scale_of
from gtddp_compile.frontends.reference import Reference, observe, outputs
from gtddp_compile.frontends.trials import other, some

FEW = 2
"""Samples on which a model is watched again."""
Attributes = dict[tuple[Hashable, str], Any]


def watch(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Reference, tuple[str, ...]]:
    """What the model does on the example inputs, and the names of the attributes in which it keeps something.

    Raises:
        CompileError: the model fails, or what a pass does depends on the passes before it.
    """
    with _parameters_kept(model):
        return _watch(model, inputs)


def _watch(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Reference, tuple[str, ...]]:
    batch = next((len(value) for value in inputs if value.dim()), 1)
    whole = tuple(other(value, 0, batch, 0, bold=False) for value in inputs)
    first, few = (tuple(some(value, batch, min(batch, FEW)) for value in values) for values in (inputs, whole))
    others, alone = _taken(model, few, whole, inputs)
    with untouched(model):
        before = read(model)
        reference = observe(model, inputs)
        kept = _kept(before, read(model))
        _again(model, first)  # it may keep something for batches of this size, too
        after = _again(model, others)
    if _same(alone, after):
        return reference, kept
    with untouched(model):
        again = outputs(model, others)
    if kept and _same(alone, again):
        names = ", ".join(map(repr, kept))
        raise CompileError(
            f"the forward pass reads the attribute {names} and writes it for the next pass",
            "Make it an input and an output of the model",
            module=kept[0].rpartition(".")[0],
        )
    if _apart(alone, after):  # by rounding they may differ on a device that adds in any order
        raise CompileError(
            "the model computes something else every time, from the same values and torch's same random numbers",
            "Draw random numbers from torch's default generator, and keep nothing outside its modules",
            module="",
        )
    return reference, kept


def _taken(model: nn.Module, *candidates: tuple[Any, ...]) -> tuple[tuple[Any, ...], tuple[Tensor, ...]]:
    """The first of some inputs that the model takes, and its outputs on them; else the last, and nothing.

    Where it takes none but the example's, those show all but what it kept of them.
    """
    for inputs in candidates:
        with untouched(model):
            if found := _again(model, inputs):
                return inputs, found
    return inputs, ()


def _again(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Tensor, ...]:
    """Outputs of one pass more, with whatever the model has kept; none where it fails, by that perhaps."""
    try:
        return outputs(model, inputs)
    except Exception:  # the user's own code runs here and may raise anything
        return ()


TABLES = {
    "max_norm": "rewrites its table in the forward pass",
    "scale_grad_by_freq": "divides by counts over the batch what is no derivative of the loss",
}
"""Options of embeddings that are no function of a sample, and why."""


def refused_table(option: str, **where: str | None) -> CompileError:
    """The refusal of one of :data:`TABLES`."""
    return CompileError(f"an embedding with {option} {TABLES[option]}", f"Leave {option} out", **where)


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Parameters are what they were after the block; a forward pass that writes or replaces one is refused."""
    paths = {id(module): path for path, module in model.named_modules()}
    before = {name: (value, value._version, value.detach().clone()) for name, value in model.named_parameters()}
    found: list[str] = []

    def note(module: nn.Module, name: str, value: nn.Parameter | None) -> None:
        if id(module) in paths and isinstance(value, nn.Parameter):  # functional_call puts in plain tensors
            found.append(f"{paths[id(module)]}.{name}".removeprefix("."))

    failed = None
    handle = register_module_parameter_registration_hook(note)
    try:
        yield
    except Exception as error:  # of a written parameter, perhaps: that is told first
        failed = error
    finally:
        handle.remove()
        for name, (value, version, old) in before.items():
            if value._version != version or not value.detach().equal(old):  # through .data no version counts
                found.append(name)
                with torch.no_grad():
                    value.copy_(old)
    for name in found:
        path = name.rpartition(".")[0]
        if getattr(model.get_submodule(path), "max_norm", None) is not None:
            raise refused_table("max_norm", module=path) from failed
        raise CompileError(
            f"the forward pass writes or replaces the parameter {name!r}",
            "Write it in the training loop, after the step; what forward changes for itself is a value of its own",
            module=path,
        ) from failed
    if failed is not None:
        raise failed


class _Left(Tensor):
    """Stands for what a forward pass would have left in an attribute: whoever reads it is told so."""

    path: str

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, whatever is asked."""
        raise next(_refusal(value.path) for value in pytree.tree_leaves((args, kwargs)) if isinstance(value, cls))

    def __getattribute__(self, name: str) -> Any:
        if name == "path" or name.startswith("__"):
            return super().__getattribute__(name)
        raise _refusal(self.path)


def _refusal(path: str) -> CompileError:
    return CompileError(
        f"the loss reads the attribute {path!r}, in which the forward pass leaves something: a compiled step does not, "
        "so it would have no gradient and no new value",
        "Return it from forward beside the other outputs, one value a sample, and read it from them",
        module=path.rpartition(".")[0],
    )


@contextmanager
def withheld(model: nn.Module, names: tuple[str, ...]) -> Iterator[None]:
    """Whoever reads one of these attributes of the model in the block is refused."""
    places = [(vars(model.get_submodule(path)), key, name) for name in names if not name[0].isupper()
              for path, _, key in [name.rpartition(".")]]  # fmt: skip
    before = [(held, key, held[key]) for held, key, _ in places if key in held]
    try:
        for held, key, name in places:
            left = torch.zeros(()).as_subclass(_Left)
            left.path = name
            held[key] = left
        yield
    finally:
        for held, key, _ in places:
            held.pop(key, None)
        for held, key, value in before:
            held[key] = value


def _kept(before: Attributes, after: Attributes) -> tuple[str, ...]:
    """Names of the attributes that a pass has written.

    Raises:
        CompileError: it draws from another generator than torch's, or changes a number.
    """
    found = {}
    for (owner, name), value in after.items():
        if (owner, name) not in before or before[owner, name] != value:
            path = owner.__name__ if isinstance(owner, type) else owner
            found[f"{path}.{name}" if path else name] = before.get((owner, name)), value
    for name, (old, new) in found.items():
        for path, was, now in _leaves(name, old, new):
            _check("" if name in generators() else name.rpartition(".")[0], path, was, now)
    return tuple(sorted(found))


def _leaves(name: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """An attribute before and after a pass; of an object its fields."""
    if isinstance(old, Record) and isinstance(new, Record):
        fields = dict(new.fields)
        for field, value in old.fields:
            yield from _leaves(f"{name}.{field}", value, fields.get(field, value))
    else:
        yield name, old, new


def _check(module: str, name: str, old: Any, new: Any) -> None:
    if isinstance(new, State) and old != new:
        raise CompileError(
            f"the forward pass draws random numbers from {name}, and a compiled program would keep one draw for good",
            "Draw them by torch's functions from its default generator, which a program asks at every step",
            module=module,
        )
    if isinstance(old, NUMBERS) and isinstance(new, NUMBERS) and old != new and old == old:
        raise CompileError(
            f"the forward pass changes the attribute {name!r} from {old!r} to {new!r}, which a compiled program cannot "
            "do",
            "Change it outside forward, in the training loop",
            module=module,
        )


def _apart(ones: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether outputs differ by more than rounding."""
    if len(ones) != len(others):
        return True
    found = [differs(one, other, scale_of(one)) for one, other in zip(ones, others, strict=True)]
    return any(apart is None or bool(apart.any()) for apart in found)


def _same(ones: tuple[Tensor, ...], others: tuple[Tensor, ...]) -> bool:
    """Whether outputs are the same bit for bit (what is no number too)."""
    return len(ones) == len(others) and all(
        one.shape == other.shape and torch.equal(one.nan_to_num(), other.nan_to_num())
        for one, other in zip(ones, others, strict=True)
    )
