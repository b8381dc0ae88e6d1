"""The report of ``coverage.py``: everything in it is computed from the recorded results."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

Record = dict[str, Any]
PASSED = "passed"
FAILURES = ("compile error", "wrong", "crash", "timeout")
COLUMNS = ("reached", "not tried", "tried", PASSED, *FAILURES)
SAID = {
    "compile error": "refused with a CompileError",
    "wrong": "compiled, but a result is wrong",
    "crash": "an exception other than CompileError, or a killed process",
    "timeout": "not done within the time limit",
}


def totals(records: dict[str, Record]) -> dict[str, Counter[str]]:
    """Counts by zoo."""
    found: dict[str, Counter[str]] = {}
    for key, record in records.items():
        counts = found.setdefault(key.partition("/")[0], Counter())
        counts["reached"] += 1
        counts[record["status"]] += 1
        counts["tried"] += record["status"] != "not tried"
    return found


def totals_table(found: dict[str, Counter[str]]) -> Table:
    """The totals for a terminal."""
    table = Table(title="coverage", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("zoo")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for zoo, counts in found.items():
        table.add_row(zoo, *(str(counts[column]) for column in COLUMNS))
    return table


def cause(record: Record) -> str:
    """The failure with its particulars (names, numbers) taken out, so that equal causes are equal."""
    text = record.get("why") or record["problem"].strip().split("\n")[0]
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "…", text)
    text = re.sub(r"0x[0-9a-f]+|-?\d+(\.\d+)?(e[+-]?\d+)?", "N", text)
    return re.sub(r"N(, N)+", "N, …", text)[:200]


def grouped(records: dict[str, Record], status: str) -> list[tuple[str, list[str]]]:
    """Architectures by cause, the commonest first."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, record in records.items():
        if record["status"] == status:
            groups[cause(record)].append(key)
    return sorted(groups.items(), key=lambda group: (-len(group[1]), group[0]))


def write_report(path: Path, kept: dict[str, Any]) -> None:
    """Write the Markdown file."""
    records: dict[str, Record] = dict(sorted(kept["records"].items()))
    parts = [
        _head(kept["environment"]),
        _totals(records, kept.get("sizes", {})),
        *(_failures(records, status) for status in ("wrong", "crash", "timeout", "compile error")),
        _not_tried(records),
        *(_passed(zoo, records) for zoo in totals(records)),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(part for part in parts if part))


def _head(environment: dict[str, str]) -> str:
    said = ", ".join(f"{name} {value}" for name, value in environment.items() if name not in ("date", "machine"))
    return f"""# Architecture coverage

Written by `python benchmarks/coverage.py`; nothing here is typed in by hand.
Measured {environment["date"]} on {environment["machine"]}: {said}.

Every architecture has random weights and a batch of three small samples, in training mode. It *passes* if one step
with `feedback=False` equals `torch.optim.SGD`'s own, parameters, buffers and loss, from the same random state (in
float64 to 1e-6 of each tensor's update; in float32, for more than 30 million parameters or where the architecture
computes in it anyway, to 2e-2), and one step with the default `feedback=True` is finite, starts from the same loss
and is another step. *Not tried* are those that cannot be built or trained in eager mode here. Parameters that start
as zeros were given small random values, for behind them every gradient vanishes. Seconds are of processor time, on
one thread.
"""


def _totals(records: dict[str, Record], sizes: dict[str, int]) -> str:
    """``sizes``: architectures of each zoo. They are taken in random order, so those reached are a fair sample."""
    lines = [_row("zoo", "in the zoo", *COLUMNS, "passed of tried"), _row("---", *["---:"] * (len(COLUMNS) + 2))]
    for zoo, counts in totals(records).items():
        share = f"{counts[PASSED] / counts['tried']:.1%}" if counts["tried"] else ""
        lines.append(_row(zoo, sizes.get(zoo, ""), *(counts[column] for column in COLUMNS), share))
    rest = {zoo: size - totals(records)[zoo]["reached"] for zoo, size in sizes.items() if zoo in totals(records)}
    missing = ", ".join(f"{count} of {zoo}" for zoo, count in rest.items() if count)
    more = f"\nNot reached before the run was ended: {missing} (the order is random).\n" if missing else ""
    return "\n".join(lines) + "\n" + more


def _failures(records: dict[str, Record], status: str) -> str:
    groups = grouped(records, status)
    if not groups:
        return ""
    parts = [f"## {status.capitalize()}: {SAID[status]}\n"]
    for number, (_, keys) in enumerate(groups, start=1):
        record = records[keys[0]]
        parts.append(f"{number}. {_many(keys)} ({record.get('phase', '')})\n\n       {_line(record['problem'], 400)}\n")
    return "\n".join(parts)


def _not_tried(records: dict[str, Record]) -> str:
    groups = grouped(records, "not tried")
    if not groups:
        return ""
    parts = ["## Not tried: not built, or not trained in eager mode\n"]
    for _, keys in groups:
        parts.append(f"- {_many(keys)}: {_code(_line(records[keys[0]]['problem'], 200))}")
    return "\n".join(parts) + "\n"


def _passed(zoo: str, records: dict[str, Record]) -> str:
    mine = {
        key.partition("/")[2]: record
        for key, record in records.items()
        if key.startswith(zoo + "/") and record["status"] == PASSED
    }
    if not mine:
        return ""
    columns = (
        "architecture", "parameters", "front end", "players", "stages", "shortcuts", "compile s", "step s", "error",
    )  # fmt: skip
    lines = [f"## Passed: {zoo}\n", _row(*columns), _row("---", *["---:"] * (len(columns) - 1))]
    for name, record in mine.items():
        lines.append(
            _row(
                name, f"{record['parameters']:,}", record["frontend"], record["players"], record["stages"],
                record["shortcuts"], f"{record['compile_seconds']:.2f}", f"{record['step_seconds']:.2f}",
                f"{record['error']:.0e}",
            )
        )  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(*cells: object) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _many(keys: Iterable[str]) -> str:
    by_zoo: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        zoo, _, name = key.partition("/")
        by_zoo[zoo].append(name)
    return "; ".join(f"**{zoo}** ({len(names)}): {', '.join(names)}" for zoo, names in by_zoo.items())


def _line(text: str, length: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= length else flat[:length] + " …"


def _code(text: str) -> str:
    return "`" + text.replace("`", "'") + "`"
