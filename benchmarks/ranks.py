"""What a step over several ranks sends, on paper, against DistributedDataParallel's all-reduce of gradients.

The formulas are those of ``gtddp_compile.lowering.traffic``, which tests hold against the bytes that gloo processes
count; large networks are given by the shapes of their layers, since nothing but shapes is read. A small network is
compiled first, and both ways have to agree on it.

    python benchmarks/ranks.py     checks, and writes the tables into docs/scaling.md
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from common import DOCS, markdown, write_section
from torch import nn

from gtddp_compile.lowering.costs import LayerShape
from gtddp_compile.lowering.traffic import Sent, buckets, traffic
from gtddp_compile.methods.curvature import Curvature, resolve
from gtddp_compile.methods.losses import split
from gtddp_compile.methods.setting import Setting
from gtddp_compile.options import Options, suggested
from gtddp_compile.runtime.compiler import build_graph, build_program

RANKS = (8, 64, 256, 1000)
LATENCY, BANDWIDTH, WIDTH, BUCKET = 5e-6, 25e9, 4, 25 * 2**20
"""Seconds from rank to rank, bytes a second out of a rank, bytes of a float32, DistributedDataParallel's bucket."""
EVERY = 10
"""``stat_every`` of the Kronecker-factored methods."""
MODES = (("foof", "local"), ("adam", "local"), ("kfac", "local"), ("foof", "full"), ("kfac", "full"))


@dataclass(frozen=True)
class Part:
    """A layer: of ``inputs`` at ``pixels`` with a kernel of so many elements, to ``outputs`` at ``positions``."""

    kind: str
    inputs: int
    outputs: int
    pixels: int = 1
    positions: int = 1
    kernel: int = 1
    bias: bool = True

    @property
    def parameters(self) -> int:
        """Weight and bias."""
        return 2 * self.outputs if self.kind == "norm" else self.outputs * (self.inputs * self.kernel + self.bias)

    def shape(self, batch: int) -> LayerShape:
        """As the cost model sees it."""
        if self.kind == "linear":
            places = () if self.positions == 1 else (self.positions,)
            x, y = (batch, *places, self.inputs), (batch, *places, self.outputs)
            return LayerShape("linear", x, y, (self.outputs, self.inputs), 1)
        side, out, k = math.isqrt(self.pixels), math.isqrt(self.positions), math.isqrt(self.kernel)
        weight = (self.outputs, self.inputs, k, k)
        return LayerShape("conv", (batch, self.inputs, side, side), (batch, self.outputs, out, out), weight, 1)

    def factors(self, name: str) -> int:
        """Elements of its Kronecker factors."""
        width = self.inputs * self.kernel + self.bias
        if self.kind == "norm":
            return self.parameters**2 + 1 if name == "kfac" and self.parameters <= 256 else 0
        if name == "kfac":
            return width**2 + self.outputs**2
        if self.kind == "conv":
            return self.inputs**2
        blocks = math.ceil(width / 1024)
        return blocks * math.ceil(width / blocks) ** 2

    def rows(self, name: str, batch: int) -> int:
        """Elements a sample of what its Γ is made of."""
        whole = self.positions * (self.inputs * self.kernel + self.bias + self.outputs)
        values = self.inputs * self.pixels + self.outputs * self.positions
        if self.kind == "norm":
            return self.parameters
        shape = self.shape(batch)
        if self.kind == "linear" or name == "kfac":
            form = shape.coordinates(bias=self.bias)
            return {"rows": whole, "samples": self.parameters, "": values}[form]
        chosen = shape.choice("auto", 32, diagonal=False, weight=True, sketches=True)
        if chosen.approximate == "sketch":
            return self.outputs * (chosen.columns + self.bias)
        return self.parameters if chosen.kept else values


def on_paper(parts: list[Part], name: str, coupling: str, batch: int, ranks: int) -> Iterator[Sent]:
    """As ``traffic``, from the shapes of layers."""
    yield Sent("program", "all_gather", 1, 3)
    yield Sent("losses", "all_gather", 1, 5)
    parameters, kronecker = sum(part.parameters for part in parts), name in ("foof", "kfac")
    if name == "adam":
        yield Sent("Q_u", "all_reduce", len(parts), parameters)
    wide = [p for p in parts if name == "kfac" and p.kind == "norm" and p.parameters > 256]
    if wide:
        yield Sent("second moments", "all_reduce", len(wide), sum(part.parameters for part in wide))
    if kronecker:
        found = [part.factors(name) for part in parts]
        yield Sent("factors", "all_reduce", sum(map(bool, found)), sum(found), False)
    if coupling == "full":
        rows, total = batch * sum(part.rows(name, batch) for part in parts), batch * ranks
        blocks = (ranks - 1) * rows > rows + 2 * total**2 * (ranks - 1) / ranks
        yield Sent("rows", "gather" if blocks else "all_gather", len(parts), rows)
        if blocks:
            yield Sent("Gamma", "all_reduce", 1, total**2)
        yield Sent("vectors over samples", "all_gather", 2, 2 * batch)
    yield Sent("agreement", "all_reduce", 1, 1)
    yield Sent("update", "all_reduce", buckets(part.parameters for part in reversed(parts)), parameters)


def check() -> None:
    """Both ways agree on a network with layers of every kind."""
    parts = [Part("conv", 1, 4, 64, 36, 9), Part("conv", 4, 150, 36, 16, 9), Part("linear", 2400, 20)]
    parts, norm = [*parts, Part("norm", 0, 20), Part("linear", 20, 3)], nn.LayerNorm(20)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Conv2d(4, 150, 3), nn.Tanh(), nn.Flatten(),
                        nn.Linear(2400, 20), norm, nn.Tanh(), nn.Linear(20, 3))  # fmt: skip
    for name, coupling in MODES:
        curvature: Curvature = resolve(name)
        options = suggested(Options(coupling=coupling), curvature)
        graph = build_graph(net, (torch.randn(8, 1, 8, 8),), options)
        for ranks in (2, 4, 16):
            plan = build_program(graph, options, curvature, decay=False, ranks=ranks).lowered.plan
            setting = Setting(curvature, (), split(nn.CrossEntropyLoss()))
            wanted = list(traffic(plan, setting, 8))
            found = list(on_paper(parts, name, coupling, 8, ranks))
            if found != wanted:
                raise SystemExit(f"{name}, {coupling}, {ranks} ranks: on paper {found}, of the plan {wanted}")


# --- the networks -----------------------------------------------------------------------------------------------------


def resnet50() -> list[Part]:
    """He et al. 2016, at 224×224; convolutions without bias, a batch-norm behind each."""
    found, before, side = [Part("conv", 3, 64, 224**2, 112**2, 49, False), Part("norm", 0, 64)], 64, 56
    for width, blocks, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(blocks):
            step = stride if index == 0 else 1
            out = side // step
            shapes = [(before, width, side, side, 1), (width, width, side, out, 9), (width, 4 * width, out, out, 1)]
            shapes += [(before, 4 * width, side, out, 1)] if index == 0 else []
            for inputs, outputs, seen, made, kernel in shapes:
                found += [Part("conv", inputs, outputs, seen**2, made**2, kernel, False), Part("norm", 0, outputs)]
            before, side = 4 * width, out
    return [*found, Part("linear", 2048, 1000)]


def transformer() -> list[Part]:
    """A billion parameters: 20 blocks of width 2048, feed-forward 8192, 1,024 tokens; embeddings frozen."""
    width, tokens, found = 2048, 1024, list[Part]()
    for _ in range(20):
        found += [Part("norm", 0, width)] * 2
        for inputs, outputs in ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)):
            found.append(Part("linear", inputs, outputs, tokens, tokens))
    return found


NETWORKS = (("ResNet-50", resnet50(), 32), ("Transformer", transformer(), 4))
"""With the samples of a rank."""


# --- tables -----------------------------------------------------------------------------------------------------------


def cost(found: list[Sent], ranks: int) -> tuple[float, float, float]:
    """Bytes that a rank sends, collectives, and seconds a step: trees for the latency, rings for the bytes."""
    shares = [(one, 1.0 if one.every_step else 1.0 / EVERY) for one in found]
    sent = sum(WIDTH * one.moved(ranks) * share for one, share in shares)
    calls = sum(one.calls * share for one, share in shares)
    hops = math.ceil(math.log2(ranks))
    waits = sum(one.calls * share * hops * (2 if one.collective == "all_reduce" else 1) for one, share in shares)
    return sent, calls, LATENCY * waits + sent / BANDWIDTH


def table(parts: list[Part], batch: int) -> str:
    """A row a number of ranks and a way."""
    parameters, rows = sum(part.parameters for part in parts), []
    for ranks in RANKS:
        buckets = math.ceil(WIDTH * parameters / BUCKET)
        base = cost([Sent("update", "all_reduce", buckets, parameters)], ranks)
        ways = [("DistributedDataParallel", base)]
        for name, coupling in MODES:
            found = list(on_paper(parts, name, coupling, batch, ranks))
            way = next((f", Γ of all by {'blocks' if one.collective == 'gather' else 'rows'}" for one in found
                        if one.what == "rows"), "")  # fmt: skip
            ways.append((f"{name}, {coupling}{way}", cost(found, ranks)))
        for said, (sent, calls, seconds) in ways:
            rows.append((str(ranks), said, f"{sent / 2**20:,.0f} MiB", f"{calls:.0f}", f"{seconds * 1e3:,.1f} ms",
                         f"{seconds / base[2]:.2f}"))  # fmt: skip
    return markdown(("ranks", "what", "a rank sends", "collectives", "time", "against DDP"), rows)


def text() -> str:
    """The section of docs/scaling.md."""
    said = [
        "## Several processes",
        "Written by `benchmarks/ranks.py`, on paper, nothing measured: what a rank sends in a step with "
        '`process_group="world"`, against DistributedDataParallel\'s all-reduce of gradients. Elements are counted'
        " from shapes (`gtddp_compile/lowering/traffic.py`; `tests/optimizer/test_ranks.py` holds them against the"
        f" bytes that 2 and 4 gloo processes hand in). Float32; {LATENCY * 1e6:.0f} µs from rank to rank in trees,"
        f" {BANDWIDTH / 1e9:.0f} GB/s out of a rank in rings. No collective here overlaps with computing, where"
        " DistributedDataParallel hides most of its own behind the backward pass. Factors are counted with a tenth:"
        " they are sent at every tenth step. Not in the table: every rank makes all inverses by itself.",
    ]
    for title, parts, batch in NETWORKS:
        millions = sum(part.parameters for part in parts) / 1e6
        said += [f"### {title}: {millions:,.0f} million parameters, {batch} samples a rank", table(parts, batch)]
    return "\n\n".join(said)


def main() -> None:
    """Check; write the section."""
    check()
    write_section("ranks", text(), DOCS / "scaling.md")


if __name__ == "__main__":
    main()
