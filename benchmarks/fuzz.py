"""Random models, options and batches, as tests/support/fuzzed.py draws them: how many steps were right or refused.

python benchmarks/fuzz.py --again   what was wrong, once more
python benchmarks/fuzz.py [cases]   writes benchmarks/fuzz.csv and the section of docs/trust.md; ends with 1 if
                                    a step was wrong or an error not in words
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch
from common import DOCS, markdown, read_rows, write_rows, write_section
from rich.progress import track

sys.path.insert(0, str(DOCS.parent / "tests"))
from support.fuzzed import FAILED, outcome

CASES = 2000
FOUND = Path(__file__).with_suffix(".csv")
DONE = FOUND.parent.parent / "build" / "fuzz.jsonl"
"""A line a case that is done, of a run that was stopped: the next goes on behind it."""


def main(cases: int) -> int:
    torch.set_num_threads(1)
    DONE.parent.mkdir(exist_ok=True)
    lines = DONE.read_text(encoding="utf-8").splitlines() if DONE.exists() else []
    found = Counter(tuple(json.loads(line)) for line in lines)
    with DONE.open("a", encoding="utf-8") as done:
        for seed in track(range(len(lines), cases), "fuzzing"):
            became = outcome(seed)
            row = became.kind, became.said if became.kind != "not finite" else ""
            found[row] += 1
            print(json.dumps(row), file=done, flush=True)
            if became.kind in FAILED:
                print(became.said, flush=True)
    write(found)
    page()
    DONE.unlink()
    return int(any(kind in FAILED for kind, _ in found))


def again() -> int:
    """The cases that failed, after a mend."""
    rows = [(row["outcome"], row["said"], int(row["cases"])) for row in read_rows(FOUND)]
    found = Counter({(kind, said): count for kind, said, count in rows if kind not in FAILED})
    for kind, said, _ in rows:
        if kind in FAILED:
            became = outcome(int(said.split(":")[0].removeprefix("seed ")))
            found[became.kind, became.said if became.kind != "not finite" else ""] += 1
    write(found)
    page()
    return int(any(kind in FAILED for kind, _ in found))


def write(found: Counter[tuple[str, str]]) -> None:
    counted = sorted(found.items(), key=lambda item: (item[0][0], -item[1]))
    write_rows(FOUND, ("outcome", "said", "cases"), [(*key, count) for key, count in counted])


def page() -> None:
    """The section of the page, from the file."""
    kinds: Counter[str] = Counter()
    for row in read_rows(FOUND):
        kinds[row["outcome"]] += int(row["cases"])
    table = markdown(("outcome", "cases"), [(kind, f"{count:,}") for kind, count in kinds.most_common()])
    write_section("fuzz", f"{sum(kinds.values()):,} cases.\n\n{table}", DOCS / "trust.md")


if __name__ == "__main__":
    sys.exit(again() if sys.argv[1:] == ["--again"] else main(int(sys.argv[1]) if len(sys.argv) > 1 else CASES))
