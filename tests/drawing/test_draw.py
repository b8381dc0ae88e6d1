"""Drawings of control graphs, most of them built by hand."""

import json
import re
import runpy
import subprocess
from collections.abc import Callable
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import networkx as nx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.tools import draw
from gtddp_compile.tools.draw import layout
from gtddp_compile.tools.draw.blocks import MOST, Block, start_of, stop_of, tree
from gtddp_compile.tools.draw.mermaid import EDGES, TEXT
from gtddp_compile.tools.draw.repeats import runs
from gtddp_compile.tools.draw.style import shortened, text_width
from gtddp_compile.tools.draw.views import Views
from support.drawn import Line, control_graph, dense, hostile, residual, resnet18, tied, two_outputs

ALL = [residual, resnet18, tied, dense, two_outputs, hostile]
each = pytest.mark.parametrize("make", ALL, ids=[make.__name__ for make in ALL])
Make = Callable[[], ControlGraph]

RESIDUAL = """\
Control graph of residual (schedule asap)
stage   players: kind, parameters      live values (the cut before it)   merges
──────────────────────────────────────────────────────────────────────────────────
    0   stem: linear, 512              x 16
    1   block.fc1: linear, 2,048       relu 32
        block.project: linear, 2,048
    2   block.fc2: linear, 4,096       block.tanh 64, block.project 64   block.add
    3   head: linear, 640              block.add 64

shortcut           kind         players         region
───────────────────────────────────────────────────────
relu → block.add   parametric   block.project   regular

5 players, 4 stages, widest cut 2 values (stage 2), 1 shortcut"""

TIED = """\
Control graph of tied (schedule asap)
stage   players: kind, parameters   live values (the cut before it)   merges
────────────────────────────────────────────────────────────────────────────
    0   embed: embedding ×2, 160    tokens 5
    1   body: linear, 64            embed 5×8, params:embed ()

2 players, 2 stages, widest cut 2 values (stage 1), 0 shortcuts, 1 unused parameter: spare.weight"""


@pytest.mark.parametrize(("make", "text"), [(residual, RESIDUAL), (tied, TIED)])
def test_table(make: Make, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert str(make()) == text


@each
def test_networkx_is_plain_data(make: Make) -> None:
    graph = make().to_networkx()
    data = nx.node_link_data(graph, edges="edges")
    assert json.loads(json.dumps(data)) == data
    assert nx.is_directed_acyclic_graph(graph)


@each
def test_dot_is_accepted_by_graphviz(make: Make) -> None:
    source = make().to_dot()
    command = [layout._executable(), "-Tcanon"]
    done = subprocess.run(command, input=source, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0 and "syntax" not in done.stderr, done.stderr
    assert source.count("subgraph cluster_") == len(make().stages)
    assert source.count(" -> ") == make().to_networkx().number_of_edges()


@each
def test_mermaid(make: Make) -> None:
    text = make().to_mermaid()
    lines = text.splitlines()
    assert lines[0] == "flowchart TB"
    assert sum(line.startswith("  subgraph ") for line in lines) == len(make().stages) == lines.count("  end")
    assert len(re.findall(r"^  n\d+ (?:-->|==>|-\.->) n\d+$", text, re.M)) == make().to_networkx().number_of_edges()
    labels = re.findall(r'^ +n\d+(?:\[|\(\[)"(.*)"(?:\]|\]\))$', text, re.M)
    assert len(labels) == len(make().ops.ops)
    assert not any(set('"`') & set(label) or "<script" in label for label in labels)


SPACE = "{http://www.w3.org/2000/svg}"


def boxes(root: ElementTree.Element) -> list[tuple[float, float, float, float, list[tuple[str, float]]]]:
    """Left, top, right, bottom and texts with their sizes of every operation's box, in the viewport."""
    drawing = next(g for g in root.iter(f"{SPACE}g") if "transform" in g.attrib and len(g) > 3)
    match = re.match(r"translate\(([\d.]+) ([\d.]+)\)", drawing.attrib["transform"])
    assert match
    dx, dy = map(float, match.groups())
    found = []
    for group in drawing:
        if group.attrib.get("class", "").startswith("op "):
            rect = group.find(f"{SPACE}rect")
            assert rect is not None
            x, y, width, height = (float(rect.attrib[key]) for key in ("x", "y", "width", "height"))
            texts = [(t.text or "", float(t.attrib["font-size"])) for t in group.iter(f"{SPACE}text")]
            found.append((x + dx, y + dy, x + width + dx, y + height + dy, texts))
    return found


@each
def test_svg(make: Make) -> None:
    graph = make()
    root = ElementTree.fromstring(graph.to_svg())
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    found = boxes(root)
    assert len(found) == len(graph.ops.ops) + 1
    for left, top, right, bottom, texts in found:
        assert left >= 0 and top >= 0 and right <= width and bottom <= height
        assert all(text_width(text, size) <= right - left or size > 15 for text, size in texts)
    for a, b in combinations(found, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    shown = " ".join(text for *_, texts in found for text, _ in texts)
    if make is not hostile:
        assert all(shortened(player.name, 34) in shown for player in graph.players)
        tips = "".join(title.text or "" for title in root.iter(f"{SPACE}title"))
        assert all(f"{op.name}: {op.kind}" in tips for op in graph.ops.ops)
    assert sum(g.attrib.get("class") == "stage" for g in root.iter(f"{SPACE}g")) == len(graph.stages)
    for path in root.iter(f"{SPACE}path"):
        numbers = [float(n) for n in re.findall(r"-?\d+\.\d", path.attrib["d"])]
        assert all(-20 <= n <= max(width, height) for n in numbers)


@pytest.mark.parametrize("suffix", draw.SUFFIXES)
def test_save(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"net{suffix}"
    residual().save(path)
    assert "block.project" in path.read_text(encoding="utf-8")
    residual().save(str(tmp_path / f"upper{suffix.upper()}"))


def test_json_is_read_back_by_networkx(tmp_path: Path) -> None:
    residual().save(tmp_path / "net.json")
    data = json.loads((tmp_path / "net.json").read_text(encoding="utf-8"))
    assert nx.utils.graphs_equal(nx.node_link_graph(data, edges="edges"), residual().to_networkx())


def test_missing_engine_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layout._executable.cache_clear()
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CompileError, match="pip install graphviz-pure"):
        residual().to_svg()
    layout._executable.cache_clear()


# --- large networks ---


@cache
def deep(blocks: int, width: int = 4) -> ControlGraph:
    """Residual blocks ``blocks.I`` of two layers, with a stem and a head."""
    lines: list[Line] = [("x", "input", (width,), "", None), ("stem", "linear", (width,), "x", (width, width))]
    before = "stem"
    for index in range(blocks):
        name = f"blocks.{index}"
        lines += [
            (f"{name}.fc1", "linear", (width,), before, (width, width)),
            (f"{name}.relu", "relu", (width,), f"{name}.fc1", None),
            (f"{name}.fc2", "linear", (width,), f"{name}.relu", (width, width)),
            (f"{name}.add", "add", (width,), f"{before} {name}.fc2", None),
        ]
        before = f"{name}.add"
    lines.append(("head", "linear", (3,), before, (3, width)))
    return control_graph(lines, "deep")


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


@pytest.mark.parametrize("make", [residual, resnet18, tied, dense, two_outputs, hostile, lambda: flat(300)])
def test_blocks_are_intervals(make: Any) -> None:
    graph = make().to_networkx()
    root = tree(graph)
    checked(root)
    assert (root.start, root.stop) == (0, len(graph))


@pytest.mark.parametrize("make", [resnet18, dense, lambda: deep(50), lambda: flat(80)])
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


@each
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
