"""Kronecker metrics ``M⁻¹`` of one layer, or of layers that decide together, without ``γ`` (docs/theory.md#curvatures).

A layer is seen as *rows*: homogeneous inputs ``x`` ``(B, G, T, n)`` (a one appended for a bias) and output gradients
``g`` ``(B, G, T, m)`` at ``T`` positions in ``G`` groups, so that ``γ_i = Σ_t g_it x_itᵀ``. A metric is a tuple
``(maps, scale, cross, rates)``:

* ``maps``: for every player ``(X, Y)``, ``(G, n, N)`` and ``(G, m, M)``: ``x̂ = x X`` and ``ĝ = g Y`` are coordinates in
  which ``M`` is diagonal (K-FAC: Cholesky factors of the inverses, EK-FAC: eigenbases; players that decide together
  have rows of one joint matrix; FOOF has no ``Y``: ``None``, the identity);
* ``scale``: the inverse of that diagonal, a float or ``(G, M, N)``; the learning rates are not in it;
* ``cross``: ``None``, or for players of the same rows (Corollary 7) what ties each to every one, itself included;
* ``rates``: the players' learning rates ``η_p``; ``M⁻¹`` has the factor ``√(η_p η_q)``.

With ``γ̂_i = Σ_p √η_p Σ_t ĝ_p x̂_pᵀ`` then ``Γ_ij = ⟨γ̂_i, scale ∘ γ̂_j⟩``: a sum over players is a sum over positions.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Joined, Layer, part_of, wide
from gtddp_compile.kernels.coordinates import (
    Coordinates,
    _mapped,
    _separated_scale,
    coordinates_form,
    coordinates_moment,
    groups_gram,
    kronecker_coordinates,
)
from gtddp_compile.kernels.linear import linear_gram, linear_gram_diagonal
from gtddp_compile.kernels.rows import joint_gram
from gtddp_compile.kernels.turned import Turned, as_matrix

CHUNK = 2**24
"""Bound on the elements of an intermediate tensor."""

Maps = tuple[tuple[Tensor, Tensor | None], ...]
Metric = tuple[Maps, Tensor | float, Tensor | None, tuple[float, ...]]


class Rows(NamedTuple):
    """A layer whose rows are made piece by piece, when they are asked for.

    ``moment`` is a kernel and the layer of which it makes ``Σ x xᵀ`` ``(G, n, n)``, where there is one. ``joined``: the
    layer has a part of the batch, and statistics are of the whole.
    """

    make: Callable[[Layer], tuple[Tensor, Tensor]]
    layer: Layer
    blocks: int = 1
    moment: tuple[Callable[[Layer], Tensor], Layer] | None = None
    joined: Joined | None = None


def flat_rows(layer: Layer) -> tuple[Tensor, Tensor]:
    """Per-sample gradients ``γ`` (the operands) themselves as output gradients of the input 1: an exact small block."""
    gamma = torch.cat([part.reshape(part.shape[0], -1) for part in layer.operands], 1)
    return gamma.new_ones(gamma.shape[0], 1, 1, 1), gamma[:, None, None]


def made_rows(layer: Layer) -> tuple[Tensor, Tensor]:
    """Rows that are there already, as a layer's."""
    return layer.operands[0], layer.g


def in_blocks(rows: tuple[Tensor, Tensor], blocks: int) -> tuple[Tensor, Tensor]:
    """Inputs ``(B, 1, T, n)`` split into blocks, zeros behind the last; each has all output gradients."""
    x, g = rows
    if blocks == 1:
        return rows
    width = -(-x.shape[-1] // blocks)
    x = F.pad(x, (0, blocks * width - x.shape[-1])).squeeze(1).unflatten(-1, (blocks, width)).transpose(1, 2)
    return x, g.expand(-1, blocks, -1, -1)


def _kronecker_rows(rows: Rows, part: slice) -> tuple[Tensor, Tensor]:
    """Rows of some samples, in float32 at least: factors are."""
    x, g = in_blocks(rows.make(part_of(rows.layer, part)), rows.blocks)
    return wide(x), wide(g)


def _row_shapes(rows: Rows) -> tuple[torch.Size, torch.Size]:
    """Of ``x`` and ``g`` but for the samples, which are asked for at every step: nothing is made that is not there."""
    if rows.make is made_rows and rows.blocks == 1:
        return rows.layer.operands[0].shape, rows.layer.g.shape
    x, g = _kronecker_rows(rows, slice(0, 1))
    return x.shape, g.shape


def _kronecker_slices(layers: Sequence[Rows], span: slice | None = None) -> Iterator[slice]:
    """Pieces of a span of samples (``None``: of all) whose rows stay within the bound."""
    span = slice(0, len(layers[0].layer.g)) if span is None else span
    if span.stop <= span.start:
        return
    first = slice(span.start, span.start + 1)
    size = sum(x.numel() + g.numel() for x, g in (_kronecker_rows(layer, first) for layer in layers))
    step = max(1, CHUNK // max(1, size))
    for start in range(span.start, span.stop, step):
        yield slice(start, min(start + step, span.stop))


def kronecker_widths(layers: Sequence[Rows]) -> tuple[tuple[int, int], ...]:
    """``(n, m)`` of every layer's rows."""
    found = [_kronecker_rows(layer, slice(0, 1)) for layer in layers]
    return tuple((x.shape[-1], g.shape[-1]) for x, g in found)


def kronecker_factor_shapes(layers: Sequence[Rows]) -> dict[str, tuple[int, int, int]]:
    """Shapes of the factors of the layers' rows side by side, by what a state calls them."""
    shapes = [_row_shapes(layer) for layer in layers]
    groups, wide_x, wide_g = shapes[0][0][1], sum(x[3] for x, _ in shapes), sum(g[3] for _, g in shapes)
    return {"factor_x": (groups, wide_x, wide_x), "factor_g": (groups, wide_g, wide_g)}


def rows_together(layers: Sequence[Rows]) -> int:
    """Rows of the layers' inputs in the batch, that of all ranks."""
    first = layers[0]
    samples = len(first.layer.g) if first.joined is None else first.joined.samples_all
    return samples * _row_shapes(first)[0][2]


def inputs_apart(factor: Tensor, layers: Sequence[Rows], biased: Sequence[bool], *, blocks: bool) -> Tensor:
    """``(G, N)``: 1 at a factor's inputs, 0 at the 1 that is the input of a bias; ``blocks``: of one layer."""
    found = factor.new_ones(factor.shape[:2])
    if blocks and len(factor) > 1 and biased[0]:  # one row, zeros behind its last
        places = torch.arange(found.numel(), device=found.device)
        last = (places * (factor.diagonal(dim1=1, dim2=2).flatten() != 0)).amax()
        return (places != last).to(found).view_as(found)
    ends = accumulate(n for n, _ in kronecker_widths(layers)) if len(layers) > 1 else (found.shape[1],)
    for end, one in zip(ends, biased, strict=True):
        found[:, end - 1] *= not one
    return found


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    """The players' rows ``(B, G, T, n_p)`` as ``(G, B T, N)``."""
    whole = rows[0] if len(rows) == 1 else torch.cat(list(rows), -1)
    return whole.transpose(0, 1).flatten(1, 2)


def kronecker_factors(
    layers: Sequence[Rows], start: float, old: tuple[Tensor | None, ...] = (None, None), keep: float = 0.0
) -> tuple[Tensor, ...]:
    """``A = E[x xᵀ]`` ``(G, N, N)`` and ``B = E[V_h V_hᵀ]`` ``(G, M, M)`` of the layers' rows side by side (Eq. 50).

    The layers' ``g`` is ``V_h = α_i g_i``; with ``α_T = start`` the expectation over samples is ``Σ_i V_h V_hᵀ / α_T``:
    with feedback off the mean of ``g gᵀ`` for a mean loss, its sum for a sum. Positions as in KFC: inputs are summed
    over them, gradients averaged.

    Args:
        layers, start: see above.
        old: factors of which the running average ``keep · old + (1 - keep) · new`` is made, as the product is, or
            ``None``; one: ``A`` alone is made.
        keep: the share of the old ones.
    """
    joined = layers[0].joined
    if joined is not None:  # A is a mean over samples, B a sum
        own = kronecker_factors([rows._replace(joined=None) for rows in layers], start, (None,) * len(old))
        whole = joined.all_reduce((own[0] * joined.share, *own[1:]))
        return tuple(
            new if o is None else torch.lerp(new, o.to(new.dtype), keep) for new, o in zip(whole, old, strict=True)
        )
    totals, sides, samples = list(old), range(len(old)), len(layers[0].layer.g)
    beta, new = (1.0, 1.0) if old[0] is None else (keep, 1.0 - keep)
    if layers[0].moment is not None:
        kernel, layer = layers[0].moment
        made, sides = kernel(layer).mul_(new / samples), sides[1:]
        totals[0] = made if old[0] is None else made.add_(old[0], alpha=keep)
    for part in _kronecker_slices(layers) if sides else ():
        found = [_kronecker_rows(layer, part) for layer in layers]
        shares = (new / samples, new / (start * found[0][1].shape[2]))
        for side in sides:
            totals[side] = _gram_added(totals[side], _side_by_side([r[side] for r in found]), beta, shares[side])
        beta = 1.0
    return tuple(total for total in totals if total is not None)


def _gram_added(total: Tensor | None, rows: Tensor, beta: float, alpha: float) -> Tensor:
    """``beta · total + alpha · rowsᵀ rows`` of rows ``(G, R, n)``; the total is read, not written."""
    if total is None:
        return torch.bmm(rows.mT, rows).mul_(alpha)
    return torch.baddbmm(total.to(rows.dtype), rows.mT, rows, beta=beta, alpha=alpha)


def kronecker_moment(layers: Sequence[Rows], start: float, maps: Maps) -> Tensor:
    """``E[(Σ_t ĝ_t x̂_tᵀ)²]`` ``(G, M, N)`` in the eigenbases: what EK-FAC puts in place of ``λ_B λ_Aᵀ``."""
    map_x, map_g = maps[0]
    assert map_g is not None  # an eigenbasis has both sides
    groups, wide_x, wide_g = map_x.shape[0], map_x.shape[-1], map_g.shape[-1]
    total = maps[0][0].new_zeros(groups, wide_g, wide_x)
    step, ones = max(1, CHUNK // (groups * wide_x * wide_g)), total.new_ones(len(layers[0].layer.g))
    for outer in _kronecker_slices(layers):
        for begin in range(outer.start, outer.stop, step):
            part = slice(begin, min(begin + step, outer.stop))
            total = total + coordinates_moment(_joint_coordinates(layers, maps, part), ones[part], start)
    joined = layers[0].joined
    return total if joined is None else joined.all_reduce(total)


def _joint_coordinates(layers: Sequence[Rows], maps: Maps, part: slice) -> Coordinates:
    """Coordinates of some samples: of one player's ``γ``, or of rows that several players have side by side."""
    x, g = _kronecker_rows(layers[0], part)
    if len(layers) == 1:
        form = coordinates_form(len(layers[0].layer.g), x.shape[2], x.shape[3], g.shape[3])
        return kronecker_coordinates(x, g, maps[0], form)
    pairs = [kronecker_coordinates(x, g, maps[0], "rows")]
    pairs += [
        kronecker_coordinates(*_kronecker_rows(layer, part), own, "rows")
        for layer, own in zip(layers[1:], maps[1:], strict=True)
    ]
    return tuple(sum(side[1:], side[0]) for side in zip(*pairs, strict=True))


def _kronecker_stacked(layers: Sequence[Rows], metric: Metric, part: slice) -> tuple[Tensor, Tensor]:
    """``x̂`` and ``√η ĝ`` of some samples, players one after the other along the positions."""
    maps, _, cross, rates = metric
    xs, gs = [], []
    for layer, (map_x, map_g), rate in zip(layers, maps, rates, strict=True):
        x, g = _kronecker_rows(layer, part)
        x, g = kronecker_coordinates(x, g, (map_x, map_g), "rows")
        xs.append(x)
        gs.append(g * (1.0 if cross is not None else rate**0.5))
        if cross is not None:  # the same rows for every player: once is enough, their number is in the scale
            break
    return torch.cat(xs, 2), torch.cat(gs, 2)


def _kronecker_gamma(layers: Sequence[Rows], metric: Metric, part: slice) -> Tensor | None:
    """``γ̂ = Σ_p √η_p Y_pᵀ γ_p X_p`` ``(B, G, M, N)``: with more positions than outputs ``γ_p`` is less than its rows.

    ``None`` where mapping the rows, position by position, is cheaper, or sums over pairs of positions are.
    """
    maps, _, cross, rates = metric
    rows = [_kronecker_rows(layer, part) for layer in (layers[:1] if cross is not None else layers)]
    total: Tensor | None = None
    for (x, g), (map_x, map_g), rate in zip(rows, maps, rates, strict=False):
        (samples, _, positions, inputs), outputs = x.shape, g.shape[-1]
        wide_x, wide_g = map_x.shape[-1], outputs if map_g is None else map_g.shape[-1]
        mapped = positions * (inputs * wide_x + (0 if map_g is None else outputs * wide_g))
        pairs = samples * positions**2 * (wide_x + wide_g)
        made = positions * wide_x * wide_g + samples * wide_x * wide_g
        here = positions * inputs * outputs + outputs * (inputs * wide_x + (0 if map_g is None else wide_g * wide_x))
        if positions == 1 or here + samples * wide_x * wide_g >= mapped + min(pairs, made):
            return None
        gamma = _mapped(g.mT @ x, (map_x, map_g)) * (1.0 if cross is not None else rate**0.5)
        total = gamma if total is None else total + gamma
    return total


def _kronecker_scale(metric: Metric) -> Tensor | float:
    """``scale`` of one row; with ``cross``, ``Σ_pq √(η_p η_q) M⁻¹_pq`` of players with the same rows."""
    _, scale, cross, rates = metric
    if cross is None:
        return scale
    total: Tensor = cross * sum(rate**0.5 for rate in rates) ** 2 + scale * sum(rates)
    return total


def kronecker_gram(
    layers: Sequence[Rows], metric: Metric, rows: Sequence[slice], *, separable: bool = False
) -> tuple[Tensor, ...]:
    """``Γ = Σ_pq γ_p M⁻¹_pq γ_qᵀ``, a block a group of samples.

    Without positions ``(X A⁻¹ Xᵀ) ∘ (G B⁻¹ Gᵀ)``; with them pairs of positions, or ``γ̂`` in chunks where its rows would
    not fit.
    """
    scale = _kronecker_scale(metric)
    if separable and isinstance(scale, Tensor):
        (maps, _, cross, rates), (by_g, by_x) = metric, _separated_scale(scale)
        maps = tuple((map_x * by_x, None if map_g is None else map_g * by_g) for map_x, map_g in maps)
        metric, scale = (maps, 1.0, cross, rates), 1.0
    return tuple(_kronecker_gram_of(layers, metric, scale, row) for row in rows)


def _kronecker_gram_of(layers: Sequence[Rows], metric: Metric, scale: Tensor | float, row: slice) -> Tensor:
    parts = list(_kronecker_slices(layers, row))
    if len(parts) == 1:
        gamma = _kronecker_gamma(layers, metric, row)
        if gamma is not None:
            return (gamma * scale).flatten(1) @ gamma.flatten(1).mT
        x, g = _kronecker_stacked(layers, metric, row)
        return groups_gram(linear_gram, x, g, scale)
    samples, (map_x, map_g) = row.stop - row.start, metric[0][0]
    outputs = kronecker_widths(layers)[0][1] if map_g is None else map_g.shape[-1]
    gram = map_x.new_zeros(samples, samples)
    step = max(1, CHUNK // (samples * map_x.shape[-1] * map_x.shape[0]))
    for start in range(0, outputs, step):
        columns = slice(start, start + step)
        rows = (_kronecker_stacked(layers, metric, part) for part in parts)
        gamma = torch.cat([g[..., columns].mT @ x for x, g in rows])
        scaled = gamma * (scale[:, columns] if isinstance(scale, Tensor) else scale)
        gram = gram + scaled.flatten(1) @ gamma.flatten(1).mT
    return gram


def turned_gram(
    kernel: Callable[[Layer], tuple[Tensor, Tensor]], layer: Layer, metric: tuple[Any, ...], rows: Sequence[slice], *,
    separable: bool = False,
) -> tuple[Tensor, ...]:  # fmt: skip
    """``Γ`` of a layer with rows (``kernel``) whose weight has a :class:`Turned` metric, and whose bias has its own."""
    weight = metric[0] if isinstance(metric[0], Turned) else Turned(None, None, as_matrix(metric[0]))
    (x, g), scale = (None if side is None else side[None] for side in weight[:2]), weight.scale
    scale = scale[None] if isinstance(scale, Tensor) else scale
    made, swapped = kernel, x is None and g is not None
    if swapped:  # the kernels want X; a sum of outer products has no first side
        x, g, made = g, None, lambda own: kernel(own)[::-1]
        scale = scale.mT if isinstance(scale, Tensor) else scale
    own = Rows(made, layer._replace(wants=(True, False)))
    x = wide(layer.g.new_ones(kronecker_widths((own,))[0][0])).diag()[None] if x is None else x
    found = kronecker_gram((own,), (((x, g),), scale, None, (1.0,)), rows, separable=separable)
    if not layer.wants[1]:
        return found
    biases = joint_gram((_kronecker_rows(own, slice(None))[1 - swapped].sum(2).flatten(1),), metric[1:], rows)
    return tuple(map(torch.add, found, biases))


def kronecker_gram_diagonal(layers: Sequence[Rows], metric: Metric) -> Tensor:
    """The diagonal of ``Γ``, ``(B,)``."""
    scale, found = _kronecker_scale(metric), []
    for part in _kronecker_slices(layers):
        x, g = _kronecker_stacked(layers, metric, part)
        found.append(groups_gram(linear_gram_diagonal, x, g, scale))
    return torch.cat(found)


def kronecker_sample_grams(layers: Sequence[Rows], metric: Metric, rank: int) -> Tensor:
    """``Γ_ii``, ``(B, r, r)``, from layers of ``1 + r`` columns a sample; the gradient's own column is left out."""
    samples = len(layers[0].layer.g) // (1 + rank)
    own = [slice(i * (1 + rank) + 1, (i + 1) * (1 + rank)) for i in range(samples)]
    return torch.stack(kronecker_gram(layers, metric, own))


def kronecker_precondition(gradients: Sequence[Tensor], metric: Metric) -> tuple[Tensor, ...]:
    """``(M⁻¹ ĝ)_p / η_p`` of every player, from ``(G, m, n)`` gradients (Eq. 45; of a coalition Eq. 52, 53).

    A player whose learning rate is 0 stays where it is, and gets 0.
    """
    maps, scale, cross, rates = metric
    inner = [
        _mapped(wide(gradient)[None], (map_x, map_g))[0] * rate**0.5
        for gradient, (map_x, map_g), rate in zip(gradients, maps, rates, strict=True)
    ]
    total = sum(inner[1:], inner[0])
    found = []
    for own, (map_x, map_g), rate, gradient in zip(inner, maps, rates, gradients, strict=True):
        scaled = total * scale if cross is None else own * scale + total * cross
        back = (scaled if map_g is None else map_g @ scaled) @ map_x.mT * (rate**-0.5 if rate else 0.0)
        found.append(back.to(gradient.dtype))
    return tuple(found)
