"""What the kernels of a layer are called with, as one value, and what they have in common.

The contract of the kernels is in ``gtddp_compile.lowering.layers.base``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

Inverses = tuple[Tensor | float, ...]
"""``M⁻¹`` of every wanted parameter: a number, a 0-d tensor (spherical) or one of its shape (diagonal)."""


class Geometry(NamedTuple):
    """How a convolution computes: one entry an axis; ``padding`` may be ``"same"``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int = 1


class Norm(NamedTuple):
    """How a normalisation computes, or PReLU.

    ``form`` is ``"batch"``, ``"instance"``, ``"group"``, ``"prelu"`` (parameters along axis 1) or ``"layer"``,
    ``"rms"`` (along the last axes, ``normalized_shape``); ``training``: the statistics of the input normalise.
    """

    form: str
    eps: float | None = 1e-5
    training: bool = False
    num_groups: int = 1
    normalized_shape: tuple[int, ...] = ()


class Table(NamedTuple):
    """How a table is looked up whose row ``padding_idx``, from the end if negative, has no gradient."""

    padding_idx: int


class Operation(NamedTuple):
    """How any other operation is differentiated (``kernels/generic.py``)."""

    function: Callable[..., Tensor]
    batched: tuple[bool, ...] = ()
    mixes: bool = False
    vectorised: bool = True
    forward_mode: bool = True
    first: int = 0
    onednn: bool = True


class Joined(Protocol):
    """Ranks that have a part of one batch each."""

    share: float
    """This one's part of the samples."""
    samples_all: int
    """Samples of all together."""

    def all_reduce(self, sums: Any) -> Any:
        """The sum over ranks of a tensor, or of each in a tuple."""


class Layer(NamedTuple):
    """Operands, gradient of the output, parameters, which of them are wanted, and how the layer computes."""

    operands: tuple[Tensor, ...]
    g: Tensor
    params: tuple[Tensor | None, ...]
    wants: tuple[bool, ...]
    how: Any = None


def part_of(layer: Layer, rows: slice) -> Layer:
    """Some samples of a layer. An operation that mixes samples keeps its operands whole."""
    operands, g, params, wants, how = layer
    if not isinstance(how, Operation):
        return Layer(tuple(x[rows] for x in operands), g[rows], params, wants, how)
    if how.mixes:
        return Layer(operands, g[rows], params, wants, how._replace(first=rows.start))
    split = how.batched or (True,) * len(operands)
    own = tuple(x[rows] if by else x for x, by in zip(operands, split, strict=True))
    return Layer(own, g[rows], params, wants, how)


def column_samples(layer: Layer) -> Layer:
    """The columns of ``g`` ``(k, B, …)`` as further samples, sample by sample: ``(B k, …)``."""
    operands, g, params, wants, how = layer
    split = (isinstance(how, Operation) and how.batched) or (True,) * len(operands)
    own = tuple(x.repeat_interleave(len(g), 0) if by else x for x, by in zip(operands, split, strict=True))
    return Layer(own, g.transpose(0, 1).reshape(-1, *g.shape[2:]), params, wants, how)


def scaled(layer: Layer, weights: Tensor) -> Layer:
    """The layer with each sample's gradient times its weight."""
    operands, g, params, wants, how = layer
    return Layer(operands, scale(g, weights), params, wants, how)


def scale(g: Tensor, weights: Tensor) -> Tensor:
    """Each sample's gradient times its weight."""
    return g * weights.to(g.dtype).reshape(-1, *(1,) * (g.dim() - 1))


def is_spherical(inverse: Any) -> bool:
    """Whether a metric is a multiple of the identity."""
    return not isinstance(inverse, Tensor) or inverse.dim() == 0


def wide(value: Tensor) -> Tensor:
    """What is added up over samples is float32 at least."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def pieces(total: int, step: int) -> tuple[slice, ...]:
    """Pieces of a bounded size. In a graph there is one: a loop would make its sizes constants."""
    if torch.compiler.is_compiling():
        return (slice(0, total),)
    return tuple(slice(start, start + step) for start in range(0, total, step))
