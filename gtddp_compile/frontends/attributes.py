"""What the modules of a model hold beside parameters, buffers and modules: read to be compared, and put back.

Read are their attributes and those of their classes: numbers, words, functions, tensors, generators of random numbers,
arrays (numpy's, and of bytes), and what lists, dicts, named tuples, namespaces, dataclasses and plain objects hold of
them, in ``__slots__`` too.
"""

from __future__ import annotations

import argparse
import enum
import functools
import operator
import pickle
import random
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import BuiltinFunctionType, FunctionType, MemberDescriptorType, MethodType, NoneType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

ATOMS = frozenset(
    {bool, int, float, complex, str, bytes, NoneType, FunctionType, BuiltinFunctionType, MethodType}
    | {torch.dtype, torch.device, torch.Size, torch.memory_format}
)
"""Types that are compared by value; numbers and words among them are no business of a forward pass to change."""
NUMBERS = bool | int | float | complex | str
METHODS = (FunctionType, property, staticmethod, classmethod)
ITEMS = (list, tuple, set, frozenset, deque)
LARGE = 1000
"""Items of an attribute up to which it is read: options of a model, not a table of words nor a program around it."""
WHOLE, READ = 2**16, 2**22
"""Bytes of an array up to which they are kept, and up to which they are read, for a sum of them; a larger one is taken
as one object, as a table in a file is."""
OTHERS = (sys.stdlib_module_names | {"torch", "numpy"}) - {"__main__"}
"""Packages whose objects are taken as one."""
OWN = frozenset(vars(nn.Module())) - {"training"}
"""What torch keeps in every module: not the user's attributes."""


class Same:
    """A value that equals itself alone, while nobody writes it; it is held, so that none takes its place in memory."""

    __slots__ = ("value", "version")

    def __init__(self, value: Any) -> None:
        self.value = value
        self.version = value._version if isinstance(value, Tensor) and not value.is_inference() else 0

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value and self.version == other.version

    def __hash__(self) -> int:
        return hash((id(self.value), self.version))


class State(NamedTuple):
    """Of a generator of random numbers."""

    told: bytes


class Record(NamedTuple):
    """An object by its class, its fields, and what its classes hold."""

    kind: Same
    fields: tuple[tuple[str, Any], ...]
    shared: tuple[tuple[str, Any], ...]


class _Around(Exception):
    """An object leads back to the model, or to too much: it is a program around the model, no part of it."""


class Reader:
    """One reading of a model's attributes.

    Attributes:
        held: containers, tensors and generators that were met and can be written.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._seen: dict[int, int] = {}
        self._most = 0
        self.held: list[Any] = []

    def attributes(
        self, modules: Iterable[tuple[Hashable, nn.Module]], skipped: set[tuple[Hashable, str]]
    ) -> list[tuple[Hashable, str, Any]]:
        """Owner, name, and something that is equal as long as the attribute is.

        Args:
            modules: each with what its attributes are listed under; those of classes are under the class.
            skipped: attributes that are not read; those that prove to be no part of the model are added.
        """
        found: list[tuple[Hashable, str, Any]] = []
        for owner, module in modules:
            for kind in _classes(type(module)):
                if id(kind) not in self._seen:
                    self._seen[id(kind)] = len(self._seen)
                    self._note(kind, _members(kind), skipped, found)
            self._note(owner, vars(module).items(), skipped, found)
        return found

    def _note(self, owner: Hashable, items: Iterable[tuple[str, Any]], skipped: set[Any], found: list[Any]) -> None:
        for name, value in items:
            if name in OWN or (skipped and (owner, name) in skipped):
                continue
            if type(value) not in ATOMS:
                self._most = len(self._seen) + LARGE
                try:
                    value = self.read(value)
                except _Around:
                    skipped.add((owner, name))
                    continue
            found.append((owner, name, value))

    def read(self, value: Any) -> Any:
        """The value, or what stands for it.

        Raises:
            _Around: it is an object that leads to the model.
        """
        kind = type(value)
        if kind in ATOMS:
            return value
        if kind is tuple:
            return tuple(map(self.read, value))
        if isinstance(value, Tensor):
            self.held.append(value)
            return Same(value)
        if value is self._model:
            raise _Around
        if isinstance(value, nn.Module | type | enum.Enum):
            return Same(value)
        if id(value) in self._seen:
            return kind, self._seen[id(value)]
        self._seen[id(value)] = len(self._seen)
        if len(self._seen) > self._most:
            raise _Around
        if isinstance(value, functools.partial):
            return kind, self.read((value.func, value.args, value.keywords))
        if isinstance(value, (*ITEMS, dict)):
            return self._items(value, kind)
        if generator(value) is not None:
            self.held.append(value)
            return _state(value)
        if _is_array(value):
            self.held.append(value)
            return kind, *_content(value)
        if not _is_record(kind):
            return Same(value)
        if hasattr(value, "__dict__"):
            self.held.append(vars(value))
        if _slots(kind):
            self.held.append(value)
        fields = tuple((name, self.read(held)) for name, held in _fields(value).items())
        shared = tuple((name, self.read(held)) for own in _classes(kind) for name, held in _members(own))
        return Record(Same(kind), fields, shared)

    def _items(self, value: Any, kind: type) -> Any:
        self.held.append(value)
        if len(value) > LARGE:
            return Same(value), len(value)
        if isinstance(value, dict):
            return kind, tuple((self.read(key), self.read(held)) for key, held in value.items())
        return (kind, *map(self.read, value))


def _is_record(kind: type) -> bool:
    """Whether objects of a class are taken by their fields."""
    if kind in (SimpleNamespace, argparse.Namespace):
        return True
    return (kind.__dictoffset__ != 0 or bool(_slots(kind))) and kind.__module__.partition(".")[0] not in OTHERS


def _places(kind: type) -> tuple[tuple[str, MemberDescriptorType], ...]:
    """Fields that a class and its bases have places for, and what reads and writes them (of a frozen dataclass too)."""
    places = (vars(own) for own in _own_classes(kind) if "__slots__" in vars(own))
    return tuple((name, at) for held in places for name, at in held.items() if isinstance(at, MemberDescriptorType))


_slots: Callable[[type], tuple[tuple[str, MemberDescriptorType], ...]] = functools.cache(_places)


def _fields(value: Any) -> dict[str, Any]:
    found = dict(getattr(value, "__dict__", ()))
    for name, place in _slots(type(value)):
        with suppress(AttributeError):  # it has none yet
            found[name] = place.__get__(value)
    return found


def _is_array(value: Any) -> bool:
    """Whether it is numbers in a row that may be written: numpy's, or bytes."""
    numpy = sys.modules.get("numpy")
    return isinstance(value, bytearray | array) or (numpy is not None and isinstance(value, numpy.ndarray))


def _content(value: Any) -> tuple[Any, ...]:
    """What is equal as long as an array's numbers are."""
    size = value.nbytes if hasattr(value, "nbytes") else len(value) * getattr(value, "itemsize", 1)
    if size > READ:
        return (Same(value),)
    raw = bytes(value) if isinstance(value, bytearray) else value.tobytes()
    shape, dtype = getattr(value, "shape", size), str(getattr(value, "dtype", ""))
    return shape, dtype, raw if size <= WHOLE else zlib.crc32(raw)


def _own_classes(kind: type) -> tuple[type, ...]:
    """The class and its bases, without those of torch and Python."""
    return tuple(k for k in kind.__mro__ if k.__module__.partition(".")[0] not in OTHERS | {"builtins"})


_classes: Callable[[type], tuple[type, ...]] = functools.cache(_own_classes)


def _members(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class holds; its methods stay what they are."""
    return (
        (name, value) for name, value in vars(kind).items() if type(value) not in METHODS and not name.startswith("__")
    )


def generator(value: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]] | None:
    """How to get and how to set the state of a generator of random numbers; ``None``: it is none."""
    if value is random or isinstance(value, random.Random):
        return value.getstate, value.setstate
    if isinstance(value, torch.Generator):
        return value.get_state, value.set_state
    numpy = sys.modules.get("numpy")
    if numpy is not None and (value is numpy.random or isinstance(value, numpy.random.RandomState)):
        return value.get_state, value.set_state
    if numpy is not None and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        return (lambda: bits.state), functools.partial(setattr, bits, "state")
    return None


def _state(value: Any) -> State:
    (get, _) = generator(value)  # type: ignore[misc]
    state = get()
    return State(bytes(state.tolist()) if isinstance(state, Tensor) else pickle.dumps(state))


def generators() -> dict[str, Any]:
    """Python's and numpy's own, by name."""
    numpy = sys.modules.get("numpy")
    return {"random": random} | ({} if numpy is None else {"numpy.random": numpy.random})


def read(model: nn.Module) -> dict[tuple[Hashable, str], Any]:
    """Every attribute by the path of its module (or by its class) and its name; by ``None``, :func:`generators`."""
    reader = Reader(model)
    found = {(owner, name): value for owner, name, value in reader.attributes(model.named_modules(), set())}
    return found | {(None, name): _state(value) for name, value in generators().items()}


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Undo whatever the block writes to attributes of the model's modules (values kept for inspection, say)."""
    reader = Reader(model)
    reader.attributes(model.named_modules(), set())
    own: list[Any] = [vars(m) for m in model.modules()]
    own += [value for held in own for value in held.values() if isinstance(value, dict | list | set)]
    undo = [_undo(value) for value in (*own, *reader.held, *generators().values())]
    undo += [_undo_class(kind) for kind in {k for m in model.modules() for k in _classes(type(m))}]
    calls = map(operator.methodcaller("__call__"), reversed(undo))
    with ExitStack() as stack:  # a callback for each of them takes longer than they do
        stack.callback(_make_all, calls)
        stack.callback(_make_all, calls)  # an interrupt before the first call of the other
        yield


def _make_all(calls: Iterator[None]) -> None:
    """Make the calls that are left; where one is interrupted, those after it too."""
    try:
        deque(calls, maxlen=0)
    except BaseException:
        _make_all(calls)
        raise


def _undo(held: Any) -> Callable[[], None]:
    """What puts back what a container, a tensor or a generator holds now."""
    if isinstance(held, tuple | frozenset):
        return lambda: None
    if isinstance(held, dict | list | set | deque):
        return functools.partial(_put_back, held, dict(held) if isinstance(held, dict) else list(held))
    if isinstance(held, Tensor):
        before, value = Same(held), held.detach().clone()
        return lambda: None if Same(held) == before else _write(held, value)
    if _is_array(held):
        return _undo_array(held)
    if generator(held) is None:
        return functools.partial(_put_back_slots, held, _fields(held))
    (get, put) = generator(held)  # type: ignore[misc]
    return functools.partial(put, get())


def _undo_array(held: Any) -> Callable[[], None]:
    before = _content(held)
    if isinstance(before[0], Same) or (hasattr(held, "flags") and not held.flags.writeable):
        return lambda: None
    values = held[:] if isinstance(held, bytearray | array) else held.copy()

    def put_back() -> None:
        if _content(held) != before:
            held[slice(None) if isinstance(held, bytearray | array) else ...] = values

    return put_back


def _put_back_slots(held: Any, fields: dict[str, Any]) -> None:
    now = _fields(held)
    for name, place in _slots(type(held)):
        if name in fields:
            place.__set__(held, fields[name])
        elif name in now:
            place.__delete__(held)


def _put_back(held: Any, items: Any) -> None:
    """What a container held, in its order; one that has it is not emptied, and so never without it."""
    if isinstance(held, dict):
        if list(map(id, held.values())) == list(map(id, items.values())) and list(held) == list(items):
            return
    elif list(map(id, held)) == list(map(id, items)):
        return
    held.clear()
    held.update(items) if isinstance(held, dict | set) else held.extend(items)


@torch.no_grad()
def _write(held: Tensor, value: Tensor) -> None:
    held.copy_(value)


def _undo_class(kind: type) -> Callable[[], None]:
    before = dict(_members(kind))

    def put_back() -> None:
        for name in dict(_members(kind)).keys() - before.keys():
            delattr(kind, name)
        for name, value in before.items():
            if vars(kind).get(name) is not value:
                setattr(kind, name, value)

    return put_back
