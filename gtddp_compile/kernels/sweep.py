"""The two sweeps' own arithmetic: cuts, contractions, and B×B blocks (one block, or one a group of samples).

A B×B quantity is a tuple of square blocks along the diagonal; with full coupling there is one.
"""

import functools
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from gtddp_compile.kernels.bundle import Layer, part_of, pieces, scaled, wide

Blocks = tuple[Tensor, ...]

WEIGHED = 2**20
"""Elements of ``g`` that are scaled at a time."""


def leaf(value: Tensor) -> Tensor:
    """The value as the beginning of a stage: gradients stop here."""
    return value.detach().requires_grad_()


def tap(value: Tensor) -> Tensor:
    """A player's output, such that its gradient can be asked for in the first sweep."""
    return value.requires_grad_() if torch.is_grad_enabled() and not value.requires_grad else value


def edge(value: Tensor) -> Any:
    """Where a player's output lies in the stage's graph: its gradient can be asked for, and the value let go of."""
    if torch.compiler.is_compiling() or not value.requires_grad:
        return value
    return torch.autograd.graph.get_gradient_edge(value)


def pull_back(
    outputs: Sequence[Tensor], inputs: Sequence[Any], gradients: Sequence[Tensor], *, vectorised: bool | None = None,
    between: Sequence[Tensor] = (),
) -> tuple[Tensor, ...]:  # fmt: skip
    """Vector-Jacobian product of one stage, or of several with values ``between`` them, zero where an input (a value or
    its :func:`edge`) does not matter.

    ``vectorised``: not ``None`` where every output has several cotangents ``(k, B, …)``: in one batched reverse pass,
    or one pass a column (for what vmap does not support).
    """
    reached = [(output, g) for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
    count = () if vectorised is None else tuple(gradients[0].shape[:1])
    if not reached:
        return tuple(zeros_of(value, count) for value in inputs)
    targets, columns = [output for output, _ in reached], [g for _, g in reached]
    found: tuple[Tensor | None, ...]
    if vectorised is not False:
        found = torch.autograd.grad(
            targets, list(inputs), columns, is_grads_batched=bool(vectorised), allow_unused=True
        )  # fmt: skip
    else:
        passes = [
            torch.autograd.grad(
                targets, list(inputs), [g[k] for g in columns], retain_graph=k + 1 < count[0], allow_unused=True
            )
            for k in range(count[0])
        ]
        found = tuple(None if column[0] is None else torch.stack(column) for column in zip(*passes, strict=True))
    cut_off((*targets, *between))
    return tuple(zeros_of(value, count) if g is None else g for value, g in zip(inputs, found, strict=True))


def cut_off(outputs: Sequence[Tensor]) -> None:
    """Let go of the graph behind values that live on: it would keep what the stage began with, its leaves, alive."""
    for output in outputs:
        if not (torch.compiler.is_compiling() or output._is_view()):
            output.detach_()


def zeros_of(value: Any, count: tuple[int, ...] = ()) -> Tensor:
    """Zeros of a value's shape, ``count`` in front of it; of its :func:`edge` too."""
    if isinstance(value, Tensor):
        return value.new_zeros(*count, *value.shape)
    known = value.node._input_metadata[value.output_nr]
    return torch.zeros(*count, *known.shape, dtype=known.dtype, device=known.device)


def loss_gradient(phi: Tensor, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """``∂φ_i/∂x_T`` for every output: samples do not mix in the loss, so one reverse pass gives them all."""
    each = torch.ones_like(phi)
    return torch.autograd.grad([phi], list(outputs), [each], allow_unused=True, materialize_grads=True)


def weigh(kernel: Callable[[Layer], tuple[Tensor, ...]], layer: Layer, weights: Tensor) -> tuple[Tensor, ...]:
    """``γᵀ w`` by a layer's ``weighted`` kernel, some samples at a time: the scaled ``g`` never exists as a whole."""
    g = layer.g
    rows = max(1, WEIGHED * g.shape[0] // max(1, g.numel()))
    if rows >= g.shape[0] or torch.compiler.is_compiling():
        return kernel(scaled(layer, weights))
    totals: tuple[Tensor, ...] = ()
    for part in pieces(g.shape[0], rows):
        found = kernel(scaled(part_of(layer, part), weights[part]))
        totals = tuple(total.add_(more) for total, more in zip(totals, found, strict=True)) if totals else found
    return totals


def contract(g: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """``⟨g_i, δx_i⟩``, shape (B,): the first-order change of each sample's loss."""
    rows = max(1, 2**20 * g.shape[0] // max(1, g.numel()))
    if rows >= g.shape[0] or torch.compiler.is_compiling():
        product = (after - before).mul_(g)
        return wide(product.sum(tuple(range(1, product.dim()))) if product.dim() > 1 else product)
    # Some samples at a time: the difference stays in the cache.
    parts = zip(g.split(rows), after.split(rows), before.split(rows), strict=True)
    return torch.cat([contract(*part) for part in parts])


def clip(change: Tensor, bound: float | None, aim: Tensor) -> Tensor:
    """``c`` within ``bound`` times the aim, where a linear prediction is believed.

    With a bound of 1 no sample's weight, ``aim + c``, changes sign (docs/theory.md#trust).
    """
    if bound is None:
        return change
    limit = aim if bound == 1 else bound * aim
    return change.clamp(-limit, limit)


def clip_radicand(rho: Tensor) -> tuple[Tensor, Tensor]:
    """``ρ`` with negative radicands of Eq. 21-23 at zero, and how many there were."""
    return rho.clamp_min(0), (rho < 0).sum()


def rows_of(batch: int, group: int | None) -> tuple[slice, ...]:
    """Rows of every group of samples; the last may be smaller."""
    if group is None:  # no range: torch.compile would take the batch for a constant
        return (slice(0, batch),)
    return tuple(slice(start, min(start + group, batch)) for start in range(0, batch, group))


def group_scale(rows: Sequence[slice], batch: int) -> tuple[float, ...]:
    """``τ = B/b`` of every group: it stands for the batch."""
    return tuple(batch / (row.stop - row.start) for row in rows)


def gram_blocks(
    kernel: Callable[..., Tensor], layer: Layer, metric: tuple[Any, ...], rows: Sequence[slice], **options: Any
) -> Blocks:
    """``Γ = γ M⁻¹ γᵀ`` of one layer, a block a group."""
    if len(rows) == 1:
        return (wide(kernel(layer, metric, **options)),)
    return tuple(wide(kernel(part_of(layer, row), metric, **options)) for row in rows)


def blocks_diagonal(vector: Tensor, rows: Sequence[slice] = (slice(None),)) -> Blocks:
    """``diag(v)``, a block a group."""
    return tuple(torch.diag(vector[row]) for row in rows)


def blocks_add(*terms: Blocks) -> Blocks:
    """Sum, block by block."""
    return tuple(functools.reduce(torch.add, blocks) for blocks in zip(*terms, strict=True))


def blocks_into(total: Blocks, *terms: Blocks) -> Blocks:
    """The total with the terms added to it in place, block by block."""
    for blocks in zip(total, *terms, strict=True):
        for term in blocks[1:]:
            blocks[0].add_(term)
    return total


def blocks_scale(factors: tuple[float, ...], blocks: Blocks) -> Blocks:
    """Each group's block times its own factor."""
    return tuple(factor * block for factor, block in zip(factors, blocks, strict=True))


def factor(blocks: Blocks, scale: Tensor | None = None) -> tuple[Blocks, tuple[Tensor, ...]]:
    """Upper Cholesky factors, ``Rᵀ R``: positive definite by construction (docs/theory.md#collapse), and kept so.

    A sum of Gram matrices carries rounding errors of about ``eps · trace``: that much is added to the diagonal, in
    double precision nothing. Where it does not do (very little damping, very deep networks whose activations grow) the
    factor is made of the eigenvalues, with a warning. The second result says of every block, by a number that is not
    0, that this was so.

    ``scale``: of every row, ``(B,)``. What is factored is ``A_ij / √(s_i s_j)``, so that a sample whose loss is small,
    and its row with it, is not lost beside what is added.
    """
    return _factors(blocks, scale, unchecked=False)


def factor_unchecked(blocks: Blocks, scale: Tensor | None = None) -> tuple[Blocks, tuple[Tensor, ...]]:
    """:func:`factor` without waiting for the device: not a number where the first lift does not do."""
    return _factors(blocks, scale, unchecked=True)


def factor_together(blocks: Blocks, scale: Tensor | None = None) -> tuple[Blocks, tuple[Tensor, ...]]:
    """:func:`factor` on one of several ranks, which may not stop alone: not a number where the second lift fails."""
    try:
        return factor(blocks, scale)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        return tuple(block * torch.nan for block in blocks), tuple(block.new_ones(()) for block in blocks)


def _factors(blocks: Blocks, scale: Tensor | None, unchecked: bool) -> tuple[Blocks, tuple[Tensor, ...]]:
    if scale is None:
        pairs = [_cholesky(block, unchecked) for block in blocks]
        return tuple(found for found, _ in pairs), tuple(failed for _, failed in pairs)
    roots = scale.sqrt().split([block.shape[0] for block in blocks])
    scaled = tuple(block / root / root.unsqueeze(1) for block, root in zip(blocks, roots, strict=True))
    factors, failed = _factors(scaled, None, unchecked)
    return tuple(found * root for found, root in zip(factors, roots, strict=True)), failed


def _cholesky(block: Tensor, unchecked: bool) -> tuple[Tensor, Tensor]:
    eps = torch.finfo(block.dtype).eps
    found: Tensor
    first = block if block.dtype == torch.float64 else _lifted(block, eps)
    found, failed = torch.linalg.cholesky_ex(first, upper=True)
    if unchecked or torch.compiler.is_compiling():  # whether it failed is seen when the step is done
        return torch.where(failed == 0, found, torch.nan), failed
    if failed:
        said = "a Gram matrix is not definite to rounding: its eigenvalues below eps trace are taken as that"
        warnings.warn(said, RuntimeWarning, stacklevel=2)
        found = _by_eigenvalues(block, eps)
    return found, failed


def _by_eigenvalues(block: Tensor, share: float) -> Tensor:
    """``R`` with ``RᵀR = V max(Λ, share · trace) Vᵀ``: what rounding does not resolve moves no other direction."""
    if not block.isfinite().all():
        raise torch.linalg.LinAlgError("a Gram matrix is not finite")  # type: ignore[attr-defined]
    values, vectors = torch.linalg.eigh(block)
    roots = values.clamp_min(share * block.trace()).sqrt()
    factor: Tensor = torch.linalg.qr(roots.unsqueeze(1) * vectors.mT, mode="r").R
    return factor


def _lifted(block: Tensor, share: float) -> Tensor:
    """The block with a share of its trace added to its diagonal."""
    found = block.clone()
    found.diagonal().add_(block.trace(), alpha=share)
    return found


def solve(factors: Blocks, vector: Tensor) -> Tensor:
    """``A⁻¹ v`` from the Cholesky factors of ``A``."""
    if len(factors) == 1:
        return _solve(factors[0], vector)
    pieces = vector.split([block.shape[0] for block in factors])
    return torch.cat([_solve(block, part) for block, part in zip(factors, pieces, strict=True)])


def _solve(block: Tensor, vector: Tensor) -> Tensor:
    vector = vector.to(block.dtype)  # of layers in another precision than the loss
    return torch.cholesky_solve(vector.unsqueeze(1), block, upper=True).squeeze(1)


def _entries(targets: Any) -> list[int]:
    """Numbers of a sample in every tensor of the targets."""
    leaves = (leaf for leaf in tree_leaves(targets) if isinstance(leaf, Tensor) and leaf.dim())
    return [math.prod(leaf.shape[1:]) for leaf in leaves]


def target_entries(targets: Any) -> float:
    """How many numbers a sample's target has; at least 1."""
    return float(max(1, sum(_entries(targets))))


def several_entries(targets: Any) -> bool:
    """Whether a sample has several numbers in one tensor of the targets."""
    return any(count > 1 for count in _entries(targets))


def reached(grams: Blocks, information: Tensor, reach: float, targets: Any) -> tuple[Blocks, Tensor]:
    """``Λ_T / c + Γ`` and the diagonal of ``Λ_T / c``: the loss counts ``c ≥ 1`` times, group by group.

    ``y = P_T⁻¹ α_T`` stays, as both ``α_T`` and ``P_T`` are ``c`` times what they were. ``c`` makes the mean of ``Γ``'s
    diagonal ``reach`` times that of ``Λ_T / c``, but is no more than a sample's target has numbers: it undoes a mean
    over many outputs, not that a loss hardly answers to the parameters or is as good as fitted.

    Args:
        grams: ``Γ`` of all stages, a block a group; overwritten.
        information: the diagonal of ``Λ_T``, ``(B,)``.
        reach: the least ratio.
        targets: of the batch, as the loss takes them: tensors with the samples leading, however nested.
    """
    most, lowered = target_entries(targets), []
    for gram, own in zip(grams, information.split([gram.shape[0] for gram in grams]), strict=True):
        diagonal = gram.diagonal()
        if most > 1:
            there = diagonal.sum()
            own = own / torch.where(there > 0, reach * own.sum() / there, 1.0).clamp(1.0, most)
        diagonal.add_(own)
        lowered.append(own)
    return grams, lowered[0] if len(lowered) == 1 else torch.cat(lowered)


def cap_step(weights: Tensor, target: Tensor, information: Tensor, scales: Sequence[float], rows: Sequence[slice],
             bound: float) -> Tensor:  # fmt: skip
    """``w``, shorter where the step it asks for is longer than the bound in the metric ``M``.

    ``(M⁻¹ C w)ᵀ M (M⁻¹ C w) = wᵀ Γ w = wᵀ (y - Λ_T w)``, as ``(Λ_T + Γ) w = y``: no product with ``Γ``. A group
    stands for the batch; its own step is capped, and so is their mean.

    Args:
        weights, target: ``w`` and ``y``, ``(B,)``.
        information: the diagonal of ``Λ_T``, ``(B,)``.
        scales: ``τ`` of every group.
        rows: of every group.
        bound: the longest step.
    """
    found = []
    for row, scale in zip(rows, scales, strict=True):
        w = weights[row]
        square = scale * (w @ (target[row].to(w.dtype) - information[row] * w))
        found.append(w * (bound / square.clamp_min(torch.finfo(w.dtype).tiny).sqrt()).clamp_max(1.0))
    return found[0] if len(found) == 1 else torch.cat(found)


def clip_gradients(bound: float, *gradients: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], ...]:
    """As ``torch.nn.utils.clip_grad_norm_``: all gradients times ``bound / (norm + 1e-6)`` where that is below 1."""
    norms = torch.stack([torch.linalg.vector_norm(part) for player in gradients for part in player])
    scale = (bound / (torch.linalg.vector_norm(norms) + 1e-6)).clamp_max(1.0)
    return tuple(tuple(part * scale.to(part.dtype) for part in player) for player in gradients)


def inverse_diagonal(factors: Blocks) -> Tensor:
    """Diagonal of ``A⁻¹`` from the Cholesky factors of ``A``."""
    return torch.cat([torch.cholesky_inverse(block, upper=True).diagonal() for block in factors])


def bind(function: Callable[..., Any], *extras: Any) -> Callable[..., Any]:
    """A player's function with the sizes it reads filled in."""
    return functools.partial(function, *extras)
