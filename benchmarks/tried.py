"""What was tried for the hot path and left out, measured again: alternatives to what the program does.

python benchmarks/tried.py --write
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
import typer
from common import interleaved, keep_heap, machine, markdown, write_section
from torch import Tensor

from gtddp_compile.kernels import Geometry, Layer, approximate, batch_moments, batch_norm, conv, linear, patches

Pair = tuple[str, str, Callable[[], object], Callable[[], object], str]
PLAIN = Geometry((1, 1), (0, 0), (1, 1))


def halves(x: Tensor) -> Tensor:
    """``X Xᵀ`` with the block above the diagonal copied from below."""
    middle = x.shape[0] // 2
    found = x.new_empty(x.shape[0], x.shape[0])
    torch.mm(x[:middle], x[:middle].T, out=found[:middle, :middle])
    torch.mm(x[middle:], x[middle:].T, out=found[middle:, middle:])
    found[middle:, :middle] = x[middle:] @ x[:middle].T
    found[:middle, middle:] = found[middle:, :middle].T
    return found


def unfolded(x: Tensor, g: Tensor) -> Tensor:
    """Per-sample gradients of a 3×3 convolution from all patches at once."""
    return g.flatten(2) @ torch.nn.functional.unfold(x, 3, padding=1).mT


def in_pieces(x: Tensor, g: Tensor) -> Tensor:
    """Per-sample gradients of a 3×3 convolution from patches that are unfolded piece by piece."""
    chosen, patches._conv_grouped = patches._conv_grouped, lambda positions, channels, kernel: False
    try:
        return patches._conv_gradients(x, g, (3, 3), PLAIN)
    finally:
        patches._conv_grouped = chosen


def updates() -> tuple[Callable[[], object], Callable[[], object]]:
    """Adam's update of an MLP's parameters: parameter by parameter, and by the foreach functions."""
    shapes = [(512, 784), *[(512, 512)] * 3, (10, 512)]
    sides = []
    for foreach in (False, True):
        params = [torch.randn(shape) for out, width in shapes for shape in ((out, width), (out,))]
        for param in params:
            param.grad = torch.randn_like(param)
        sides.append(torch.optim.Adam(params, lr=1e-4, foreach=foreach).step)
    return sides[0], sides[1]


def pairs() -> list[Pair]:
    """(what, in place of what, the program's way, the other way, why it was left out)."""
    x, g = torch.randn(128, 512), torch.randn(128, 512)
    short = x[:, :256].contiguous()
    grams = [x @ x.T + torch.eye(128) for _ in range(5)]
    stack = torch.stack(grams)
    images, gradients = torch.randn(128, 64, 16, 16), torch.randn(128, 64, 16, 16)
    padded = torch.nn.functional.pad(images, (1, 1, 1, 1)).unsqueeze(1)
    weight, new = torch.randn(512, 512), torch.empty(512, 512)

    def apart() -> None:
        new.copy_(weight - 0.1 * (g.T @ x))

    def folded() -> None:
        new.copy_(weight)
        new.addmm_(g.T, x, alpha=-0.1)

    maps, affine = torch.randn(128, 64, 32, 32), (torch.randn(64), torch.randn(64))
    small = (padded[:, :, :16, :10, :10].contiguous(), gradients[:, None, :16, :8, :8].contiguous())
    deep = torch.randn(16, 1024, 4, 4), torch.randn(16, 2048, 2, 2), torch.randn(2048, 1024, 1, 1)
    strided = Layer(deep[:1], deep[1], deep[2:], (True, False), Geometry((2, 2), (0, 0), (1, 1)))
    linear_layer = Layer((x,), g, (None,), (True, False))
    return [
        ("symmetric product in three of four blocks", "X Xᵀ, 128 × 256", lambda: short @ short.T, lambda: halves(short),
         "parts take longer than the whole; from 512 samples on products are made so"),
        ("bfloat16", "X Xᵀ, 128 × 512", lambda: x @ x.T, lambda: x.bfloat16() @ x.bfloat16().T,
         "little of a whole step; an option, see the table of Gram matrices"),
        ("one batched Cholesky of 5 stages", "one a stage, 128 × 128",
         lambda: [torch.linalg.cholesky_ex(gram) for gram in grams], lambda: torch.linalg.cholesky_ex(stack),
         "no faster"),
        ("patches of all samples unfolded at once", "per-sample gradients of a 3×3 convolution, 64 channels, 16×16",
         lambda: patches._conv_gradients(padded, gradients.unsqueeze(1), (3, 3), PLAIN),
         lambda: unfolded(images, gradients), "slower"),
        ("patches of some samples at a time", "per-sample gradients of a 3×3 convolution, 16 channels, 8×8",
         lambda: patches._conv_gradients(*small, (3, 3), PLAIN), lambda: in_pieces(*small),
         "slower where channels are few"),
        ("torch's own weight gradient", "a 1×1 convolution's, 1024 → 2048 channels, 16 samples, stride 2 on 4×4",
         lambda: conv.conv_weighted(strided),
         lambda: torch.ops.aten.convolution_backward(deep[1], deep[0], deep[2], None, [2, 2], [0, 0], [1, 1],
                                                     False, [0, 0], 1, [False, True, False]),
         "slower where the weight is larger than what its gradient is made of"),
        ("torch's own moments", "a batch-norm's value in training, 128 × 64 × 32 × 32",
         lambda: batch_norm(maps, None, None, None, *affine, training=True, moments=batch_moments(maps)),
         lambda: batch_norm(maps, None, None, None, *affine, training=True),
         "slower on a CPU; what a model is recorded and checked with"),
        ("batched dot products", "⟨g, δx⟩ of every sample, 128 × 512",
         lambda: (g - x).mul_(g).sum(1), lambda: torch.bmm((g - x).unsqueeze(1), g.unsqueeze(2)).flatten(),
         "slower"),
        ("gradient, step and copy apart", "weight written by one product, 512 × 512", folded, apart,
         "slower"),
        ("Γ of a diagonal metric, exact", "Γ with the metric separated, 512 × 512, 128 samples",
         lambda: approximate.linear_separable_gram(linear_layer, (weight.square(),)),
         lambda: linear.linear_gram(linear_layer, (weight.square(),)),
         "the default separates; `gram=\"exact\"` is there to compare"),
        ("foreach functions", "Adam's update of the MLP, parameter by parameter", *updates(),
         "no faster; and a player is updated when the forward sweep reaches it, by itself"),
    ]  # fmt: skip


def main(
    count: Annotated[int, typer.Option(help="interleaved pairs")] = 40,
    write: Annotated[bool, typer.Option(help="write the section of docs/performance.md")] = False,
) -> None:
    """Measure; see the module's docstring."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for what, instead, ours, other, why in pairs():
        found = interleaved(ours, other, count)
        rows.append((what, instead, f"{1e3 * found.base:.2f} ms", f"{1e3 * found.ours:.2f} ms",
                     f"{found.ratio:.2f} ({found.low:.2f}–{found.high:.2f})", why))  # fmt: skip
        print(*rows[-1], sep="  ", flush=True)
    if write:
        header = ("alternative", "to", "the program's", "the alternative", "ratio (quartiles)", "why not")
        text = f"{machine(1)}. Medians of {count} interleaved pairs, CPU time (`benchmarks/tried.py`).\n\n"
        write_section("tried", "## Tried and left out\n\n" + text + markdown(header, rows))


if __name__ == "__main__":
    keep_heap()
    typer.run(main)
