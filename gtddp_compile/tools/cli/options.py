"""What the commands share: their options, and the model or optimizer that these describe."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, TypeVar

import typer

from gtddp_compile.algebra.derivation import RECURSIONS
from gtddp_compile.api import compile_optimizer
from gtddp_compile.errors import CompileError
from gtddp_compile.methods.curvature import REGISTRY
from gtddp_compile.methods.terminal import MonteCarlo
from gtddp_compile.optimizer import CompiledOptimizer
from gtddp_compile.passes.p04_schedule import SCHEDULES
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.cli.loading import (
    FLOATS,
    LOSSES,
    keyword_arguments,
    load_inputs,
    load_loss,
    load_model,
    number_or_word,
    parse_schedule,
)
from gtddp_compile.tools.cli.terminal import working

MODEL, DERIVATION = "Model", "Derivation"
SUGGESTS = "what the base method suggests"
FEEDBACK: Mapping[str, Any] = {"on": True, "open": "open", "off": False}
Function = TypeVar("Function", bound=Callable[..., None])


Target = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="[b]package.module:factory[/] or [b]path/to/file.py:factory[/]; a class or function that returns the "
        "model, or the model itself.",
        show_default=False,
    ),
]
Inputs = Annotated[
    list[str],
    typer.Option(
        "--input",
        "-i",
        metavar="SHAPE[:DTYPE]",
        help="Shape of an example input, batch first: [b]2,3,224,224[/], or [b]2,16:int64[/] for indices (zeros). "
        "Again for every further argument of the model.",
        rich_help_panel=MODEL,
        show_default=False,
    ),
]
Compared = Annotated[
    str,
    typer.Argument(
        metavar="PROGRAM",
        help="A [b].json[/] that export wrote, or a model as [b]MODULE:FACTORY[/].",
        show_default=False,
    ),
]


def _option(
    kind: Any, default: Any, help: str, *names: str, choices: Iterable[str] = (), panel: str = DERIVATION, **more: Any
) -> tuple[Any, Any]:
    """Annotation and default of an option that several commands have; ``choices`` complete it."""
    known = list(choices)
    if known:
        more["autocompletion"] = lambda incomplete: [name for name in known if name.startswith(incomplete)]
    return Annotated[kind, typer.Option(*names, help=help, rich_help_panel=panel, **more)], default


OPTIONS: Mapping[str, tuple[Any, Any]] = {
    "arguments": _option(list[str], [], "Keyword argument of the factory; repeatable.", "--arg", "-a",
                         panel=MODEL, metavar="KEY=VALUE"),
    "dtype": _option(str, "float32", "Precision of the model and of inputs without a type of their own: "
                     f"{', '.join(FLOATS)}.", panel=MODEL, choices=FLOATS),
    "loss": _option(str, "cross_entropy", f"{', '.join(LOSSES)}, a class of torch.nn, or module:callable.",
                    choices=LOSSES),
    "curvature": _option(str, "foof", f"Base method: {', '.join(REGISTRY)}.", choices=REGISTRY),
    "lr": _option(float | None, None, "Learning rate.", show_default=False),
    "settings": _option(list[str], [], "Further option of the base method, [b]momentum=0.9[/] say; repeatable.",
                        "--set", "-s", metavar="KEY=VALUE"),
    "schedule": _option(list[str], ["asap"], f"{', '.join(SCHEDULES)}; or [b]PLAYER=STAGE[/], again for every player.",
                        choices=SCHEDULES, metavar="NAME|PLAYER=STAGE"),
    "coupling": _option(str, "full", "full, block, or a group size.", choices=("full", "block")),
    "recursion": _option(str, "levenberg", "levenberg, substituted or printed (the last two with --coupling block).",
                         choices=RECURSIONS),
    "feedback": _option(str, "on", "on, open or off.", choices=FEEDBACK),
    "terminal": _option(str | None, None, "How the loss is expanded: geometric, gradient, ggn, or a number of sampled "
                        "columns.", choices=("geometric", "gradient", "ggn"), show_default=SUGGESTS),
    "rollout": _option(str | None, None, "linear (one joint step) or nonlinear (a second forward sweep).",
                       choices=("linear", "nonlinear"), show_default="linear where there is a joint step"),
    "inertia": _option(float | None, None, "Momentum inside the model.", show_default=SUGGESTS),
    "lookahead": _option(float | None, None, "What of the last step is taken first.", show_default=SUGGESTS),
    "averaging": _option(float | None, None, "What the newest parameters count for in their average, times the steps.",
                         show_default=SUGGESTS),
}  # fmt: skip
"""Options that several commands have, by the name of their argument."""


def takes(*names: str) -> Callable[[Function], Function]:
    """Give a command options of :data:`OPTIONS`, which it gets as keyword arguments; ``"*"``: all."""

    def decorate(function: Function) -> Function:
        # Not get_type_hints: on Python 3.10 it wraps what defaults to None in Optional, which hides options from typer.
        asked = signature(function, eval_str=True).parameters.values()
        parameters = [one for one in asked if one.kind is not Parameter.VAR_KEYWORD]
        for name in OPTIONS if "*" in names else names:
            kind, default = OPTIONS[name]
            parameters.append(Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=kind))
        function.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        function.__annotations__ = {one.name: one.annotation for one in parameters}
        return function

    return decorate


def program_of(target: str, inputs: list[str], **choices: Any) -> UpdateProgram:
    """The program in a ``.json`` file, or of a model with the given options."""
    if target.endswith(".json"):
        try:
            with working(f"reading {target}"):
                return UpdateProgram.load(target)
        except OSError as error:
            raise CompileError(f"{target} cannot be read ({error.strerror})", "Give a file that exists") from error
    if not inputs:
        raise typer.BadParameter("a model needs the shape of an example input", param_hint="--input")
    return compiled(target, inputs, **choices).program


def compiled(target: str, inputs: list[str], arguments: list[str], dtype: str, **given: Any) -> CompiledOptimizer:
    """The optimizer that the options ask for (``given``: those of :data:`OPTIONS` under Derivation)."""
    model, examples = model_and_inputs(target, inputs, arguments, dtype)
    rate, feedback, terminal = given.get("lr"), given["feedback"], given["terminal"]
    options = keyword_arguments(given.get("settings", ()), "--set") | ({} if rate is None else {"lr": rate})
    if feedback not in FEEDBACK:
        raise typer.BadParameter(f"{feedback!r}: give on, open or off", param_hint="--feedback")
    choices: dict[str, Any] = {
        "schedule": parse_schedule(given["schedule"]),
        "coupling": number_or_word(given["coupling"]),
        "feedback": FEEDBACK[feedback],
        "terminal": MonteCarlo(int(terminal)) if terminal and terminal.isdecimal() else terminal,
        **{name: given[name] for name in ("recursion", "rollout", "inertia", "lookahead", "averaging", "curvature")},
    }
    found = load_loss(given["loss"])
    with working(f"deriving the optimizer of {type(model).__name__}"):
        return compile_optimizer(model, examples, loss=found, **choices, **options)


def model_and_inputs(target: str, inputs: list[str], arguments: list[str], dtype: str) -> Any:
    """The model and its example inputs."""
    if dtype not in FLOATS:
        raise typer.BadParameter(f"{dtype!r}: give one of {', '.join(FLOATS)}", param_hint="--dtype")
    examples = load_inputs(inputs, dtype)
    with working(f"loading {target}"):
        return load_model(target, arguments, dtype), examples
