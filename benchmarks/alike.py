"""What it gains that small layers of one shape are one product: a step with it and without, in turns.

Of networks of equal linear layers with tanh between them, the default optimizer.

    python benchmarks/alike.py     what alike.csv has not, then the table in docs/performance.md
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from common import Row, interleaved, keep_heap, machines, markdown, measure_missing, write_section
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from gtddp_compile.lowering import decide

RAW, KEYS = Path(__file__).with_suffix(".csv"), ("layers", "width", "batch")
VALUES = ("alone_ms", "together_ms", "ratio", "low", "high")
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


def run(*size: int) -> tuple[float, ...]:
    """Milliseconds alone and together, the ratio and its quartiles."""
    found = interleaved(step(*size, 0), step(*size, WITHOUT_BOUND), PAIRS)
    return 1e3 * found.base, 1e3 * found.ours, found.ratio, found.low, found.high


def text(rows: list[Row]) -> str:
    """The table of the rows."""
    table = []
    for row in rows:
        alone, together, ratio, low, high = (float(row[name]) for name in VALUES)
        times = (f"{alone:.2f} ms", f"{together:.2f} ms", f"{ratio:.2f} ({low:.2f}–{high:.2f})")
        table.append((*(row[name] for name in KEYS), *times, row["measured"]))
    return (
        f"Written by `benchmarks/alike.py`. {machines(rows)}; processor time, medians of {PAIRS} steps in turns,"
        f" quartiles of the ratio.\n\n{markdown((*KEYS, 'alone', 'together', 'ratio', 'measured'), table)}"
    )


def main() -> None:
    """Measure what is missing; write the table."""
    keep_heap()
    torch.set_num_threads(1)
    write_section("alike", text(measure_missing(RAW, KEYS, VALUES, SIZES, run)))


if __name__ == "__main__":
    main()
