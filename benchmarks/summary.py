"""What README.md shows of the measurements: the newest raw results in this folder, cut down to two short tables.

python benchmarks/summary.py        rewrites the sections between README.md's markers
"""

from __future__ import annotations

import json
import re

from common import DOCS, markdown, write_section
from step_time import RESULTS, in_order
from study_methods import DEFAULT
from study_runs import Runs, final, load, median
from study_tasks import TASKS
from time_to_target import best_rival, readme

README = DOCS.parent / "README.md"
COLUMNS = ("sgd", "rmsprop", "adam", "foof", "kfac")
CLAIMED = "digits-128"
"""The task that the first claim is about."""


def steps() -> str:
    """Ratio of a compiled step to the base method's, a row a network."""
    found: dict[str, dict[str, str]] = {}
    for key, row in in_order(json.loads(RESULTS.read_text(encoding="utf-8"))).items():
        name, curvature, options, against, *_ = json.loads(key)
        if options or not against.startswith("torch.optim") or curvature not in COLUMNS:
            continue
        ratio = re.match(r"[\d.]+", row[7])
        assert ratio is not None
        found.setdefault(name, {})[curvature] = ratio.group()
    rows = [(name, *(cells.get(column, "–") for column in COLUMNS)) for name, cells in found.items()]
    header = ("network", "sgd", "rmsprop", "adam", "foof (default)", "kfac")
    return (
        "A training step (linear rollout), against torch.optim's step of the base method (FOOF's and K-FAC's against "
        "SGD's), in turns in one process:\n\n" + markdown(header, rows)
    )


def claim(runs: Runs) -> str:
    """The first thing that README says."""
    task = TASKS[CLAIMED]
    ours, rival = final(runs, task, DEFAULT), best_rival(runs, task)
    assert rival is not None
    name, theirs = rival[0].name.removeprefix("torch "), rival[1]
    return (
        f"On the paper's own network, batch 128, it reaches a train loss of {task.target} in "
        f"**{median(ours, 'steps_to'):g} steps** with nothing tuned where {name} with its best "
        f"learning rate takes {median(theirs, 'steps_to'):g}, in {median(ours, 'seconds_to'):.2f} s of processor time "
        f"against {median(theirs, 'seconds_to'):.2f} s, and ends at a validation accuracy of "
        f"{median(ours, 'accuracy'):.1%} against {median(theirs, 'accuracy'):.1%} (seeds: {len(ours)}, medians)."
    )


if __name__ == "__main__":
    runs = load()
    said = "Written by `benchmarks/summary.py`; machine, versions, spread, sweeps and what lost: "
    pages = "[docs/time-to-target.md](docs/time-to-target.md), [docs/performance.md](docs/performance.md)."
    targets = (
        "`compile_optimizer(model, x, loss=…)` with nothing tuned / the best rival, tuned for the task; medians over "
        "seeds, a dash where the target was not reached, ratios with their 95 % intervals:\n\n" + readme(runs)
    )
    write_section("claim", claim(runs), README)
    write_section("measured", f"## Measured\n\n{targets}\n\n{steps()}\n\n{said}{pages}", README)
