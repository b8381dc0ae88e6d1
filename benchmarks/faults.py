"""A fault at every instruction of generated programs: an exception, or NaN in what it writes; what became of the step.

python benchmarks/faults.py   writes benchmarks/faults.csv and the section of docs/trust.md; ends with 1 if a step was
                              half done
"""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from itertools import product
from pathlib import Path

import torch
from common import DOCS, markdown, read_rows, write_rows, write_section
from rich.progress import track

sys.path.insert(0, str(DOCS.parent / "tests"))
from support.faults import CURVATURES, ELSE, KINDS, NETWORKS, NOTHING, PACKAGE, ROLLOUTS, WHOLE, Faults

FOUND, PAGE = Path(__file__).with_suffix(".csv"), DOCS / "trust.md"
NAN, ANYWHERE = "NaN in a value", "interrupt, any line of the package"
EVERY, SPARSE = 60, 5
"""Lines between two interrupts anywhere (a step passes some thousands), and between two faults of another kind."""
OUTCOMES = (f"raised, {NOTHING}", f"raised, {WHOLE}", WHOLE, f"raised, {ELSE}", ELSE)


def main() -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found: Counter[tuple[str, ...]] = Counter()
    for names in track(list(product(NETWORKS, CURVATURES, ROLLOUTS)), "faults"):
        program = Faults(*names)
        given = {kind: program.exceptions(kind, 1 if kind == "interrupt" else SPARSE) for kind in KINDS}
        given |= {ANYWHERE: program.exceptions("interrupt", EVERY, PACKAGE), NAN: program.not_a_number(SPARSE)}
        for kind, outcomes in given.items():
            found.update((*names, kind, outcome) for outcome in list(outcomes)[:-1])  # the last is of a step without
    header = ("network", "curvature", "rollout", "fault", "outcome", "faults")
    write_rows(FOUND, header, [(*key, count) for key, count in found.items()])
    page()
    return int(any(ELSE in outcome for *_, outcome in found))


def page() -> None:
    """The section of the page, from the file."""
    rows = read_rows(FOUND)
    count: Counter[tuple[str, str]] = Counter()
    for row in rows:
        count[row["fault"], row["outcome"]] += int(row["faults"])
    kinds = list(dict.fromkeys(row["fault"] for row in rows))
    table = markdown(("fault", *OUTCOMES), [(kind, *(f"{count[kind, one]:,}" for one in OUTCOMES)) for kind in kinds])
    drawn = {key: ", ".join(dict.fromkeys(row[key] for row in rows)) for key in ("network", "curvature", "rollout")}
    said = (
        f"{sum(count.values()):,} faults by `benchmarks/faults.py`. Networks: {drawn['network']}; curvatures: "
        f"{drawn['curvature']}; rollouts: {drawn['rollout']}."
    )
    write_section("faults", f"{said}\n\n{table}", PAGE)


if __name__ == "__main__":
    sys.exit(main())
