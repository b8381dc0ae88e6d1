"""The closed set of operations: what a method of ``m`` is called with, what micro-batches share, what is lifted.

A kernel's operands are named by its own signature; a method's are named here, since a program may be read where no
base method is.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cache

from gtddp_compile import kernels
from gtddp_compile.lowering.layers import FILES


@dataclass(frozen=True)
class Method:
    """A method of the base method ``m``, as programs call it.

    Attributes:
        operands: names of its operands, in order.
        shared: whether micro-batches of one update have it in common: statistics, updates, the weight of a batch.
    """

    operands: tuple[str, ...]
    shared: bool = False


def _method(operands: str, shared: bool = False) -> Method:
    return Method(tuple(operands.split()), shared)


METHODS: dict[str, Method] = {
    # the loss
    "losses": _method("outputs targets"),
    "factors": _method("phi outputs targets leaves"),
    "above": _method("phi outputs targets"),
    "terminal": _method("phi kind aim own half group", shared=True),
    # the ranks of a process group
    "joined_above": _method("phi outputs targets"),
    "joined_losses": _method("outputs targets"),
    "joined_terminal": _method("phi kind aim own half"),
    "all_reduce": _method("sums"),
    "all_samples": _method("own axis"),
    "own_samples": _method("all"),
    "samples_at": _method("owner own axis"),
    "made_at": _method("owner kernel"),
    "agree": _method("weights"),
    # figures and random numbers
    "keep": _method("stage"),
    "mark": _method("segment"),
    "rewind": _method("segment"),
    "settle": _method(""),
    # statistics
    "observe": _method("names gradients", shared=True),
    "observe_block": _method("stage kind names layers start", shared=True),
    "observe_moment": _method("names moments", shared=True),
    "observe_uniform": _method("names positions", shared=True),
    "observe_channels": _method("names layer positions sketch blocks", shared=True),
    "observe_factors": _method("stage kind names layers start", shared=True),
    "observe_coordinates": _method("names moment", shared=True),
    "observe_alike": _method("stage kind names layers start", shared=True),
    # the metric
    "metric": _method("names"),
    "separated_metric": _method("names groups"),
    "channels_metric": _method("names"),
    "block_metric": _method("kind names"),
    "block_maps": _method("names"),
    "block_inverses": _method("names"),
    "alike_inverses": _method("names"),
    "rate": _method("names"),
    "alike_rates": _method("names"),
    "look_ahead": _method("params targets"),
    "pace": _method(""),
    "early": _method("amount"),
    "last_step": _method("names"),
    "last_steps": _method("names"),
    "drift": _method("names"),
    "drift_block": _method("kind names"),
    # gains and updates
    "open_gain": _method("names gradients"),
    "open_block": _method("kind names gradients"),
    "apply": _method("names gradients", shared=True),
    "apply_block": _method("kind names gradients", shared=True),
    "apply_steps": _method("kind names steps", shared=True),
    "descend": _method("names gradients", shared=True),
    "descend_block": _method("kind names gradients", shared=True),
    "descend_steps": _method("kind names steps", shared=True),
    "descend_dual": _method("names coordinates weights"),
    "descend_alike": _method("names coordinates weights last mu"),
    "descend_each": _method("names steps", shared=True),
    "descend_by": _method("names weighted subtract layer"),
    "descend_rows": _method("names weighted rows layer"),
    "descend_inputs": _method("names weighted whitened layer"),
}
"""By name; ``m.NAME`` in a program."""

LIFTED = frozenset(
    {name for name, kernel in kernels.KERNELS.items() if kernel.__module__.rpartition(".")[2] in FILES}
    | {"contract", "contract_factors", "contract_arranged", "scale", "scaled", "weigh", "combined", "alike_rows"}
)
"""Kernels that get bfloat16 and half values as float32 (``runtime.precision``)."""


def is_shared(function: str) -> bool:
    """Whether micro-batches of one update make a call together."""
    return function.startswith("m.") and METHODS[function[2:]].shared


@cache
def names_of(function: str) -> tuple[str, ...]:
    """Names of the operands of a function that programs call; none of what is no operation by itself (``"="``)."""
    if function.startswith("m."):
        return METHODS[function[2:]].operands
    if function not in kernels.KERNELS:
        return ()
    return tuple(inspect.signature(kernels.KERNELS[function]).parameters)
