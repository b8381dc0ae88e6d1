"""From recorded calls to calls without side effects: in-place operations make new values.

``y = x.relu_()`` becomes ``y = relu(x)``, and whoever reads ``x`` later reads ``y``. If ``x`` is a part ``z[i]``,
whoever reads ``z`` later reads it with ``y`` put in. A change that can be seen through yet another view of the same
memory cannot be followed this way and is :class:`Untraceable`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils import _pytree as pytree

from gtddp_compile import kernels
from gtddp_compile.frontends.canonical import Canonical, canonical
from gtddp_compile.frontends.traced import Call, Traced, Untraceable
from gtddp_compile.graph import BufferRef, ParamRef, Ref, iter_leaves, map_leaves

VIEWS = frozenset(
    {
        "view", "reshape", "flatten", "transpose", "permute", "getitem", "chunk", "split", "unbind", "squeeze",
        "unsqueeze",
    }
    | {
        "expand", "expand_as", "t", "T", "mT", "H", "mH", "narrow", "select", "slice", "detach", "contiguous",
        "unflatten",
    }
    | {
        "view_as", "swapaxes", "swapdims", "movedim", "moveaxis", "diagonal", "unfold", "tensor_split",
        "split_with_sizes",
    }
    | {"alias", "real", "imag", "as_strided", "reshape_as", "to", "type", "float", "double", "half", "ravel", "dropout"}
    | {"hsplit", "vsplit", "as_tensor", "broadcast_to"}
)  # fmt: skip
"""Operations whose value may share memory with their first argument."""

COPYING = frozenset(
    {"reshape", "flatten", "contiguous", "to", "type", "float", "double", "half", "dropout", "as_tensor", "reshape_as"}
)
"""Those whose value may be another's as well."""


@dataclass(frozen=True)
class Clean:
    """A call without side effects, in canonical form."""

    call: Call
    form: Canonical


@dataclass
class _Memory:
    """Which recorded values are the same tensor, which share memory, and what a tensor has become."""

    last_read: dict[str, int]
    same: dict[str, str] = field(default_factory=dict)
    root: dict[str, str] = field(default_factory=dict)
    members: dict[str, list[str]] = field(default_factory=dict)
    now: dict[str, str] = field(default_factory=dict)
    part_of: dict[str, tuple[str, Any]] = field(default_factory=dict)
    """By the name of a part: what it is part of, and its index."""
    held: dict[str, Any] = field(default_factory=dict)
    """By the name of a root: the parameter or buffer that it is a view of."""

    def add(self, name: str, *, same_as: str | None = None, view_of: str | None = None) -> None:
        self.same[name] = self.same[same_as] if same_as else name
        source = same_as or view_of
        self.root[name] = self.root[source] if source else name
        self.members.setdefault(self.root[name], []).append(name)

    def current(self, name: str) -> str:
        return self.now.get(self.same.get(name, name), name)

    def wholes(self, name: str) -> list[tuple[str, Any]]:
        """What a tensor is part of, and what that is part of, each with the index of the part."""
        found = []
        while (whole := self.part_of.get(self.same[name])) is not None:
            found.append(whole)
            name = whole[0]
        return found

    def is_seen_elsewhere(self, name: str, position: int) -> bool:
        """Whether a later call reads the memory of ``name`` through a view that it is no part of."""
        own = {self.same[n] for n in (name, *(whole for whole, _ in self.wholes(name)))}
        family = self.members[self.root[name]]
        return any(self.same[n] not in own and self.last_read.get(n, -1) > position for n in family)


def functionalise(traced: Traced) -> tuple[tuple[Clean, ...], Any]:
    """Calls without side effects, and the output in terms of them.

    Raises:
        Untraceable: an in-place operation is seen through another view, or changes a parameter or buffer; an argument
            ``out=`` is written.
    """
    memory = _Memory(_last_reads(traced))
    for name in traced.inputs:
        memory.add(name)
    found: list[Clean] = []

    def update(leaf: Any) -> Any:
        return Ref(memory.current(leaf.name)) if isinstance(leaf, Ref) else leaf

    for position, call in enumerate(traced.calls):
        form = canonical(call)
        if form.kwargs.get("out") is not None:
            raise _writes(call, form.kwargs["out"])
        first = call.args[0] if call.args else None
        form = replace(form, args=map_leaves(form.args, update), kwargs=map_leaves(form.kwargs, update))
        found.append(Clean(call, form))
        if not form.in_place:
            shares = isinstance(first, Ref) and form.kind in VIEWS
            memory.add(call.name, view_of=first.name if shares and isinstance(first, Ref) else None)
            if form.kind in VIEWS - COPYING and isinstance(first, ParamRef | BufferRef):
                memory.held[call.name] = first
            if isinstance(first, Ref) and form.kind == "getitem" and _is_basic(call.args[1]):
                memory.part_of[call.name] = (first.name, call.args[1])
            continue
        if not isinstance(first, Ref):
            raise _writes(call, first)
        if memory.root[first.name] in memory.held:
            raise _writes(call, memory.held[memory.root[first.name]])
        if memory.is_seen_elsewhere(first.name, position):
            raise Untraceable(
                f"{form.kind} changes a tensor in place that is read through another view later",
                module=call.module,
                source=call.source,
            )
        memory.add(call.name, same_as=first.name)
        memory.now[memory.same[first.name]] = value = call.name
        for whole, index in memory.wholes(first.name):
            args = (Ref(memory.current(whole)), map_leaves(index, update), Ref(value))
            value = f"{value}_put_in"
            put = replace(call, name=value, target=kernels.setitem, args=args, kwargs={})
            found.append(Clean(put, Canonical("setitem", kernels.setitem, args, {})))
            memory.add(value, same_as=whole)
            memory.now[memory.same[whole]] = value
    return tuple(found), pytree.tree_map(update, traced.output)


def _is_basic(index: Any) -> bool:
    """Whether a part taken by an index is a view: by numbers and slices."""
    parts = index if isinstance(index, tuple) else (index,)
    return all(isinstance(part, int | slice | type(None) | type(Ellipsis)) and part is not True for part in parts)


def _last_reads(traced: Traced) -> dict[str, int]:
    found: dict[str, int] = {}
    for position, call in enumerate(traced.calls):
        found.update((leaf.name, position) for leaf in iter_leaves((call.args, dict(call.kwargs))))
    end = len(traced.calls)
    found.update((leaf.name, end) for leaf in pytree.tree_leaves(traced.output) if isinstance(leaf, Ref))
    return found


def _writes(call: Call, first: Any) -> Untraceable:
    what = "an argument out=" if isinstance(first, Ref) else "a constant"
    if isinstance(first, BufferRef):
        what = f"the buffer {first.name!r}"
    if isinstance(first, ParamRef):
        what = f"the parameter {first.name!r}"
    return Untraceable(f"the forward pass writes {what}", module=call.module, source=call.source)
