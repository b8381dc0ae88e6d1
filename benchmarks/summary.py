"""What README.md shows of the measurements: the newest raw results in this folder, cut down to two short tables.

python benchmarks/summary.py        rewrites the section between README.md's markers
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import DOCS, markdown, write_section
from step_time import RESULTS, in_order
from wall_clock import COMPARED, RAW, TARGET, Run, chosen_runs, compared
from wall_clock_methods import DATA

README = DOCS.parent / "README.md"
COLUMNS = ("sgd", "sgd coarse", "rmsprop", "adam", "foof", "kfac")


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


def targets(raw: Path = RAW) -> str:
    """Steps and time to the target, by base method, without feedback and with it."""
    runs = [Run(**entry) for entry in json.loads(raw.read_text(encoding="utf-8"))]
    rows = [(data.name, *row) for data in DATA.values() for row in compared(chosen_runs(data, runs))]
    return (
        f"A residual network on real digits, to a train loss of {TARGET}: every method with its own tuned learning "
        "rate, medians over seeds, processor time; a dash where not every seed got there within the steps allowed:"
        "\n\n" + markdown(("data", *COMPARED), rows)
    )


if __name__ == "__main__":
    said = "Written by `benchmarks/summary.py`; machine, versions, spread and the sweep: "
    pages = "[docs/performance.md](docs/performance.md), [docs/wall-clock.md](docs/wall-clock.md)."
    write_section("measured", f"## Measured\n\n{steps()}\n\n{targets()}\n\n{said}{pages}", README)
