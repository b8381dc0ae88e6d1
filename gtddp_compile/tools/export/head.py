"""What the docstring of an exported module says of its program: the work of a step, and its equations' symbols."""

from __future__ import annotations

from collections.abc import Iterator

from gtddp_compile.options import Nystrom
from gtddp_compile.runtime.program import UpdateProgram

TAKES = "every stage takes one weighted parameter gradient, preconditioned by the base method"
ROLLED = f"Then sweep forward: {TAKES}, and runs again."
OPEN = f"Then {TAKES}; none answers to another."
FACTORS = "Back-propagate once, then make one {size} x {size} Gram matrix and one Cholesky factor a stage"
STEPS = {
    "joint": "Back-propagate once and add up every stage's Gram matrix: one {size} x {size} system and one Cholesky "
    "factor for all stages. Its solution w weighs the samples in one parameter gradient a layer, preconditioned by the "
    "base method; nothing runs again.",
    "nystrom": "Back-propagate once. The weights w of the samples, for all stages the same, come by conjugate "
    f"gradients: no Gram matrix is formed. Then {TAKES}.",
    "information": f"{FACTORS}. {ROLLED}",
    "block": f"{FACTORS}, of which only what is a sample's own goes on to the stage before. {ROLLED}",
    "substituted": "Back-propagate once, then find every sample's own weight a stage, from its gradients alone. "
    f"{ROLLED}",
    "base": "Back-propagate once. Every layer takes its gradient, preconditioned by the base method; without feedback.",
}
"""By form; ``nystrom`` is the joint form of the option of that name."""
SYMBOLS = {
    "C": "C the per-sample parameter gradients of a stage (one column a sample)",
    "M": "M the curvature of the base method",
    "Gamma": "Gamma = C^T M^-1 C",
    "c": "c the change of each sample's loss that the stages before have caused",
    "d": "d the gradient of the coupled weight decay",
    "mu": "mu the inertia",
    "v": "v the last step",
    "b": "b the ordinary parameter gradient",
    "tau": "tau = B / b the batch over a group's samples",
    "s": "s = C^T M^-1 l",
    "E": "E which columns are of the same sample",
}


def summary(program: UpdateProgram) -> str:
    """The work of a step, by the program's form."""
    name = {"printed": "substituted"}.get(program.form.name, str(program.form.name))
    if name == "joint" and isinstance(program.options.gram, Nystrom):
        name = "nystrom"
    said = STEPS[name].format(size="B r" if program.form.factored else "B")
    if isinstance(program.options.coupling, int):
        said += f" B is the batch in groups of {program.options.coupling}."
    return said.replace(ROLLED, OPEN) if program.options.feedback == "open" else said


def symbols(program: UpdateProgram) -> Iterator[str]:
    """What the equations' symbols stand for, as far as no equation says it."""
    defined = {str(equation.symbol) for equation in program.form.said}
    used = {str(symbol) for equation in program.form.said for symbol in equation.expression.free_symbols}
    if "Gamma" in used:
        used |= {"C", "M"}
    for symbol, text in SYMBOLS.items():
        if symbol not in used - defined:
            continue
        if symbol == "C" and program.form.factored:
            text = "C the pulled-back columns of the loss's Hessian, r a sample"
        if symbol == "c" and program.options.feedback == "open":
            text = "c = 0"
        yield text
