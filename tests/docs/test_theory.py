"""References to docs/theory.md resolve, its tables have every printed symbol, the glossary's files exist."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import MonteCarlo, compile_optimizer
from gtddp_compile.algebra.elimination import cooperative_gains
from gtddp_compile.runtime.program import UpdateProgram
from support.architectures import EXAMPLES

ROOT = Path(__file__).resolve().parents[2]
PLACES = ("gtddp_compile", "passes", "tests", "docs", "benchmarks", "examples")
TEXTS = {".py", ".md", ".txt", ".json", ".js"}
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "nonlinear": {"curvature": "adam", "rollout": "nonlinear", "weight_decay": 0.1},
    "columns": {"curvature": "kfac", "terminal": MonteCarlo(2), "coupling": 2, "rollout": "nonlinear"},
    "paper": {"curvature": "rmsprop", "coupling": "block", "recursion": "substituted"},
    "paper, columns": {"curvature": "sgd", "coupling": "block", "recursion": "substituted", "terminal": "ggn"},
    "printed": {"curvature": "kfac", "coupling": "block", "recursion": "printed", "cooperative": False},
    "block": {"curvature": "ekfac", "coupling": "block"},
    "recompute": {"memory": "recompute", "rollout": "nonlinear"},
    "capped": {"max_step": 1.0, "max_grad_norm": 1.0},
    "base": {"feedback": False},
}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def files() -> Iterator[Path]:
    for place in PLACES:
        yield from (path for path in sorted((ROOT / place).rglob("*")) if path.suffix in TEXTS)
    yield from (ROOT / name for name in ("README.md", "CONTRIBUTING.md"))


@cache
def anchors(document: Path) -> frozenset[str]:
    """Headings as GitHub links to them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(encoding="utf-8"), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings)


def test_references_to_the_theory_resolve() -> None:
    known, found = anchors(ROOT / "docs/theory.md"), set()
    for path in files():
        text, where = path.read_text(encoding="utf-8"), str(path.relative_to(ROOT))
        for written, section in re.findall(r"((?:docs/)?theory\.md)(#[\w-]+)?", text):
            assert not section or section[1:] in known, f"{where}: {written}{section} is no section"
            assert path.suffix == ".md" or written == "docs/theory.md", f"{where}: write docs/theory.md{section}"
            found.add(section[1:])
        if path != Path(__file__):
            assert not re.search(r"\(theory: |theory\.md (section )?\d|shared/api\.md", text), (
                f"{where}: a reference by number"
            )
    assert {"collapse", "linear-rollout", "mixing", "columns", "block", "weight-decay", "inertia"} <= found


@pytest.mark.parametrize("name", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_links_between_documents_have_their_sections(name: str) -> None:
    for target, section in re.findall(r"\]\(([\w-]*\.?m?d?)#([\w-]+)\)", read(f"docs/{name}")):
        assert section in anchors(ROOT / "docs" / (target or name)), f"{target}#{section}"


def test_the_glossary_names_files_that_exist() -> None:
    sources = {path.name for place in ("gtddp_compile", "passes") for path in (ROOT / place).rglob("*.py")}
    rows = re.findall(r"^\| (\w[\w ]*) \| (.*) \|$", read("docs/glossary.md"), re.MULTILINE)[1:]
    assert [word.lower() for word, _ in rows] == sorted(word.lower() for word, _ in rows)
    for word, text in rows:
        assert re.search(r"\[theory\]\(theory\.md#[\w-]+\), `\w+\.py`$", text), word
    named = set(re.findall(r"`(\w+\.py)`", read("docs/glossary.md") + read("docs/theory.md")))
    tests = {path.name for path in (ROOT / "tests").rglob("*.py")}
    assert len(named) > 20 and named <= sources | tests, named - sources - tests


def known_symbols() -> tuple[frozenset[str], list[str]]:
    """Those of the table of equations, and those of the table of programs."""
    equations, programs = (
        read("docs/theory.md").partition("\n## Symbols\n")[2].split("Variables of a generated program")
    )
    first = "".join(row.split(" | ")[0] for row in programs.splitlines() if row.startswith("|"))
    cells = [row.split(" | ")[0] for row in equations.splitlines() if row.startswith("|")]
    return frozenset(re.findall(r"`([^`]+)`", "".join(cells))), re.findall(r"`([^\W_]\w*)`", first)


def pattern(variables: list[str], program: UpdateProgram) -> str:
    """Of every variable that the table allows a program: ``NAME`` is one of its own operations or players."""
    names = {*program.lowered.names.values(), *(re.sub(r"\W", "_", player.name) for player in program.graph.players)}
    one = f"(?:{'|'.join(sorted(names))})"
    found = [name.replace("T", r"\d+").replace("NAME", f"{one}(?:_and_{one})*") for name in variables]
    return rf"(?:{'|'.join(found)})(?:__old|__back)?"


def general(symbol: str) -> str:
    """``V'_xr`` as ``V'_xx``, ``K_y~_v`` as ``K_x~_u``: any part of the state is ``x``, any player ``u``."""

    def subscript(found: re.Match[str]) -> str:
        return found[1] + re.sub(r"[xyzrs]\d*", "x", re.sub(r"[uvwû]\d*", "u", found[2]))

    return re.sub(r"(?<=u)\.[u.]+", ".u", re.sub(r"([_^])([xyzrsuvwû\d.]+)", subscript, symbol))


def loss(outputs: Any, targets: Tensor) -> Tensor:
    while not isinstance(outputs, Tensor):
        outputs = next(iter(outputs.values() if isinstance(outputs, dict) else outputs))
    return outputs.flatten(1).square().sum(1)


def programs() -> Iterator[UpdateProgram]:
    wanted = [(name, options) for name in ("inception_like", "siamese") for options in OPTIONS.values()]
    for name, options in (*wanted, ("attention_block", {}), ("embedding_mlp", {}), ("unet_like", OPTIONS["recompute"])):
        given = EXAMPLES[name]()
        yield compile_optimizer(given.model, given.inputs, loss=loss, **options).program
    equal = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    yield compile_optimizer(equal, torch.zeros(5, 4), loss=loss).program


def test_every_symbol_that_is_printed_is_in_the_table() -> None:
    symbols, variables = known_symbols()
    seen: set[str] = set()
    for program in programs():
        coalitions = [e for stage in program.derived.stages for e in cooperative_gains(stage.derivation)]
        equations = [*program.derivation(format="sympy"), *((e.symbol, e.expression) for e in coalitions)]
        seen |= {str(symbol) for pair in equations for side in pair for symbol in side.free_symbols}
        written = {name for one in program.lowered.instructions for name in one.written} - {"_"}
        allowed = re.compile(pattern(variables, program))
        unknown = {name for name in written if not allowed.fullmatch(name)}
        assert not unknown, f"{program!r}: not in docs/theory.md#symbols: {sorted(unknown)}"
    assert len(seen) > 60
    assert not {symbol for symbol in seen if general(symbol) not in symbols}


def test_a_symbol_that_is_not_in_the_table_is_found() -> None:
    symbols, variables = known_symbols()
    assert general("V'_xr") == general("V'_yy") == "V'_xx" and general("Q_vw.u.v") == "Q_uu.u" and "Psi" not in symbols
    program = next(programs())
    allowed, name = pattern(variables, program), next(iter(program.lowered.names.values()))
    assert re.fullmatch(allowed, f"g_{name}_at2__old")
    assert not any(re.fullmatch(allowed, other) for other in ("omega_1", f"omega_{name}", "g_elsewhere_at2"))


def test_inputs_are_marked_where_a_gain_on_them_is_printed() -> None:
    program = next(programs())
    marked = [line for line in program.derivation().splitlines() if "its change is 0" in line]
    inputs = set(program.graph.ops.inputs)
    assert marked and all(set(line.partition(" = ")[2].partition("  (")[0].split(", ")) <= inputs for line in marked)
    assert "its change is 0" not in program.derivation(len(program.graph.stages) - 1)
