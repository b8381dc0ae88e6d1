"""A step's frame leaves room behind it on CPython's stack, wherever it lies there."""

from __future__ import annotations

import resource
from collections.abc import Callable

from gtddp_compile.runtime.fast import with_room

CALLS = 100


def faults_of(frame: Callable[[], None], depth: int) -> int:
    """Pages that are taken anew while ``frame`` is called behind ``depth`` other frames."""
    if depth:
        return faults_of(frame, depth - 1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    frame()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def many_variables() -> Callable[[], None]:
    """A function with as many variables as a step of a large network, that calls another one ``CALLS`` times."""
    lines = [f"    v{index} = None" for index in range(1000)]
    text = "\n".join(["def frame():", *lines, f"    for _ in range({CALLS}):", "        inner()"])
    space: dict[str, Callable[[], None]] = {"inner": lambda: None}
    exec(text, space)
    return space["frame"]


def test_no_call_from_a_step_takes_memory_from_the_system() -> None:
    frame = with_room(many_variables())
    assert max(faults_of(frame, depth) for depth in range(120) for _ in range(2)) < CALLS
