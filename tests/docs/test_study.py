"""The pages of the study say what the rows of ``benchmarks/study.csv`` say."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


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
