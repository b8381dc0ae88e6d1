"""How many wrong programs the tests see: one operator changed at a time, and the tests about its file run.

``python benchmarks/mutation.py --count 30 --seed 0`` draws operators of the passes p05 to p09, the kernels and the base
methods, changes each in a copy of the tree (+ to -, * to /, < to <=, a constant by one, `not` left out), runs the tests
with -x, and writes docs/mutation.md. A mutant that no test fails on either computes the same or shows what is untested.
A verdict is kept in ``mutation.csv`` and not looked for again: stop it when you like and start it again to go on.
"""

from __future__ import annotations

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

from common import markdown, read_rows, write_rows

ROOT = Path(__file__).resolve().parents[1]
KEPT = Path(__file__).with_suffix(".csv")
MATRIX = ["tests/programs/test_matrix.py", "-k", "dense"]
SUITES: dict[str, list[list[str]]] = {
    "passes": [["tests/structure/test_structure.py", "tests/structure/test_structure_random.py"], ["tests/derivation"],
               MATRIX, ["tests/frontends"]],
    "gtddp_compile/kernels": [["tests/kernels"], MATRIX, ["tests/programs/test_kronecker.py",
                              "tests/programs/test_gram_forms.py"]],
    "gtddp_compile/methods": [["tests/kernels/test_curvature.py", "tests/kernels/test_losses.py",
                               "tests/kernels/test_terminal_factors.py"], MATRIX,
                              ["tests/programs/test_kronecker.py", "tests/optimizer"]],
}  # fmt: skip
"""Tests by what they are about, the quickest first."""
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """A file with one expression replaced."""

    folder: str
    path: str
    line: int
    before: str
    after: str
    text: str


def mutants(folder: str, path: Path) -> Iterator[Mutant]:
    """Every one of a file; messages, annotations and texts are left alone."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    skipped = {id(inner) for node in ast.walk(tree) for part in _not_run(node) for inner in ast.walk(part)}
    for node in ast.walk(tree):
        changed = None if id(node) in skipped else _changed(node)
        if changed is not None and isinstance(node, ast.expr):
            before = ast.get_source_segment(source, node) or ""
            text = _replaced(source, node, f"({ast.unparse(changed)})")
            place = str(path.relative_to(ROOT))
            yield Mutant(folder, place, node.lineno, " ".join(before.split()), ast.unparse(changed), text)


def _not_run(node: ast.AST) -> list[ast.AST]:
    if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr):
        return [node]
    if isinstance(node, ast.AnnAssign):
        return [node.annotation]
    if isinstance(node, ast.FunctionDef):
        return [a.annotation for a in ast.walk(node.args) if isinstance(a, ast.arg) and a.annotation is not None] + (
            [node.returns] if node.returns is not None else []
        )
    return []


def _changed(node: ast.AST) -> ast.expr | None:
    if isinstance(node, ast.BinOp) and type(node.op) in SWAPS:
        return ast.BinOp(node.left, SWAPS[type(node.op)](), node.right)  # type: ignore[arg-type]
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in SWAPS:
        return ast.Compare(node.left, [SWAPS[type(node.ops[0])]()], node.comparators)  # type: ignore[list-item]
    if isinstance(node, ast.Constant) and type(node.value) is int:
        return ast.Constant(node.value + 1)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return node.operand
    return None


def _replaced(source: str, node: ast.expr, new: str) -> str:
    lines = source.encode().split(b"\n")  # columns are of bytes
    assert node.end_lineno is not None and node.end_col_offset is not None
    head, tail = lines[node.lineno - 1][: node.col_offset], lines[node.end_lineno - 1][node.end_col_offset :]
    lines[node.lineno - 1 : node.end_lineno] = [head + new.encode() + tail]
    return b"\n".join(lines).decode()


def drawn(count: int, seed: int) -> list[Mutant]:
    """As many of each folder, files before places: a long file is not drawn more often, nor does one move the rest."""
    found, share = [], count // len(SUITES)
    for folder in SUITES:
        pattern = "p0[5-9]_*.py" if folder == "passes" else "**/*.py"
        files = [path for path in sorted((ROOT / folder).glob(pattern)) if any(mutants(folder, path))]
        for index in range(share):
            path = files[index * len(files) // share]
            fresh = [mutant for mutant in mutants(folder, path) if mutant not in found]
            found.append(random.Random(f"{seed} {path.name} {index}").choice(fresh))
    return found


def verdict(mutant: Mutant, copy: Path, limit: int) -> str:
    """The first test that fails, or that none does."""
    target, kept = copy / mutant.path, (copy / mutant.path).read_text(encoding="utf-8")
    target.write_text(mutant.text, encoding="utf-8")
    try:
        for suite in SUITES[mutant.folder]:
            done = run([*suite, "-x", "-q", "--no-header", "-p", "no:cacheprovider"], copy, limit)
            if done is None:
                return f"**not decided**: the tests did not end in {limit} s"
            if done.returncode not in (0, 5):
                lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return (
                    f"caught: {lines[0].split(' ', 1)[1].split(' - ')[0]}" if lines else "caught: nothing is imported"
                )
        return "**not caught**"
    finally:
        target.write_text(kept, encoding="utf-8")


def check_unchanged(said: str, copy: Path, seen: set[str], limit: int) -> None:
    """The test that caught a mutant passes on the tree as it is."""
    test = said.removeprefix("caught: ")
    if test.startswith("tests/") and test not in seen:
        done = run([test, "-q", "-p", "no:cacheprovider"], copy, limit)
        if done is None or done.returncode:
            raise SystemExit(f"{test} fails without a change: mend it first")
        seen.add(test)


def run(arguments: list[str], copy: Path, limit: int) -> subprocess.CompletedProcess[str] | None:
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", *arguments]
    try:
        return subprocess.run(
            command, cwd=copy, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        return None


@dataclass(frozen=True)
class Row:
    """What became of the mutant drawn as ``number``, in the tree of ``commit``."""

    seed: int
    number: int
    place: str
    before: str
    after: str
    verdict: str
    commit: str


def page(rows: list[Row], count: int, seed: int) -> str:
    caught = sum(row.verdict.startswith("caught") for row in rows)
    cells = [(f"`{r.place}`", f"`{r.before}`", f"`{r.after}`", r.verdict.replace("tests/", ""), r.commit) for r in rows]
    table = markdown(("place", "is", "was made", "", "at"), cells)
    return f"""# Mutation check

{caught} of {len(rows)} changes of one operator are caught. Written by
`benchmarks/mutation.py --count {count} --seed {seed}`, after {len(rows)} of {count}:
what it changes, and which tests it runs for a file, is in the script.
"Caught" names a test that fails; it passes without the change. The last column is the commit that was changed. A
verdict in bold was looked at by hand.

{table}
"""


def write(rows: list[Row], count: int, seed: int) -> None:
    write_rows(KEPT, [*Row.__annotations__], map(astuple, rows))
    said = page([row for row in rows if row.seed == seed], count, seed)
    (ROOT / "docs" / "mutation.md").write_text(said, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, default=900, help="seconds for one set of tests")
    given = parser.parse_args()
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    rows = [Row(**{**r, "seed": int(r["seed"]), "number": int(r["number"])}) for r in read_rows(KEPT)]
    seen = set[str]()
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "tree"
        for name in ("gtddp_compile", "passes", "tests", "examples", "docs", "benchmarks"):
            shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns(".data"))
        shutil.copy(ROOT / "pyproject.toml", copy)
        (copy / "gtddp_compile" / "passes").symlink_to("../passes")
        for number, mutant in enumerate(drawn(given.count, given.seed)):
            if any((row.seed, row.number) == (given.seed, number) for row in rows):
                continue
            said = verdict(mutant, copy, given.limit)
            check_unchanged(said, copy, seen, given.limit)
            place = f"{mutant.path}:{mutant.line}"
            rows.append(Row(given.seed, number, place, mutant.before, mutant.after, said, commit))
            print(rows[-1], flush=True)
            write(rows, given.count, given.seed)


if __name__ == "__main__":
    main()
