"""The table of docs/performance.md about ways that were taken out, or looked at and kept: with them against without.

The code that was taken out is at the commit that a row names; ``taken_out.csv`` holds what was measured there, by
switching one way off in one process (time: interleaved steps, medians) or in a process of its own (memory).

    python benchmarks/taken_out.py       writes the section
"""

from __future__ import annotations

import csv
from pathlib import Path

from common import markdown, write_section

ROWS = Path(__file__).with_suffix(".csv")


def main() -> None:
    """Write the section."""
    with ROWS.open(encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    header = ("what", "network", "batch", "method", "rollout", "figure", "with", "without", "kept", "commit")
    write_section("taken out", markdown(header, [[row[name] for name in header] for row in found]))


if __name__ == "__main__":
    main()
