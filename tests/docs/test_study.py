"""The pages of the study say what the rows of ``benchmarks/study.csv`` say."""

import importlib
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PERFORMANCE = DOCS / "performance.md"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def test_time_to_target_is_written_from_the_rows():
    import time_to_target as page

    runs, text = page.load(), page.PAGE.read_text(encoding="utf-8")
    for table in (page.tasks_table(), page.summary(runs), page.all_methods(runs)):
        assert table in text, "run benchmarks/time_to_target.py --budget 0"


def test_the_readme_says_and_draws_what_the_rows_say():
    import summary as page

    runs, drawn = page.load(), page.PICTURE.read_text(encoding="utf-8")
    assert page.claim(runs) in page.README.read_text(encoding="utf-8"), "run benchmarks/summary.py"
    rows = page.rows(runs)
    assert len(rows) > 10 and all(f">{text}</text>" in drawn for row in rows for text in row.words())


def test_research_is_written_from_the_rows():
    import research as page

    text = page.PAGE.read_text(encoding="utf-8")
    for table in (page.table(page.load()), page.csv_table(Path(page.__file__).with_suffix(".csv"))):
        assert table in text, "run benchmarks/research.py"


def test_robustness_is_written_from_the_rows():
    import robustness as page

    runs, text = page.load(), (page.DOCS / "robustness.md").read_text(encoding="utf-8")
    for names in page.DECISIONS.values():
        assert page.comparison(runs, names) in text, "run benchmarks/robustness.py --budget 0"


def test_an_interval_holds_what_it_is_of():
    from study_runs import Run
    from time_to_target import ratio

    mine, theirs = ([Run("digits-128", "default", 0.0, "constant", seed, seconds_to=factor * (1 + 0.1 * seed))
                     for seed in range(5)] for factor in (1.0, 2.0))  # fmt: skip
    assert ratio(mine, theirs) == "2.00 (2.00–2.00)"
    mine[3].seconds_to = float("inf")
    assert ratio(mine, theirs) == "reached / not"


def sections(name: str, how: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """What a script writes into which page from its committed rows; it measures nothing."""
    script, found = importlib.import_module(name), []

    def measured(*_: object, **__: object) -> None:
        raise AssertionError(f"{name}.csv lacks rows: run benchmarks/{name}.py")

    monkeypatch.setattr(script, "run", measured, raising=False)
    if hasattr(script, "keep_heap"):
        monkeypatch.setattr(script, "keep_heap", lambda: None)
    monkeypatch.setattr(script, "write_section", lambda _, text, path=PERFORMANCE: found.append((path, text)))
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    getattr(script, how)()
    return found


@pytest.mark.parametrize("name", ["depth", "first_steps", "lookahead", "fuzz", "faults"])
def test_a_section_is_written_from_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = sections(name, "page" if name in ("fuzz", "faults") else "main", monkeypatch)
    assert found
    for page, text in found:
        assert text.strip() in page.read_text(encoding="utf-8"), f"run benchmarks/{name}.py"


def test_pages_are_written_from_their_rows(tmp_path: Path) -> None:
    import alike
    import coverage_report
    import metrics
    import mutation
    import physics
    import step_time

    kept = json.loads((ROOT / "benchmarks/coverage.json").read_text(encoding="utf-8"))
    coverage_report.write_report(tmp_path / "coverage.md", kept)
    mutants = [mutation.Row(**{**r, "seed": int(r["seed"]), "number": int(r["number"])})
               for r in alike.read_rows(mutation.KEPT)]  # fmt: skip
    timed = json.loads(step_time.RESULTS.read_text(encoding="utf-8"))
    found = {
        "coverage.md": (tmp_path / "coverage.md").read_text(encoding="utf-8"),
        "mutation.md": mutation.page(mutants, len(mutants), mutants[0].seed),
        "physics.md": physics.table(physics.load()),
        "research.md": metrics.section(metrics.load(metrics.RAW)),
        "performance.md": physics.csv_table(alike.ROWS) + "\n" + step_time.table(timed),
    }
    for name, text in found.items():
        page = (DOCS / name).read_text(encoding="utf-8").splitlines()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) > 10 and not set(lines) - set(page), f"write {name} again"
