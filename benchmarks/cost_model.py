"""Whether the cost model picks the fastest exact form of a Gram matrix: every form of every layer shape, timed.

The layers are those of the timed networks (``networks.py``), each shape once, at the network's batch. A form is timed
by making the kernels take it. Left out is a form whose one block of memory would be too large for the program, and one
that multiplies ``FAR`` times as often as the form with the fewest multiplications. The last column is what the choice
costs against the fastest.

    python benchmarks/cost_model.py --write
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from common import machine, markdown, write_section
from networks import NETWORKS
from torch import Tensor, nn

from gtddp_compile.kernels import Geometry, Layer, conv, conv_pairs, linear

FAR = 6
COLUMNS = ("pairs", "patches", "pixels", "materialised")
FORMS = {"linear": ("pairs", "materialised"), "conv": ("patches", "pixels", "materialised")}


@dataclass(frozen=True)
class Shape:
    """A layer as it is met in a network.

    Attributes:
        kind: ``"linear"`` or ``"conv"``.
        x, g: shapes of input and output gradient.
        weight: shape of the weight.
        options: of the convolution's kernels.
        network: where it was met first.
    """

    kind: str
    x: tuple[int, ...]
    g: tuple[int, ...]
    weight: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]
    network: str

    @property
    def positions(self) -> int:
        """Of the output."""
        sizes = self.g[1:-1] if self.kind == "linear" else self.g[2:]
        return int(torch.Size(sizes).numel())

    def arguments(self) -> tuple[Layer, tuple[float]]:
        """Layer and metric."""
        generator = torch.Generator().manual_seed(0)
        x, g, weight = (torch.randn(size, generator=generator) for size in (self.x, self.g, self.weight))
        how = None if self.kind == "linear" else Geometry(**dict(self.options))
        return Layer((x,), g, (weight,), (True, False), how), (0.1,)

    def gram(self, arguments: tuple[Any, ...]) -> Tensor:
        """``Γ`` as the program makes it."""
        if self.kind == "linear":
            return linear.linear_gram(*arguments)
        return conv.conv_gram(*arguments)

    def chosen(self) -> str:
        """The model's choice."""
        batch, patch_size = self.x[0], int(torch.Size(self.weight[1:]).numel())
        if self.kind == "linear":
            return linear.linear_gram_form(batch, self.positions, patch_size, self.weight[0])
        kernel, groups = int(torch.Size(self.weight[2:]).numel()), dict(self.options)["groups"]
        pixels = int(torch.Size(self.x[2:]).numel())
        return conv_pairs.conv_gram_form(
            batch, self.positions, pixels, self.weight[1], kernel, self.weight[0] // groups
        )

    def forms(self) -> list[str]:
        """Those that are timed."""
        batch, outputs = self.x[0], self.weight[0]
        inputs, kernel = (int(torch.Size(sizes).numel()) for sizes in (self.weight[1:], self.weight[2:]))
        pairs = (batch * self.positions) ** 2
        pixels = (batch * int(torch.Size(self.x[2:]).numel())) ** 2
        costs = {
            "pairs": pairs * (inputs + outputs),
            "patches": pairs * (inputs + outputs) / 2,
            "pixels": pixels * self.weight[1] + pairs * outputs,
            "materialised": batch * inputs * outputs * (self.positions + batch),
        }
        possible = [form for form in FORMS[self.kind]
                    if form != "pixels" or (kernel > 1 and max(pairs, pixels) <= 4 * conv_pairs.CHUNK)]  # fmt: skip
        return [form for form in possible if costs[form] <= FAR * min(costs[other] for other in possible)]

    def __str__(self) -> str:
        if self.kind == "linear":
            return f"linear {self.weight[1]} → {self.weight[0]}, {self.positions} positions"
        size, stride = "×".join(map(str, self.weight[2:])), dict(self.options)["stride"][0]
        return f"conv {size}, {self.weight[1]} → {self.weight[0]}, stride {stride}, {self.positions} positions"


def shapes(names: list[str]) -> Iterator[Shape]:
    """Every linear layer and convolution of the networks, a shape once."""
    seen = set()
    for name in names:
        network = NETWORKS[name]
        found: list[Shape] = []

        def record(
            module: nn.Module, args: tuple[Tensor, ...], output: Tensor, into: Any = found, at: str = name
        ) -> None:
            x, g, weight = tuple(args[0].shape), tuple(output.shape), tuple(module.weight.shape)
            if isinstance(module, nn.Linear):
                into.append(Shape("linear", x, g, weight, (), at))
            elif isinstance(module, nn.Conv2d):
                options = tuple((key, getattr(module, key)) for key in ("stride", "padding", "dilation", "groups"))
                into.append(Shape("conv", x, g, weight, options, at))

        model = network.build()
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.register_forward_hook(record)
        with torch.no_grad():
            model(network.data()[0])
        for shape in found:
            key = (shape.kind, shape.x, shape.weight, shape.options)
            if key not in seen and shape.x[0] == network.batch:
                seen.add(key)
                yield shape


def measure(shape: Shape, repeats: int) -> dict[str, float]:
    """Median processor time of every form, in turns, seconds.

    Raises:
        RuntimeError: two forms give different matrices.
    """
    arguments, taken = shape.arguments(), dict[str, list[float]]()
    results: dict[str, Tensor] = {}
    for turn in range(repeats + 1):
        for form in shape.forms():
            with patch(f"gtddp_compile.kernels.{shape.kind}.{shape.kind}_gram_form", return_value=form):
                start = time.process_time()
                results[form] = shape.gram(arguments)
            if turn:
                taken.setdefault(form, []).append(time.process_time() - start)
    first, *others = results.values()
    if any((other - first).norm() > 1e-3 * first.norm() for other in others):
        raise RuntimeError(f"{shape}: forms disagree")
    return {form: statistics.median(values) for form, values in taken.items()}


def main(
    names: Annotated[list[str] | None, typer.Argument(help="networks; all if none is given")] = None,
    repeats: Annotated[int, typer.Option(help="timings of every form")] = 3,
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md")] = False,
) -> None:
    """Measure; see the module's docstring."""
    torch.set_num_threads(1)
    rows, count, lost, best, all_in = [], 0, 0, 0.0, 0.0
    for shape in shapes(names or list(NETWORKS)):
        times, choice = measure(shape, repeats), shape.chosen()
        fastest = min(times, key=times.__getitem__)
        lost += times[choice] > 1.1 * times[fastest]
        best, all_in = best + times[fastest], all_in + times[choice]
        cells = (f"{1e3 * times[form]:.1f} ms" if form in times else "–" for form in COLUMNS)
        line = (str(shape), shape.network, *cells, choice, f"{times[choice] / times[fastest]:.2f}")
        count += 1
        rows += [line] if len(times) > 1 else []
        print(*line, sep="  ", flush=True)
    said = (f"{count} shapes; the choice is more than a tenth slower than the fastest form in {lost}; one of each "
            f"takes {all_in:.2f} s as chosen, {best:.2f} s by the fastest forms.")  # fmt: skip
    print(said)
    if write:
        header = ("layer", "network", *COLUMNS, "chosen", "against the fastest")
        text = (
            f"{machine(1)}. Medians of {repeats}, CPU time (`benchmarks/cost_model.py`). {said} Listed are those with "
            "more than one form in question.\n\n"
        )
        write_section("cost model", "## The cost model against measurement\n\n" + text + markdown(header, rows))


if __name__ == "__main__":
    typer.run(main)
