"""Decisions of a model on values, checked where a program runs the path that was recorded."""

from __future__ import annotations

from typing import Any


class OtherPath(ValueError):
    """The values of a batch lead elsewhere than those that the model was recorded with.

    Attributes:
        module: path of the module that decides.
        source: ``"file.py:12"`` of the line.
    """

    def __init__(self, module: str, source: str) -> None:
        super().__init__(f"module {module!r}, at {source}: these values take another path than the recorded one")
        self.module, self.source = module, source


def guard(holds: Any, module: str, source: str) -> None:
    """Nothing where the recorded decision holds, else ``OtherPath``."""
    if not holds:
        raise OtherPath(module, source)
