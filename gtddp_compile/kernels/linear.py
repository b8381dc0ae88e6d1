"""Per-sample parameter gradients of ``h = x Wᵀ + b`` (docs/theory.md#gram-matrices).

``x`` is ``(B, …, n)``, ``h`` and ``g`` are ``(B, …, m)``; the middle axes are *positions*, ``T`` of them in
all. Then ``γ_i = (Σ_t g_it x_itᵀ, Σ_t g_it)``, and for a spherical metric without positions ``Γ = η_w (X Xᵀ)
∘ (G Gᵀ) + η_b G Gᵀ``. Nothing larger than about ``CHUNK`` elements is built on the way.
"""

import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, is_spherical, pieces

CHUNK = 2**20
"""Bound on the elements of an intermediate tensor."""

HALVED = 512
"""Samples from which on a CPU's symmetric product is made of its upper triangle, a few rows at a time; parts of smaller
ones take longer than the whole (measured)."""

FEW = 8
"""Positions up to which pairs of them are taken one by one."""


def linear_gram_form(samples: int, positions: int, inputs: int, outputs: int) -> str:
    """The cheaper way to the Gram matrix of a spherical weight, by multiplications.

    ``"pairs"`` sums ``(x_is · x_jt)(g_is · g_jt)`` over pairs of positions: ``B² T² (n + m)``.
    ``"materialised"`` builds the per-sample gradients and multiplies them: ``B m n T + B² m n``. A diagonal
    metric (``B² m n`` either way) is materialised, or without positions summed over pairs of samples.
    """
    pairs = samples**2 * positions**2 * (inputs + outputs)
    materialised = samples * inputs * outputs * (positions + samples)
    return "pairs" if pairs <= materialised else "materialised"


def _linear_rows(values: Tensor) -> Tensor:
    """All positions in one axis: ``(B, …, n)`` as ``(B, T, n)``."""
    return values.reshape(values.shape[0], -1, values.shape[-1])


def _linear_blocks(x: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample weight gradients, output rows by output rows: ``(rows, (B, rows, n))``."""
    step = max(1, CHUNK // (x.shape[0] * x.shape[-1]))
    for rows in pieces(g.shape[-1], step):
        columns = g[..., rows].mT
        yield rows, columns * x if x.shape[1] == 1 else columns @ x


def _linear_pairs(x: Tensor, g: Tensor) -> Tensor:
    """``Σ_st (x_is · x_jt)(g_is · g_jt)`` as ``(B, B)``."""
    samples, positions, _ = x.shape
    if positions <= FEW and not torch.compiler.is_compiling():
        return _linear_few_pairs(x, g)
    all_x, all_g = x.flatten(0, 1).mT, g.flatten(0, 1).mT
    step = max(1, CHUNK // (samples * positions**2))
    blocks = []
    for part in pieces(samples, step):
        product = (x[part].flatten(0, 1) @ all_x) * (g[part].flatten(0, 1) @ all_g)
        blocks.append(product.reshape(-1, positions, samples, positions).sum((1, 3)))
    return torch.cat(blocks)


def _linear_few_pairs(x: Tensor, g: Tensor) -> Tensor:
    """The same, its upper triangle a few samples at a time: what is added up stays in the cache."""
    samples, positions, _ = x.shape
    step = max(1, CHUNK // (16 * samples))
    gram, space = g.new_empty(samples, samples), g.new_empty(3, step * samples)
    (x, x_mT), (g, g_mT) = ((v.transpose(0, 1).contiguous(), v.permute(1, 2, 0).contiguous()) for v in (x, g))
    for rows in pieces(samples, step):
        shape = (min(step, samples - rows.start), samples - rows.start)
        inputs, outputs, total = (part[: shape[0] * shape[1]].view(shape) for part in space)
        total.zero_()
        for s, t in itertools.product(range(positions), repeat=2):
            torch.mm(x[s, rows], x_mT[t, :, rows.start :], out=inputs)
            torch.mm(g[s, rows], g_mT[t, :, rows.start :], out=outputs)
            total.addcmul_(inputs, outputs)
        gram[rows, rows.start :] = total
        gram[rows.start :, rows] = total.mT
    return gram


def _linear_sample_pairs(x: Tensor, g: Tensor, metric: Tensor) -> Tensor:
    """``Γ_ij = (g_i ∘ g_j) · M⁻¹ (x_i ∘ x_j)``, pairs ``i ≤ j`` alone; ``x`` ``(B, n)``, ``g`` ``(B, m)``."""
    samples = x.shape[0]
    if torch.compiler.is_compiling():  # indices of a triangle would make the batch a constant
        whole: Tensor = (((x.unsqueeze(1) * x) @ metric.mT) * (g.unsqueeze(1) * g)).sum(2)
        return whole
    left, right = torch.triu_indices(samples, samples, device=x.device)
    step = max(1, CHUNK // (x.shape[1] + g.shape[1]))
    blocks = []
    for part in pieces(left.shape[0], step):
        i, j = left[part], right[part]
        blocks.append((((x[i] * x[j]) @ metric.mT) * (g[i] * g[j])).sum(1))
    values = torch.cat(blocks)
    gram = values.new_empty(samples, samples)
    gram[left, right] = values
    gram[right, left] = values
    return gram


def _linear_weight_gram(x: Tensor, g: Tensor, metric: Tensor | float) -> Tensor:
    """The weight's part of the Gram matrix; ``x`` ``(B, T, n)``, ``g`` ``(B, T, m)``."""
    spherical = is_spherical(metric)
    samples, positions, inputs = x.shape
    if spherical and linear_gram_form(samples, positions, inputs, g.shape[-1]) == "pairs":
        return _linear_pairs(x, g) * metric
    if not spherical and positions == 1 and samples * (inputs + g.shape[-1]) <= 2 * inputs * g.shape[-1]:
        return _linear_sample_pairs(x[:, 0], g[:, 0], metric)  # type: ignore[arg-type]
    gram = None
    for rows, block in _linear_blocks(x, g):
        found = linear_inputs((block if spherical else block * metric[rows] ** 0.5).flatten(1))  # type: ignore[index]
        gram = found if gram is None else gram.add_(found)
    return gram.mul_(metric) if spherical else gram  # type: ignore[union-attr,return-value]


def linear_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``: the weight's ``(m, n)``, the bias's ``(m,)``."""
    flat = layer.g.flatten(0, -2)
    weight = (flat.mT @ layer.operands[0].flatten(0, -2),) if layer.wants[0] else ()
    return (*weight, flat.sum(0)) if layer.wants[1] else weight


def linear_subtract(layer: Layer, targets: tuple[Tensor, ...], rates: tuple[float, ...]) -> None:
    """``target -= rate · γᵀ 1`` for each wanted parameter, in place: the weight's by one product."""
    flat = layer.g.flatten(0, -2)
    if layer.wants[0]:
        targets[0].addmm_(flat.mT, layer.operands[0].flatten(0, -2), alpha=-rates[0])
    if layer.wants[1]:
        targets[-1].sub_(flat.sum(0), alpha=rates[-1])


def linear_inputs(x: Tensor) -> Tensor:
    """``X Xᵀ``, ``(B, B)``, of one row a sample; of a large one the blocks below the diagonal are copies."""
    samples = len(x)
    if torch.compiler.is_compiling() or x.device.type != "cpu" or samples < HALVED:
        return x @ x.mT
    product = x.new_empty(samples, samples)
    for rows in pieces(samples, -(-samples // 4)):
        torch.mm(x[rows], x[rows.start :].mT, out=product[rows, rows.start :])
        product[rows.stop :, rows] = product[rows, rows.stop :].mT
    return product


def linear_pulled(g: Tensor, weight: Tensor, x: Tensor) -> Tensor:
    """``g W``, the gradient of ``x``."""
    return (g @ weight.to(g.dtype)).to(x.dtype)


def linear_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``; each metric spherical or of the parameter's shape."""
    x, g, wants = layer.operands[0], layer.g, layer.wants
    if x.dim() == 2 and all(map(is_spherical, metric)):
        gram = linear_inputs(g)
        if not wants[0]:
            return gram.mul_(metric[-1])
        factor = linear_inputs(x) * metric[0]
        return gram.mul_(factor.add_(metric[1]) if len(metric) > 1 else factor)
    x, g = _linear_rows(x), _linear_rows(g)
    bias = linear_inputs(g.sum(1) * metric[-1] ** 0.5) if wants[1] else None
    if not wants[0]:
        return bias  # type: ignore[return-value]
    gram = _linear_weight_gram(x, g, metric[0])
    return gram if bias is None else gram.add_(bias)


def linear_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    x, g = _linear_rows(layer.operands[0]), _linear_rows(layer.g)
    samples, positions, inputs = x.shape
    diagonal = g.new_zeros(samples)
    if layer.wants[0]:
        weight = metric[0]
        spherical = is_spherical(weight)
        if positions == 1:
            squares = x.square()
            norms = squares.sum(-1, keepdim=True) * weight if spherical else squares @ weight.mT  # type: ignore[union-attr]
            diagonal = diagonal + (g.square() * norms).sum((1, 2))
        elif spherical and positions * (inputs + g.shape[-1]) <= inputs * g.shape[-1]:
            step = max(1, CHUNK // positions**2)
            for part in pieces(samples, step):
                product = (x[part] @ x[part].mT) * (g[part] @ g[part].mT)
                diagonal[part] = product.sum((1, 2)) * weight
        else:
            for rows, block in _linear_blocks(x, g):
                scale = weight if spherical else weight[rows]  # type: ignore[index]
                diagonal = diagonal + (block.square() * scale).sum((1, 2))
    if layer.wants[1]:
        diagonal = diagonal + (g.sum(1).square() * metric[-1]).sum(1)
    return diagonal


def linear_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩ = Σ_t g_it · (V x_it + v_b)``, ``(B,)``."""
    x, g, wants = layer.operands[0], layer.g, layer.wants
    if not wants[0]:
        return _linear_rows(g).sum(1) @ direction[0]
    if g.shape[-1] * 2 < x.shape[-1]:
        change = F.linear(x, direction[0], direction[1] if wants[1] else None)
        return (g * change).flatten(1).sum(1)
    found = (g @ direction[0]).mul_(x).flatten(1).sum(1)  # a product of untransposed matrices
    return found + _linear_rows(g).sum(1) @ direction[1] if wants[1] else found


def linear_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``: the weight's ``(B, m, n)``, the bias's ``(B, m)``."""
    x, g = _linear_rows(layer.operands[0]), _linear_rows(layer.g)
    weight = (g.mT * x if x.shape[1] == 1 else g.mT @ x,) if layer.wants[0] else ()
    return (*weight, g.sum(1)) if layer.wants[1] else weight


def linear_rows(layer: Layer) -> tuple[Tensor, Tensor]:
    """Homogeneous inputs ``(B, 1, T, n)`` and output gradients ``(B, 1, T, m)`` (kernels of ``kronecker``)."""
    x = _linear_rows(layer.operands[0])
    x = F.pad(x, (0, 1), value=1.0) if layer.wants[1] else x
    return x.unsqueeze(1), _linear_rows(layer.g).unsqueeze(1)
