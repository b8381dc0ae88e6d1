"""Values whose samples do not lie along the leading axis, brought to ``(B, …)`` and back.

A layout is ``(axis, fold, to)`` or ``(axis, fold, to, order)``: samples lie along ``axis``, alone (``""``), as ``B·k``
(``"inner"``) or as ``k·B`` (``"outer"``); ``k`` becomes axis ``to`` of the arranged value (1, or 2 behind the channels
that a normalisation has first); entries of the axis are taken in ``order`` first, where there is one. What is moved is
a view wherever torch can make one.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arrangement = tuple[Any, ...]


def order_of_rows(index: Tensor, rows: int, samples: int) -> Tensor:
    """The order in which entries taken by ``index`` from ``rows`` rows, sample by sample, lie sample by sample again.

    Raises:
        ValueError: samples have different numbers of entries.
    """
    order = torch.argsort(index, stable=True)
    count = index.shape[0]
    own = torch.arange(count, device=index.device) * samples // max(1, count)
    if not torch.equal(index[order] * samples // rows, own):
        raise ValueError(f"{count} rows are no equal number for each of {samples} samples")
    return order


def apart(
    value: Tensor, batch: int, axis: int = 0, fold: str = "", to: int = 1, order: Tensor | None = None,
    columns: int = 0,
) -> Tensor:  # fmt: skip
    """The value as ``(B, …)``, every sample's elements under its own index.

    ``columns``: leading axes that are no part of the value (the columns of a factor), kept in front.
    """
    value = value.movedim(columns + axis, columns)
    if order is not None:
        value = value.index_select(columns, order)
    if fold == "inner":
        value = value.unflatten(columns, (batch, -1))
    elif fold == "outer":
        value = value.unflatten(columns, (-1, batch)).transpose(columns, columns + 1)
    return value.movedim(columns + 1, columns + to) if fold and to != 1 else value


def together(value: Tensor, axis: int = 0, fold: str = "", to: int = 1, order: Tensor | None = None) -> Tensor:
    """The inverse of :func:`apart`: from ``(B, …)`` to the value as the model has it."""
    if fold and to != 1:
        value = value.movedim(to, 1)
    if fold == "outer":
        value = value.transpose(0, 1)
    if fold:
        value = value.flatten(0, 1)
    if order is not None:
        value = value.index_select(0, torch.argsort(order))
    return value.movedim(0, axis)


def apart_all(operands: tuple[Tensor, ...], batch: int, layouts: tuple[Arrangement | None, ...]) -> tuple[Tensor, ...]:
    """Every operand as ``(B, …)``; those without a layout, which all samples share, stay."""
    pairs = zip(operands, layouts, strict=True)
    return tuple(value if layout is None else apart(value, batch, *layout) for value, layout in pairs)


def arranged(
    function: Callable[..., Tensor], batch: int, output: Arrangement, operands: tuple[Arrangement | None, ...]
) -> Callable[..., Tensor]:
    """``function(params, *operands)`` with its value and its operands as ``(B, …)``.

    The number of samples is that of the operands it is called with (one, where a kernel takes samples one by one).
    """

    def of_samples(params: Any, *values: Tensor) -> Tensor:
        pairs = list(zip(values, operands, strict=True))
        count = next((value.shape[0] for value, layout in pairs if layout is not None), batch)
        joined = [value if layout is None else together(value, *layout) for value, layout in pairs]
        return apart(function(params, *joined), count, *output)

    return of_samples


def contract_arranged(
    contract: Callable[..., Tensor], g: Tensor, after: Tensor, before: Tensor, batch: int, axis: int, fold: str,
    order: Tensor | None = None, order_after: Tensor | None = None, columns: int = 0,
) -> Tensor:  # fmt: skip
    """``⟨g_i, δx_i⟩`` of a value in another layout; ``contract`` is the kernel for ``(B, …)``.

    ``order`` of the first sweep, ``order_after`` of the second: an entry is compared with what it has become.
    """
    later, earlier = apart(after, batch, axis, fold, 1, order_after), apart(before, batch, axis, fold, 1, order)
    result: Tensor = contract(apart(g, batch, axis, fold, 1, order, columns), later, earlier)
    return result
