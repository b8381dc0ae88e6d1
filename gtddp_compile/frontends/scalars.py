"""Numbers that a model reads from values: what it computes of them is recorded, what it decides on them is checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from gtddp_compile.frontends.canonical import python_number

ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
Record = Callable[[Callable[..., Any], tuple[Any, ...]], Any]


class Scalar(torch.SymFloat):
    """A ``float`` read from a value, or computed of one.

    torch takes it wherever it takes a float; whatever else wants its plain value (``math``, a format, a hash) is
    refused, since that would be the example's for good.

    Attributes:
        value: what it is for the example inputs.
        leaf: what it is called in the recording.
    """

    def __init__(self, value: float, leaf: Any, record: Record, decide: Record, refuse: Callable[[], NoReturn]) -> None:
        """``record`` notes a call and gives its name; ``decide`` notes it, and that it has to give the same."""
        self.value, self.leaf, self._record, self._decide, self._refuse = value, leaf, record, decide, refuse

    def _made(self, function: Callable[..., Any], *args: Any) -> Any:
        """What a function makes of numbers, a number in turn."""
        result = function(*map(plain, args))
        if not isinstance(result, float):  # a root of what is negative
            self._refuse()
        return Scalar(result, self._record(function, args), self._record, self._decide, self._refuse)

    def __float__(self) -> NoReturn:
        self._refuse()

    def __hash__(self) -> int:
        self._refuse()

    def __repr__(self) -> str:
        self._refuse()

    def __format__(self, _: str) -> str:
        self._refuse()

    def __reduce_ex__(self, _: Any) -> NoReturn:
        self._refuse()

    __str__ = hex = as_integer_ratio = __complex__ = __getstate__ = __repr__  # type: ignore[assignment]

    def __deepcopy__(self, _: Any) -> Scalar:
        return self

    def conjugate(self) -> Scalar:
        """It is real."""
        return self

    def __bool__(self) -> bool:
        return self != 0

    def __int__(self) -> int:
        return self.__trunc__()

    def __trunc__(self) -> int:
        return self._decide(math.trunc, (self,))  # type: ignore[no-any-return]

    def __floor__(self) -> int:
        return self._decide(math.floor, (self,))  # type: ignore[no-any-return]

    def __ceil__(self) -> int:
        return self._decide(math.ceil, (self,))  # type: ignore[no-any-return]

    def __round__(self, digits: int | None = None) -> int:
        if digits is not None:
            self._refuse()
        below, whole = self.__floor__(), self._made(operator.mod, self, 1)  # halves go to what is even
        if whole == 0.5:
            return below + below % 2
        return below + bool(whole > 0.5)

    def is_integer(self) -> bool:
        """Whether nothing is behind the point."""
        return bool(self._made(operator.mod, self, 1) == 0)

    def __neg__(self) -> Any:
        return self._made(operator.neg, self)

    def __pos__(self) -> Any:
        return self

    def __abs__(self) -> Any:
        return self._made(operator.abs, self)


def plain(value: Any) -> Any:
    """The value of a number for the example inputs; anything else is itself."""
    return value.value if isinstance(value, Scalar) else value


def _operand(value: Any) -> Any:
    """A number as an operand, ``NotImplemented`` if it is none (a tensor does the operation itself)."""
    value = python_number(value) if not isinstance(value, Tensor | Scalar) else value
    return value if isinstance(value, Scalar | bool | int | float) else NotImplemented


def _binary(function: Callable[..., Any], *, swapped: bool, decides: bool) -> Callable[[Scalar, Any], Any]:
    def apply(self: Scalar, other: Any) -> Any:
        found = _operand(other)
        if found is NotImplemented:
            return NotImplemented
        args = (found, self) if swapped else (self, found)
        return self._decide(function, args) if decides else self._made(function, *args)

    return apply


for _name in ARITHMETIC:
    setattr(Scalar, f"__{_name}__", _binary(getattr(operator, _name), swapped=False, decides=False))
    setattr(Scalar, f"__r{_name}__", _binary(getattr(operator, _name), swapped=True, decides=False))
for _name in COMPARISONS:
    setattr(Scalar, f"__{_name}__", _binary(getattr(operator, _name), swapped=False, decides=True))
