"""Front ends: what a model does, recorded by torch.fx or torch.export, and the cleaning both need."""

from gtddp_compile.frontends.derivatives import differentiates, trace_derivatives
from gtddp_compile.frontends.exported import trace_export, trace_functional
from gtddp_compile.frontends.followed import trace_followed
from gtddp_compile.frontends.keywords import positional
from gtddp_compile.frontends.reference import beginning, observe
from gtddp_compile.frontends.state import withheld
from gtddp_compile.frontends.symbolic import trace_symbolically
from gtddp_compile.frontends.traced import Call, Traced, Untraceable

__all__ = [
    "Call", "Traced", "Untraceable", "beginning", "differentiates", "observe", "positional", "trace_derivatives",
    "trace_export", "trace_followed", "trace_functional", "trace_symbolically", "withheld",
]  # fmt: skip
