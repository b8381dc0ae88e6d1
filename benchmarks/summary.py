"""What README.md shows of the measurements: the newest raw results in this folder, cut down to two short tables.

python benchmarks/summary.py        rewrites the section between README.md's markers
"""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path

from common import DOCS, markdown, write_section
from step_time import RESULTS
from wall_clock import RAW, TARGET, Run, chosen_runs, spread
from wall_clock_methods import DATA, METHODS

BEST = 3
"""How many of our own methods are listed."""

README = DOCS.parent / "README.md"
COLUMNS = ("sgd", "sgd coarse", "rmsprop", "adam", "kfac", "ekfac")


def steps() -> str:
    """Ratio of a compiled step to the base method's, a row a network."""
    found: dict[str, dict[str, str]] = {}
    for key, row in json.loads(RESULTS.read_text(encoding="utf-8")).items():
        name, curvature, options, against, *_ = json.loads(key)
        column = f"{curvature} coarse" if options == {"gram": "coarse"} else curvature if not options else ""
        if against == "feedback=False" or column not in COLUMNS:
            continue
        ratio = re.match(r"[\d.]+", row[7])
        assert ratio is not None
        cells = found.setdefault(name, {})
        cells[column] = max(cells.get(column, ""), ratio.group(), key=lambda text: float(text or 0))
    rows = [(name, *(cells.get(column, "–") for column in COLUMNS)) for name, cells in found.items()]
    header = ("network", "sgd", 'sgd, `gram="coarse"`', "rmsprop", "adam", "kfac", "ekfac")
    return (
        "A training step with feedback, against the base method's own (torch.optim; for K-FAC and EK-FAC, which "
        "have no feedback there, the faster of the packages that could be timed), in turns in one process:\n\n"
        + markdown(header, rows)
    )


def targets(raw: Path = RAW) -> str:
    """Steps and time to the target, every method of every data set."""
    runs = [Run(**entry) for entry in json.loads(raw.read_text(encoding="utf-8"))]
    rows = []
    for data in DATA.values():
        final = chosen_runs(data, runs)
        order = sorted(final, key=lambda name: statistics.median(run.reached()[1] for run in final[name]))
        sides = {side: [name for name in order if METHODS[name].side == side] for side in ("ours", "torch", "asdl")}
        listed = {*sides["ours"][:BEST], *sides["torch"], *sides["asdl"][:1]}
        for name in (name for name in order if name in listed):
            mine = final[name]
            rows.append((data.name, name, spread([run.reached()[0] for run in mine], "{:.0f}"),
                         spread([run.reached()[1] for run in mine], "{:.2f} s"),
                         spread([100 * run.best for run in mine], "{:.1f} %")))  # fmt: skip
    header = ("data", "method", f"steps to a train loss of {TARGET}", "processor time", "best validation accuracy")
    return (
        "A residual network on real digits, every method with its own tuned learning rate, medians over seeds (least "
        f"to most); the first {BEST} of ours:\n\n" + markdown(header, rows)
    )


if __name__ == "__main__":
    said = "Written by `benchmarks/summary.py`; machine, versions, spread and the sweep: "
    pages = "[docs/performance.md](docs/performance.md), [docs/wall-clock.md](docs/wall-clock.md)."
    write_section("measured", f"## Measured\n\n{steps()}\n\n{targets()}\n\n{said}{pages}", README)
