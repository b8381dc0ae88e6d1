"""What README.md shows of the measurements: the newest raw results in this folder, cut down to two short tables.

python benchmarks/summary.py        rewrites the sections between README.md's markers
"""

from __future__ import annotations

import json
import math
import re
import statistics

from common import DOCS, markdown, write_section
from robustness import RAW
from robustness_cases import DEFAULT, RIVALS, TASKS
from robustness_runs import TARGET, Run, Runs, final, load
from step_time import RESULTS, in_order

README = DOCS.parent / "README.md"
COLUMNS = ("sgd", "sgd coarse", "rmsprop", "adam", "foof", "kfac")
CLAIMED = "digits-128"
"""The task that the first claim is about."""


def steps() -> str:
    """Ratio of a compiled step to the base method's, a row a network."""
    found: dict[str, dict[str, str]] = {}
    for key, row in in_order(json.loads(RESULTS.read_text(encoding="utf-8"))).items():
        name, curvature, options, against, *_ = json.loads(key)
        column = f"{curvature} coarse" if options == {"gram": "coarse"} else curvature if not options else ""
        if not against.startswith("torch.optim") or column not in COLUMNS:
            continue
        ratio = re.match(r"[\d.]+", row[7])
        assert ratio is not None
        found.setdefault(name, {})[column] = ratio.group()
    rows = [(name, *(cells.get(column, "–") for column in COLUMNS)) for name, cells in found.items()]
    header = ("network", "sgd", 'sgd, `gram="coarse"`', "rmsprop", "adam", "foof (default)", "kfac")
    return (
        "A training step (linear rollout), against torch.optim's step of the base method (FOOF's and K-FAC's against "
        "SGD's), in turns in one process:\n\n" + markdown(header, rows)
    )


def best_rival(runs: Runs, task: str) -> tuple[str, list[Run]]:
    """The tuned rival with the fewest steps to the target, and its runs."""
    named = [(method.name, final(runs, TASKS[task], method)) for method in RIVALS]
    return min((pair for pair in named if pair[1]), key=lambda pair: median(pair[1], "steps_to"))


def median(runs: list[Run], name: str) -> float:
    """Of a figure over seeds."""
    return statistics.median(getattr(run, name) for run in runs)


def shown(value: float, form: str, unit: str = "") -> str:
    """A dash for what was not reached."""
    return f"{value:{form}}{unit}" if math.isfinite(value) else "–"


def targets(runs: Runs) -> str:
    """The default, nothing tuned, beside the best tuned torch.optim method, task by task."""
    rows = []
    for task in TASKS.values():
        ours = final(runs, task, DEFAULT)
        if not ours or not any(final(runs, task, method) for method in RIVALS):
            continue
        name, theirs = best_rival(runs, task.name)
        figures = [(median(side, "steps_to"), median(side, "seconds_to"), median(side, "best_accuracy"))
                   for side in (ours, theirs)]  # fmt: skip
        (steps, seconds, best), (others, longer, other) = figures
        rows.append((
            task.name, name.removeprefix("torch "), f"{shown(steps, 'g')} / {shown(others, 'g')}",
            f"{shown(seconds, '.2f', ' s')} / {shown(longer, '.2f', ' s')}", f"{best:.1%} / {other:.1%}",
        ))  # fmt: skip
    header = ("task, batch", "best tuned rival", f"steps to train loss {TARGET}", "processor time", "best validation")
    return (
        "`compile_optimizer(model, x, loss=…)` with nothing tuned / the better of SGD with Nesterov momentum and Adam, "
        "their learning rates tuned; medians over seeds, a dash where the target was not reached:\n\n"
        + markdown(header, rows)
    )


def claim(runs: Runs) -> str:
    """The first thing that README says."""
    ours = final(runs, TASKS[CLAIMED], DEFAULT)
    name, theirs = best_rival(runs, CLAIMED)
    return (
        f"On the paper's own network, batch 128, it reaches a train loss of {TARGET} in "
        f"**{median(ours, 'steps_to'):g} steps** with nothing tuned where {name.removeprefix('torch ')} with its best "
        f"learning rate takes {median(theirs, 'steps_to'):g}, in {median(ours, 'seconds_to'):.2f} s of processor time "
        f"against {median(theirs, 'seconds_to'):.2f} s, and ends at a validation accuracy of "
        f"{median(ours, 'accuracy'):.1%} against {median(theirs, 'accuracy'):.1%} (medians of {len(ours)} seeds)."
    )


if __name__ == "__main__":
    runs = load(RAW)
    said = "Written by `benchmarks/summary.py`; machine, versions, spread, sweeps and what lost: "
    pages = "[docs/robustness.md](docs/robustness.md), [docs/performance.md](docs/performance.md)."
    write_section("claim", claim(runs), README)
    write_section("measured", f"## Measured\n\n{targets(runs)}\n\n{steps()}\n\n{said}{pages}", README)
