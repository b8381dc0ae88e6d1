"""Which entries of a value changed when one sample of the inputs did, and which layouts that allows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.graph.layouts import LEADING, Layout

ROUNDING = 1000
"""Units of rounding within which two values are the same."""


@dataclass(frozen=True)
class Change:
    """Entries of a value that one variant of the inputs changed.

    Attributes:
        mask: of the value's shape.
        count: how many they are.
        sample: the sample of the inputs that the variant changes.
    """

    mask: Tensor
    count: int
    sample: int


@dataclass(frozen=True)
class Scale:
    """What is no change in a value: the same row may be rounded otherwise beside other rows.

    Attributes:
        unit: the largest difference that is none.
        finite: whether all entries are; infinities may be equal, and what is no number twice is no change.
    """

    unit: float
    finite: bool


def scale_of(value: Tensor) -> Scale:
    """The scale on which a value's entries differ."""
    if not _is_inexact(value) or not value.numel():
        return Scale(0.0, finite=True)
    largest = float(value.abs().amax())
    finite = math.isfinite(largest)
    if not finite:
        largest = float(value.abs().nan_to_num(0, 0, 0).max())
    return Scale(ROUNDING * torch.finfo(value.dtype).eps * largest, finite)


def differs(value: Tensor, other: Any, scale: Scale) -> Tensor | None:
    """Where two values differ by more than rounding; ``None`` if they cannot be compared."""
    if not isinstance(other, Tensor) or other.shape != value.shape:
        return None
    if not _is_inexact(value):
        return value != other
    difference = value - other
    difference = difference.abs_() if value.is_floating_point() else difference.abs()
    apart = difference.le(scale.unit).logical_not_()
    if not scale.finite:
        apart &= (value != other) & ~(value.isnan() & other.isnan())
    return apart


def changes(values: Sequence[Any], changed: Sequence[int]) -> list[Change | None]:
    """What each variant, of one sample each, changed of the first value; ``None`` if it cannot be compared."""
    scale = scale_of(values[0])
    masks = [differs(values[0], other, scale) for other in values[1:]]
    return [
        None if mask is None else Change(mask, int(mask.count_nonzero()), sample)
        for mask, sample in zip(masks, changed, strict=True)
    ]


def lies_as(layout: Layout, values: Sequence[Any], changed: Sequence[int], batch: int) -> bool:
    """Whether only the changed sample's entries changed, bit for bit, and each did: the common case, told quickly.

    ``layout``: samples one after the other along the leading axis, one entry each or several.
    """
    value = values[0]
    if not value.dim() or not layout.fits(tuple(value.shape), batch):
        return False
    scale, own = scale_of(value), len(value) // batch
    for other, sample in zip(values[1:], changed, strict=True):
        if not isinstance(other, Tensor) or other.shape != value.shape:
            return False
        start, end = sample * own, (sample + 1) * own
        if not (torch.equal(value[:start], other[:start]) and torch.equal(value[end:], other[end:])):
            return False
        found = differs(value[start:end], other[start:end], scale)
        if found is None or not bool(found.any()):
            return False
    return True


def decide(
    options: Sequence[Layout], found: Sequence[Change | None], batch: int, implied: Sequence[Layout | None]
) -> Layout | None:
    """The layout that the changes allow; where they allow several, what the operands have, then the plain one."""
    seen = [change for change in found if change is not None and change.count]
    allowed = [layout for layout in options if all(within(change, layout, batch) for change in seen)]
    likely = [layout for layout in allowed if layout in implied]
    return next(iter(likely or [layout for layout in allowed if seen or layout == LEADING]), None)


def within(change: Change, layout: Layout, batch: int) -> bool:
    """Whether nothing outside the sample changed."""
    return int(_own(change.mask, layout, change.sample, batch).count_nonzero()) == change.count


def keep_own(values: list[Any], changed: Sequence[int], batch: int, known: Sequence[Layout | None]) -> Layout | None:
    """Of a value that mixes samples, keep each changed sample's own part and put back what it does to others.

    So the operations behind it can be followed. The variants among ``values`` are replaced. Returns the layout that the
    value is read in: one of its moving operands', ``known``, if any fits.
    """
    kept = values[0]
    if any(not isinstance(other, Tensor) or other.shape != kept.shape for other in values[1:]):
        return None
    plain = (layout for layout in known if layout is not None and layout.order is None)
    layout = next((layout for layout in plain if layout.fits(tuple(kept.shape), batch)), None)
    if layout is None and not all(known):
        return None
    for run, sample in enumerate(changed, 1):
        found, values[run] = values[run], kept.clone()
        if layout is not None:
            _own(values[run], layout, sample, batch).copy_(_own(found, layout, sample, batch))
    return layout


def _own(value: Tensor, layout: Layout, sample: int, batch: int) -> Tensor:
    """A view of what a sample has of a value."""
    rows = value.movedim(layout.axis, 0)
    if layout.fold == "":
        return rows[sample]
    return rows.unflatten(0, (batch, -1))[sample] if layout.fold == "inner" else rows[sample::batch]


def _is_inexact(value: Tensor) -> bool:
    return value.is_floating_point() or value.is_complex()
