"""The compiler's passes, in the order they run: pure functions from one immutable structure to the next.

The first five make the control graph of a model, the others its program; ``gtddp_compile.compiler`` calls them.
"""

from gtddp_compile.passes.p01_normalise import normalise
from gtddp_compile.passes.p02_players import find_players
from gtddp_compile.passes.p03_shortcuts import find_shortcuts
from gtddp_compile.passes.p04_schedule import schedule
from gtddp_compile.passes.p05_augment import augment
from gtddp_compile.passes.p06_derive import derive
from gtddp_compile.passes.p07_collapse import collapse
from gtddp_compile.passes.p08_simplify import simplify
from gtddp_compile.passes.p09_lower import lower
from gtddp_compile.passes.p10_remake import make_again
from gtddp_compile.passes.p11_forget import let_go
from gtddp_compile.passes.p12_recompute import run_again
from gtddp_compile.passes.p13_emit import emit

PIPELINE = (
    normalise, find_players, find_shortcuts, schedule, augment,
    derive, collapse, simplify, lower, make_again, let_go, run_again, emit,
)  # fmt: skip
"""In running order, one a file."""

__all__ = [
    "PIPELINE",
    "augment",
    "collapse",
    "derive",
    "emit",
    "find_players",
    "find_shortcuts",
    "let_go",
    "lower",
    "make_again",
    "normalise",
    "run_again",
    "schedule",
    "simplify",
]
