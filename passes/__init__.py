"""The compiler's passes, in the order they run: pure functions from one immutable structure to the next.

The first five make the control graph of a model, the others its program; ``gtddp_compile.runtime.compiler`` calls them.
"""

from gtddp_compile.passes.p01_normalise import normalise
from gtddp_compile.passes.p02_find_players import find_players
from gtddp_compile.passes.p03_find_shortcuts import find_shortcuts
from gtddp_compile.passes.p04_schedule import schedule
from gtddp_compile.passes.p05_augment import augment
from gtddp_compile.passes.p06_derive import derive
from gtddp_compile.passes.p07_collapse import collapse
from gtddp_compile.passes.p08_simplify import simplify
from gtddp_compile.passes.p09_lower import lower
from gtddp_compile.passes.p10_recompute import recompute
from gtddp_compile.passes.p11_distribute import distribute
from gtddp_compile.passes.p12_emit import emit

PIPELINE = (
    normalise, find_players, find_shortcuts, schedule, augment,
    derive, collapse, simplify, lower, recompute, distribute, emit,
)  # fmt: skip
"""In running order, one a file."""

__all__ = [
    "PIPELINE", "augment", "collapse", "derive", "distribute", "emit", "find_players", "find_shortcuts", "lower",
    "normalise", "recompute", "schedule", "simplify",
]  # fmt: skip
