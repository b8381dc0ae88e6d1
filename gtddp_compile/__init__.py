"""gtddp_compile: derive an optimal-control optimizer for a torch model, and train with it.

``compile_optimizer(model, example_inputs, loss=…)`` traces the model, builds its state-augmented control graph, derives
the gains of Differential Dynamic Programming symbolically and generates the program that trains it.
"""

from gtddp_compile.api import compile_optimizer
from gtddp_compile.errors import CompileError, NonFiniteError
from gtddp_compile.graph import ControlGraph, Player, Shortcut, Stage, Value
from gtddp_compile.graph_batches import GraphBatches
from gtddp_compile.methods.curvature import (
    EKFAC,
    FOOF,
    KFAC,
    SGD,
    SOAP,
    Adagrad,
    Adam,
    AdamW,
    Curvature,
    Muon,
    RMSprop,
    Shampoo,
)
from gtddp_compile.methods.terminal import Geometric, MonteCarlo
from gtddp_compile.optimizer import CompiledOptimizer
from gtddp_compile.options import Nystrom, Sketch
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.terms import Terms

__all__ = [
    "EKFAC", "FOOF", "KFAC", "SGD", "SOAP", "Adagrad", "Adam", "AdamW", "CompileError", "CompiledOptimizer",
    "ControlGraph", "Curvature", "Geometric", "GraphBatches", "MonteCarlo", "Muon", "NonFiniteError", "Nystrom",
    "Player", "RMSprop", "Shampoo", "Shortcut", "Sketch", "Stage", "Terms", "UpdateProgram", "Value",
    "compile_optimizer",
]  # fmt: skip
