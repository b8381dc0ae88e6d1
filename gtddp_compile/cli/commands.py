"""The commands of ``gtddp-compile``."""

from __future__ import annotations

from enum import Enum
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax

from gtddp_compile.api import compile_optimizer
from gtddp_compile.cli.loading import (
    FLOATS,
    LOSSES,
    keyword_arguments,
    load_inputs,
    load_loss,
    load_model,
    number_or_word,
)
from gtddp_compile.cli.terminal import reporting, warn, working, write, written
from gtddp_compile.compiler import build_graph, build_program
from gtddp_compile.curvature import REGISTRY, SGD
from gtddp_compile.draw import SUFFIXES
from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.optimizer import CompiledOptimizer
from gtddp_compile.options import Options

app = typer.Typer(
    help="Derive an optimal-control optimizer for a torch model: look at its control graph, read its derivation, "
    "carry its update program away.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
demo = typer.Typer(help="Demonstrations (they need pip install 'gtddp-compile\\[demo]').", no_args_is_help=True)
app.add_typer(demo, name="demo")


class Format(str, Enum):
    """How a derivation is written."""

    text = "text"
    latex = "latex"


# --- what the commands share ------------------------------------------------------------------------------------------

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
    str,
    typer.Option(
        help="asap, alap or sequential.",
        rich_help_panel=DERIVATION,
        autocompletion=_choices(("asap", "alap", "sequential")),
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
Feedback = Annotated[str, typer.Option(help="on, open or off.", rich_help_panel=DERIVATION)]


def _compiled(
    target: str,
    inputs: list[str],
    arguments: list[str],
    dtype: str,
    loss: str,
    schedule: str,
    curvature: str,
    lr: float | None,
    settings: list[str],
    coupling: str,
    recursion: str,
    feedback: str,
) -> CompiledOptimizer:
    """The optimizer that the options ask for."""
    model, examples = _model(target, inputs, arguments, dtype)
    options = keyword_arguments(settings, "--set") | ({} if lr is None else {"lr": lr})
    switches: dict[str, Any] = {"on": True, "open": "open", "off": False}
    if feedback not in switches:
        raise typer.BadParameter(f"{feedback!r}: give on, open or off", param_hint="--feedback")
    choices: dict[str, Any] = {
        "schedule": schedule,
        "coupling": number_or_word(coupling),
        "recursion": recursion,
        "feedback": switches[feedback],
    }
    found = load_loss(loss)
    with working(f"deriving the optimizer of {type(model).__name__}"):
        return compile_optimizer(model, examples, loss=found, curvature=curvature, **choices, **options)


def _model(target: str, inputs: list[str], arguments: list[str], dtype: str) -> Any:
    if dtype not in FLOATS:
        raise typer.BadParameter(f"{dtype!r}: give one of {', '.join(FLOATS)}", param_hint="--dtype")
    examples = load_inputs(inputs, dtype)
    with working(f"loading {target}"):
        return load_model(target, arguments, dtype), examples


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"gtddp-compile {metadata.version('gtddp-compile')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Nothing else is common to all commands."""


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    target: Target,
    inputs: Inputs,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, help=f"File to write: {', '.join(SUFFIXES)}.", show_default=False),
    ] = None,
    arguments: Arguments = [],  # noqa: B006
    dtype: Dtype = "float32",
    schedule: Schedule = "asap",
    coupling: Coupling = "full",
    recursion: Recursion = "levenberg",
) -> None:
    """Show the control graph of a model: players, stages, live values, shortcuts.

    Printed as a table without [b]--out[/]. An .html page folds the model into
    blocks that expand, and shows every stage's derivation.

    [dim]gtddp-compile inspect mynet.py:Net --input 2,3,224,224 --out net.html[/]
    """
    with reporting():
        if out is not None and out.suffix.lower() not in SUFFIXES:
            raise typer.BadParameter(
                f"no drawing is known by {out.suffix!r}: {', '.join(SUFFIXES)}", param_hint="--out"
            )
        model, examples = _model(target, inputs, arguments, dtype)
        with working(f"tracing {type(model).__name__}"):
            graph = build_graph(model, examples, Options(schedule=schedule))
        if out is not None and out.suffix.lower() == ".html":  # only the page shows derivations
            with working("deriving the stages"):
                graph = _with_derivations(graph, schedule, coupling, recursion)
        if out is None:
            typer.echo(str(graph))
            return
        with working(f"drawing {out}"):
            try:
                graph.save(out)
            except OSError as error:
                raise CompileError(f"{out} cannot be written ({error.strerror})", "Choose another --out") from error
        written(out)


def _with_derivations(graph: ControlGraph, schedule: str, coupling: str, recursion: Any) -> ControlGraph:
    """The graph with every stage's derivation; without them, said openly, where there is no program for it."""
    choices = Options(schedule=schedule, coupling=number_or_word(coupling), recursion=recursion)
    try:
        return build_program(graph, choices, SGD(), decay=False).drawn
    except CompileError as error:
        warn(f"the page shows no derivations: {error}")
        return graph


@app.command()
def derive(
    target: Target,
    inputs: Inputs,
    stage: Annotated[int | None, typer.Option(help="One stage's derivation only.", show_default="all")] = None,
    format: Annotated[Format, typer.Option(help="How to write it.")] = Format.text,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", dir_okay=False, help="File to write.", show_default=False)
    ] = None,
    arguments: Arguments = [],  # noqa: B006
    dtype: Dtype = "float32",
    loss: LossName = "cross_entropy",
    schedule: Schedule = "asap",
    curvature: Curvature = "sgd",
    coupling: Coupling = "full",
    recursion: Recursion = "levenberg",
    feedback: Feedback = "on",
) -> None:
    """Print what was derived for a model: dynamics, gains and value recursion, stage by stage.

    [dim]gtddp-compile derive mynet.py:Net --input 2,16 --stage 1 --format latex[/]
    """
    with reporting():
        optimizer = _compiled(
            target, inputs, arguments, dtype, loss, schedule, curvature, None, [], coupling, recursion, feedback
        )
        with working("writing the derivation"):
            text = optimizer.program.derivation(stage, format.value)
        if out is not None:
            write(out, text + "\n")
            written(out)
        elif format is Format.latex and (console := Console()).is_terminal:
            console.print(Syntax(text, "latex", background_color="default"))
        else:
            typer.echo(text)


@app.command()
def export(
    target: Target,
    inputs: Inputs,
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            dir_okay=False,
            show_default=False,
            help="File to write, by its suffix: .py (needs torch alone), .json, .tex, .pt2.",
        ),
    ],
    arguments: Arguments = [],  # noqa: B006
    dtype: Dtype = "float32",
    loss: LossName = "cross_entropy",
    curvature: Curvature = "sgd",
    lr: Rate = None,
    settings: Settings = [],  # noqa: B006
    schedule: Schedule = "asap",
    coupling: Coupling = "full",
    recursion: Recursion = "levenberg",
    feedback: Feedback = "on",
) -> None:
    """Write the update program of a model to a file of its own.

    [dim]gtddp-compile export mynet.py:Net --input 2,16 --curvature adam --lr 1e-3 --out step.py[/]
    """  # fmt: skip
    with reporting():
        optimizer = _compiled(
            target, inputs, arguments, dtype, loss, schedule, curvature, lr, settings, coupling, recursion, feedback
        )
        with working(f"writing {out}"):
            optimizer.program.export(out)
        written(out)


@demo.command("digits")
def digits(
    steps: Annotated[int, typer.Option(min=1, help="Steps of batch 8 a run.")] = 1440,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: weights and batch order.")] = 5,
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The report to write.")] = Path(
        "digits.html"
    ),
) -> None:
    """The paper's DIGITS network: the base method, the paper's form and the compiled default, side by side."""
    with reporting():
        missing = [name for name in ("jinja2", "matplotlib", "sklearn") if util.find_spec(name) is None]
        if missing:
            raise CompileError(
                f"the demo needs {', '.join(missing)}, not installed here", "pip install 'gtddp-compile[demo]'"
            )
        from gtddp_compile.demo.digits import main  # its packages are an extra

        main(steps, seeds, out)
