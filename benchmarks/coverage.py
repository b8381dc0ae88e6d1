"""Which public architectures compile, and whether what was compiled is right.

``python benchmarks/coverage.py`` takes every architecture of torchvision, timm and transformers (those installed), with
random weights, and makes one step with feedback off, which must equal torch.optim.SGD's own (Proposition 4), buffers
included, and one with feedback on, which must be finite and another one. It keeps the results in a JSON file, goes on
from there when started again, and writes ``docs/coverage.md`` from it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import fnmatch
import json
import platform
import random
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import pool
import torch
import typer
import zoo
from coverage_report import PASSED, totals, totals_table, write_report
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

import gtddp_compile
from gtddp_compile import CompileError, compile_optimizer

ROOT = Path(__file__).resolve().parent.parent
LR = 0.01
HUGE = 150_000_000
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-2}
State = dict[str, Tensor]
Send = Callable[[dict[str, Any]], None]


class WrongResult(Exception):
    """What was compiled computes something else."""


class Postponed(Exception):
    """Too large to run beside another one."""


# --- one architecture -------------------------------------------------------------------------------------------------


def examine(name: str, architecture: str, *, alone: bool, send: Send) -> None:
    """Build, compile, step, compare; everything found is sent as it is found.

    Raises:
        NotTried, Postponed, CompileError, WrongResult: as they say; anything else is a crash.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    send({"phase": "build"})
    case = zoo.build(name, architecture)
    send({"parameters": case.size, "note": case.note})
    if case.size > HUGE and not alone:
        raise Postponed
    case, expected, loss = _reference(case, send)
    started = _state(case.model)

    send({"phase": "compile, feedback off"})
    model = copy.deepcopy(case.model)
    began = time.process_time()
    optimizer = _compile(model, case, feedback=False)
    send({"base_compile_seconds": time.process_time() - began, **_graph(optimizer)})
    send({"phase": "step, feedback off"})
    torch.manual_seed(1)
    found = optimizer.step(case.inputs, case.targets)
    base = _state(model)
    try:
        send({"error": _compare(started, base, expected, found, loss, _tolerance(optimizer, loss))})
    except WrongResult as problem:
        if not any(op.random for op in optimizer.graph.ops.ops):
            raise
        raise WrongResult(f"{problem}; {_in_evaluation(case)}") from None
    del optimizer, model, expected

    send({"phase": "compile, feedback on"})
    model = copy.deepcopy(case.model)
    began = time.process_time()
    optimizer = _compile(model, case, feedback=True)
    send({"compile_seconds": time.process_time() - began, "phase": "step, feedback on"})
    torch.manual_seed(1)
    began = time.process_time()
    found = optimizer.step(case.inputs, case.targets)
    send({"step_seconds": time.process_time() - began})
    send({"difference": _differs(started, base, _state(model), found, loss, _tolerance(optimizer, loss))})
    send({"phase": "done"})


def _in_evaluation(case: zoo.Case) -> str:
    """The same comparison without random numbers, to tell a wrong gradient from masks drawn in another order."""
    case = dataclasses.replace(case, model=copy.deepcopy(case.model).eval())
    case, expected, loss = _reference(case, lambda report: None)
    model = copy.deepcopy(case.model)
    optimizer = _compile(model, case, feedback=False)
    found = optimizer.step(case.inputs, case.targets)
    try:
        _compare(_state(case.model), _state(model), expected, found, loss, _tolerance(optimizer, loss))
    except WrongResult:
        return "in evaluation mode too"
    return "in evaluation mode it is equal: the random numbers are others"


def _reference(case: zoo.Case, send: Send) -> tuple[zoo.Case, State, Tensor]:
    """torch.optim.SGD's own step, in float64 where that is cheap and the architecture allows it."""
    send({"phase": "eager"})
    precisions = (torch.float64, torch.float32) if case.size <= zoo.LARGE else (torch.float32,)
    problem: Exception | None = None
    for precision in precisions:
        case = case.to(precision)
        model = copy.deepcopy(case.model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        torch.manual_seed(1)
        try:
            value = case.loss(model(*case.inputs), case.targets).mean()
            value.backward()
        except Exception as failure:  # an architecture that insists on float32; in that, it is not tried
            problem = failure
            continue
        optimizer.step()
        if not torch.isfinite(value) or not all(bool(p.isfinite().all()) for p in model.parameters()):
            problem = ValueError("its own loss or gradient is not finite")
            continue
        send({"precision": str(precision).removeprefix("torch.")})
        return case, _state(model), value.detach()
    raise zoo.NotTried(f"{type(problem).__name__}: {problem}")


def _compile(model: nn.Module, case: zoo.Case, *, feedback: bool) -> Any:
    return compile_optimizer(model, case.inputs, loss=case.loss, curvature="sgd", lr=LR, feedback=feedback)


def _graph(optimizer: Any) -> dict[str, Any]:
    graph = optimizer.graph
    return {
        "frontend": graph.ops.frontend,
        "operations": len(graph.ops.ops),
        "players": len(graph.players),
        "stages": len(graph.stages),
        "shortcuts": len(graph.shortcuts),
        "random": any(op.random for op in graph.ops.ops),
    }


def _state(model: nn.Module) -> State:
    return {name: value.detach().clone() for name, value in (*model.named_parameters(), *model.named_buffers())}


def _tolerance(optimizer: Any, loss: Tensor) -> float:
    """Of the coarsest precision in which the architecture computes: some cast to float32 inside."""
    inside = {op.dtype for op in optimizer.graph.ops.ops} & TOLERANCE.keys()
    return max(TOLERANCE[dtype] for dtype in (*inside, loss.dtype))


def _compare(before: State, ours: State, theirs: State, found: Tensor, loss: Tensor, tolerance: float) -> float:
    """The largest error, relative to the largest update of the same tensor (floor: 1/1000 of the largest of all).

    Raises:
        WrongResult: it is above the tolerance.
    """
    largest = max(_span(theirs[name], before[name]) for name in theirs if theirs[name].is_floating_point())
    worst, at = 0.0, ""
    for name, value in theirs.items():
        if not value.is_floating_point():
            error = float(not torch.equal(value, ours[name]))
        else:
            finite = value[value.isfinite()]
            rounding = 4 * torch.finfo(value.dtype).eps * float(finite.abs().max()) if finite.numel() else 0.0
            scale = _span(value, before[name]) + 1e-3 * largest + 1e-300
            error = max(0.0, _span(value, ours[name]) - rounding) / scale
        if not error <= worst:  # a NaN is the worst
            worst, at = error, name
    if not worst <= tolerance:
        raise WrongResult(f"feedback off: {at} differs from torch.optim.SGD's by {worst:.2g} of its update")
    if not torch.allclose(found.to(loss.dtype), loss, rtol=tolerance, atol=tolerance):
        raise WrongResult(f"feedback off: the loss is {float(found)}, the model's own {float(loss)}")
    return worst


def _differs(before: State, base: State, found: State, value: Tensor, loss: Tensor, tolerance: float) -> float:
    """The feedback step's distance from the base step, relative to the base step.

    Raises:
        WrongResult: the step is not finite, or no other than the base method's.
    """
    if not torch.isfinite(value):
        raise WrongResult("feedback on: the loss is not finite")
    bad = [name for name, tensor in found.items() if not bool(tensor.isfinite().all()) and base[name].isfinite().all()]
    if bad:
        raise WrongResult(f"feedback on: {bad[0]} is not finite")
    if not torch.allclose(value.to(loss.dtype), loss, rtol=tolerance, atol=tolerance):
        raise WrongResult(f"feedback on: the loss is {float(value)}, the model's own {float(loss)}")
    floating = [name for name in base if base[name].is_floating_point()]
    change = max(_span(base[name], before[name]) for name in floating)
    difference = max(_span(base[name], found[name]) for name in floating) / (change + 1e-300)
    if difference == 0.0:
        raise WrongResult("feedback on: the step equals the base method's")
    return difference


def _span(first: Tensor, second: Tensor) -> float:
    apart = torch.where(first == second, torch.zeros_like(first), first - second)  # infinities may be equal
    return float(apart.abs().max()) if apart.numel() else 0.0


# --- all of them ------------------------------------------------------------------------------------------------------


def _job(name: str, architecture: str, alone: bool) -> pool.Job:
    def job(send: Send) -> None:
        try:
            examine(name, architecture, alone=alone, send=send)
        except CompileError as problem:
            send({"status": "compile error", "why": problem.why})
            raise
        except WrongResult:
            send({"status": "wrong"})
            raise
        except zoo.NotTried as problem:
            send({"status": "not tried", "problem": str(problem)})
        except Postponed:
            send({"status": "postponed"})
        else:
            send({"status": PASSED})

    return job


def warm(zoos: list[str]) -> None:
    """Compile once before anything is measured, for what torch and sympy set up at their first use."""
    torch.set_num_threads(1)
    case = zoo.build("transformers", "bert") if "transformers" in zoos else _small()
    with contextlib.suppress(Exception):  # should it fail, its own turn will tell
        _compile(case.model, case, feedback=True).step(case.inputs, case.targets)


def _small() -> zoo.Case:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    return zoo.Case(model, (torch.randn(3, 4),), torch.tensor([0, 1, 2]), zoo.classification)


def _record(outcome: pool.Outcome) -> dict[str, Any]:
    record = dict(outcome.found)
    if record.get("phase") in ("build", "eager") and record.get("status") != "postponed":
        record["status"] = "not tried"
    if "status" not in record:
        record["status"] = "timeout" if outcome.problem.startswith("timeout") else "crash"
    record.update(problem=outcome.problem[:2000], detail=outcome.detail[-3000:], seconds=round(outcome.seconds, 2))
    return record


def environment() -> dict[str, str]:
    """Date, machine and versions, for a report."""
    found = {"date": date.today().isoformat(), "python": platform.python_version(), "machine": _machine()}
    source = Path(gtddp_compile.__file__).resolve().parent
    said = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=source, capture_output=True, text=True, check=False
    )
    if said.returncode == 0:
        found["commit"] = said.stdout.strip()
    for package in ("gtddp-compile", "torch", *zoo.ZOOS):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _machine() -> str:
    cores = torch.multiprocessing.cpu_count()
    return f"{platform.system()} {platform.machine()}, {cores} cores, one thread an architecture"


def main(
    zoos: Annotated[list[str] | None, typer.Option("--zoo", help="A zoo; may be given again. Default: all.")] = None,
    only: Annotated[str, typer.Option(help="Architectures that match, with * and ?.")] = "*",
    out: Annotated[Path, typer.Option(dir_okay=False, help="The report to write.")] = ROOT / "docs" / "coverage.md",
    results: Annotated[Path, typer.Option("--json", help="Raw results; what is in it is not done again.")] = ROOT
    / "build"
    / "coverage.json",
    jobs: Annotated[int, typer.Option(min=1, help="Architectures at a time.")] = 2,
    seconds: Annotated[float, typer.Option(min=1, help="Limit for one architecture.")] = 300,
    gigabytes: Annotated[
        float, typer.Option(min=1, help="Memory limit for one architecture; alone, at the end, 2.5 times that.")
    ] = 8,
    retry: Annotated[bool, typer.Option(help="Do again what did not pass.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Run nothing: write the report of what there is.")] = False,
    code: Annotated[str, typer.Option(help="Commits that were run, where git cannot say.")] = "",
) -> None:
    """Measure how many public architectures compile and are right."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that the running processes are ended too
    console = Console()
    kept: dict[str, Any] = json.loads(results.read_text()) if results.exists() else {"records": {}}
    records = kept["records"]
    wanted = [name for name in (zoos or zoo.ZOOS) if zoo.installed(name)]
    for name in set(zoos or zoo.ZOOS) - set(wanted):
        console.print(f"{name} is not installed: left out")
    kept.setdefault("sizes", {}).update({name: len(zoo.names(name)) for name in wanted})
    if code and "environment" in kept:
        kept["environment"]["commit"] = code
    if report:
        write_report(out, kept)
        return
    listed = [(name, each) for name in wanted for each in zoo.names(name) if fnmatch.fnmatch(each, only)]
    done = {key for key, record in records.items() if record["status"] == PASSED or not retry}
    todo = [pair for pair in listed if "/".join(pair) not in done]
    random.Random(0).shuffle(todo)  # what is there after a while is a fair sample
    zoo.preload(wanted)
    warm(wanted)

    def keep(outcome: pool.Outcome, *, alone: bool) -> bool:
        record = _record(outcome)
        if record["status"] == "postponed" or (not alone and record["problem"].startswith("out of memory")):
            return False
        records["/".join(outcome.key)] = record
        kept["environment"] = environment()
        results.parent.mkdir(parents=True, exist_ok=True)
        results.with_suffix(".new").write_text(json.dumps(kept, indent=1))
        results.with_suffix(".new").replace(results)
        if record["status"] not in (PASSED, "not tried"):
            console.print(f"[red]{record['status']}[/] {'/'.join(outcome.key)}: {record['problem'][:300]}", markup=True)
        return True

    columns = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn())
    # Refreshed by hand: a refreshing thread could hold a lock in the moment of a fork.
    with Progress(*columns, console=console, auto_refresh=False, expand=True) as progress:
        task = progress.add_task("coverage", total=len(todo))

        def tick(running: list[Any]) -> None:
            progress.update(task, description=" ".join("/".join(key) for key in running)[:60])
            progress.refresh()

        late = []
        options: dict[str, Any] = {"seconds": seconds, "tick": tick}
        for outcome in pool.run(
            [(pair, _job(*pair, alone=False)) for pair in todo], workers=jobs, gigabytes=gigabytes, **options
        ):
            if keep(outcome, alone=False):
                progress.advance(task)
            else:
                late.append(outcome.key)
        for outcome in pool.run(
            [(pair, _job(*pair, alone=True)) for pair in late], workers=1, gigabytes=2.5 * gigabytes, **options
        ):
            keep(outcome, alone=True)
            progress.advance(task)
    if not records:
        console.print("nothing to report: none of the zoos is installed")
        return
    console.print(totals_table(totals(records)))
    write_report(out, kept)
    console.print(f"report: [bold]{out}[/bold]", soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
