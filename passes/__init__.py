"""The compiler's passes, in the order they run: pure functions from one immutable structure to the next.

p01_normalise, p02_players, p03_shortcuts, p04_schedule, p05_augment make the control graph of a model; p06_derive,
p07_collapse, p08_simplify, p09_lower, p10_emit make its program. ``gtddp_compile.compiler`` runs them.
"""
