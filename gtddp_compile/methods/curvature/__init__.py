"""Base methods, one a file: the curvature ``Q_uu`` of Table 1 and how each consumes a gradient."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature.adagrad import Adagrad
from gtddp_compile.methods.curvature.adam import Adam, AdamW
from gtddp_compile.methods.curvature.base import Curvature, Group, MetricKind, State
from gtddp_compile.methods.curvature.blocks import BlockUpdates
from gtddp_compile.methods.curvature.ekfac import EKFAC
from gtddp_compile.methods.curvature.foof import FOOF
from gtddp_compile.methods.curvature.kfac import KFAC
from gtddp_compile.methods.curvature.kronecker import Kronecker
from gtddp_compile.methods.curvature.muon import Muon
from gtddp_compile.methods.curvature.rmsprop import RMSprop
from gtddp_compile.methods.curvature.sgd import SGD
from gtddp_compile.methods.curvature.shampoo import Shampoo
from gtddp_compile.methods.curvature.soap import SOAP
from gtddp_compile.methods.curvature.updates import ParameterUpdates

__all__ = [
    "EKFAC", "FOOF", "KFAC", "SGD", "SOAP", "Adagrad", "Adam", "AdamW", "BlockUpdates", "Curvature", "Group",
    "Kronecker", "MetricKind", "Muon", "ParameterUpdates", "RMSprop", "Shampoo", "State", "resolve",
]  # fmt: skip

REGISTRY: dict[str, Any] = {
    "sgd": SGD, "rmsprop": RMSprop, "adam": Adam, "adamw": AdamW, "adagrad": Adagrad, "kfac": KFAC, "ekfac": EKFAC,
    "foof": FOOF, "shampoo": Shampoo, "soap": SOAP, "muon": Muon,
}  # fmt: skip
"""The base methods by name: frozen dataclasses that implement :class:`Curvature`."""

PLAIN = ("spherical", "diagonal")
"""Metrics that a parameter has entry by entry: no matrix is decomposed for them."""


def by_parameter() -> str:
    """Names of the methods with a plain metric, for people."""
    *names, last = (repr(name) for name, method in REGISTRY.items() if method.metric in PLAIN)
    return f"{', '.join(names)} or {last}"


IMPLEMENTATION_ONLY = frozenset({"foreach", "fused", "capturable"})
"""torch.optim's options that choose between implementations of the same update."""


def resolve(curvature: str | Curvature, **options: Any) -> Curvature:
    """A base method from its name and options, or the object as it is.

    Args:
        curvature: a name in :data:`REGISTRY`, or an object such as ``Adam(lr=1e-3)``.
        **options: torch.optim's options, with a name only.

    Raises:
        CompileError: unknown name or option, an option out of range, or options beside an object.
    """
    if isinstance(curvature, Curvature):
        if options:
            raise CompileError(
                f"options {_listed(options)} were given beside the curvature object {curvature!r}",
                f"Give them to the object: {type(curvature).__name__}(…)",
            )
        return curvature
    if not isinstance(curvature, str):
        remedy = f"Give one of {_listed(REGISTRY)}, or an object such as Adam(lr=1e-3)"
        raise CompileError(f"curvature is {curvature!r}, neither a name nor a Curvature object", remedy)
    if curvature not in REGISTRY:
        raise CompileError(f"curvature {curvature!r} is not known", f"Choose one of {_listed(REGISTRY)}")
    known = [field.name for field in fields(REGISTRY[curvature]) if field.init]
    unknown = [option for option in options if option not in known]
    if unknown:
        why = f"curvature {curvature!r} has no option {_listed(unknown)}"
        if IMPLEMENTATION_ONLY.intersection(unknown):
            why += " (it would only choose between implementations of the same update, which the compiler does)"
        if "differentiable" in unknown:
            why += " (a step writes the parameters in place, and no gradient goes through it)"
        offered = (option for option in known if option != "maximize")  # there to be refused by name
        raise CompileError(why, f"Its options are {', '.join(offered)}")
    built: Curvature = REGISTRY[curvature](**options)
    return built


def _listed(names: Any) -> str:
    return ", ".join(map(repr, names))
