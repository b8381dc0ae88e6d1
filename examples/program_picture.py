"""Draws ``docs/program.svg``, the README's picture of what is compiled: ``python examples/program_picture.py [path]``.

A module, its control graph, the equations of one stage, the program: every text but the headings is the compiler's own.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import wrap

import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from gtddp_compile.runtime.program import UpdateProgram
from gtddp_compile.tools.draw.style import escape
from gtddp_compile.wording import plural

PICTURE = Path(__file__).parent.parent / "docs" / "program.svg"
WIDTH, PAD, LINE, SIZE, GRAPH, ROOM = 800.0, 16.0, 15.0, 10.5, 492.0, 114
STAGE = 2
"""Shown in full: two values are in the cut before it."""

MONO = "ui-monospace, Menlo, Consolas, 'DejaVu Sans Mono', 'Liberation Mono', monospace"
SANS = "Inter, 'Segoe UI', 'Helvetica Neue', Helvetica, Arial, 'Liberation Sans', sans-serif"
INK, QUIET, ACCENT = "#1f2733", "#5c6878", "#b0348c"
SWEEPS = {"trajectory": "#4a7bd0", "loss": "#c8922a", "backward": "#35936a", "joint": "#b0348c"}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 16)
        self.inner = nn.Linear(16, 32)
        self.outer = nn.Linear(32, 16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        r = self.inner(h).tanh()
        h = h + self.outer(r)
        return self.head(h)


def program() -> UpdateProgram:
    """Of the network, in the default rollout."""
    return compile_optimizer(Net(), torch.zeros(4, 8), loss=nn.CrossEntropyLoss(), curvature="sgd").program


def text(x: float, y: float, words: str, fill: str = INK, more: str = "") -> str:
    """One line of code."""
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{fill}" xml:space="preserve"{more}>{escape(words)}</text>'


def heading(y: float, number: int, words: str, x: float = PAD) -> str:
    """What a part of the picture is."""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-family="{SANS}" font-size="13" font-weight="700" fill="{INK}">'
        f'<tspan fill="{ACCENT}">{number}</tspan>  {escape(words)}</text>'
    )


def module_and_graph(compiled: UpdateProgram) -> tuple[list[str], float]:
    """The source on the left, the control graph on the right with the stage outlined; and where they end."""
    drawn = compiled.graph.to_svg()
    width, height = map(float, re.findall(r'(?:width|height)="(\d+)"', drawn)[:2])
    scale = GRAPH / width
    x, y, (left, top) = WIDTH - PAD - GRAPH, 36.0, _place(drawn)
    found = [heading(24, 1, "an ordinary module"), heading(24, 2, 'its control graph: opt.graph.save("net.svg")', x)]
    source = [line for line in inspect.getsource(Net).splitlines() if '"""' not in line]
    found += [text(PAD, 52 + LINE * at, line) for at, line in enumerate(source)]
    inner = drawn.replace(f'width="{width:.0f}" height="{height:.0f}"', f'width="{GRAPH:.0f}"', 1)
    found.append(inner.replace("<svg ", f'<svg x="{x:.1f}" y="{y:.1f}" height="{height * scale:.1f}" ', 1).strip())
    found.append(
        f'<rect x="{x + scale * left[0]:.1f}" y="{y + scale * top[0]:.1f}" width="{scale * left[1]:.1f}" '
        f'height="{scale * top[1]:.1f}" rx="4" fill="none" stroke="{ACCENT}" stroke-width="1.8"/>'
    )
    return found, y + height * scale


def _place(drawn: str) -> tuple[tuple[float, float], tuple[float, float]]:
    """Left and width, top and height of the stage's band."""
    band = re.search(
        rf'data-stage="{STAGE}">.*?<rect x="(.*?)" y="(.*?)" width="(.*?)" height="(.*?)"', drawn, re.DOTALL
    )
    assert band is not None
    x, y, width, height = map(float, band.groups())
    return (x, width), (y, height)


def equations(compiled: UpdateProgram, y: float) -> tuple[list[str], float]:
    """The derivation of the stage, the source of every equation at the right."""
    found = [heading(y, 3, f"what is derived for stage {STAGE}: opt.program.derivation({STAGE})")]
    for line in compiled.derivation(STAGE).splitlines():
        y += LINE
        words, _, source = line.partition("   (") if " = " in line and line.endswith(")") else (line, "", "")
        found.append(text(PAD, y + 6, words.rstrip(), INK if " = " in line or "<-" in line else QUIET))
        if source:
            found.append(text(WIDTH - PAD, y + 6, f"({source}", QUIET, ' text-anchor="end"'))
    return found, y + 6


def _shown(compiled: UpdateProgram) -> Iterator[tuple[str, str, str, str]]:
    """Sweep, text, note and colour of every line; of stages that are not shown how many instructions they have."""
    weights = True
    for part in str(compiled).split("\n\n")[1:]:
        head, *lines = part.splitlines()
        sweep = head.split(",")[0]
        if f"stage {STAGE}:" not in head and not (sweep == "joint" and weights):
            yield sweep, head, plural(len(lines), "instruction"), QUIET
            continue
        weights = weights and sweep != "joint"
        yield sweep, head, "", SWEEPS[sweep]
        for line in lines:
            code, _, note = line.partition("    # ")
            *pieces, last = wrap(code.strip(), ROOM, initial_indent="  ", subsequent_indent="      ")
            yield from ((sweep, piece, "", INK) for piece in pieces)
            fits = len(last) + len(note) < ROOM
            yield sweep, last, note if fits else "", INK
            if not fits:
                yield sweep, "", note, INK


def listing(compiled: UpdateProgram, y: float) -> tuple[list[str], float]:
    """The program, a stripe of colour a sweep."""
    found = [heading(y, 4, f"the program, stage {STAGE} and the weights of all stages in full: print(opt.program)")]
    for sweep, words, note, colour in _shown(compiled):
        y += LINE
        found.append(f'<rect x="{PAD:.1f}" y="{y - 4:.1f}" width="4" height="{LINE:.1f}" fill="{SWEEPS[sweep]}"/>')
        found.append(text(PAD + 12, y + 6, words, colour))
        if note:
            found.append(text(WIDTH - PAD, y + 6, note, QUIET, ' text-anchor="end"'))
    return found, y + 6


def picture() -> str:
    """The SVG, on a ground of its own: it reads the same on light and dark pages."""
    compiled = program()
    parts, y = module_and_graph(compiled)
    for part in (equations, listing):
        more, y = part(compiled, y + 34)
        parts += more
    return "\n".join(
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH:.0f}" height="{y + 18:.0f}" '
            f'viewBox="0 0 {WIDTH:.0f} {y + 18:.0f}" font-family="{MONO}" font-size="{SIZE}" role="img" '
            'aria-label="A module, its control graph, the equations of one stage and the program">',
            f'<rect x="0.5" y="0.5" width="{WIDTH - 1:.0f}" height="{y + 17:.0f}" rx="10" fill="#ffffff" '
            'stroke="#d9dfe7"/>',
            *parts,
            "</svg>\n",
        )
    )


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else PICTURE
    target.write_text(picture(), encoding="utf-8")
    print(target)
