"""Hooks on the gradients of modules: a compiled step runs none, so a model is recorded without them."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.attributes import untouched
from gtddp_compile.frontends.reference import agrees, observe

HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def unhooked(model: nn.Module, *, but: Collection[nn.Module] = ()) -> Iterator[None]:
    """Modules, all but some, have no hooks on gradients in the block."""
    own = [vars(module) for module in model.modules() if module not in but]
    held = [(place, name, place[name]) for place in own for name in HOOKS if place.get(name)]
    for place, name, _ in held:
        place[name] = OrderedDict()
    try:
        yield
    finally:
        for place, name, hooks in held:
            place[name] = hooks


def check_hooks(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse hooks that change gradients; those that look at them do not run, which the user is told elsewhere.

    Raises:
        CompileError: one changes gradients, or the model fails.
    """
    hooked = {path: m for path, m in model.named_modules() if any(vars(m).get(name) for name in HOOKS)}

    def same(*modules: nn.Module) -> bool:
        with unhooked(model, but=modules):
            return agrees(observe(model, inputs), plain)

    if not hooked:
        return
    with untouched(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of where hooks fire
        with unhooked(model):
            plain = observe(model, inputs)
        if same(*hooked.values()):
            return
        path = next((path for path, module in hooked.items() if not same(module)), next(iter(hooked)))
    raise CompileError(
        "its backward hook changes gradients, and a compiled step runs no hooks",
        "Remove the hook and write what it does as a torch.autograd.Function applied in forward, whose backward is "
        "linear in the gradient, or put it into the loss (to clip gradients: max_grad_norm)",
        module=path,
        operation=type(hooked[path]).__name__,
    )
