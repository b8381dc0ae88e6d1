"""Derivations of a residual block."""

import torch
from sympy import MatrixExpr
from torch import nn

from gtddp_compile.algebra.derivation import StageDerivation
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import DerivedStage, derive
from gtddp_compile.runtime.compiler import build_graph


class Residual(nn.Module):
    """``x + W_tf tanh(… tanh(W_ts x))`` with ``depth`` layers beside the shortcut, one layer before and one
    after it.
    """

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.before = nn.Linear(3, 4)
        self.branch = nn.ModuleList(nn.Linear(4, 4) for _ in range(depth))
        self.after = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.before(x))
        h = x
        for layer in self.branch[:-1]:
            h = torch.tanh(layer(h))
        return self.after(x + self.branch[-1](h))


def residual_stages(depth: int) -> list[DerivedStage]:
    """Derivations of the stages ts … tf."""
    graph = build_graph(Residual(depth), (torch.zeros(2, 3),), Options())
    return list(derive(graph).stages[1 : depth + 1])


def opened(d: StageDerivation, e: MatrixExpr) -> MatrixExpr:
    """Everything except ``Q_uu`` written in Jacobians and the value function at t+1."""
    inner = {eq.symbol: eq.expression for eq in (*d.q_x.values(), *d.q_u.values(), *d.q_ux.values(), *d.q_xx.values())}
    gains = {d.k.symbol: d.k.expression, **{eq.symbol: eq.expression for eq in d.gains.values()}}
    return e.subs(gains).doit().subs(inner).doit()
