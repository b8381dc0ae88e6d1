"""What differs between two update programs: players, stages, cuts, derivations, instructions, options."""

from gtddp_compile.tools.difference.compare import compare
from gtddp_compile.tools.difference.report import SUFFIXES, Change, Hunk, ProgramDiff, Section

__all__ = ["SUFFIXES", "Change", "Hunk", "ProgramDiff", "Section", "compare"]
