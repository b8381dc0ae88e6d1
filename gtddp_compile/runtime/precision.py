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

from gtddp_compile.errors import CompileError
from gtddp_compile.lowering.operations import LIFTED

LOW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """How a step runs.

    Attributes:
        autocast: device type and dtype of the ``torch.autocast`` around it; ``None`` where there is none.
        low: whether parameters are bfloat16 or half.
        scale: of gradients between stages, where any of it is half.
    """

    autocast: tuple[str, torch.dtype] | None = None
    low: bool = False
    scale: float = 1.0

    @classmethod
    def around(cls, params: Iterable[Tensor], scale: float = 1.0) -> Precision:
        """The precision of a step on these parameters, here and now."""
        found = list(params)
        kinds = {param.dtype for param in found}
        kind = found[0].device.type
        cast = (kind, torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else None
        half = torch.float16 in kinds or (cast is not None and cast[1] == torch.float16)
        return cls(cast, not kinds.isdisjoint(LOW), scale if half else 1.0)

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
        value = _lifted(value) if name in LIFTED else value
        if self.scale == 1.0:
            return value
        if name == "loss_gradient":
            return lambda phi, outputs: value(phi * self.scale, outputs)
        if name == "Layer":  # without parameters: rows of one that is already unscaled
            return lambda xs, g, params, *rest: value(xs, lift(g) / self.scale if params else g, params, *rest)
        if name == "alike_rows":
            return lambda xs, gs, *rest: value(xs, tuple(g / self.scale for g in lift(gs)), *rest)
        if name in ("contract", "contract_factors"):
            return lambda g, *values: value(lift(g) / self.scale, *values)
        return value


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


class GradientScale:
    """What ``torch.amp.GradScaler`` does to the loss, done to the gradients between stages, by its figures.

    They are half there; kernels get them as float32 and without the scale. A step whose update is not finite is made
    again with a smaller scale, so that no batch is lost.

    Args:
        scaler: the user's; ``None`` and one that is not enabled: a scale of 1.

    Raises:
        CompileError: it is none.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise CompileError(
                f"grad_scaler is a {type(scaler).__name__}", "Pass a torch.amp.GradScaler, or leave it out"
            )
        self._scaler = scaler

    @property
    def value(self) -> float:
        """The scale."""
        return float(self._scaler.get_scale()) if self._scaler is not None else 1.0

    def kept(self) -> None:
        """A step was made with it: greater by ``growth_factor`` after ``growth_interval`` of them."""
        if self._scaler is not None and self._scaler.is_enabled():
            self._set(self._scaler.state_dict()["_growth_tracker"] + 1, 1.0)

    def back_off(self) -> None:
        """A step overflowed with it: smaller by ``backoff_factor``, 1 at least."""
        assert self._scaler is not None
        self._set(0, max(self._scaler.get_backoff_factor(), 1 / self.value))

    def _set(self, steps: int, factor: float) -> None:
        assert self._scaler is not None
        if steps >= self._scaler.get_growth_interval():
            steps, factor = 0, self._scaler.get_growth_factor()
        state = self._scaler.state_dict()
        self._scaler.load_state_dict({**state, "scale": state["scale"] * factor, "_growth_tracker": steps})
