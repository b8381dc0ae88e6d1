"""How the Laplacian inside a model is written, what is recorded of it, and what a step costs: docs/physics.md.

python benchmarks/derivatives.py [--pairs 15]     one thread, float64, the 2-64-64-48-48-1 tanh network, 900 points
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from common import DOCS, interleaved, keep_heap, machine, markdown, measured, torch_step, write_section
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx

from gtddp_compile import CompileError, Geometric, Nystrom, compile_optimizer, kernels, pde
from gtddp_compile.frontends import Untraceable, trace_derivatives, trace_export, trace_symbolically

POINTS, WIDTHS = 900, (64, 64, 48, 48)
PRODUCTS = {"aten.mm.default", "aten.addmm.default", "aten.bmm.default"}


class Residual(nn.Module):
    """``Δu`` of a network, the residual of Poisson's equation but for its right-hand side."""

    def __init__(self, way: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        size = 2
        for width in WIDTHS:
            layers += [nn.Linear(size, width), nn.Tanh()]
            size = width
        self.net = nn.Sequential(*layers, nn.Linear(size, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        return self.way(self.net, x)


def by_hand(net: Any, x: Tensor) -> Tensor:
    """Value, first derivatives and Laplacian as four rows of one tensor, layer by layer."""
    z = torch.cat([x[:, None], torch.eye(2, dtype=x.dtype).expand(len(x), 2, 2), torch.zeros_like(x)[:, None]], 1)
    for layer in net:
        if isinstance(layer, nn.Linear):
            z = F.linear(z, layer.weight)
            z = torch.cat([z[:, :1] + layer.bias, z[:, 1:]], 1)
        else:
            y, first = torch.tanh(z[:, :1]), z[:, 1:-1]
            slope = 1 - y * y
            bend = slope * z[:, -1:] - 2 * y * slope * (first * first).sum(1, keepdim=True)
            z = torch.cat([y, slope * first, bend], 1)
    return z[:, -1, 0]


def forward_twice(net: nn.Module, x: Tensor) -> Tensor:
    """One direction after the other."""
    found = torch.zeros_like(x[:, 0])
    for axis in range(2):
        e = torch.zeros_like(x)
        e[:, axis] = 1
        found = found + jvp(lambda y, e=e: jvp(net, (y,), (e,))[1], (x,), (e,))[1][:, 0]  # type: ignore[misc]
    return found


def by_autograd(net: nn.Module, x: Tensor) -> Tensor:
    """As most physics-informed code has it."""
    x = x.requires_grad_(True)
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return sum(torch.autograd.grad(g[:, d].sum(), x, create_graph=True)[0][:, d] for d in range(2))  # type: ignore[return-value]


def mapped(transform: Callable[..., Any]) -> Callable[[nn.Module, Tensor], Tensor]:
    """The trace of a second derivative of ``u`` at every point."""
    return lambda net, x: vmap(lambda p: transform(lambda q: net(q)[0])(p).trace())(x)  # type: ignore[no-any-return]


WAYS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "by hand, stacked": by_hand,
    "`pde.laplacian`": lambda net, x: pde.laplacian(net)(x)[:, 0],
    "`pde.hessian_diagonal`": lambda net, x: pde.hessian_diagonal(net)(x)[:, 0].sum(-1),
    "`vmap(hessian)`": mapped(hessian),
    "`vmap(jacfwd(grad))`": mapped(lambda f: jacfwd(grad(f))),
    "`vmap(jacrev(grad))`": mapped(lambda f: jacrev(grad(f))),
    "`vmap(jacfwd(jacfwd))`": mapped(lambda f: jacfwd(jacfwd(f))),
    "`jvp` of `jvp`": forward_twice,
    "`torch.autograd.grad`": by_autograd,
}


def squared(outputs: Tensor, targets: Tensor) -> Tensor:
    return 0.5 * (outputs - targets) ** 2


def recorded(model: Residual, x: Tensor) -> tuple[str, ...]:
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


def row(name: str, pairs: int) -> tuple[str, ...]:
    """What is recorded, Adam's step on the same model, and the joint step."""
    torch.manual_seed(0)
    model, x, y = Residual(WAYS[name]).double(), torch.rand(POINTS, 2).double(), torch.rand(POINTS).double()
    found = recorded(model, x)
    other = copy.deepcopy(model)
    adam = torch_step(other, torch.optim.Adam(other.parameters(), lr=1e-6), lambda o, t: squared(o, t).mean())
    setting: dict[str, Any] = {"curvature": "sgd", "lr": 1e8, "max_step": 1e-4, "terminal": Geometric(aim=2.0)}
    times = []
    for gram in ("exact", Nystrom()):
        opt = compile_optimizer(copy.deepcopy(model), x, loss=squared, gram=gram, **setting)
        time = interleaved(lambda: adam(x.clone(), y), partial(opt.step, x, y), pairs)
        times += [f"{1e3 * time.ours:.0f}", f"{time.ratio:.1f} ({time.low:.1f}–{time.high:.1f})"]
    print(name, *found, *times, file=sys.stderr, flush=True)
    return name, *found, f"{1e3 * time.base:.0f}", *times


def main() -> None:
    """Measure and write."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--pairs", type=int, default=15)
    pairs = arguments.parse_args().pairs
    keep_heap()
    torch.set_num_threads(1)
    header = ("Δu", "also recorded by", "of aten: operations, products", "tidied: calls, uses of a layer",
              "Adam ms", "joint step ms", "ratio (quartiles)", "without Γ", "ratio")  # fmt: skip
    table = markdown(header, [row(name, pairs) for name in WAYS])
    said = f"Written by `benchmarks/derivatives.py`, {measured()}: {machine(1)}; processor time, in turns, medians."
    write_section("derivatives", f"{table}\n\n{said}", DOCS / "physics.md")


if __name__ == "__main__":
    main()
