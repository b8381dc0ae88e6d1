"""Large networks drawn: what is folded, what the page holds, and that every form stays within its limits."""

from __future__ import annotations

import json
import re
import runpy
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtddp_compile.graph import ControlGraph, Shortcut
from gtddp_compile.tools.draw import layout
from gtddp_compile.tools.draw.blocks import MOST, Block, start_of, stop_of, tree
from gtddp_compile.tools.draw.mermaid import EDGES, TEXT
from gtddp_compile.tools.draw.repeats import Run, runs
from gtddp_compile.tools.draw.views import Views
from support.drawn import Line, control_graph, dense, hostile, residual, resnet18, tied, two_outputs, unet

SPACE = "{http://www.w3.org/2000/svg}"


@cache
def deep(blocks: int, width: int = 4) -> ControlGraph:
    """Residual blocks ``blocks.I`` of two layers, with a stem and a head."""
    lines: list[Line] = [("x", "input", (width,), "", None), ("stem", "linear", (width,), "x", (width, width))]
    shortcuts = []
    before = "stem"
    for index in range(blocks):
        name = f"blocks.{index}"
        lines += [
            (f"{name}.fc1", "linear", (width,), before, (width, width)),
            (f"{name}.relu", "relu", (width,), f"{name}.fc1", None),
            (f"{name}.fc2", "linear", (width,), f"{name}.relu", (width, width)),
            (f"{name}.add", "add", (width,), f"{before} {name}.fc2", None),
        ]
        shortcuts.append(Shortcut(before, f"{name}.add", "identity"))
        before = f"{name}.add"
    lines.append(("head", "linear", (3,), before, (3, width)))
    return control_graph(lines, tuple(shortcuts), "deep")


def flat(layers: int) -> ControlGraph:
    """A sequence without modules around its layers: only its structure repeats."""
    lines: list[Line] = [("x", "input", (4,), "", None)]
    for index in range(layers):
        lines.append((f"{2 * index}", "linear", (4,), f"{2 * index - 1}" if index else "x", (4, 4)))
        lines.append((f"{2 * index + 1}", "relu", (4,), f"{2 * index}", None))
    return control_graph(lines, name="flat")


def page(graph: ControlGraph, notes: dict[int, str] | None = None) -> tuple[str, dict[str, Any]]:
    text = graph.to_html(notes)
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert found
    return text, json.loads(found[1])


def said(data: dict[str, Any], numbers: list[int]) -> str:
    return "\n".join(data["lines"][number] for number in numbers)


# --- repeats and blocks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sequence", "found"),
    [
        ("", []),
        ("abcdefg", []),
        ("aab", []),
        ("xaaaay", [Run(1, 1, 4)]),
        ("sabababt", [Run(1, 2, 3)]),
        ("abcabcabcaaaa", [Run(0, 3, 3), Run(9, 1, 4)]),
    ],
)
def test_runs(sequence: str, found: list[Run]) -> None:
    assert runs(sequence) == found


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=60))
def test_runs_are_periodic_and_apart(sequence: list[int]) -> None:
    end = 0
    for run in runs(sequence):
        assert run.start >= end and run.count >= 3
        end = run.stop
        assert sequence[run.start : run.stop] == sequence[run.start : run.start + run.period] * run.count


def checked(block: Block) -> None:
    """Children fill their block's interval in order, and are few."""
    at = block.start
    for child in block.children:
        assert start_of(child) == at
        at = stop_of(child)
        if isinstance(child, Block):
            checked(child)
    assert at == block.stop and len(block.children) <= MOST


@pytest.mark.parametrize("make", [residual, resnet18, unet, tied, dense, two_outputs, hostile, lambda: flat(300)])
def test_blocks_are_intervals(make: Any) -> None:
    graph = make().to_networkx()
    root = tree(graph)
    checked(root)
    assert (root.start, root.stop) == (0, len(graph))


def test_repeated_modules_are_counted() -> None:
    root = tree(deep(100).to_networkx())
    checked(root)
    blocks = next(child for child in root.children if isinstance(child, Block))
    assert blocks.path == "blocks" and blocks.repeats == 100
    inner = next(block for block in root.blocks() if block.path == "blocks.7")
    assert len(inner.children) == 4 and inner.stop - inner.start == 4


def test_structure_repeats_without_modules() -> None:
    root = tree(flat(100).to_networkx())
    checked(root)
    pair = next(block for block in root.blocks() if block.stop - block.start == 2)
    assert pair.title.count(" – ") == 1
    assert sum(block.stop - block.start == 2 for block in root.blocks()) == 100


# --- folded views -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [resnet18, unet, dense, lambda: deep(50), lambda: flat(80)])
@pytest.mark.parametrize("boxes", [1, 12, 40])
def test_views_are_acyclic_and_stages_run_down(make: Any, boxes: int) -> None:
    whole = make().to_networkx()
    view = Views(whole).folded(boxes)
    assert nx.is_directed_acyclic_graph(view)
    assert all(view.nodes[a]["stage"] <= view.nodes[b]["stage"] for a, b in view.edges())
    inside = sum(data.get("block", {"operations": 1})["operations"] for _, data in view.nodes(data=True))
    assert inside == len(whole)
    players = sum(data.get("block", {"players": bool(data["player"])})["players"] for _, data in view.nodes(data=True))
    assert players == len(whole.graph["players"])
    stages = view.graph["stages"]
    spans = [(stage.get("first", stage["index"]), stage.get("last", stage["index"])) for stage in stages]
    covered = [at for first, last in spans for at in range(first, last + 1)]
    assert covered == sorted(set(covered)) and len(covered) <= len(whole.graph["stages"])


def test_the_first_of_equal_blocks_is_shown_and_the_rest_is_one() -> None:
    view = Views(deep(200).to_networkx()).folded(20)
    assert "blocks.0.fc1" in view and "blocks.1.fc1" not in view
    rest = view.nodes["blocks.1 – blocks.199"]["block"]
    assert (rest["repeats"], rest["players"], rest["stages"]) == (199, 398, (3, 400))


# --- still pictures ---------------------------------------------------------------------------------------------------


def test_svg_of_a_thousand_blocks_is_small() -> None:
    text = deep(1000).to_svg()
    root = ElementTree.fromstring(text)
    assert len(text) < 60_000
    shown = " ".join(found.text or "" for found in root.iter(f"{SPACE}text"))
    assert "blocks.1 – blocks.999" in shown and "stages 3–2000" in shown and "blocks.0.fc1" in shown


def test_svg_boxes_is_a_limit() -> None:
    graph = resnet18()
    counts = [graph.to_svg(boxes).count('class="op ') for boxes in (15, 30, 100)]
    assert counts[0] <= 16 < counts[1] <= 31 < counts[2] == len(graph.ops.ops) + 1


def test_mermaid_stays_within_its_limits() -> None:
    for graph in (deep(1000), flat(500), dense()):
        text = graph.to_mermaid()
        assert len(text) <= TEXT and len(re.findall(r"(?:-->|==>|-\.->)", text)) <= EDGES
    assert "999 alike" in deep(1000).to_mermaid()


def test_table_of_a_thousand_blocks_is_read_at_a_glance() -> None:
    lines = str(deep(1000)).splitlines()
    assert len(lines) < 25 and max(map(len, lines)) <= 112
    assert any("3–2000" in line and "as stages 1–2, 999 times" in line for line in lines)
    assert any("998 more alike, the last blocks.998.add → blocks.999.add" in line for line in lines)
    assert lines[-1] == "2002 players, 2002 stages, widest cut 2 values (stage 2), 1000 shortcuts"


def test_notebook_of_a_large_network() -> None:
    assert len(deep(1000)._repr_html_()) < 60_000


def test_the_picture_in_the_docs_is_what_the_script_makes(tmp_path: Path) -> None:
    """Names and stages, not places: another release of the layout engine may move a line."""
    script = Path(__file__).parents[2] / "examples" / "pictures.py"
    runpy.run_path(str(script))["main"](str(tmp_path / "made.svg"))
    made, committed = (
        [found.text for found in ElementTree.parse(path).iter(f"{SPACE}text")]
        for path in (tmp_path / "made.svg", script.parent.parent / "docs" / "transformer.svg")
    )
    assert made == committed and "blocks.1 – blocks.23" in made, "run python examples/pictures.py"


# --- the page ---------------------------------------------------------------------------------------------------------

ALL = [residual, resnet18, unet, tied, dense, two_outputs, hostile]


@pytest.mark.parametrize("make", ALL, ids=[make.__name__ for make in ALL])
def test_page_is_self_contained(make: Any) -> None:
    text, data = page(make(), {0: "k = -M⁻¹ Q_u </script><script>alert(1)</script>"})
    assert not re.search(r"""(?:src|href|url|@import)\s*[=(]\s*["']?\s*(?:https?:)?//""", text)
    assert text.count("<svg ") == 1 and text.count("</script>") == 2 and "<script>alert" not in text
    assert "default-src 'none'" in text
    assert said(data, data["stages"][0]["note"]).startswith("k = -M⁻¹ Q_u </script>")


@pytest.mark.parametrize("make", [*ALL, lambda: deep(60), lambda: flat(70)])
def test_page_holds_everything(make: Any) -> None:
    graph = make()
    data = page(graph)[1]
    assert [name for name, *_ in data["ops"]] == [op.name for op in graph.ops.ops]
    kids = [kid for block in data["blocks"] for kid in block["kids"] if kid is not None]
    assert sorted(kid for kid in kids if kid >= 0) == list(range(len(graph.ops.ops)))
    assert sorted(-1 - kid for kid in kids if kid < 0) == list(range(1, len(data["blocks"])))
    for op, (_, words, stage, block) in zip(graph.ops.ops, data["ops"], strict=True):
        assert said(data, words).startswith(f"{op.name}: {op.kind}") or make is hostile
        assert stage == graph.stage_of[op.name]
        assert data["ops"].index([op.name, words, stage, block]) in data["blocks"][block]["kids"]
    for stage, found in zip(graph.stages, data["stages"], strict=True):
        assert [data["lines"][number] for number in found["names"]] == list(stage.live) or make is hostile


@pytest.mark.parametrize("make", [*ALL, lambda: deep(60)])
def test_page_layouts_do_not_overlap(make: Any) -> None:
    data = page(make())[1]
    for found in data["layouts"]:
        width, height = found["size"]
        boxes = [(x - w / 2, y - h / 2, x + w / 2, y + h / 2) for x, y, w, h, *_ in found["nodes"]]
        for index, (left, top, right, bottom) in enumerate(boxes):
            assert left >= -1 and right <= width + 1 and top >= -1 and bottom <= height + 1
            for other in boxes[:index]:
                apart = right <= other[0] + 1 or other[2] <= left + 1 or bottom <= other[1] + 1 or other[3] <= top + 1
                assert apart, found
        for source, target, _, _, points, crosses, _ in found["lines"]:
            assert max(source, target) < len(found["nodes"]) + len(found["joints"])
            assert len(points) % 2 == 0 and len(points) >= 10 and all(at < len(found["bands"]) for at in crosses)


def test_a_thousand_blocks_are_few_layouts_and_one_run(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    run = layout._run
    monkeypatch.setattr(layout, "_run", lambda source: calls.append(source) or run(source))
    text, data = page(deep(1000), dict.fromkeys(range(2002), "the same\nderivation"))
    assert len(calls) == 1 and len(data["blocks"]) > 1000
    assert len(data["layouts"]) < 60 and len(text) < 2_000_000
    assert data["open"] == [0] and len(data["blocks"][0]["kids"]) < 10
    assert data["lines"].count("derivation") == 1


def test_a_small_network_opens_whole() -> None:
    data = page(residual())[1]
    assert data["open"] == list(range(len(data["blocks"])))
