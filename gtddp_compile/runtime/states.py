"""Whether optimizer state belongs to the parameters it is used with."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import REGISTRY, Curvature
from gtddp_compile.methods.curvature.numbers import out_of_range
from gtddp_compile.options import Options, own_momentum
from gtddp_compile.runtime.precision import LOW, lift
from gtddp_compile.runtime.shards import divided, is_shard


def check_used(
    groups: Sequence[Mapping[str, Any]], states: Mapping[Tensor, Mapping[str, Any]], curvature: Curvature
) -> None:
    """Groups have the options of the base method, and states lie where their parameters do, in their precision.

    Raises:
        CompileError: an option is missing or out of range, a state is not whole, or the model was moved or converted
            after its first step.
    """
    for group in groups:
        curvature.check(group)
        for parameter in group["params"]:
            _check_state(states.get(parameter, {}), parameter, group, curvature)
    for parameter, state in states.items():
        wanted = (parameter.device, lift(parameter.detach()).dtype)
        for value in state.values():
            if isinstance(value, Tensor) and value.dim() and (value.device, value.dtype) != wanted:
                raise CompileError(
                    f"the model's parameters are {parameter.dtype} on {parameter.device}, and the optimizer's state for"
                    f" them is {value.dtype} on {value.device}",
                    "Take the state along when the model is moved: opt.load_state_dict(opt.state_dict())",
                )


def check_steps(groups: Sequence[Mapping[str, Any]], curvature: Curvature, options: Options) -> None:
    """What the program's model takes from the groups beside the base method: another value would not fail.

    Args:
        groups: of the optimizer.
        curvature: the base method.
        options: that the program was compiled with.

    Raises:
        CompileError: a group's ``inertia`` or ``lookahead`` is no number from 0 to below 1, inertia is not there, or
            the base method has a momentum beside it; ``averaging`` is no number that is 0 or at least 1, or these steps
            are not averaged; ``peak_lr`` is no number that is at least 0.
    """
    for group in groups:
        peak = group.get("peak_lr", 0.0)
        if not isinstance(peak, int | float) or not peak >= 0:
            raise out_of_range(curvature.name, "peak_lr", peak, "a number that is at least 0")
        for option in ("inertia", "lookahead"):
            value = group.get(option, 0.0)
            if not isinstance(value, int | float) or not 0 <= value < 1:
                raise out_of_range(curvature.name, option, value, "a number that is at least 0 and less than 1")
            if value and not (options.inertia and "inertia" in group):
                raise CompileError(
                    f"a parameter group has {option}={value!r}, and "
                    + ("no inertia" if options.inertia else "the optimizer was compiled without inertia"),
                    f"Compile with inertia, or take {option} out of the group (of a state_dict, before it is loaded)",
                    module=group.get("name"),
                )
        newest = group.get("averaging", 0.0)
        if not isinstance(newest, int | float) or not (newest == 0 or newest >= 1):
            raise out_of_range(curvature.name, "averaging", newest, "a number that is 0 or at least 1")
        if newest and not (options.inertia and options.averages and "inertia" in group):
            raise CompileError(
                f"a parameter group has averaging={newest!r}, and these steps are not averaged",
                "Compile with inertia, rollout='linear' and without line_search, or take averaging out of the group",
                module=group.get("name"),
            )
        if group.get("inertia") and (moved := own_momentum(group)):
            raise CompileError(
                f"a parameter group has inertia={group['inertia']!r} beside {curvature.name}'s own momentum {moved!r}: "
                "two memories of one step",
                "Set one of them to 0 in the group (of a state_dict, before it is loaded); OneCycleLR, CyclicLR write"
                " a momentum unless they are given cycle_momentum=False",
                module=group.get("name"),
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
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
        raise CompileError(
            f"a {type(state_dict).__name__} without 'state' and 'param_groups' is no optimizer's state_dict",
            "Pass what state_dict() of the optimizer returned, not the model's, nor a path",
        )
    stored = state_dict["param_groups"]
    if all("name" in group for group in stored):
        return _by_name(state_dict, groups)
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


def _by_name(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Saved groups in the order of the compiled optimizer's, found by their names; a group of a module that is new has
    no state.
    """
    stored = {group["name"]: group for group in state_dict["param_groups"]}
    names = [group["name"] for group in groups]
    if len(stored) < len(state_dict["param_groups"]) or list(stored) == names:
        return dict(state_dict)
    extra, new = [name for name in stored if name not in names], [name for name in names if name not in stored]
    if extra:
        raise CompileError(
            f"the state has parameter groups {extra}, and the optimizer has none of these names",
            "Rename them in state_dict()['param_groups'] as the modules are called now, divide this optimizer's groups "
            "as they were, or take out those of modules that are gone",
        )
    if new:
        warnings.warn(f"the state has no parameter groups {new}: they begin without", stacklevel=4)
    numbers = iter(range(sum(len(group["params"]) for group in groups)))
    found: dict[str, Any] = {**state_dict, "state": {}, "param_groups": []}
    for group in groups:
        theirs = stored.get(group["name"])
        own = [next(numbers) for _ in group["params"]]
        found["param_groups"].append({**(group if theirs is None else theirs), "params": own})
        if theirs is not None:
            if len(theirs["params"]) != len(own):
                return dict(state_dict)  # refused for its sizes
            pairs = zip(own, theirs["params"], strict=True)
            found["state"] |= {number: state_dict["state"][i] for number, i in pairs if i in state_dict["state"]}
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
    unknown = state_dict["state"].keys() - {index for group in stored for index in group["params"]}
    if unknown:
        raise CompileError(
            f"the state has entries {sorted(unknown, key=str)} of parameters that are in none of its groups",
            "Save it again from the optimizer: state_dict() has one entry a parameter",
        )
    for theirs, group in zip(stored, groups, strict=True):
        _check_method(theirs, curvature)
        options = {**group, **theirs}
        for index, parameter in zip(theirs["params"], group["params"], strict=True):
            _check_state(state_dict["state"].get(index, {}), parameter, options, curvature, shapes=True)


def completed(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The saved groups with the options of the optimizer's that they do not have: those of another version, or of an
    optimizer without inertia. Nothing is turned off by a word that is missing.
    """
    pairs = zip(groups, state_dict["param_groups"], strict=True)
    return {**state_dict, "param_groups": [{**own, **theirs} for own, theirs in pairs]}


def _check_method(group: Mapping[str, Any], curvature: Curvature) -> None:
    """Told by the options, which may be all of this method's and more of another's (SOAP's are Adam's and its own)."""
    ours = curvature.defaults().keys()
    missing, found = ours - group.keys() - {*curvature.later}, ""
    if missing:
        found = f"it has no {', '.join(sorted(missing))}"
    for name, kind in REGISTRY.items():
        theirs = kind().defaults().keys()
        if not missing and ours < theirs <= group.keys():
            found = f"it has {name}'s {', '.join(sorted(theirs - ours))}"
    if found:
        raise CompileError(
            f"the state is of another base method than {curvature.name}: {found}",
            "Compile with the base method that it was saved from, or start without it",
        )


def _check_state(
    state: Mapping[str, Any], parameter: Tensor, group: Mapping[str, Any], curvature: Curvature, *, shapes: bool = False
) -> None:
    """A parameter's state is whole, and of its shapes."""
    expected = curvature.init_state(lift(parameter.detach()), dict(group)) if state else {}
    for key, value in expected.items():
        own = state.get(key)
        if isinstance(value, Tensor) and not isinstance(own, Tensor | float | int):
            raise CompileError(
                f"the state of a parameter {tuple(parameter.shape)} has no {key}, which {curvature.name} keeps",
                "Load what the same base method saved, or leave this parameter's state out"
                if shapes
                else "If an option that needs it (amsgrad, a momentum) was switched on after steps were made, set it"
                " before the first one, or begin with new states: opt.state.clear()",
                module=group.get("name"),
            )
        if shapes and isinstance(own, Tensor) and isinstance(value, Tensor) and own.shape != value.shape:
            raise CompileError(
                f"the state's {key} has shape {tuple(own.shape)} where the parameter has {tuple(parameter.shape)}",
                "Leave out of state_dict()['state'] what belongs to parameters that were replaced",
                module=group.get("name"),
            )


def unround(
    states: MutableMapping[Tensor, Any], loaded: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> None:
    """States as they were saved where torch has rounded them: numbers, and all of bfloat16 and half parameters. Of
    parameters in shards they are divided.

    Args:
        states: of the optimizer, after loading.
        loaded: what was loaded, in the order of the groups.
        groups: of the optimizer.
    """
    theirs = (index for group in loaded["param_groups"] for index in group["params"])
    parameters = (parameter for group in groups for parameter in group["params"])
    for index, parameter in zip(theirs, parameters, strict=True):
        for key, value in loaded["state"].get(index, {}).items():
            if isinstance(value, Tensor) and (not value.dim() or parameter.dtype in LOW):
                states[parameter][key] = value.to(parameter.device) if value.dim() else value
        if parameter in states:
            states[parameter].update(divided(parameter, states[parameter]))


def apart(states: Mapping[Tensor, Mapping[str, Any]]) -> None:
    """Every tensor has memory of its own, no larger than it is: torch.save writes the whole of what a tensor lies in.

    Layers that are computed together leave the parts of one tensor in their states.
    """
    for state in states.values():
        for value in state.values():
            if not isinstance(value, Tensor) or is_shard(value):  # those have memory of their own
                continue
            if value.untyped_storage().nbytes() > value.numel() * value.element_size():
                value.data = value.data.clone()
