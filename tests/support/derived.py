"""Derivations of a residual block."""

from typing import Any

import torch
from sympy import MatrixExpr
from torch import nn

from gtddp_compile.algebra.derivation import StageDerivation
from gtddp_compile.graph import ControlGraph
from gtddp_compile.options import Options
from gtddp_compile.passes.p06_derive import DerivedStage, derive
from gtddp_compile.runtime.compiler import build_graph
from support.networks import make


def residual(depth: int, **options: Any) -> ControlGraph:
    """Of ``x + W_tf tanh(… tanh(W_ts x))``: ``depth`` layers beside the shortcut, one before and one after it."""

    def forward(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
        x = h = torch.tanh(net.before(x))
        for k in range(depth - 1):
            h = torch.tanh(getattr(net, f"l{k}")(h))
        return net.after(x + getattr(net, f"l{depth - 1}")(h))

    model = make(forward, before=(3, 4), **{f"l{k}": (4, 4) for k in range(depth)}, after=(4, 2))
    return build_graph(model, (torch.zeros(2, 3).double(),), Options(**options))


def residual_stages(depth: int) -> list[DerivedStage]:
    """Derivations of the stages ts … tf."""
    return list(derive(residual(depth)).stages[1 : depth + 1])


def opened(d: StageDerivation, e: MatrixExpr) -> MatrixExpr:
    """Everything except ``Q_uu`` written in Jacobians and the value function at t+1."""
    inner = {eq.symbol: eq.expression for eq in (*d.q_x.values(), *d.q_u.values(), *d.q_ux.values(), *d.q_xx.values())}
    gains = {d.k.symbol: d.k.expression, **{eq.symbol: eq.expression for eq in d.gains.values()}}
    return e.subs(gains).doit().subs(inner).doit()
