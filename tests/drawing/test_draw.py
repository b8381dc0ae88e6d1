"""Drawings of control graphs that are built by hand: the passes are not needed."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from xml.etree import ElementTree

import networkx as nx
import pytest

from gtddp_compile.errors import CompileError
from gtddp_compile.graph import ControlGraph
from gtddp_compile.tools import draw
from gtddp_compile.tools.draw import layout
from gtddp_compile.tools.draw.layout import Box, Link, Request, layered
from gtddp_compile.tools.draw.style import shortened, text_width
from support.drawn import Line, control_graph, dense, hostile, residual, resnet18, tied, two_outputs, unet

ALL = [residual, resnet18, unet, tied, dense, two_outputs, hostile]
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
def test_table_names_everything_within_its_width(make: Make) -> None:
    graph = make()
    text = str(graph)
    assert max(map(len, text.splitlines())) <= 110 or make is tied
    joined = "".join(text.split())
    if make is not hostile:
        assert all(player.name in joined for player in graph.players)
    assert "\x1b" not in text


def test_networkx() -> None:
    graph = residual().to_networkx()
    assert graph.nodes["block.project"] == {
        "kind": "linear",
        "module": "block.project",
        "source": "net.py:7",
        "shape": [32, 64],
        "stage": 1,
        "player": "block.project",
        "coalition": ["block.fc1", "block.project"],
        "parameters": ["block.project.weight"],
        "merge": False,
        "input": False,
        "output": False,
        "live": {"born": 1, "dies": 2, "readers": [2], "fixed": False},
    }
    assert graph.nodes["block.add"]["merge"] and graph.nodes["x"]["stage"] == -1 and graph.nodes["head"]["output"]
    assert graph.edges["block.project", "block.add", 0] == {
        "crosses": [2],
        "shortcut": "parametric",
        "control": None,
    }
    assert graph.edges["block.fc2", "block.add", 0]["shortcut"] is None
    assert graph.edges["relu", "block.project", 0]["shortcut"] == "parametric"
    assert graph.graph["stages"][2]["live"] == ["block.tanh", "block.project"]
    assert graph.graph["players"][0]["parameters"] == [["stem.weight", [32, 16]]]
    waiting = resnet18().to_networkx().edges["maxpool", "layer1.0.add", 0]
    assert waiting == {"crosses": [2, 3, 4, 5], "shortcut": "identity", "control": None}
    assert tied().to_networkx().edges["embed", "head", 0] == {
        "crosses": [1],
        "shortcut": None,
        "control": "embed",
    }


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


@each
def test_svg_draws_bands_in_order_and_boxes_in_their_band(make: Make) -> None:
    graph = make()
    root = ElementTree.fromstring(graph.to_svg())
    bands = {}
    for group in root.iter(f"{SPACE}g"):
        rect = group.find(f"{SPACE}rect")
        if group.attrib.get("class") == "stage" and rect is not None:
            top = float(rect.attrib["y"])
            bands[int(group.attrib["data-stage"])] = (top, top + float(rect.attrib["height"]))
    for (_, bottom), (top, _) in pairwise(bands.values()):
        assert abs(bottom - top) <= 0.11
    for op, (_, top, _, bottom, _) in zip(graph.ops.ops, boxes(root), strict=False):
        stage = graph.stage_of[op.name]
        if stage >= 0:
            assert bands[stage][0] < top and bottom < bands[stage][1]


def test_svg_is_the_same_every_time() -> None:
    assert unet().to_svg() == unet().to_svg()


def test_svg_of_a_long_network() -> None:
    lines: list[Line] = [("x", "input", (4,), "", None)]
    lines += [(f"fc{i}", "linear", (4,), f"fc{i - 1}" if i else "x", (4, 4)) for i in range(300)]
    assert len(boxes(ElementTree.fromstring(control_graph(lines).to_svg(boxes=400)))) == 302


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


def test_save_names_the_choices(tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"'\.png'.*\.svg, \.html"):
        residual().save(tmp_path / "net.png")
    assert not list(tmp_path.iterdir())


def test_missing_engine_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    layout._executable.cache_clear()
    monkeypatch.setattr("importlib.metadata.files", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(CompileError, match="pip install graphviz-pure"):
        residual().to_svg()
    layout._executable.cache_clear()


def test_layout_places_rows_downwards() -> None:
    sizes = {name: Box(0, 0, 50, 20) for name in "abc"}
    request = Request(sizes, [["a"], [], ["b", "c"]], [Link("a", "b"), Link("a", "c", 3)])
    found, again = layered([request, request])
    assert found == again
    assert found.boxes["a"].y < found.rows[1] < found.boxes["b"].y == found.boxes["c"].y
    assert len(found.routes) == 2 and all(len(route) % 3 == 2 for route in found.routes)


def test_notebook() -> None:
    assert "<svg " in residual()._repr_html_()
