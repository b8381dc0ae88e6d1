"""Parts of a forward pass under another autocast, or another choice of attention, than is around the model."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from gtddp_compile.errors import CompileError
from gtddp_compile.frontends.attributes import untouched
from gtddp_compile.frontends.reference import outputs
from gtddp_compile.frontends.traced import module_paths, users_line

AUTOCAST = (
    "autocast is another here than around the model, and a recording has one",
    "Take it out; for lower precision in a part of the model, step without autocast and put torch.autocast around that "
    "part in forward",
)
ATTENTION = (
    "sdpa_kernel is around attention, a recording leaves the choice to torch, and in lower precision they differ",
    "Take sdpa_kernel out, or step without autocast",
)


def refused_region(model: nn.Module, inputs: tuple[Any, ...]) -> CompileError | None:
    """What of the forward pass no recording has, and where it begins; ``None``: nothing."""
    watching = _Watching(model)
    with untouched(model), module_paths(model) as watching.stack, watching:
        outputs(model, inputs)
    return watching.found


class _Watching(TorchFunctionMode):
    """Notes the first torch function that is called under something else than there is outside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.found: CompileError | None = None
        self.stack = [""]
        self._kinds = {"cpu", *(parameter.device.type for parameter in model.parameters())}
        self._cast, self._kernels = self._casts(), _attention()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look, and run it."""
        low = any(enabled for _, enabled, _ in self._casts())
        if self.found is None and self._casts() != self._cast:
            self._note(AUTOCAST)
        elif self.found is None and low and func is F.scaled_dot_product_attention and _attention() != self._kernels:
            self._note(ATTENTION)
        return func(*args, **(kwargs or {}))

    def _note(self, what: tuple[str, str]) -> None:
        self.found = CompileError(*what, module=self.stack[-1], source=users_line() or None)

    def _casts(self) -> list[tuple[str, bool, torch.dtype | None]]:
        on = {kind: torch.is_autocast_enabled(kind) for kind in sorted(self._kinds)}
        return [(kind, on[kind], torch.get_autocast_dtype(kind) if on[kind] else None) for kind in on]


def _attention() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return cuda.math_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
