"""No measurement is typed in: outside of what scripts write, pages have no number with a unit, share or spread."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
WRITTEN = {"batch-norm-reading", "compile_time", "cooperation", "coverage", "errors", "mutation", "paper", "robustness"}
"""Pages that scripts write whole, held to their rows elsewhere; the words of some are in templates, which are read."""
PAGES = [
    ROOT / "README.md",
    *(path for path in sorted((ROOT / "docs").glob("*.md")) if path.stem not in WRITTEN),
    *sorted((ROOT / "benchmarks").glob("*.md.in")),
    ROOT / "examples/paper/paper.md.in",
]
UNIT = r"µs|ms|s|min|h|(?:milli)?seconds?|minutes?|hours?|days?|[KkMG]i?B|%|per ?cent|x|×|times|steps|cases|faults"
NUMBER = r"(?<![\w.,^-])\d[\d,.]*(?:e[-+]?\d+)?"
FORMS = (rf"{NUMBER}(?:\s?(?:–|to|or)\s?[\d.,]+)?\s?(?:{UNIT})(?![\w×])", rf"{NUMBER} of \d+", r"± ?\d",
         rf"\| *{NUMBER}\.\d+ *\|")  # fmt: skip
"""A number with a unit, so many of so many, a spread, a table's cell that is a decimal number."""
ALLOWED = {
    ("docs/theory.md", "16 steps"): "what (1 - m)^k is for torch's m",
    ("docs/time-to-target.md", "10 steps"): "a setting of Shampoo's",
    ("docs/time-to-target.md", "95 %"): "the level of an interval",
    ("docs/usage.md", "0.8 times"): "what lookahead=0.8 means",
    ("docs/usage.md", "0.9 times"): "what inertia=0.9 means",
    ("examples/paper/paper.md.in", "95 %"): "the level of an interval",
    ("examples/paper/paper.md.in", "80 %"): "the paper's own claim, quoted",
}
"""Definitions, each with its reason."""


def typed(text: str) -> set[str]:
    """What looks like a measurement, outside of sections that a script writes, code, formulas and links."""
    for written in (r"<!-- begin (.*?) -->.*?<!-- end \1 -->", r"^```.*?^```", r"`[^`]*`|\$[^$]*\$|\]\([^)]*\)"):
        text = re.sub(written, "``", text, flags=re.DOTALL | re.MULTILINE)
    return {found[0] for found in re.finditer("|".join(FORMS), text)}


def test_no_measurement_is_typed_in() -> None:
    found = {(str(path.relative_to(ROOT)), said) for path in PAGES for said in typed(path.read_text(encoding="utf-8"))}
    assert not found - ALLOWED.keys(), "let a script write it, or say it without the figure"
    assert not ALLOWED.keys() - found, "not said any more"


def test_what_looks_like_a_measurement() -> None:
    for said in ("takes 12.5 ms", "3 to 4 times as long", "97.4% of", "2× SGD's", "after 1,440 steps", "on 5 of 32",
                 "0.31 ± 0.02", "| sgd | 0.628 |", "1e-3 s"):  # fmt: skip
        assert typed(said), said
    for said in ("`12 ms`", "<!-- begin a -->\n12 ms\n<!-- end a -->", "torch 2.13", "Eq. 23 of it", "1×1", "lr 0.1"):
        assert not typed(said), said
