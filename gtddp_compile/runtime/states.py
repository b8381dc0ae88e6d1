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


def regrouped(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    named: Mapping[str, Tensor],
    curvature: Curvature,
) -> dict[str, Any]:
    """What an optimizer of torch.optim has saved for a model, in the groups of a compiled one; of that, as it is.

    Parameters are found by name, where it was made from ``model.named_parameters()``, else by their order in the model,
    with or without frozen ones.

    Args:
        state_dict: with groups that have no ``name``.
        groups: of the compiled optimizer; what the saved ones do not say stays as it is.
        named: the model's parameters.
        curvature: the base method.

    Raises:
        CompileError: it is of another base method, the parameters of several groups cannot be told, or there are more
            or fewer than the model has.
    """
    stored = state_dict["param_groups"]
    if all("name" in group for group in stored):
        return dict(state_dict)
    for group in stored:
        _check_method(group, curvature)
    places = iter(_order(stored, named))
    theirs = {id(named[next(places)]): (index, group) for group in stored for index in group["params"]}
    found: dict[str, Any] = {**state_dict, "state": {}, "param_groups": []}
    numbers = iter(range(len(named)))
    for group in groups:
        own = dict(group) | {"params": [next(numbers) for _ in group["params"]]}
        said = None
        for number, parameter in zip(own["params"], group["params"], strict=True):
            if id(parameter) not in theirs:
                continue
            index, all_options = theirs[id(parameter)]
            options = {key: all_options[key] for key in all_options.keys() & {*group, "initial_lr"} - {"params"}}
            if said not in (None, options):
                raise CompileError(
                    f"the state has other options for some parameters of module {group['name']!r} than for others",
                    "Divide the group in opt.param_groups as they are before loading",
                    module=group["name"],
                )
            own |= (said := options)
            state = state_dict["state"].get(index, {})
            if known := {key: value for key, value in state.items() if value is not None}:
                found["state"][number] = known
        found["param_groups"].append(own)
    return found


def _order(stored: Sequence[Mapping[str, Any]], named: Mapping[str, Tensor]) -> Sequence[str]:
    """Names of saved parameters, group after group."""
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    count = sum(len(group["params"]) for group in stored)
    order = next((names for names in (list(named), trained) if len(names) == count), None)
    if all("param_names" in group for group in stored):
        order = [name for group in stored for name in group["param_names"]]
    elif len(stored) > 1:
        order = None
    if order is None or not set(trained) <= set(order) <= named.keys():
        raise CompileError(
            f"the state has {len(stored)} parameter groups of {count} parameters without names, and the model "
            f"{len(named)} parameters: which is whose cannot be told",
            "Save it from an optimizer made with model.named_parameters(), or from one group of all parameters",
        )
    return order


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
        _check_method(theirs, curvature)
        for index, parameter in zip(theirs["params"], group["params"], strict=True):
            _check_shapes(state_dict["state"].get(index, {}), parameter, group, curvature)


def _check_method(group: Mapping[str, Any], curvature: Curvature) -> None:
    missing = curvature.defaults().keys() - group.keys()
    if missing:
        raise CompileError(
            f"the state is of another base method than {curvature.name}: it has no {', '.join(sorted(missing))}",
            "Compile with the base method that it was saved from, or start without it",
        )


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
