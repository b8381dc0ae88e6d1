"""Physics-informed networks: time and steps to a relative L2 error, ours beside Adam, SOAP and L-BFGS.

The problems are those of ``examples/pde``, with their settings. All methods of a problem and seed start from the same
weights, and all but L-BFGS, whose points stay, draw the same points anew for every step. Only steps are timed. Rates of
Adam and SOAP are the best of three in shorter runs with a seed of their own. Where a problem's example averages
networks, so does every method here. Every finished run is kept in ``physics.json`` and not run again; the tables go to
docs/physics.md, with what prototypes found (``physics_tried.csv``). One thread, float64. SOAP is of the extra
``rivals``.

    python benchmarks/physics.py [--seeds 3] [--only heat,Adam]      what is missing, then the table
    python benchmarks/physics.py --kept                              the tables alone
    python benchmarks/physics.py --quick                             a minute; nothing is kept or written
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from common import DOCS, csv_table, keep_heap, machine, markdown, measured, write_section
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "pde"))
import heat
import helmholtz
import poisson
from solve import Problem

from gtddp_compile import compile_optimizer

RAW, TRIED = (Path(__file__).with_name(name) for name in ("physics.json", "physics_tried.csv"))
BUDGET, SWEEP, SWEEP_SEED, PAIRS = 60.0, 10.0, 100, 15
"""Seconds of a run, of one that only tunes a rate, the seed of the latter, and pairs of steps that are compared."""
TARGETS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
RATES = (1e-2, 3e-3, 1e-3)
PROBLEMS: dict[str, Callable[[], Problem]] = {
    "Poisson 2-D": lambda: poisson.problem(2),
    "heat 1+1-D": heat.problem,
    "Helmholtz 2-D": helmholtz.problem,
    "Poisson 10-D": lambda: poisson.problem(10),
    (MANY := "Poisson 2-D at 4080 points"): lambda: poisson.problem(2, 4),
}
Step = Callable[[], tuple[float, int]]
"""One step: its processor seconds, and how many evaluations of loss and gradient it took."""


# --- methods ----------------------------------------------------------------------------------------------------------


def ours(**more: Any) -> Callable[[Problem, torch.Generator, float], Step]:
    """The joint step, by the problem's setting and what is said beside it."""

    def begin(problem: Problem, drawn: torch.Generator, rate: float) -> Step:
        opt = compile_optimizer(problem.terms, problem.points(drawn), **problem.setting | more)

        def step() -> tuple[float, int]:
            points = problem.points(drawn)
            start = time.process_time()
            opt.step(points)
            return time.process_time() - start, 1

        return step

    return begin


def loss(problem: Problem, points: dict[str, tuple[Tensor, Tensor | float]]) -> Tensor:
    """As ``Terms`` has it, each term at its own points alone."""
    terms = problem.terms
    halves = [0.5 * (terms.terms[name](terms.net, x).flatten() - y).square().mean() for name, (x, y) in points.items()]
    return torch.stack(halves).sum()


def first_order(make: Callable[..., torch.optim.Optimizer]) -> Callable[[Problem, torch.Generator, float], Step]:
    """An optimizer of gradients at a constant rate."""

    def begin(problem: Problem, drawn: torch.Generator, rate: float) -> Step:
        opt = make(problem.terms.parameters(), lr=rate)

        def step() -> tuple[float, int]:
            points = problem.points(drawn)
            start = time.process_time()
            opt.zero_grad()
            loss(problem, points).backward()
            opt.step()
            return time.process_time() - start, 1

        return step

    return begin


def soap(*args: Any, **options: Any) -> torch.optim.Optimizer:
    """SOAP (Vyas and others 2024) as ``pytorch-optimizer`` has it, without weight decay."""
    from pytorch_optimizer import SOAP

    found: torch.optim.Optimizer = SOAP(*args, **options, weight_decay=0.0)
    return found


def lbfgs(problem: Problem, drawn: torch.Generator, rate: float) -> Step:
    """torch.optim.LBFGS on one set of points, 20 iterations a call."""
    opt = torch.optim.LBFGS(problem.terms.parameters(), history_size=50, line_search_fn="strong_wolfe")
    points, calls = problem.points(drawn), 0

    def closure() -> Tensor:
        nonlocal calls
        calls += 1
        opt.zero_grad()
        value = loss(problem, points)
        value.backward()
        return value

    def step() -> tuple[float, int]:
        start, before = time.process_time(), calls
        opt.step(closure)
        return time.process_time() - start, calls - before

    return step


METHODS: dict[str, Callable[[Problem, torch.Generator, float], Step]] = {
    "ours": ours(), "ours with Γ": ours(gram="exact"), "ours with Γ by 1020": ours(gram="exact", coupling=1020),
    "Adam": first_order(torch.optim.Adam), "Adam for 300 s": first_order(torch.optim.Adam),
    "SOAP": first_order(soap), "L-BFGS": lbfgs,
}  # fmt: skip
TUNED = ("Adam", "SOAP")
LONG = {"Adam for 300 s": 300.0}
"""Methods with a budget of their own, at the rate that is best in short."""


FORMS = {
    "ours with Γ": ("Poisson 2-D", MANY), "ours with Γ by 1020": (MANY,),
    "Adam for 300 s": ("Helmholtz 2-D", "Poisson 10-D"),
}  # fmt: skip
"""Methods that are run on some problems alone."""


def asked(problem: str, method: str) -> bool:
    """Whether the method is run on the problem."""
    return problem in FORMS[method] if method in FORMS else problem != MANY or method == "ours"


# --- runs -------------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A row of the results.

    Attributes:
        problem, method, rate, seed: which run; ``rate`` is 0 where nothing is tuned.
        compile_s: processor seconds to make the step.
        steps, seconds: in all; steps of L-BFGS are evaluations of loss and gradient.
        best: least error.
        reached: ``[target, seconds, steps]`` of each that was reached.
        ended: "budget", or "stalled".
        lifted: factors that were made of eigenvalues.
        price: our step beside Adam's of the same model, in turns at the end; 0 where it was not measured.
        measured, machine: when, which commit, where.
        load: processes on the machine, this one among them, in the mean of five minutes; 0 where it was not noted.
    """

    problem: str
    method: str
    rate: float
    seed: int
    compile_s: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    best: float = math.inf
    reached: list[tuple[float, float, int]] = field(default_factory=list)
    ended: str = "budget"
    lifted: int = 0
    price: float = 0.0
    measured: str = ""
    machine: str = ""
    load: float = 0.0

    @property
    def key(self) -> tuple[str, str, float, int]:
        """Identifies it."""
        return self.problem, self.method, self.rate, self.seed


def perform(run: Run, budget: float, say: Callable[[Run, float], None]) -> None:
    """Train for ``budget`` seconds of steps; the error is looked at about twice a second, and not timed."""
    torch.manual_seed(run.seed)
    problem, drawn, looked = PROBLEMS[run.problem](), torch.Generator().manual_seed(run.seed), 0.0
    start = time.process_time()
    step = METHODS[run.method](problem, drawn, run.rate)
    run.compile_s = time.process_time() - start
    while run.seconds < budget and run.ended == "budget":
        before = [p.detach().clone() for p in problem.terms.parameters()] if run.method == "L-BFGS" else []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            seconds, steps = step()
        run.lifted += sum("not definite" in str(warning.message) for warning in caught)
        problem.follow()
        run.seconds, run.steps = run.seconds + seconds, run.steps + steps
        if before and all(map(torch.equal, before, problem.terms.parameters())):
            run.ended = "stalled"
        if run.seconds < min(looked + 0.5, budget) and run.ended == "budget":
            continue
        looked, error = run.seconds, problem.error()
        run.best = min(run.best, error)
        known = {target for target, *_ in run.reached}
        run.reached += [(t, run.seconds, run.steps) for t in TARGETS if error < t and t not in known]
        say(run, error)
    if run.method.startswith("ours"):
        adam, ratios = METHODS["Adam"](problem, drawn, 0.0), []
        for _ in range(PAIRS):
            ratios.append(step()[0] / adam()[0])
            problem.terms.zero_grad()  # our step warns of gradients that it does not read
        run.price = statistics.median(ratios)


Runs = dict[tuple[str, str, float, int], Run]


def load() -> Runs:
    """What is kept."""
    rows = json.loads(RAW.read_text(encoding="utf-8")) if RAW.exists() else []
    return {run.key: run for run in (Run(**row) for row in rows)}


def tuned(runs: Runs, problem: str, method: str) -> float:
    """The rate with the least error in the sweep."""
    return min(RATES, key=lambda rate: runs[problem, method, rate, SWEEP_SEED].best)


def wanted(runs: Runs, problems: Sequence[str], methods: Sequence[str], seeds: int) -> Iterator[Run]:
    """In the order in which they are run; a rate is decided once its sweep has been."""
    for method in methods:
        for problem in [problem for problem in problems if asked(problem, method)]:
            if method in TUNED:
                yield from (Run(problem, method, rate, SWEEP_SEED) for rate in RATES)
            known = "Adam" if method in LONG else method
            rate = tuned(runs, problem, known) if known in TUNED else 0.0
            yield from (Run(problem, method, rate, seed) for seed in range(1, seeds + 1))


# --- the table --------------------------------------------------------------------------------------------------------


HEADER = ("problem", "method", "seeds", "load", "ms a step", "of Adam's step",
          *(f"{target:.0e}: s (steps)" for target in TARGETS), "best error")  # fmt: skip


def table(runs: Runs) -> str:
    """A row for a problem and method, medians over seeds; a target that half of the seeds did not reach has a dash."""
    rows: list[Sequence[str]] = []
    for problem in PROBLEMS:
        for method in [method for method in METHODS if asked(problem, method)]:
            found = [r for r in runs.values() if (r.problem, r.method) == (problem, method) and r.seed != SWEEP_SEED]
            rate = f" (rate {found[0].rate:g})" if found and found[0].rate else ""
            left = ("0", *[""] * (len(HEADER) - 4), "not run")
            rows.append((problem, method + rate, *(cells(found) if found else left)))
    kept = list(runs.values())
    compiling = statistics.median(run.compile_s for run in kept if run.method.startswith("ours"))
    said = (
        f"Relative L2 error; processor seconds of steps alone (making ours takes {compiling:.0f} s more, once), "
        f"{BUDGET:.0f} s a run where nothing else is said; medians of the seeds. Load: processes on the machine during "
        "every run, where noted; more than its cores lengthen each other's seconds. Of Adam's step: the two in turns, "
        f"at the end of a run. Rates: of {', '.join(map(str, RATES))} the best after {SWEEP:.0f} s with another seed. "
        "Lifted: factors made "
        "of eigenvalues. L-BFGS: evaluations for steps, on points that stay. "
        f"Written by `benchmarks/physics.py`; last run {kept[-1].measured}: {kept[-1].machine}."
    )
    return f"{markdown(HEADER, rows)}\n\n{said}"


def cells(found: Sequence[Run]) -> tuple[str, ...]:
    """What a row says of its runs."""
    counts = {"stalled": sum(run.ended == "stalled" for run in found), "lifted": sum(run.lifted for run in found)}
    said = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    prices = [run.price for run in found if run.price]
    return (
        str(len(found)), ", ".join(f"{run.load:.0f}" for run in found if run.load),
        f"{statistics.median(1e3 * run.seconds / run.steps for run in found):.0f}",
        f"{statistics.median(prices):.1f}" if prices else "",
        *(reached(found, target) for target in TARGETS),
        f"{statistics.median(run.best for run in found):.1e}" + (f" ({said})" if said else ""),
    )  # fmt: skip


def reached(found: Sequence[Run], target: float) -> str:
    """Median seconds and steps to a target, of seeds that never reached it infinitely many."""
    hits = [next(((s, n) for t, s, n in run.reached if t == target), (math.inf, math.inf)) for run in found]
    seconds, steps = (statistics.median(hit[i] for hit in hits) for i in (0, 1))
    return f"{seconds:.1f} ({steps:.0f})" if math.isfinite(seconds) else "–"


def main(
    only: Annotated[str, typer.Option(help="problems and methods, with commas; all where none is named")] = "",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    kept: Annotated[bool, typer.Option(help="nothing is run; the tables of what is kept")] = False,
    quick: Annotated[bool, typer.Option(help="2 s a run, one seed; nothing is kept or written")] = False,
) -> None:
    """Measure what is missing; write the table."""
    keep_heap()
    torch.set_num_threads(1)
    names = {name.strip() for name in only.split(",") if name.strip()}
    if unknown := names - PROBLEMS.keys() - METHODS.keys():
        raise typer.BadParameter(f"{sorted(unknown)} is not among {[*PROBLEMS, *METHODS]}")
    stamp = measured(), machine(1)  # of the code that is loaded now
    problems = [name for name in PROBLEMS if name in names] or list(PROBLEMS)
    methods = [name for name in METHODS if name in names] or list(METHODS)
    runs: Runs = {} if quick else load()
    pairs = [method for method in methods for problem in problems if asked(problem, method)]
    total = sum((1 if quick else seeds) + len(RATES) * (name in TUNED) for name in pairs)
    columns = (TextColumn("run"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.description}"))
    with Progress(*columns) as progress:
        bar = progress.add_task("", total=total)

        def say(run: Run, error: float) -> None:
            text = f"{run.problem}, {run.method}, seed {run.seed}: {run.seconds:.0f} s, error {error:.1e}"
            progress.update(bar, description=text)

        for run in () if kept else wanted(runs, problems, methods, 1 if quick else seeds):
            if run.key not in runs:
                budget = SWEEP if run.seed == SWEEP_SEED else LONG.get(run.method, BUDGET)
                perform(run, 2.0 if quick else budget, say)
                (run.measured, run.machine), run.load = stamp, round(os.getloadavg()[1], 1)
                runs[run.key] = run
                if not quick:
                    RAW.write_text(json.dumps([asdict(r) for r in runs.values()], indent=1), encoding="utf-8")
            progress.advance(bar)
    if quick:
        print(table(runs))
    else:
        write_section("physics", table(runs), DOCS / "physics.md")
        write_section("tried", csv_table(TRIED), DOCS / "physics.md")


if __name__ == "__main__":
    typer.run(main)
