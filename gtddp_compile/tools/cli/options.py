"""What the commands share: their options, and the model or optimizer that these describe."""

from __future__ import annotations

from typing import Annotated, Any

import typer

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


def _choices(names: Any) -> Any:
    """Complete an option from a list of names."""
    return lambda incomplete: [name for name in names if name.startswith(incomplete)]


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
Arguments = Annotated[
    list[str],
    typer.Option(
        "--arg", "-a", metavar="KEY=VALUE", help="Keyword argument of the factory; repeatable.", rich_help_panel=MODEL
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help=f"Precision of the model and of inputs without a type of their own: {', '.join(FLOATS)}.",
        rich_help_panel=MODEL,
        autocompletion=_choices(FLOATS),
    ),
]
Schedule = Annotated[
    list[str],
    typer.Option(
        metavar="NAME|PLAYER=STAGE",
        help=f"{', '.join(SCHEDULES)}; or [b]PLAYER=STAGE[/], again for every player.",
        rich_help_panel=DERIVATION,
        autocompletion=_choices(SCHEDULES),
    ),
]
Curvature = Annotated[
    str,
    typer.Option(
        help=f"Base method: {', '.join(REGISTRY)}.", rich_help_panel=DERIVATION, autocompletion=_choices(REGISTRY)
    ),
]
Rate = Annotated[float | None, typer.Option(help="Learning rate.", rich_help_panel=DERIVATION, show_default=False)]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Further option of the base method, [b]momentum=0.9[/] say; repeatable.",
        rich_help_panel=DERIVATION,
    ),
]
LossName = Annotated[
    str,
    typer.Option(
        help=f"{', '.join(LOSSES)}, a class of torch.nn, or module:callable.",
        rich_help_panel=DERIVATION,
        autocompletion=_choices(LOSSES),
    ),
]
Coupling = Annotated[
    str,
    typer.Option(
        help="full, block, or a group size.", rich_help_panel=DERIVATION, autocompletion=_choices(("full", "block"))
    ),
]
Recursion = Annotated[
    str,
    typer.Option(
        help="levenberg, substituted or printed (the last two with --coupling block).",
        rich_help_panel=DERIVATION,
        autocompletion=_choices(("levenberg", "substituted", "printed")),
    ),
]
TerminalName = Annotated[
    str | None,
    typer.Option(
        help="How the loss is expanded: geometric, gradient, ggn, or a number of sampled columns.",
        rich_help_panel=DERIVATION,
        autocompletion=_choices(("geometric", "gradient", "ggn")),
        show_default="what the base method suggests",
    ),
]
Feedback = Annotated[str, typer.Option(help="on, open or off.", rich_help_panel=DERIVATION)]
RolloutName = Annotated[
    str | None,
    typer.Option(
        help="linear (one joint step) or nonlinear (a second forward sweep).",
        rich_help_panel=DERIVATION,
        autocompletion=_choices(("linear", "nonlinear")),
        show_default="linear where there is a joint step",
    ),
]
Inertia = Annotated[
    float | None,
    typer.Option(
        help="Momentum inside the model.", rich_help_panel=DERIVATION, show_default="what the base method suggests"
    ),
]


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


def compiled(
    target: str,
    inputs: list[str],
    arguments: list[str],
    dtype: str,
    loss: str,
    schedule: list[str],
    curvature: str,
    lr: float | None,
    settings: list[str],
    coupling: str,
    recursion: str,
    feedback: str,
    terminal: str | None,
    rollout: str | None,
    inertia: float | None,
) -> CompiledOptimizer:
    """The optimizer that the options ask for."""
    model, examples = model_and_inputs(target, inputs, arguments, dtype)
    options = keyword_arguments(settings, "--set") | ({} if lr is None else {"lr": lr})
    switches: dict[str, Any] = {"on": True, "open": "open", "off": False}
    if feedback not in switches:
        raise typer.BadParameter(f"{feedback!r}: give on, open or off", param_hint="--feedback")
    choices: dict[str, Any] = {
        "schedule": parse_schedule(schedule),
        "coupling": number_or_word(coupling),
        "recursion": recursion,
        "feedback": switches[feedback],
        "terminal": MonteCarlo(int(terminal)) if terminal and terminal.isdecimal() else terminal,
        "rollout": rollout,
        "inertia": inertia,
    }
    found = load_loss(loss)
    with working(f"deriving the optimizer of {type(model).__name__}"):
        return compile_optimizer(model, examples, loss=found, curvature=curvature, **choices, **options)


def model_and_inputs(target: str, inputs: list[str], arguments: list[str], dtype: str) -> Any:
    """The model and its example inputs."""
    if dtype not in FLOATS:
        raise typer.BadParameter(f"{dtype!r}: give one of {', '.join(FLOATS)}", param_hint="--dtype")
    examples = load_inputs(inputs, dtype)
    with working(f"loading {target}"):
        return load_model(target, arguments, dtype), examples
