"""How the Laplacian inside a model is written, what is recorded of it, and what a step costs: docs/physics.md.

    python benchmarks/derivatives.py     what derivatives.csv has not, then the table in docs/physics.md

One thread, float64, the 2-64-64-48-48-1 tanh network, 900 points.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import DOCS, Row, interleaved, keep_heap, machines, markdown, measure_missing, torch_step, write_section
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from gtddp_compile import CompileError, Geometric, Nystrom, compile_optimizer, kernels
from gtddp_compile.frontends import Untraceable, trace_derivatives, trace_export, trace_symbolically

sys.path.insert(0, str(DOCS.parent / "tests"))
from support.laplacians import WAYS, Model

POINTS, WIDTHS = 900, (64, 64, 48, 48)
PAIRS, SEEDS = 15, (0,)
RAW = Path(__file__).with_suffix(".csv")
GRAMS: dict[str, Any] = {"exact": "exact", "nystrom": Nystrom()}
RECORDED = ("also", "operations", "products", "calls", "layers")
OF = tuple(f"of_{against}{part}" for against in ("adam", "hand") for part in ("", "_low", "_high"))
TIMED = tuple(f"{gram}_{what}" for gram in GRAMS for what in ("adam_ms", "ms", *OF))
PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


def residual(way: str) -> Model:
    """``Δu`` of a network, the residual of Poisson's equation but for its right-hand side."""
    sizes = (2, *WIDTHS)
    layers = [part for before, after in pairwise(sizes) for part in (nn.Linear(before, after), nn.Tanh())]
    return Model(WAYS[way], nn.Sequential(*layers, nn.Linear(sizes[-1], 1)))


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets) ** 2


def recorded(model: Model, x: Tensor) -> tuple[object, ...]:
    """Which other front end takes it, and what the one for derivatives makes of what aten sees."""
    others = [name for name, trace in (("torch.fx", trace_symbolically), ("torch.export", trace_export))
              if takes(trace, model, x)]  # fmt: skip
    params = {name: p.detach() for name, p in model.named_parameters()}
    raw = make_fx(lambda p, v: functional_call(model, p, (v,)))(params, x.clone())
    nodes = [str(node.target) for node in raw.graph.nodes if node.op == "call_function"]
    products = sum(name in PRODUCTS for name in nodes)
    calls = trace_derivatives(model, (x,)).calls
    layers = sum(call.target in (F.linear, kernels.transposed) for call in calls)
    return ", ".join(others) or "–", len(nodes), products, len(calls), layers


def takes(trace: Callable[..., Any], model: nn.Module, x: Tensor) -> bool:
    """Whether a front end records it."""
    try:
        trace(model, (x.clone(),))
    except (Untraceable, CompileError, fx.proxy.TraceError):
        return False
    return True


def joint(name: str, gram: Any, seed: int, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """The joint step of a model with the Laplacian written so."""
    torch.manual_seed(seed)
    setting: dict[str, Any] = {"curvature": "sgd", "lr": 1e8, "max_step": 1e-4, "terminal": Geometric(aim=2.0)}
    return partial(compile_optimizer(residual(name), x, loss=squared, gram=gram, **setting).step, x, y)


def run(name: str, seed: int) -> tuple[object, ...]:
    """What is recorded; the joint step beside Adam's on the same model, and beside that of the Laplacian by hand."""
    torch.manual_seed(seed)
    model, x, y = residual(name), torch.rand(POINTS, 2), torch.rand(POINTS)
    found = recorded(model, x)
    other, times = copy.deepcopy(model), list[float]()
    adam = torch_step(other, torch.optim.Adam(other.parameters(), lr=1e-6), lambda o, t: squared(o, t).mean())
    for gram in GRAMS.values():
        time = interleaved(lambda: adam(x.clone(), y), joint(name, gram, seed, x, y), PAIRS)
        # Both from the first step on: without Γ a step costs what its system asks for.
        byhand = next(iter(WAYS))
        beside = interleaved(joint(byhand, gram, seed, x, y), joint(name, gram, seed, x, y), PAIRS)
        times += [1e3 * time.base, 1e3 * time.ours]
        times += [part for each in (time, beside) for part in (each.ratio, each.low, each.high)]
    return *found, *times


def text(rows: list[Row]) -> str:
    """The table of the rows."""
    header = ("Δu", "also recorded by", "of aten: operations, products", "tidied: calls, uses of a layer",
              "Adam ms", "joint step ms", "of Adam's (quartiles)", "of by hand's", "without Γ", "of Adam's",
              "of by hand's")  # fmt: skip
    table = []
    for row in rows:
        name = row["way"]
        said = name if name.startswith("by hand") else " of ".join(f"`{part}`" for part in name.split(" of "))
        counts = (f"{row['operations']}, {row['products']}", f"{row['calls']}, {row['layers']}")
        times = [f"{float(row['exact_adam_ms']):.0f}"]
        for gram in GRAMS:
            ms, *of = (float(row[f"{gram}_{what}"]) for what in ("ms", *OF))
            times += [f"{ms:.0f}", *("{:.1f} ({:.1f}–{:.1f})".format(*part) for part in (of[:3], of[3:]))]
        table.append((said, row["also"], *counts, *times))
    said = f"Written by `benchmarks/derivatives.py`: {machines(rows)}; processor time, in turns, medians."
    return f"{markdown(header, table)}\n\n{said}"


def main() -> None:
    """Measure what is missing; write the table."""
    keep_heap()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    rows = measure_missing(RAW, ("way", "seed"), (*RECORDED, *TIMED), product(WAYS, SEEDS), run)
    write_section("derivatives", text(rows), DOCS / "physics.md")


if __name__ == "__main__":
    main()
