"""``program.diff(other)``: what one more shortcut, another option or another layer changes, and nothing else."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, UpdateProgram, compile_optimizer
from support.architectures import EXAMPLES
from support.networks import make, mlp

X = torch.randn(4, 4, dtype=torch.float64)
LAYERS: dict[str, Any] = {"first": (4, 5), "a": (5, 5), "b": (5, 5), "head": (5, 3)}


def program(model: nn.Module, inputs: Any = X, **options: Any) -> UpdateProgram:
    options = {"loss": nn.CrossEntropyLoss(), "curvature": "sgd", "lr": 0.1, **options}
    return compile_optimizer(model, inputs, **options).program


def network(*, around_a: bool = False, extra: bool = False) -> nn.Module:
    """A residual block around b; a shortcut around a or a layer between the two on demand."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        h = torch.relu(net.first(x))
        y = torch.tanh(net.a(h)) + h if around_a else torch.tanh(net.a(h))
        y = torch.relu(net.extra(y)) if extra else y
        return net.head(torch.tanh(net.b(y)) + y)

    return make(forward, **LAYERS, **({"extra": (5, 5)} if extra else {}))


def changed(diff: Any) -> set[str]:
    return {section.title.partition(" ")[0].rstrip(":") for section in diff.sections if section}


@pytest.mark.parametrize("name", ["densenet_like", "siamese", "two_inputs"])
def test_a_program_does_not_differ_from_itself(name: str) -> None:
    first, second = (program(EXAMPLES[name]().model, EXAMPLES[name]().inputs) for _ in range(2))
    diff = first.diff(second)
    assert not diff and "do not differ" in str(diff) and "do not differ" in diff.to_html()
    assert diff["instructions"].same == len(first.lowered.instructions)
    assert diff["players"].same == len(first.graph.players)


def test_one_shortcut_more() -> None:
    diff = program(network()).diff(program(network(around_a=True)))
    assert changed(diff) == {"operations", "shortcuts", "stages", "derivation", "instructions"}
    assert diff["players"].same == 4
    assert [(c.sign, c.what, c.right) for c in diff["shortcuts"].changes if c.sign == "+"] == [
        ("+", "relu → add′", "identity"),
        ("+", "add′ → add", "identity"),
    ]
    (pattern,) = diff["derivation"].hunks
    lines = {f"{line.sign} {line.text}" for line in pattern.lines}
    assert pattern.where == "stage 1" and {"- x' <- [J  F]", "+ x' <- [I+J  F]"} <= lines
    assert "+ Q_x = (I + f_x.T)*V'_x" in lines
    new = [change for change in diff["operations"].changes if change.sign == "+"]
    assert [(c.what, c.right) for c in new] == [("add′", "add(tanh, relu) 5")]


def test_a_layer_more_moves_the_others_without_changing_them() -> None:
    """Stages and variables of later layers have other numbers; only what is about the new layer is said."""
    diff = program(network()).diff(program(network(extra=True)))
    assert [(c.sign, c.what) for c in diff["players"].changes] == [("+", "extra")]
    assert [(c.sign, c.what) for c in diff["stages"].changes if c.sign == "+"] == [("+", "stage 2: extra")]
    assert {hunk.where.partition(": ")[2] for hunk in diff["instructions"].hunks} == {"b", "extra (new)"}
    assert [hunk.where for hunk in diff["derivation"].hunks] == ["stage 2, new"]


def test_options_and_their_formulas() -> None:
    inputs = mlp().batch(0)[0]
    first = program(mlp().model, inputs)
    second = program(mlp().model, inputs, curvature="rmsprop", coupling="block", recursion="printed", lr=0.2)
    diff = first.diff(second)
    rows = {c.what: (c.left, c.right) for c in diff["options"].changes}
    assert rows["coupling"] == ("'full'", "'block'") and rows["curvature"] == ("sgd", "rmsprop")
    assert rows["sgd.lr"] == ("0.1", "") and rows["rmsprop.lr"] == ("", "0.2")
    assert any(hunk.where.startswith("collapsed recursion") for hunk in diff["derivation"].hunks)
    assert not diff["players"] and not diff["operations"] and not diff["stages"]


class Checked(HTMLParser):
    """Whether elements are closed in order, and nothing is loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        assert not {name for name, _ in attributes} & {"src", "href"} and tag != "script"
        self.open += [] if tag in ("meta",) else [tag]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass


def test_page_and_text(tmp_path: Path) -> None:
    diff = program(network()).diff(program(network(around_a=True)))
    for name in ("diff.html", "diff.txt"):
        diff.save(tmp_path / name)
    page, text = ((tmp_path / name).read_text() for name in ("diff.html", "diff.txt"))
    parser = Checked()
    parser.feed(page)
    assert not parser.open and "default-src 'none'" in page
    lines = [line for section in diff.sections for hunk in section.hunks for line in hunk.lines]
    assert page.count('<div class="gone">') == sum(line.sign == "-" for line in lines) > 5
    assert all(f"{line.sign} {line.text}" in text for line in lines)
    assert not re.search(r"\x1b\[", text)
    with pytest.raises(CompileError, match=r"not written as '.pdf'. Use one of .html, .txt"):
        diff.save(tmp_path / "diff.pdf")


def test_programs_from_files(tmp_path: Path) -> None:
    """A stored program is compared like the one it came from."""
    first, second = program(network()), program(network(around_a=True))
    for name, one in (("first", first), ("second", second)):
        one.export(tmp_path / f"{name}.json")
    loaded = [UpdateProgram.load(tmp_path / f"{name}.json") for name in ("first", "second")]
    assert str(loaded[0].diff(loaded[1])) == str(first.diff(second))
    assert not loaded[0].diff(first)
