"""The commands of ``gtddp-compile``."""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from importlib import metadata, util
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.syntax import Syntax

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.methods.curvature import SGD
from gtddp_compile.options import Options
from gtddp_compile.runtime.compiler import build_graph, build_program
from gtddp_compile.tools.cli.loading import number_or_word, parse_schedule
from gtddp_compile.tools.cli.options import Compared, Inputs, Target, compiled, model_and_inputs, program_of, takes
from gtddp_compile.tools.cli.terminal import reporting, save, show, warn, working
from gtddp_compile.tools.difference import SUFFIXES as DIFF_SUFFIXES
from gtddp_compile.tools.draw import SUFFIXES

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
@reporting()
@takes("arguments", "dtype", "schedule", "coupling", "recursion")
def inspect(
    target: Target,
    inputs: Inputs,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, help=f"File to write: {', '.join(SUFFIXES)}.", show_default=False),
    ] = None,
    **choices: Any,
) -> None:
    """Show the control graph of a model: players, stages, live values, shortcuts.

    Printed as a table without [b]--out[/]. An .html page folds the model into
    blocks that expand, and shows every stage's derivation.

    [dim]gtddp-compile inspect mynet.py:Net --input 2,3,224,224 --out net.html[/]
    """
    _check_suffix(out, SUFFIXES)
    model, examples = model_and_inputs(target, inputs, choices["arguments"], choices["dtype"])
    schedule = parse_schedule(choices["schedule"])
    with working(f"tracing {type(model).__name__}"):
        graph = build_graph(model, examples, Options(schedule=schedule))
    if out is None:
        typer.echo(str(graph))
        return
    if out.suffix.lower() == ".html":  # only the page shows derivations
        asked = {"coupling": number_or_word(choices["coupling"]), "recursion": choices["recursion"]}
        with working("deriving the stages"):
            graph = _with_derivations(graph, Options(schedule=schedule, **asked))
    save(out, graph.save)


def _check_suffix(out: Path | None, known: Iterable[str]) -> None:
    if out is not None and out.suffix.lower() not in known:
        raise typer.BadParameter(f"{out.suffix!r} is not one of {', '.join(known)}", param_hint="--out")


def _with_derivations(graph: ControlGraph, choices: Options) -> ControlGraph:
    """The graph with every stage's derivation; without them, said openly, where there is no program for it."""
    try:
        return build_program(graph, choices, SGD(), decay=False).drawn
    except CompileError as error:
        warn(f"the page shows no derivations: {error}")
        return graph


@app.command()
@reporting()
@takes("*")
def derive(
    target: Target,
    inputs: Inputs,
    stage: Annotated[int | None, typer.Option(help="One stage's derivation only.", show_default="all")] = None,
    format: Annotated[Format, typer.Option(help="How to write it.")] = Format.text,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", dir_okay=False, help="File to write.", show_default=False)
    ] = None,
    **choices: Any,
) -> None:
    """Print what was derived for a model: dynamics, gains and value recursion, stage by stage.

    [dim]gtddp-compile derive mynet.py:Net --input 2,16 --stage 1 --format latex[/]
    """
    optimizer = compiled(target, inputs, **choices)
    with working("writing the derivation"):
        text = optimizer.program.derivation(stage, format.value)
    if out is not None:
        save(out, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    elif format is Format.latex and (console := Console()).is_terminal:
        console.print(Syntax(text, "latex", background_color="default"))
    else:
        typer.echo(text)


@app.command()
@reporting()
@takes("*")
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
            help="File to write, by its suffix: .py (needs torch), .json, .tex, .pt2.",
        ),
    ],
    **choices: Any,
) -> None:
    """Write the update program of a model to a file of its own.

    [dim]gtddp-compile export mynet.py:Net --input 2,16 --curvature adam --lr 1e-3 --out step.py[/]
    """
    save(out, compiled(target, inputs, **choices).program.export)


@app.command()
@reporting()
@takes("*")
def diff(
    first: Compared,
    second: Compared,
    inputs: Inputs = [],  # noqa: B006
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", dir_okay=False, help="File to write: .html or .txt.", show_default=False),
    ] = None,
    **choices: Any,
) -> None:
    """Show what differs between two update programs: players, cuts, derivations, instructions, options.

    The options under Model and Derivation are for models; a .json has its own.

    [dim]gtddp-compile diff plain.json residual.json --out diff.html[/]

    [dim]gtddp-compile diff mynet.py:Plain mynet.py:Residual --input 2,16[/]
    """
    _check_suffix(out, DIFF_SUFFIXES)
    programs = [program_of(target, inputs, **choices) for target in (first, second)]
    with working("comparing"):
        found = programs[0].diff(programs[1])
    if out is None:
        show(found)
    else:
        save(out, found.save)


@demo.command("digits")
@reporting()
def digits(
    steps: Annotated[int, typer.Option(min=1, help="Steps of batch 8 a run; batch 128 makes a twelfth.")] = 720,
    seeds: Annotated[int, typer.Option(min=1, help="Seeds: weights and batch order.")] = 3,
    out: Annotated[Path, typer.Option("--out", "-o", dir_okay=False, help="The report to write.")] = Path(
        "digits.html"
    ),
) -> None:
    """The paper's DIGITS network: tuned SGD and Adam, the paper's form and the compiled default, side by side."""
    missing = [name for name in ("matplotlib", "sklearn") if util.find_spec(name) is None]
    if missing:
        raise CompileError(
            f"the demo needs {', '.join(missing)}, not installed here", "pip install 'gtddp-compile[demo]'"
        )
    from gtddp_compile.tools.demo.digits import main  # its packages are an extra

    main(steps, seeds, out)
