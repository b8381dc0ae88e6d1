"""Periodic runs in a sequence: the repeated structure of deep networks."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

LONGEST_PERIOD = 24


@dataclass(frozen=True, slots=True)
class Run:
    """``sequence[start : start + period * count]`` is ``count`` times the same ``period`` items."""

    start: int
    period: int
    count: int

    @property
    def stop(self) -> int:
        """One past its last item."""
        return self.start + self.period * self.count


def runs(sequence: Sequence[Hashable], least: int = 3) -> list[Run]:
    """Non-overlapping periodic runs from left to right, at each place the one that covers most, in linear time.

    A period must occur ``least`` times to count; items between the runs repeat nothing.
    """
    number = {item: index for index, item in enumerate(dict.fromkeys(sequence))}
    items = [number[item] for item in sequence]
    ahead = [_matches(items, period) for period in range(1, min(LONGEST_PERIOD, len(items)) + 1)]
    found: list[Run] = []
    at = 0
    while at < len(items):
        best = None
        for period, matches in enumerate(ahead, 1):
            count = matches[at] // period + 1
            if count >= least and (best is None or period * count > best.stop - best.start):
                best = Run(at, period, count)
        if best:
            found.append(best)
        at = best.stop if best else at + 1
    return found


def _matches(items: Sequence[int], period: int) -> list[int]:
    """At every place, how many items in a row equal the one a period further on."""
    found = [0] * len(items)
    for index in range(len(items) - period - 1, -1, -1):
        found[index] = found[index + 1] + 1 if items[index] == items[index + period] else 0
    return found
