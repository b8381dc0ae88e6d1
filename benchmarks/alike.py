"""What it gains that small layers of one shape are one product: a step with it and without, in turns.

Of networks of equal linear layers with tanh between them, the default optimizer.

    python benchmarks/alike.py            measures, and prints the table
    python benchmarks/alike.py --write    and writes it into docs/performance.md, its rows into alike.csv
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import interleaved, keep_heap, machine, markdown, measured, read_rows, write_rows, write_section
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from gtddp_compile.lowering import decide

ROWS = Path(__file__).with_suffix(".csv")
HEADER = ("layers", "width", "batch", "alone", "together", "ratio", "measured")
SIZES = ((2, 48, 64), (4, 48, 64), (12, 48, 64), (40, 48, 64), (4, 16, 8), (12, 16, 8), (12, 64, 128), (4, 128, 64),
         (12, 128, 64), (12, 128, 128), (4, 256, 64), (12, 256, 64), (12, 256, 128), (12, 512, 64), (12, 512, 128),
         (4, 1024, 128))  # fmt: skip
"""Layers, width, and samples a batch."""
PAIRS, WITHOUT_BOUND = 60, 2**40


def step(layers: int, width: int, batch: int, together: int) -> Callable[[], Tensor]:
    """A step of a network, with layers of up to so many multiplications computed together."""
    torch.manual_seed(0)
    parts: list[nn.Module] = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.Tanh())]
    x, y = torch.randn(batch, width), torch.randint(width, (batch,))
    bound, decide.TOGETHER = decide.TOGETHER, together
    opt = compile_optimizer(nn.Sequential(*parts), x, loss=nn.CrossEntropyLoss())
    decide.TOGETHER = bound
    for _ in range(12):
        opt.step(x, y)
    return lambda: opt.step(x, y)


def row(size: tuple[int, int, int]) -> tuple[Any, ...]:
    """One line of the table."""
    found = interleaved(step(*size, 0), step(*size, WITHOUT_BOUND), PAIRS)
    ratio = f"{found.ratio:.2f} ({found.low:.2f}–{found.high:.2f})"
    return (*size, f"{1e3 * found.base:.2f} ms", f"{1e3 * found.ours:.2f} ms", ratio, measured())


def text() -> str:
    """The table from the rows."""
    rows = [[each[name] for name in HEADER] for each in read_rows(ROWS)]
    return (
        f"Written by `benchmarks/alike.py --write`. {machine(1)}; processor time, medians of {PAIRS} steps in turns,"
        " quartiles of the ratio.\n\n" + markdown(HEADER, rows)
    )


def main() -> None:
    """Measure, print, and with ``--write`` put the table into the document."""
    keep_heap()
    torch.set_num_threads(1)
    rows = [row(size) for size in SIZES]
    print(markdown(HEADER, [[str(part) for part in each] for each in rows]))
    if "--write" in sys.argv[1:]:
        write_rows(ROWS, HEADER, rows)
        write_section("alike", text())


if __name__ == "__main__":
    main()
