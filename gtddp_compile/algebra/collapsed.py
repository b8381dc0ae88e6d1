"""The collapsed recursion: what is left of a stage once its value function is written in the back-propagated
gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from sympy import Expr, MatrixExpr, MatrixSymbol, Symbol

from gtddp_compile.algebra.derivation import Equation
from gtddp_compile.algebra.symbols import Rule, SymmetricSymbol

FormName = Literal["joint", "information", "block", "substituted", "printed", "base"]
COUPLED: tuple[FormName, ...] = ("joint", "information")
"""Forms that couple the samples of a batch or group by one matrix: the linear and the nonlinear rollout."""
LEVENBERG: tuple[FormName, ...] = (*COUPLED, "block")
"""Forms whose stage Hessian is ``M + f_uᵀ V_xx f_u``."""

BATCH = Symbol("B", integer=True, positive=True)
CONTROLS = Symbol("m", integer=True, positive=True)
GROUP_SCALE = Symbol("tau", positive=True)
"""``B / b`` inside a group of b samples, which stands for the batch."""

GRADIENTS = MatrixSymbol("C", CONTROLS, BATCH)
"""``γᵀ``: per-sample parameter gradients of the stage's players, one column a sample. With a richer terminal factor
the columns are the pulled-back factors of all samples, ``Ψᵀ``, and ``B`` stands for ``B r`` everywhere below."""
BASE = MatrixSymbol("b", CONTROLS, 1)
"""``f_uᵀ A``: the ordinary gradient ``γᵀ α_T``; present where the linear term is kept apart (richer factors)."""
CURVATURE = SymmetricSymbol("M", CONTROLS, CONTROLS)
DECAY = MatrixSymbol("l", CONTROLS, 1)
"""``ℓ_u``: gradient of the coupled weight decay and of inertia, ``λ u - μ M v``."""
MOMENTUM = MatrixSymbol("v", CONTROLS, 1)
"""``v``: the last step's ``δu``, which inertia regularises towards instead of zero."""
WEIGHT_DECAY = MatrixSymbol("d", CONTROLS, 1)
"""``λ u``: gradient of the coupled weight decay alone."""
INERTIA = Symbol("mu", nonnegative=True)
CHANGE = MatrixSymbol("c", BATCH, 1)
"""``c``: first-order change of each sample's loss that the stages before have already caused."""
GRAM = SymmetricSymbol("Gamma", BATCH, BATCH)
DRIFT = MatrixSymbol("s", BATCH, 1)
"""``s = γ M⁻¹ (b + ℓ_u)``: what the terms outside the span (weight decay; the ordinary gradient, where it is kept
apart) do to each column."""
WEIGHTS = MatrixSymbol("w", BATCH, 1)
OPEN_GAIN = MatrixSymbol("k", CONTROLS, 1)
UPDATE = MatrixSymbol("delta_u", CONTROLS, 1)

# With a prime: at t+1 (the recursion runs backward).
ALPHA, ALPHA_NEXT = MatrixSymbol("alpha", BATCH, 1), MatrixSymbol("alpha'", BATCH, 1)
VARIANCE, VARIANCE_NEXT = SymmetricSymbol("P", BATCH, BATCH), SymmetricSymbol("P'", BATCH, BATCH)
INFORMATION, INFORMATION_NEXT = SymmetricSymbol("Lambda", BATCH, BATCH), SymmetricSymbol("Lambda'", BATCH, BATCH)
TARGET, TARGET_NEXT = MatrixSymbol("y", BATCH, 1), MatrixSymbol("y'", BATCH, 1)
"""``y = P⁻¹ α``: the ones, until weight decay drifts them."""
RHO, RHO_NEXT = MatrixSymbol("rho", BATCH, 1), MatrixSymbol("rho'", BATCH, 1)
SYSTEM = SymmetricSymbol("X", BATCH, BATCH)
OWN, OWN_NEXT = SymmetricSymbol("R", BATCH, BATCH), SymmetricSymbol("R'", BATCH, BATCH)
"""``P`` projected on the samples: a block of rank × rank a sample (``diag(ρ)`` where the rank is one)."""
SAMPLES = SymmetricSymbol("E", BATCH, BATCH)
"""``I_B ⊗ 1 1ᵀ``: which columns belong to the same sample."""


START, AIM = Symbol("start", positive=True), Symbol("aim", positive=True)
"""At the end of the trajectory ``V_x = start g`` and ``V_xx = start g gᵀ / aim``, sample by sample."""


def terminal(*, papers_scale: bool = False) -> dict[str, Expr]:
    """What every sample has at the end: ``P_T`` is diagonal there, and ``Λ_T = P_T⁻¹``, ``y_T = P_T⁻¹ α_T``.

    ``papers_scale``: Proposition 5's factor is the gradient of the batch's cost, so that ``V_xx = V_x V_xᵀ``.
    """
    alpha, rho = START, START**2 / AIM if papers_scale else START / AIM
    return {"alpha": alpha, "rho": rho, "Lambda": 1 / rho, "y": alpha / rho}


@dataclass(frozen=True)
class Claim:
    """An identity that was proved by exact rewriting, by ``rules``, before the collapse was used."""

    statement: str
    left: MatrixExpr
    right: MatrixExpr
    rules: tuple[Rule, ...] = ()


@dataclass(frozen=True)
class CollapsedForm:
    """The equations the fast program runs, one set for every stage, and the claims they rest on.

    Attributes:
        name: ``"joint"`` (full batch coupling and groups, the policy rolled out on the linearised dynamics: one
            ``w`` for all stages), ``"information"`` (the same coupling, rolled out on the network),
            ``"block"`` (per-sample coupling, Levenberg stage Hessian), ``"substituted"`` and ``"printed"``
            (the paper's own, docs/theory.md#block), ``"base"`` (feedback off).
        backward: equations of the backward sweep, in order, by the name of what they define.
        forward: equations of the forward sweep.
        factored: whether the columns are pulled-back factors (``V_x = A + G α``) instead of gradients (``V_x = G α``).
        claims: what was proved about every pattern of the network.
    """

    name: FormName
    backward: dict[str, Equation]
    forward: dict[str, Equation]
    claims: tuple[Claim, ...]
    factored: bool = False

    @property
    def said(self) -> list[Equation]:
        """The equations of both sweeps, those left out that say nothing (``y = y'`` without weight decay)."""
        found = [*self.backward.values(), *self.forward.values()]
        return [equation for equation in found if not _says_nothing(equation)]


@cache
def _says_nothing(equation: Equation) -> bool:
    return bool(str(equation.expression) == f"{equation.symbol}'")
