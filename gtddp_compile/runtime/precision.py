"""Lower precision: the network runs in what the user chose, everything that is added up over samples in float32.

Two ways lead there: ``torch.autocast`` around the step, and a model whose parameters are bfloat16 or half. In both
the stages run as the model would; the kernels (``Γ``, ``γᵀ w``, ``c``) and the loss get bfloat16 and half tensors as
float32, which holds every value of theirs, and the kernels run with autocast off. So matrices over samples, statistics
and states are float32 at least, and rounding to the parameter's precision happens once, where it is written.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.lowering.operations import LIFTED

LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """How a step runs.

    Attributes:
        autocast: device type and dtype of the ``torch.autocast`` around it; ``None`` where there is none.
        low: whether parameters are bfloat16 or half.
    """

    autocast: tuple[str, torch.dtype] | None = None
    low: bool = False

    @classmethod
    def around(cls, params: Iterable[Tensor]) -> Precision:
        """The precision of a step on these parameters, here and now."""
        found = list(params)
        low = any(param.dtype in LOW for param in found)
        kind = found[0].device.type
        cast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        return cls(cast, low)

    @property
    def mixed(self) -> bool:
        """Whether anything is below float32."""
        return self.low or self.autocast is not None

    def outside(self) -> AbstractContextManager[Any]:
        """Around the program: no autocast."""
        return torch.autocast(self.autocast[0], enabled=False) if self.autocast else nullcontext()

    def inside(self) -> AbstractContextManager[Any]:
        """Around the network and the loss: the user's autocast."""
        return torch.autocast(self.autocast[0], self.autocast[1]) if self.autocast else nullcontext()

    def function(self, name: str, value: Any, network: Collection[str]) -> Any:
        """A function of the program's namespace as this precision needs it; ``network``: those that are its stages."""
        if name in network:
            return _within(self, value)
        return _lifted(value) if name in LIFTED else value


def lift(value: Any) -> Any:
    """bfloat16 and half tensors as float32, within tuples, lists and dictionaries."""
    if isinstance(value, Tensor):
        return value.float() if value.dtype in LOW else value
    if isinstance(value, tuple | list):
        items = [lift(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return {key: lift(item) for key, item in value.items()} if isinstance(value, dict) else value


def _lifted(kernel: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(kernel)
    def called(*args: Any, **kwargs: Any) -> Any:
        return kernel(*(lift(arg) for arg in args), **{key: lift(arg) for key, arg in kwargs.items()})

    return called


def _within(precision: Precision, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def called(*args: Any) -> Any:
        with precision.inside():
            return function(*args)

    return called
