"""Fig. 4: the value Hessian of the batch, and how much of it lies in the diagonal blocks.

With a rank-one terminal Hessian a sample, ``V_xx = Z P Zᵀ``: column j of ``Z`` is the gradient of sample j's loss in
the states of the whole batch (batch-norm mixes them), ``P`` is B x B. Through a stage with the gradients ``γ`` of the
samples' losses in its parameters, ``Γ = γ M⁻¹ γᵀ``, the paper's recursion gives ``P - P Γ P`` (``Q_uu = M``, Table 1),
full coupling ``(P⁻¹ + Γ)⁻¹`` (``Q_uu = M + f_uᵀ V_xx f_u``). Both here without the block-diagonal approximation, which
is what is looked at; SGD's ``M``. Written out by automatic differentiation, without the compiler.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from shared import LOSS, SETTINGS, PaperNet, Row, figure, load, markdown, save, where
from torch import Tensor, nn

RESULTS = "fig4"
RECURSIONS = ("paper", "full")
LR, DRAWN = 0.1, 4


def jobs(rows: Sequence[Row]) -> list[Row]:
    """With batch-norm and without, before training and after, batch sizes, both recursions."""
    batches, steps = ((4,), (0, 10)) if SETTINGS.quick else ((4, 8, 32), (0, 200))
    return [{"norm": norm, "trained": str(trained), "batch": str(batch), "recursion": recursion, "seed": str(seed)}
            for norm in ("none", "batch") for trained in steps for batch in batches for recursion in RECURSIONS
            for seed in range(1 if SETTINGS.quick else 3)]  # fmt: skip


def gradients(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """Losses of the samples; by layer in the order of use, gradients of every loss in what the layer reads,
    ``(B, B, n)`` by loss and sample, and in its parameters, ``(B, m)``.
    """
    seen: list[tuple[nn.Module, Tensor]] = []
    layers = [layer for layer in model.modules() if list(layer.parameters(recurse=False))]
    hooks = [layer.register_forward_pre_hook(lambda own, given: seen.append((own, given[0]))) for layer in layers]
    phi = nn.functional.cross_entropy(model(x.requires_grad_()), y, reduction="none")
    for hook in hooks:
        hook.remove()
    reads = [value for _, value in seen]
    owned = [list(layer.parameters()) for layer, _ in seen]
    flat = [*reads, *(p for own in owned for p in own)]
    found = [torch.autograd.grad(one, flat, retain_graph=True) for one in phi]
    columns = [torch.stack(parts).flatten(1) for parts in zip(*found, strict=True)]
    states, rest = columns[: len(reads)], columns[len(reads) :]
    sizes = [len(own) for own in owned]
    own = [torch.cat([rest.pop(0) for _ in range(size)], 1) for size in sizes]
    return phi.detach(), [(s.view(len(y), len(y), -1), g) for s, g in zip(states, own, strict=True)]


def block_norms(model: nn.Module, x: Tensor, y: Tensor, recursion: str, lr: float = LR) -> list[Tensor]:
    """Frobenius norms of the blocks of ``V_xx`` in what every layer reads, ``(B, B)`` each, in the order of use."""
    phi, layers = gradients(model, x, y)
    size, found = len(y), []
    p = torch.eye(size, dtype=phi.dtype) / size**2 if recursion == "paper" else torch.diag(1 / (size * phi))
    for states, own in reversed(layers):
        gamma = lr * own @ own.T
        p = p - p @ gamma @ p if recursion == "paper" else torch.linalg.inv(torch.linalg.inv(p) + gamma)
        inner = torch.einsum("ain,bin->iab", states, states)  # Z_iᵀ Z_i of the rows of sample i
        left = p @ inner
        found.append(torch.einsum("iab,jba->ij", left, left).clamp_min(0).sqrt())
    return found[::-1]


def share(norms: Tensor) -> float:
    """How much of the squared norm lies in the diagonal blocks."""
    return float(norms.diagonal().square().sum() / norms.square().sum())


def coupling(norms: Tensor) -> float:
    """``‖V_ij‖ / √(‖V_ii‖ ‖V_jj‖)``, mean over pairs: 0 is block-diagonal, however unequal the samples are."""
    own = norms.diagonal().sqrt()
    alike = norms / own[:, None] / own
    return float((alike.sum() - len(own)) / (len(own) ** 2 - len(own)))


def work(job: Row) -> Row:
    """The value Hessian in what every layer reads, in float64."""
    torch.manual_seed(int(job["seed"]))
    (x, y), _ = load("digits", None)
    model = PaperNet((1, 8, 8), 1, 4, norm=job["norm"] == "batch")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for rows in torch.randint(len(y), (int(job["trained"]), 32)):
        optimizer.zero_grad()
        LOSS(model(x[rows]), y[rows]).backward()
        optimizer.step()
    rows = torch.randint(len(y), (int(job["batch"]),))
    found = block_norms(model.double(), x[rows].double(), y[rows], job["recursion"])
    wanted = found[::2] if job["norm"] == "batch" else found  # what batch-norms read is left out
    return {
        "share": " ".join(f"{share(norms):.4f}" for norms in wanted),
        "coupling": " ".join(f"{coupling(norms):.4f}" for norms in wanted),
        "blocks": " ".join(f"{v:.3g}" for v in wanted[1].flatten().tolist()) if len(rows) <= DRAWN else "",
    }


def table(rows: Sequence[Row]) -> str:
    """Percent of the squared norm by layer, and the coupling at the second convolution; means over seeds."""
    lines = []
    for row in where(rows, seed=0):
        setting = {name: row[name] for name in ("norm", "trained", "batch", "recursion")}
        same = where(rows, **setting)
        shares, couplings = (torch.tensor([[float(v) for v in other[name].split()] for other in same]).mean(0).tolist()
                             for name in ("share", "coupling"))  # fmt: skip
        each = (f"{100 * value:.1f}" for value in shares)
        lines.append((*setting.values(), *each, f"{100 / int(row['batch']):.0f}", f"{couplings[1]:.3f}"))
    layers = ("first conv %", "second conv %", "third conv %", "head %")
    header = ("normalisation", "steps before", "batch", "recursion", *layers, "all blocks alike %", "coupling")
    return markdown(header, lines)


def parts(rows: Sequence[Row], folder: Path) -> dict[str, str]:
    """The blocks of the second convolution's Hessian, and the table."""
    late = max(int(row["trained"]) for row in rows)
    shown = [row for row in where(rows, batch=DRAWN, trained=late, seed=0)]
    made, axes = figure(len(shown), width=2.2, height=2.4)
    for axis, row in zip(axes[0], shown, strict=True):
        blocks = torch.tensor([float(v) for v in row["blocks"].split()]).view(DRAWN, DRAWN)
        axis.imshow(blocks, cmap="gray", vmin=0)
        axis.set_title(f"{row['recursion']}, norm: {row['norm']}")
        axis.set(xticks=[], yticks=[])
    return {"fig4": f"{save(made, folder, 'fig4')}\n\n{table(rows)}"}
