"""Pages and sections that scripts of ``benchmarks`` write are what the committed rows give, and nothing beside it."""

import importlib
import json
import sys
from pathlib import Path

import matplotlib
import pytest

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@pytest.fixture(scope="module", autouse=True)
def _benchmarks():
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield
    sys.path.remove(str(ROOT / "benchmarks"))


def holds(page: Path, text: str) -> bool:
    """Whether a text is the whole page, or all that stands between two markers."""
    found = page.read_text(encoding="utf-8")
    return found.strip() == text.strip() if text.startswith("# ") else f"-->\n{text.strip()}\n<!-- end " in found


def test_time_to_target_is_written_from_the_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    import time_to_target as page

    found: list[str] = []
    monkeypatch.setattr(page, "write_section", lambda _, text, path: found.append(text))
    monkeypatch.setattr(page, "draw", lambda runs, path: None)
    page.write_page(page.load())
    assert len(found) == 4
    assert all(holds(page.PAGE, text) for text in found), "run benchmarks/time_to_target.py --budget 0"


def test_the_readme_and_the_first_page_say_what_the_rows_say(monkeypatch: pytest.MonkeyPatch) -> None:
    import summary as page

    found: list[tuple[Path, str]] = []
    monkeypatch.setattr(page, "write_section", lambda _, text, path: found.append((path, text)))
    page.write(page.load())
    assert [path for path, _ in found] == [page.README, page.README, page.INDEX]
    assert all(holds(*one) for one in found), "run benchmarks/summary.py"


def test_research_is_written_from_the_rows():
    import research as page

    for table in (page.table(page.load()), page.csv_table(Path(page.__file__).with_suffix(".csv"))):
        assert holds(page.PAGE, table), "run benchmarks/research.py"


def test_robustness_is_written_from_the_rows():
    import robustness as page

    assert holds(page.PAGE, page.page(page.load())), "run benchmarks/robustness.py --budget 0"


def test_an_interval_holds_what_it_is_of():
    from study_runs import Run
    from time_to_target import ratio, verdict

    mine, theirs = ([Run("digits-128", "default", 0.0, "constant", seed, seconds_to=factor * (1 + 0.1 * seed))
                     for seed in range(5)] for factor in (1.0, 2.0))  # fmt: skip
    assert ratio(mine, theirs) == "2.00 (2.00–2.00)"
    assert verdict(mine, theirs) == "ahead" and verdict(theirs, mine) == "behind"
    assert ratio(mine, theirs[:1]) == "2.00 (one seed)" and verdict(mine, theirs[:1]) == "one"
    theirs[0].seconds_to = 0.3  # slower in most seeds, by far sooner in one
    assert verdict(mine, theirs) == verdict(theirs, mine) == "level"
    mine[3].seconds_to = float("inf")
    assert ratio(mine, theirs) == "rival in 5 of 5, ours in 4 of 5" and verdict(mine, theirs) == "behind"
    assert ratio(mine, theirs[1:2]) == "2.00 (one seed; ours in 4 of 5)" and verdict(mine, theirs[1:2]) == "behind"
    assert verdict(theirs, mine) == "ahead"


WRITTEN = {
    "alike": "performance", "batch_norm_reading": "batch-norm-reading", "compile_time": "compile_time",
    "cooperation": "cooperation", "coupling": "research", "depth": "research", "derivatives": "physics",
    "first_steps": "research", "floors": "research", "gram_fidelity": "performance", "likelihoods": "research",
    "lookahead": "research", "scaling": "scaling", "schedules": "training", "shards": "several-processes",
}  # fmt: skip
"""A script that keeps its rows beside it, and its page."""


@pytest.mark.parametrize("name", WRITTEN)
def test_a_page_is_written_from_the_rows_beside_the_script(name: str) -> None:
    from common import read_rows

    script, page = importlib.import_module(name), DOCS / f"{WRITTEN[name]}.md"
    rows = read_rows(script.RAW)
    assert len(rows) > 5 and all(row["measured"] and row["machine"] for row in rows)
    assert holds(page, script.text(rows)), f"run benchmarks/{name}.py"


def test_pictures_are_drawn_from_the_rows(tmp_path: Path) -> None:
    import scaling
    import summary
    import time_to_target
    from common import read_rows

    with matplotlib.rc_context():
        matplotlib.rcdefaults()  # another test may have drawn in a style of its own
        scaling.plot(scaling.load(read_rows(scaling.RAW)), tmp_path / "scaling.svg")
        time_to_target.draw(time_to_target.load(), tmp_path / "time-to-target.svg")
        summary.draw(summary.rows(summary.load()), tmp_path / "gain.svg")
    for path in tmp_path.glob("*.svg"):
        assert path.read_text("utf-8") == (DOCS / path.name).read_text("utf-8"), f"draw {path.name} again"


@pytest.mark.parametrize("name", ["fuzz", "faults"])
def test_a_section_counts_the_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    script, found = importlib.import_module(name), []
    monkeypatch.setattr(script, "write_section", lambda _, text, path: found.append(text))
    script.page()
    assert len(found) == 1 and holds(DOCS / "trust.md", found[0])


def test_pages_are_written_from_their_rows(tmp_path: Path) -> None:
    import coverage_report
    import metrics
    import mutation
    import physics
    import ranks
    import step_time

    kept = json.loads((ROOT / "benchmarks/coverage.json").read_text(encoding="utf-8"))
    coverage_report.write_report(tmp_path / "coverage.md", kept)
    mutants = [mutation.Row(**{**r, "seed": int(r["seed"]), "number": int(r["number"])})
               for r in mutation.read_rows(mutation.KEPT)]  # fmt: skip
    timed = json.loads(step_time.RESULTS.read_text(encoding="utf-8"))
    found = [
        ("coverage", (tmp_path / "coverage.md").read_text(encoding="utf-8")),
        ("mutation", mutation.page(mutants, len(mutants), mutants[0].seed)),
        ("physics", physics.table(physics.load())),
        ("physics", physics.csv_table(physics.TRIED)),
        ("research", metrics.section(metrics.load(metrics.RAW))),
        ("performance", step_time.text(timed)),
        ("scaling", ranks.text()),
    ]
    assert holds(DOCS / "index.md", step_time.price(timed))
    for name, text in found:
        assert len(text) > 1000 and holds(DOCS / f"{name}.md", text), f"write {name}"
