"""Where the samples of a value lie: which of its elements belong to sample i.

Theory needs of a value only its part for each sample (``g^(i)``, ``δx^(i)``); how a model arranges them is layout. Most
values have samples along their leading axis. Others have them along another one (``(T, B, n)``, attention that takes
time first), or together with something else along one axis: ``(B·k, n)``, tokens of all samples in one list, windows or
heads or frames of all images; ``(k·B, n)``, two views of a batch one after the other. Where tokens are sorted by the
expert that serves them, their order depends on the data; then an operation of the graph computes it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Fold = Literal["", "inner", "outer"]


@dataclass(frozen=True)
class Layout:
    """The axis of a value along which samples lie, and what they share it with.

    Attributes:
        axis: the axis; -1: none is known to be (:data:`UNKNOWN`).
        fold: ``""``: entry i is sample i; ``"inner"``: the axis is ``B·k``, k entries of sample 0 come first;
            ``"outer"``: it is ``k·B``, entry j belongs to sample ``j mod B``. k is whatever the axis has room for, so a
            layout holds for every size of the batch.
        order: name of the operation whose value says in which order the entries of the axis have to be taken first;
            ``None``: in their own.
    """

    axis: int = 0
    fold: Fold = ""
    order: str | None = None

    def fits(self, shape: tuple[int, ...], batch: int) -> bool:
        """Whether a value of this shape can have ``batch`` samples there."""
        if not 0 <= self.axis < len(shape):
            return False
        size = shape[self.axis]
        return size % batch == 0 and size > batch if self.fold else size == batch

    def sample_shape(self, shape: tuple[int, ...], batch: int) -> tuple[int, ...]:
        """Shape of one sample's part: what the axis holds of it first, then the other axes in order."""
        if self.axis < 0:
            return shape
        rest = shape[: self.axis] + shape[self.axis + 1 :]
        return (shape[self.axis] // batch, *rest) if self.fold else rest

    def owner(self, rank: Tensor, batch: int) -> Tensor:
        """The sample that every entry of the axis belongs to, from the entries' places in the layout's order."""
        return {"": rank, "inner": rank * batch // len(rank), "outer": rank % batch}[self.fold]

    def __str__(self) -> str:
        if self.axis < 0:
            return "samples along no axis"
        fold = {"": "", "inner": ", B*k", "outer": ", k*B"}[self.fold]
        return f"samples along axis {self.axis}{fold}" + (f", in the order of {self.order}" if self.order else "")


LEADING = Layout()
LISTED = Layout(0, "inner")
"""Of rows in one list, those of sample 0 first."""
UNKNOWN = Layout(-1)
"""Of a value that depends on the inputs, and of which nothing tells what belongs to which sample (a batch's mean)."""


def candidates(shape: tuple[int, ...], batch: int) -> tuple[Layout, ...]:
    """Every layout that a shape allows, the plain one first."""
    folds: tuple[Fold, ...] = ("", "inner", "outer")
    found = [Layout(axis, fold) for fold in folds for axis in range(len(shape))]
    return tuple(layout for layout in found if layout.fits(shape, batch))
