"""What the command line shows: progress while something takes long, and failures without a traceback."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from gtddp_compile.errors import CompileError

PATIENCE = 1.0
"""Seconds without a word before progress is shown."""


def stderr() -> Console:
    """A console on the standard error of this moment (tests and pipes replace it)."""
    return Console(stderr=True, highlight=False)


@contextmanager
def working(doing: str) -> Iterator[None]:
    """Show what is being done and for how long, once it has taken a second; nothing where stderr is not a terminal.

    The work gives no figures of how far it is, so the bar says only that it goes on.
    """
    console = stderr()
    if not console.is_terminal:
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True)
    progress.add_task(doing, total=None)
    timer = threading.Timer(PATIENCE, progress.start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        if progress.live.is_started:
            progress.stop()


@contextmanager
def reporting() -> Iterator[None]:
    """Turn a :class:`CompileError` into a readable message on stderr and exit code 1."""
    try:
        yield
    except CompileError as error:
        report(error)
        raise typer.Exit(1) from error


def report(error: CompileError) -> None:
    """Print where, why and what to do, each on lines of its own."""
    console = stderr()
    place = [f"module [bold]{escape(error.module)}[/]"] if error.module else []
    place += [f"operation [bold]{escape(error.operation)}[/]"] if error.operation else []
    place += [f"at [bold]{escape(error.source)}[/]"] if error.source else []
    console.print(f"[bold red]failed:[/] {', '.join(place)}" if place else "[bold red]failed[/]", soft_wrap=True)
    console.print(Padding(escape(f"{error.why.rstrip('.')}."), (0, 0, 0, 2)))
    console.print(Padding(f"[green]{escape(error.remedy.rstrip('.'))}.[/]", (0, 0, 0, 2)))


def show(found: object) -> None:
    """Print a result: in colours where stdout is a terminal, else as its plain text."""
    console = Console()
    if console.is_terminal:
        console.print(found)
    else:
        typer.echo(str(found))


def warn(text: str) -> None:
    """Say on stderr what the result leaves out, and why."""
    stderr().print(f"[yellow]note:[/] {escape(text)}")


def save(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and say where it is, and how large."""
    with working(f"writing {path}"):
        try:
            write(path)
        except OSError as error:
            raise CompileError(f"{path} cannot be written ({error.strerror})", "Choose another --out") from error
    size = path.stat().st_size / 1024
    stderr().print(f"wrote [bold]{escape(str(path))}[/] ({size:,.1f} KiB)", soft_wrap=True)
