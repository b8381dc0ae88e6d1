"""Whether optimizer state belongs to the parameters it is used with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import Curvature
from gtddp_compile.runtime.precision import LOW, lift


def check_states(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Optimizer state lies where its parameter does, in its precision.

    Raises:
        CompileError: the model was moved or converted after its first step.
    """
    for parameter, state in states.items():
        wanted = (parameter.device, lift(parameter.detach()).dtype)
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() and (value.device, value.dtype) != wanted:
                raise CompileError(
                    f"the model's parameters are {parameter.dtype} on {parameter.device}, and the optimizer's state for"
                    f" them is {value.dtype} on {value.device}",
                    "Take the state along when the model is moved: opt.load_state_dict(opt.state_dict())",
                )


def check_loaded(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], curvature: Curvature) -> None:
    """What is about to be loaded is the state of this base method for parameters of these shapes.

    Raises:
        CompileError: it is of another optimizer, another base method, or another model.
    """
    stored = state_dict["param_groups"]
    sizes, wanted = ([len(group["params"]) for group in several] for several in (stored, groups))
    if sizes != wanted:
        raise CompileError(
            f"the state has {len(sizes)} parameter groups of {sum(sizes)} parameters, this optimizer {len(wanted)} of"
            f" {sum(wanted)}",
            "Load what a compiled optimizer of the same model saved: it has a group for every module with parameters",
        )
    for theirs, group in zip(stored, groups, strict=True):
        missing = curvature.defaults().keys() - theirs.keys()
        if missing:
            raise CompileError(
                f"the state is of another base method than {curvature.name}: it has no {', '.join(sorted(missing))}",
                "Compile with the base method that it was saved from, or start without it",
            )
        for index, parameter in zip(theirs["params"], group["params"], strict=True):
            _check_shapes(state_dict["state"].get(index, {}), parameter, group, curvature)


def _check_shapes(state: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any], curvature: Curvature) -> None:
    expected = curvature.init_state(lift(parameter.detach()), dict(group)) if state else {}
    for key, value in expected.items():
        own = state.get(key)
        if isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape != value.shape:
            raise CompileError(
                f"the state's {key} has shape {tuple(own.shape)} where the parameter has {tuple(parameter.shape)}",
                "Leave out of state_dict()['state'] what belongs to parameters that were replaced",
                module=group.get("name"),
            )


def unrounded(state: Mapping[int, Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]) -> dict[Tensor, Any]:
    """The states of bfloat16 and half parameters as they were saved: torch rounds them to the parameter's precision."""
    parameters = enumerate(parameter for group in groups for parameter in group["params"])
    return {
        parameter: {
            key: value.to(parameter.device) if isinstance(value, Tensor) and value.dim() else value
            for key, value in state[index].items()
        }
        for index, parameter in parameters
        if parameter.dtype in LOW and index in state
    }
