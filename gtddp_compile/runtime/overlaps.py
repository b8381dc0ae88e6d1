"""Tensors of a model that lie in the same memory, without being one tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.runtime.shards import is_shard


class _Placed(NamedTuple):
    """A tensor, and the bytes that it begins and ends at."""

    begin: int
    end: int
    name: str
    value: Tensor


def aliases(parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> frozenset[str]:
    """Buffers that have entries in the memory of trained parameters, which a step writes.

    Raises:
        CompileError: two parameters have: a step of one would be written over by that of the other.
    """
    found = set()
    for one, other in _overlapping({**buffers, **parameters}):
        names = [name for name in (one, other) if name in parameters]
        if not any(parameters[name].requires_grad for name in names):
            continue
        if len(names) == 1:
            found |= {one, other} - {*names}
            continue
        first, second = sorted(names, key=list(parameters).index)
        raise CompileError(
            f"parameters {first!r} and {second!r} are two, but lie in the same memory, where a step of one writes over "
            "the other's",
            "Tie them as one Parameter (b.weight = a.weight; for the transpose, use a.weight.t() in forward), or give "
            "one its own memory: p.data = p.data.clone()",
            module=second.rpartition(".")[0],
        )
    return frozenset(found)


def _overlapping(values: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs that have an entry in common; views that lie beside or between each other have none."""
    before: list[_Placed] = []
    for own in sorted(placed for name, value in values.items() for placed in _place(name, value)):
        before = [other for other in before if other.end > own.begin]
        yield from ((other.name, own.name) for other in before if _shares(other, own))
        before.append(own)


def _place(name: str, value: Tensor) -> Iterator[_Placed]:
    if is_shard(value) or value.is_nested or value.layout != torch.strided or not value.numel():
        return
    try:
        begin = value.data_ptr()
    except RuntimeError:  # of a class of its own, without memory
        return
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    if begin:
        yield _Placed(begin, begin + (last + 1) * value.element_size(), name, value)


def _shares(*pair: _Placed) -> bool:
    """Whether two tensors whose spans overlap have an entry in common."""
    one, other = pair
    if one.value.device != other.value.device:
        return False
    if all(own.value.numel() * own.value.element_size() == own.end - own.begin for own in pair):
        return True
    first = min(own.begin for own in pair)
    taken = torch.zeros(max(own.end for own in pair) - first, dtype=torch.bool, device="cpu")
    for begin, _, _, value in pair:
        width = value.element_size()
        axes = [(n, width * s) for n, s in zip(value.shape, value.stride(), strict=True) if s]
        own_bytes = taken.as_strided([*(n for n, _ in axes), width], [*(s for _, s in axes), 1], begin - first)
        if bool(own_bytes.any()):
            return True
        own_bytes.fill_(True)
    return False
