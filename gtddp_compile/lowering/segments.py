"""Where a trajectory that is not kept is run again from: segments of stages, by a cost model over traced shapes."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import isqrt

from gtddp_compile.graph import ControlGraph


@dataclass(frozen=True)
class Segments:
    """Stages between checkpoints.

    Attributes:
        starts: first stage of every segment, 0 first.
        kept: estimated bytes of values and gradients held where the whole trajectory is kept.
        peak: the same with these segments: all checkpoints and the largest segment.
    """

    starts: tuple[int, ...]
    kept: int
    peak: int


def choose_segments(graph: ControlGraph, *, gradients: bool) -> Segments:
    """The segments with the least peak, by the bytes of the traced shapes.

    ``gradients``: whether the forward sweep needs ``g`` at the cuts and of the players' outputs beside the values.
    """
    copies = 2 if gradients else 1
    stage_bytes = [copies * sum(graph.op(name).nbytes for name in stage.ops) for stage in graph.stages]
    if not any(stage_bytes):  # shapes unknown to the recording: every stage counts the same
        stage_bytes = [1] * len(graph.stages)
    moved = {value.name for value in graph.values if value.born >= 0 and value.control is None}
    cuts = [copies * sum(graph.op(name).nbytes for name in stage.live if name in moved) for stage in graph.stages]
    kept = sum(stage_bytes)
    found = [Segments((0,), kept, kept)]
    for parts in range(2, 2 * isqrt(len(stage_bytes)) + 2):
        starts = _cheapest(stage_bytes, cuts, max(*stage_bytes, -(-kept // parts)))
        sizes = [sum(stage_bytes[a:b]) for a, b in pairwise((*starts, len(stage_bytes)))]
        found.append(Segments(starts, kept, max(sizes) + sum(cuts[start] for start in starts[1:])))
    return min(found, key=lambda segments: segments.peak)


def describe_memory(graph: ControlGraph, segments: Segments | None, *, gradients: bool) -> str:
    """What a step holds of the trajectory (``gradients``: and of its gradients), at the traced batch size."""
    found = segments or choose_segments(graph, gradients=gradients)
    held = f"values{' and gradients' if gradients else ''}, estimated for the traced batch: {_shown(found.kept)}"
    count = len(found.starts)
    if count == 1:
        return f"{held} in one segment (running it again would not reduce the peak)"
    if segments is None:
        return f"{held} kept; memory='recompute' would hold {_shown(found.peak)} ({count} segments)"
    where = ", ".join(map(str, found.starts))
    return f"recomputed in {count} segments, from stages {where}: {held} as a whole, {_shown(found.peak)} so"


def _shown(size: int) -> str:
    return f"{size / 2**20:.1f} MiB" if size >= 2**17 else f"{size / 2**10:.1f} KiB"


def _cheapest(stages: list[int], cuts: list[int], bound: int) -> tuple[int, ...]:
    """First stages of segments of at most ``bound`` bytes whose cuts cost least: a sliding minimum, linear."""
    until = list(accumulate(stages, initial=0))
    best, before = [0], [0]
    window: deque[tuple[int, int]] = deque()  # (start, cost of ending a segment there), costs rising
    for end in range(1, len(stages) + 1):
        start = end - 1
        cost = best[start] + (cuts[start] if start else 0)
        while window and window[-1][1] >= cost:
            window.pop()
        window.append((start, cost))
        while until[end] - until[window[0][0]] > bound:
            window.popleft()
        best.append(window[0][1])
        before.append(window[0][0])
    starts, at = [], len(stages)
    while at:
        at = before[at]
        starts.append(at)
    return tuple(reversed(starts))
