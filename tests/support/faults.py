"""A fault at any line of a generated program."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Fault(BaseException):
    """Of no kind that anybody handles, as a KeyboardInterrupt is."""


@contextmanager
def fault_at(line: int) -> Iterator[None]:
    """Raise at one line of the generated functions, counted as they run."""
    lines = iter(range(1, line))

    def follow(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and next(lines, None) is None:
            raise Fault
        return follow

    def enter(frame: Any, event: str, _: Any) -> Any:
        return follow if frame.f_code.co_filename.startswith("<gtddp_compile") else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)
