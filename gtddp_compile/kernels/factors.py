"""Richer value Hessians: ``r`` columns a sample instead of the gradient alone (docs/theory.md#columns).

Two layouts. A value's columns travel as ``(1 + r, B, …)``: row 0 is the ordinary gradient ``g`` (the linear term, kept
apart), rows 1 … r the pulled-back factor. Vectors and matrices over columns are ordered sample by sample,
``(i, a) -> i r + a``, so that a group of samples is a block. Layer kernels see columns as further samples; where an
operation cannot be evaluated on repeated samples (``mixes``), they are called once a column.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gtddp_compile.kernels.sweep import cut_off, zeros_of

CHUNK = 2**24
"""Bound on the elements of an intermediate tensor."""

Blocks = tuple[Tensor, ...]
Kernel = Callable[..., Any]


def pull_back_factors(
    outputs: Sequence[Tensor], inputs: Sequence[Any], gradients: Sequence[Tensor], *, vectorised: bool = True
) -> tuple[Tensor, ...]:
    """Vector-Jacobian products of one stage with 1 + r cotangents; zero where an input does not matter.

    ``vectorised``: in one batched reverse pass; otherwise one pass a column (for what vmap does not support).
    """
    reached = [(output, g) for output, g in zip(outputs, gradients, strict=True) if output.requires_grad]
    count = gradients[0].shape[0]
    if not reached:
        return tuple(zeros_of(value, (count,)) for value in inputs)
    targets, columns = [output for output, _ in reached], [g for _, g in reached]
    found: tuple[Tensor | None, ...]
    if vectorised:
        found = torch.autograd.grad(targets, list(inputs), columns, is_grads_batched=True, allow_unused=True)
    else:
        passes = [
            torch.autograd.grad(
                targets, list(inputs), [g[k] for g in columns], retain_graph=k + 1 < count, allow_unused=True
            )
            for k in range(count)
        ]
        found = tuple(None if column[0] is None else torch.stack(column) for column in zip(*passes, strict=True))
    cut_off(targets)
    return tuple(zeros_of(value, (count,)) if part is None else part for value, part in zip(inputs, found, strict=True))


def combine(g: Tensor, start: float, weights: Tensor) -> Tensor:
    """The cotangent ``α_T g_i + Σ_a w_ia z_ia`` of every sample: ``A + G w`` of one value."""
    by_sample = weights.to(g.dtype).reshape(g.shape[1], -1)
    total: Tensor = start * g[0] + torch.einsum("ba,ab...->b...", by_sample, g[1:])
    return total


def contract_factors(g: Tensor, after: Tensor, before: Tensor) -> Tensor:
    """``c = Zᵀ δx``, shape (B r,)."""
    delta = (after - before).reshape(1, after.shape[0], -1)
    found = torch.linalg.vecdot(g[1:].reshape(g.shape[0] - 1, after.shape[0], -1), delta)
    change: Tensor = found.T.reshape(-1)
    return change if change.dtype in (torch.float32, torch.float64) else change.float()


def clip_factors(change: Tensor, bound: float | None, rank: int) -> Tensor:
    """``c`` with every sample's ``‖c_i‖`` within the bound.

    ``½ ‖c_i‖² = ½ δx_iᵀ V δx_i`` is the second-order change of the sample's loss; its ``δx`` is scaled as a whole. With
    the gradient as the only column this is the bound on ``|c_i|``.
    """
    if bound is None:
        return change
    by_sample = change.reshape(-1, rank)
    norms = by_sample.norm(dim=1, keepdim=True)
    outside = norms > bound
    scaled = torch.where(outside, by_sample * (bound / norms.clamp_min(bound)), by_sample)
    return scaled.reshape(-1)


# --- layer kernels over columns ---------------------------------------------------------------------------------------


def _columns(g: Tensor) -> Tensor:
    """``(k, B, …)`` as ``(B k, …)``."""
    return g.transpose(0, 1).reshape(-1, *g.shape[2:])


def _spread(operands: tuple[Tensor, ...], count: int, batched: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """Every sample's operands once a column."""
    split = batched or (True,) * len(operands)
    return tuple(x.repeat_interleave(count, 0) if by else x for x, by in zip(operands, split, strict=True))


def factor_rows(
    per_sample: Kernel,
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    **options: Any,
) -> tuple[Tensor, ...]:
    """``Ψ``, ``(B k, *shape)`` for each wanted parameter: what the k columns of ``g`` pull back to."""
    count = g.shape[0]
    if options.get("mixes"):
        found = [per_sample(operands, column, params, wants, **options) for column in g]
        return tuple(torch.stack(rows, 1).flatten(0, 1) for rows in zip(*found, strict=True))
    spread = _spread(operands, count, options.get("batched", ()))
    rows: tuple[Tensor, ...] = per_sample(spread, _columns(g), params, wants, **options)
    return rows


def factor_gram(
    gram: Kernel,
    per_sample: Kernel,
    joint: Kernel,
    blocks: Kernel,
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Any, ...],
    rows: Sequence[slice],
    **options: Any,
) -> Blocks:
    """``[γ Ψ] M⁻¹ [γ Ψ]ᵀ`` of one layer over all 1 + r columns, a block a group: ``Γ`` and the cross terms with ``γ``.

    ``blocks`` is ``gram_blocks``, ``joint`` is ``joint_gram``.
    """
    found: Blocks
    if options.get("mixes"):
        found = joint(factor_rows(per_sample, operands, g, params, wants, **options), metric, rows)
    else:
        spread = _spread(operands, g.shape[0], options.get("batched", ()))
        found = blocks(gram, spread, _columns(g), params, wants, metric, rows, **options)
    return found


def factor_directional(
    directional: Kernel,
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    direction: tuple[Tensor, ...],
    **options: Any,
) -> Tensor:
    """``⟨ψ_ia, v⟩``, shape (B r,); one call of the layer's kernel a column."""
    found = [directional(operands, column, params, wants, direction, **options) for column in g[1:]]
    return torch.stack(found, 1).flatten()


def split_columns(blocks: Blocks, rank: int, start: float, scales: tuple[float, ...]) -> tuple[Blocks, Tensor]:
    """``Γ`` and ``τ Ψ M⁻¹ γᵀ α_T`` from the Gram matrix over all columns."""
    grams, crosses = [], []
    for block, scale in zip(blocks, scales, strict=True):
        tiles = block.reshape(-1, 1 + rank, block.shape[0] // (1 + rank), 1 + rank)
        samples = tiles.shape[0]
        grams.append(tiles[:, 1:, :, 1:].reshape(samples * rank, samples * rank))
        crosses.append(scale * start * tiles[:, 1:, :, 0].sum(2).flatten())
    return tuple(grams), torch.cat(crosses)


def sample_grams(
    per_sample: Kernel,
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor | None, ...],
    wants: tuple[bool, ...],
    metric: tuple[Any, ...],
    **options: Any,
) -> Tensor:
    """``Γ_ii``, ``(B, r, r)``: a block of the Gram matrix a sample."""
    rank, batch = g.shape[0] - 1, g.shape[1]
    size = sum(p.numel() for p, want in zip(params, wants, strict=True) if want and p is not None)
    step = batch if options.get("mixes") else max(1, CHUNK // max(1, rank * size))
    split = options.get("batched") or (True,) * len(operands)
    found = []
    for start in range(0, batch, step):
        part = slice(start, start + step)
        operands_ = operands
        if not options.get("mixes"):
            operands_ = tuple(x[part] if by else x for x, by in zip(operands, split, strict=True))
        psi = factor_rows(per_sample, operands_, g[1:, part], params, wants, **options)
        found.append(joint_sample_grams(psi, metric, rank))
    return torch.cat(found)


def joint_sample_grams(psi: tuple[Tensor, ...], metric: tuple[Any, ...], rank: int) -> Tensor:
    """``Γ_ii`` from ``Ψ`` itself, ``(B, r, r)``."""
    total: Tensor | None = None
    for rows, inverse in zip(psi, metric, strict=True):
        flat, scaled = rows.reshape(-1, rank, rows[0].numel()), (rows * inverse).reshape(-1, rank, rows[0].numel())
        block = scaled @ flat.mT
        total = block if total is None else total + block
    assert total is not None
    return total if total.dtype in (torch.float32, torch.float64) else total.float()


# --- one block a sample -----------------------------------------------------------------------------------------------


def samples_identity(value: float, ones: Tensor, rank: int) -> Tensor:
    """``value · I_r`` a sample, ``(B, r, r)``."""
    identity = torch.eye(rank, dtype=ones.dtype, device=ones.device)
    return value * identity.expand(ones.shape[0], rank, rank)


def samples_apply(own: Tensor, vector: Tensor) -> Tensor:
    """The block-diagonal matrix times a vector (B r,)."""
    return (own @ vector.reshape(own.shape[0], -1, 1)).flatten()


def samples_solve(own: Tensor, vector: Tensor) -> Tensor:
    """Its inverse times a vector (B r,)."""
    solved: Tensor = torch.linalg.solve(own, vector.reshape(own.shape[0], -1, 1))
    return solved.flatten()


def samples_inverse(own: Tensor) -> Blocks:
    """Its inverse as one block over all columns."""
    return (torch.block_diag(*torch.linalg.inv(own)),)


def samples_of_inverse(factors: Blocks, rank: int) -> Tensor:
    """The samples' own blocks of ``X⁻¹``, from the Cholesky factor of ``X``."""
    found = []
    for factor in factors:
        inverse = torch.cholesky_inverse(factor, upper=True)
        samples = inverse.shape[0] // rank
        index = torch.arange(samples, device=inverse.device)
        found.append(inverse.reshape(samples, rank, samples, rank)[index, :, index])
    return torch.cat(found)


def shrink_samples(root: Tensor, gram: Tensor, sign: int) -> tuple[Tensor, Tensor, Tensor]:
    """``Z ← Z R`` with ``R Rᵀ = I - sign · q_uᵀ M⁻¹ q_u``, in the coordinates of the pulled-back factor.

    Args:
        root: ``(B, r, r)``: a sample's Hessian is ``Z root rootᵀ Zᵀ``, so that ``q_u = Ψ_iᵀ root``.
        gram: ``Γ_ii``, ``(B, r, r)``.
        sign: 1, or -1 as Eq. 21-23 print it.

    Returns:
        the new root, the new block ``root rootᵀ``, and how many eigenvalues of ``R Rᵀ`` were negative (taken as 0).
    """
    inner = root.mT @ gram @ root
    identity = torch.eye(inner.shape[-1], dtype=inner.dtype, device=inner.device)
    values, vectors = torch.linalg.eigh(identity - sign * (inner + inner.mT) / 2)
    new = root @ (vectors * values.clamp_min(0).sqrt().unsqueeze(1))
    return new, new @ new.mT, (values < 0).sum()
