"""How the Laplacian inside a model is written, what is recorded of it, and what a step costs: docs/physics.md.

python benchmarks/derivatives.py [--pairs 15]     one thread, float64, the 2-64-64-48-48-1 tanh network, 900 points
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from common import DOCS, interleaved, keep_heap, machine, markdown, measured, torch_step, write_section
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx

from gtddp_compile import CompileError, Geometric, Nystrom, compile_optimizer, kernels
from gtddp_compile.frontends import Untraceable, trace_derivatives, trace_export, trace_symbolically

sys.path.insert(0, str(DOCS.parent / "tests"))
from support.laplacians import WAYS, Model

POINTS, WIDTHS = 900, (64, 64, 48, 48)
PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


def residual(way: str) -> Model:
    """``Δu`` of a network, the residual of Poisson's equation but for its right-hand side."""
    sizes = (2, *WIDTHS)
    layers = [part for before, after in pairwise(sizes) for part in (nn.Linear(before, after), nn.Tanh())]
    return Model(WAYS[way], nn.Sequential(*layers, nn.Linear(sizes[-1], 1)))


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets) ** 2


def recorded(model: Model, x: Tensor) -> tuple[str, ...]:
    """Which other front end takes it, and what the one for derivatives makes of what aten sees."""
    others = [name for name, trace in (("torch.fx", trace_symbolically), ("torch.export", trace_export))
              if takes(trace, model, x)]  # fmt: skip
    params = {name: p.detach() for name, p in model.named_parameters()}
    raw = make_fx(lambda p, v: functional_call(model, p, (v,)))(params, x.clone())
    nodes = [str(node.target) for node in raw.graph.nodes if node.op == "call_function"]
    products = sum(name in PRODUCTS for name in nodes)
    calls = trace_derivatives(model, (x,)).calls
    layers = sum(call.target in (F.linear, kernels.transposed) for call in calls)
    return ", ".join(others) or "–", f"{len(nodes)}, {products}", f"{len(calls)}, {layers}"


def takes(trace: Callable[..., Any], model: nn.Module, x: Tensor) -> bool:
    """Whether a front end records it."""
    try:
        trace(model, (x.clone(),))
    except (Untraceable, CompileError, fx.proxy.TraceError):
        return False
    return True


def joint(name: str, gram: Any, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """The joint step of a model with the Laplacian written so."""
    torch.manual_seed(0)
    setting: dict[str, Any] = {"curvature": "sgd", "lr": 1e8, "max_step": 1e-4, "terminal": Geometric(aim=2.0)}
    return partial(compile_optimizer(residual(name), x, loss=squared, gram=gram, **setting).step, x, y)


def row(name: str, pairs: int) -> tuple[str, ...]:
    """What is recorded, Adam's step on the same model, and the joint step, beside that of the Laplacian by hand."""
    torch.manual_seed(0)
    model, x, y = residual(name), torch.rand(POINTS, 2), torch.rand(POINTS)
    found = recorded(model, x)
    other, times = copy.deepcopy(model), []
    adam = torch_step(other, torch.optim.Adam(other.parameters(), lr=1e-6), lambda o, t: squared(o, t).mean())
    for gram in ("exact", Nystrom()):
        time = interleaved(lambda: adam(x.clone(), y), joint(name, gram, x, y), pairs)
        # Both from the first step on: without Γ a step costs what its system asks for.
        beside = interleaved(joint(next(iter(WAYS)), gram, x, y), joint(name, gram, x, y), pairs)
        times += [f"{1e3 * time.ours:.0f}", *(f"{t.ratio:.1f} ({t.low:.1f}–{t.high:.1f})" for t in (time, beside))]
    print(name, *found, *times, file=sys.stderr, flush=True)
    said = name if name.startswith("by hand") else " of ".join(f"`{part}`" for part in name.split(" of "))
    return said, *found, f"{1e3 * time.base:.0f}", *times


def main() -> None:
    """Measure and write."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--pairs", type=int, default=15)
    pairs = arguments.parse_args().pairs
    keep_heap()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    header = ("Δu", "also recorded by", "of aten: operations, products", "tidied: calls, uses of a layer",
              "Adam ms", "joint step ms", "of Adam's (quartiles)", "of by hand's", "without Γ", "of Adam's",
              "of by hand's")  # fmt: skip
    table = markdown(header, [row(name, pairs) for name in WAYS])
    said = f"Written by `benchmarks/derivatives.py`, {measured()}: {machine(1)}; processor time, in turns, medians."
    write_section("derivatives", f"{table}\n\n{said}", DOCS / "physics.md")


if __name__ == "__main__":
    main()
