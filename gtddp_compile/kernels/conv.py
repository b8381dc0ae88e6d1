"""Per-sample parameter gradients of convolutions in one to three dimensions (theory: section 4d).

With patches unfolded, a convolution is a linear layer at ``T`` output positions, group by group: ``x``
becomes ``(B, G, n, T)`` with ``n = (channels / G) · kernel``, ``g`` is ``(B, G, m, T)`` with ``m = outputs /
G``, and ``γ_i = Σ_t g_it x_itᵀ``. Patches are unfolded a bounded piece at a time (``CHUNK`` elements), each
at most once a call.

A sample may have several images (frames, windows): ``x`` is ``(B, k, channels, …)`` and ``g`` likewise, and ``γ_i``
sums over them as over positions.

Options of every kernel: ``stride``, ``padding``, ``dilation`` (tuples, one entry an axis; ``padding`` may be
``"same"``) and ``groups``. Transposed convolutions go through the generic rule.
"""

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 2**22
"""Bound on the elements of an intermediate tensor: what is read again soon stays in the last-level cache."""

ADD = 40
"""What an elementwise multiplication or addition on a large tensor costs, in multiplications of a matrix product."""

GROUPED = 256
"""Output positions from which a grouped convolution of any number of channels beats unfolded patches on a CPU."""

BLOCK = 8
"""Channels that torch's own convolutions take together: with fewer, patches are faster."""


def conv_gram_form(samples: int, positions: int, pixels: int, channels: int, kernel: int, outputs: int) -> str:
    """The cheapest way to the Gram matrix of a spherical weight, by multiplications a group.

    Args:
        samples: ``B``.
        positions: ``T``, of the output.
        pixels: ``S``, of the input.
        channels, outputs: of one group.
        kernel: elements of the kernel; ``n = channels · kernel``.

    Returns:
        ``"patches"``: sum over pairs of positions, ``½ B² T² (n + m)``. ``"pixels"``: as that, but inner products
        of patches are sums of inner products of pixels, ``B² S² channels`` and ``kernel`` additions a pair;
        one block of memory, so for at most ``4 CHUNK`` pairs. ``"materialised"``: per-sample gradients, ``B m n T +
        B² m n``.
    """
    patch, pairs = channels * kernel, (samples * positions) ** 2
    costs = {
        "patches": pairs * (patch + outputs + ADD) / 2,
        "materialised": samples * patch * outputs * (positions + samples),
    }
    if kernel > 1 and max(pairs, (samples * pixels) ** 2) <= 4 * CHUNK:
        costs["pixels"] = (samples * pixels) ** 2 * channels + pairs * (outputs + ADD * (1 + kernel / 2))
    return min(costs, key=costs.__getitem__)


def _conv_pieces(total: int, step: int) -> tuple[slice, ...]:
    """Pieces of a bounded size. In a graph there is one: a loop would make its sizes constants."""
    if torch.compiler.is_compiling():
        return (slice(0, total),)
    return tuple(slice(start, start + step) for start in range(0, total, step))


def _conv_margins(
    kernel: tuple[int, ...], padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> tuple[tuple[int, int], ...]:
    """Zeros before and after each axis; ``"same"`` puts the odd one after, as torch does."""
    if padding == "valid":
        return tuple((0, 0) for _ in kernel)
    if isinstance(padding, str):
        totals = [gap * (size - 1) for size, gap in zip(kernel, dilation, strict=True)]
        return tuple((total // 2, total - total // 2) for total in totals)
    return tuple((width, width) for width in padding)


def _conv_padded(x: Tensor, margins: tuple[tuple[int, int], ...]) -> Tensor:
    """``x`` with zeros around its spatial axes."""
    widths = [width for pair in reversed(margins) for width in pair]
    return F.pad(x, widths) if any(widths) else x


def _conv_groups(values: Tensor, groups: int) -> Tensor:
    """``(B, channels, …)`` as ``(B, G, channels / G, …)``."""
    shape = values.shape
    return values.reshape(shape[0], groups, shape[1] // groups, *shape[2:])


def _conv_symmetric(
    x: Tensor, weight: Tensor, padding: tuple[int, ...] | str, dilation: tuple[int, ...]
) -> tuple[Tensor, tuple[int, ...]]:
    """``x`` and a padding of equal widths on both sides that together say the same."""
    margins = _conv_margins(tuple(weight.shape[2:]), padding, dilation)
    if all(before == after for before, after in margins):
        return x, tuple(before for before, _ in margins)
    return _conv_padded(x, margins), tuple(0 for _ in margins)


def _conv_windows(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]) -> Tensor:
    """A view ``(…, *kernel, *positions)`` of an input ``(…, *pixels)`` that is padded already."""
    first, axes = x.dim() - len(kernel), len(kernel)
    for axis, (size, step, gap) in enumerate(zip(kernel, stride, dilation, strict=True)):
        x = x.unfold(first + axis, gap * (size - 1) + 1, step)[..., ::gap]
    return x.permute(*range(first), *range(first + axes, first + 2 * axes), *range(first, first + axes))


def _conv_patches(
    x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...], groups: int
) -> Tensor:
    """Patches ``(B, G, n, T)`` of an input that is padded already."""
    x = _conv_windows(x, kernel, stride, dilation)
    positions = math.prod(x.shape[2 + len(kernel) :])
    return x.reshape(x.shape[0], groups, x.shape[1] // groups * math.prod(kernel), positions)


def _conv_grouped(positions: int, channels: int, kernel: int) -> bool:
    """Whether a grouped convolution beats unfolded patches (measured: benchmarks/tried.py), whose copies weigh most."""
    return kernel > 1 and channels >= BLOCK and (positions >= GROUPED or 16 * positions >= channels**2)


def _conv_gradients(
    x: Tensor, g: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Tensor:
    """``γ`` ``(B, G, m, n)`` from a padded ``x`` ``(B, G, channels, …)`` and ``g`` ``(B, G, m, …)``."""
    samples, groups, channels = x.shape[:3]
    outputs, positions = g.shape[2], g[0, 0, 0].numel()
    if x.device.type == "cpu" and _conv_grouped(positions, channels, math.prod(kernel)):
        # One weight gradient with every sample a group of its own, no patches unfolded; torch copies all it reads.
        pieces = _conv_pieces(samples, max(1, 2 * CHUNK // (x[0].numel() + g[0].numel())))
        if len(pieces) > 1:
            return torch.cat([_conv_gradients(x[rows], g[rows], kernel, stride, dilation) for rows in pieces])
        count, zeros = samples * groups, [0 for _ in kernel]
        weight = x.new_empty(1).expand(count * outputs, channels, *kernel)
        own, part = (value.reshape(1, -1, *value.shape[3:]) for value in (g, x))
        gradients: Tensor = torch.ops.aten.convolution_backward(
            own, part, weight, None, stride, zeros, dilation, False, zeros, count, [False, True, False]
        )[1]
        return gradients.reshape(samples, groups, outputs, -1)
    step = max(1, CHUNK // (groups * channels * math.prod(kernel) * positions))
    parts = ((g[rows].flatten(3), x[rows].flatten(1, 2)) for rows in _conv_pieces(samples, step))
    blocks = [own @ _conv_patches(part, kernel, stride, dilation, groups).mT for own, part in parts]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks)


def _conv_blocks(
    x: Tensor, g: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...], dilation: tuple[int, ...]
) -> Iterator[tuple[slice, Tensor]]:
    """Per-sample gradients, some input channels at a time: ``(channels, (B, G, m, channels · kernel))``."""
    step = max(1, CHUNK // (g.shape[0] * g.shape[1] * g.shape[2] * math.prod(kernel)))
    for channels in _conv_pieces(x.shape[2], step):
        yield channels, _conv_gradients(x[:, :, channels], g, kernel, stride, dilation)


def _conv_add_gram(gram: Tensor, rows: Tensor) -> None:
    """``gram += rows rowsᵀ``, three of its four blocks by products."""
    half = len(rows) // 2
    gram[:half].addmm_(rows[:half], rows.mT)
    gram[half:, half:].addmm_(rows[half:], rows[half:].mT)
    gram[half:, :half] = gram[:half, half:].mT


def _conv_pairs(x: Tensor, g: Tensor) -> Tensor:
    """``Σ_st (x_is · x_jt)(g_is · g_jt)``, ``(B, B)``: ``x`` ``(B, G, n, T)``, ``g`` ``(B, G, m, T)``.

    Positions lie outermost, and of a pair of positions ``s < t`` and ``t < s`` only the first is computed: the
    other is its transpose.
    """
    samples, groups, _, positions = x.shape
    x, g = (value.permute(1, 3, 0, 2).contiguous() for value in (x, g))  # (G, T, B, …)
    step = max(1, math.ceil(positions / 4))
    if not torch.compiler.is_compiling():
        step = max(1, min(step, CHUNK // (groups * samples**2 * positions)))
    gram = x.new_zeros(samples, samples)
    for start in range(0, positions, step):
        stop = min(start + step, positions)
        own = (x[:, start:stop].flatten(1, 2), g[:, start:stop].flatten(1, 2))
        gram += _conv_pair_sum(*own, *own, samples)
        if stop < positions:
            later = _conv_pair_sum(*own, x[:, stop:].flatten(1, 2), g[:, stop:].flatten(1, 2), samples)
            gram += later + later.mT
    return gram


def _conv_pair_sum(x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor, samples: int) -> Tensor:
    """``(x xᵀ) ∘ (g gᵀ)`` of rows ``(G, positions · B, …)``, summed over groups and pairs of positions."""
    product = (x @ other_x.mT).mul_(g @ other_g.mT)
    return product.reshape(x.shape[0], -1, samples, other_x.shape[1] // samples, samples).sum((0, 1, 3))


def _conv_pixel_pairs(
    x: Tensor,
    g: Tensor,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    margins: tuple[tuple[int, int], ...],
) -> Tensor:
    """As :func:`_conv_pairs`, inner products of patches as sums of those of pixels.

    ``x`` ``(B, G, channels, …)`` is not padded; ``g`` is ``(B, G, m, …)``. For each element ``k`` of the kernel the
    pixel Gram matrix, moved by ``k`` in both its positions, is added; what lies in the margins is zero.
    """
    samples, groups, axes = x.shape[0], x.shape[1], len(kernel)
    pixels, positions = tuple(x.shape[3:]), tuple(g.shape[3:])
    order = (1, *range(3, 3 + axes), 0, 2)
    rows = x.permute(order).reshape(groups, -1, x.shape[2])
    of_pixels = (rows @ rows.mT).reshape(groups, *pixels, samples, *pixels, samples)
    total = x.new_zeros(groups, *positions, samples, *positions, samples)
    for element in itertools.product(*map(range, kernel)):
        target, source = [], []
        for axis, index in enumerate(element):
            shift, step = index * dilation[axis] - margins[axis][0], stride[axis]
            first = max(0, -(shift // step))  # the first output position whose pixel is there
            last = min(positions[axis], (pixels[axis] - 1 - shift) // step + 1)
            target.append(slice(first, max(first, last)))
            source.append(slice(first * step + shift, max(first, last) * step + shift, step))
        if all(part.stop > part.start for part in target):
            whole = slice(None)
            total[(whole, *target, whole, *target)] += of_pixels[(whole, *source, whole, *source)]
    rows = g.permute(order).reshape(groups, -1, g.shape[2])
    product = total.reshape(groups, rows.shape[1], rows.shape[1]).mul_(rows @ rows.mT)
    return product.reshape(groups, -1, samples, math.prod(positions), samples).sum((0, 1, 3))


def _conv_metric(metric: Tensor, channels: slice, groups: int) -> Tensor:
    """A diagonal metric's part for a block: ``(G, m, channels · kernel)``."""
    shape = metric.shape
    return metric.reshape(groups, shape[0] // groups, *shape[1:])[:, :, channels].flatten(2)


def _conv_images(operands: tuple[Tensor, ...], g: Tensor, params: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """``x`` and ``g`` image by image: ``(B k, channels, …)``."""
    x = operands[0]
    return (x.flatten(0, 1), g.flatten(0, 1)) if g.dim() > params[0].dim() else (x, g)


def _conv_samples(rows: Tensor, samples: int) -> Tensor:
    """Rows of images ``(B k, …)`` added up sample by sample: ``(B, …)``."""
    return rows if rows.shape[0] == samples else rows.unflatten(0, (samples, -1)).sum(1)


def _conv_beside(rows: Tensor, samples: int) -> Tensor:
    """Positions of all images of a sample side by side: ``(B k, G, n, T)`` as ``(B, G, n, k T)``."""
    return rows if rows.shape[0] == samples else rows.unflatten(0, (samples, -1)).movedim(1, 3).flatten(3)


def conv_weighted(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, ...]:
    """``γᵀ 1``: the weight's and the bias's shape."""
    x, g = _conv_images(operands, g, params)
    bias = (g.flatten(2).sum((0, 2)),) if wants[1] else ()
    if not wants[0]:
        return bias
    x, widths = _conv_symmetric(x, params[0], padding, dilation)
    zeros, only_weight = [0 for _ in stride], [False, True, False]
    weight: Tensor = torch.ops.aten.convolution_backward(
        g, x, params[0], None, stride, widths, dilation, False, zeros, groups, only_weight
    )[1]
    return (weight, *bias)


def conv_gram(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``; each metric spherical or of the parameter's shape."""
    samples = g.shape[0]
    gram = g.new_zeros(samples, samples)
    x, g = _conv_images(operands, g, params)
    if wants[0]:
        weight, kernel = metric[0], tuple(params[0].shape[2:])
        spherical = not isinstance(weight, Tensor) or weight.dim() == 0
        margins, rows, images = _conv_margins(kernel, padding, dilation), _conv_groups(g, groups), len(g) // samples
        sizes = (params[0].shape[1], math.prod(kernel))  # with several images a patch is no sum over pixels of one
        form = conv_gram_form(
            samples, images * rows[0, 0, 0].numel(), images * x[0, 0].numel(),
            *(sizes if images == 1 else (math.prod(sizes), 1)), rows.shape[2],
        )  # fmt: skip
        if spherical and form == "pixels":
            gram = _conv_pixel_pairs(_conv_groups(x, groups), rows, kernel, stride, dilation, margins) * weight
        elif spherical and form == "patches":
            patches = _conv_patches(_conv_padded(x, margins), kernel, stride, dilation, groups)
            pairs = (_conv_beside(part, samples) for part in (patches, rows.flatten(3)))
            gram = _conv_pairs(*pairs) * weight
        else:
            split = _conv_groups(_conv_padded(x, margins), groups)
            for channels, gradients in _conv_blocks(split, rows, kernel, stride, dilation):
                block = _conv_samples(gradients, samples)
                scale = 1.0 if spherical else _conv_metric(weight, channels, groups) ** 0.5  # type: ignore[arg-type]
                flat = (block if spherical else block * scale).flatten(1)
                _conv_add_gram(gram, flat)
            gram = gram * weight if spherical else gram
    if not wants[1]:
        return gram
    bias = _conv_samples(g.flatten(2).sum(2), samples) * metric[-1] ** 0.5
    return gram + bias @ bias.mT


def conv_gram_diagonal(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    metric: tuple[Tensor | float, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    samples = g.shape[0]
    diagonal = g.new_zeros(samples)
    x, g = _conv_images(operands, g, params)
    if wants[0]:
        weight, kernel = metric[0], tuple(params[0].shape[2:])
        spherical = not isinstance(weight, Tensor) or weight.dim() == 0
        x = _conv_groups(_conv_padded(x, _conv_margins(kernel, padding, dilation)), groups)
        for channels, gradients in _conv_blocks(x, _conv_groups(g, groups), kernel, stride, dilation):
            block = _conv_samples(gradients, samples)
            scale = weight if spherical else _conv_metric(weight, channels, groups)  # type: ignore[arg-type]
            diagonal = diagonal + (block.square() * scale).flatten(1).sum(1)
    if wants[1]:
        diagonal = diagonal + (_conv_samples(g.flatten(2).sum(2), samples).square() * metric[-1]).sum(1)
    return diagonal


def conv_directional(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    direction: tuple[Tensor, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> Tensor:
    """``⟨γ_i, v⟩ = Σ_t g_it · (V * x_i + v_b)_t``, ``(B,)``."""
    samples = g.shape[0]
    x, g = _conv_images(operands, g, params)
    if not wants[0]:
        return _conv_samples(g.flatten(2).sum(2), samples) @ direction[0]
    x, widths = _conv_symmetric(x, params[0], padding, dilation)
    bias, zeros = direction[1] if wants[1] else None, [0 for _ in stride]
    change = torch.convolution(x, direction[0], bias, stride, widths, dilation, False, zeros, groups)
    return _conv_samples((g * change).flatten(1).sum(1), samples)


def conv_per_sample(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, ...]:
    """``γ``, ``(B, *shape)`` for each wanted parameter."""
    samples, result = g.shape[0], []
    x, g = _conv_images(operands, g, params)
    if wants[0]:
        kernel = tuple(params[0].shape[2:])
        x = _conv_groups(_conv_padded(x, _conv_margins(kernel, padding, dilation)), groups)
        gradients = _conv_gradients(x, _conv_groups(g, groups), kernel, stride, dilation)
        result.append(_conv_samples(gradients, samples).reshape(samples, *params[0].shape))
    if wants[1]:
        result.append(_conv_samples(g.flatten(2).sum(2), samples))
    return tuple(result)


def conv_rows(
    operands: tuple[Tensor, ...],
    g: Tensor,
    params: tuple[Tensor, ...],
    wants: tuple[bool, ...],
    *,
    stride: tuple[int, ...],
    padding: tuple[int, ...] | str,
    dilation: tuple[int, ...],
    groups: int,
) -> tuple[Tensor, Tensor]:
    """Homogeneous patches ``(B, G, T, n)`` and output gradients ``(B, G, T, m)`` (kernels of ``kronecker``)."""
    kernel, samples = tuple(params[0].shape[2:]), g.shape[0]
    x, g = _conv_images(operands, g, params)
    images = _conv_padded(x, _conv_margins(kernel, padding, dilation))
    windows = _conv_windows(_conv_groups(images, groups), kernel, stride, dilation).movedim(0, 2 + len(kernel))
    size = windows.shape[1 : 2 + len(kernel)]
    # One buffer (G, n, B, T), written once: a product over all rows reads it as it lies, the ones are its last plane.
    rows = x.new_empty(groups, math.prod(size) + wants[1], *windows.shape[2 + len(kernel) :])
    rows[:, : math.prod(size)].unflatten(1, size).copy_(windows)
    if wants[1]:
        rows[:, -1] = 1.0
    rows = rows.reshape(*rows.shape[:2], samples, -1).permute(2, 0, 3, 1)
    return rows, _conv_beside(_conv_groups(g, groups).flatten(3), samples).mT
