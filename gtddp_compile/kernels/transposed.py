"""Per-sample parameter gradients of ``h = x W``: those of ``x Wᵀ`` with ``x`` and ``g`` in each other's place.

``x`` is ``(B, …, m)``, ``h`` and ``g`` are ``(B, …, n)``: ``γ_i = Σ_t x_it g_itᵀ``. Derivatives by reverse mode inside
a model use its linear layers this way, too; :func:`linear_uses_gram` takes all uses of one weight together.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile.kernels.bundle import Inverses, Layer, is_spherical
from gtddp_compile.kernels.linear import (
    _linear_rows,
    _linear_weight_gram,
    linear_directional,
    linear_gram,
    linear_gram_diagonal,
    linear_inputs,
    linear_per_sample,
    linear_subtract,
    linear_weighted,
)


def transposed(x: Tensor, weight: Tensor) -> Tensor:
    """``x W``."""
    return x @ weight


def _swapped(layer: Layer) -> Layer:
    """The linear layer with the same ``γ``."""
    return layer._replace(operands=(layer.g,), g=layer.operands[0])


def transposed_weighted(layer: Layer) -> tuple[Tensor, ...]:
    """``γᵀ 1``."""
    return linear_weighted(_swapped(layer))


def transposed_subtract(layer: Layer, targets: tuple[Tensor, ...], rates: tuple[float, ...]) -> None:
    """``target -= rate · γᵀ 1``, in place."""
    linear_subtract(_swapped(layer), targets, rates)


def transposed_gram(layer: Layer, metric: Inverses) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``."""
    return linear_gram(_swapped(layer), metric)


def transposed_gram_diagonal(layer: Layer, metric: Inverses) -> Tensor:
    """The diagonal of ``γ M⁻¹ γᵀ``, ``(B,)``."""
    return linear_gram_diagonal(_swapped(layer), metric)


def transposed_directional(layer: Layer, direction: tuple[Tensor, ...]) -> Tensor:
    """``⟨γ_i, v⟩``, ``(B,)``."""
    return linear_directional(_swapped(layer), direction)


def transposed_per_sample(layer: Layer) -> tuple[Tensor, ...]:
    """``γ``, ``(B, m, n)``."""
    return linear_per_sample(_swapped(layer))


def linear_uses_gram(layer: Layer, metric: Inverses, *, uses: tuple[tuple[bool, bool], ...]) -> Tensor:
    """``γ M⁻¹ γᵀ``, ``(B, B)``, of one weight used several times, see :func:`joined_uses`."""
    joined, bias = joined_uses(layer, metric, uses=uses)
    gram = _linear_weight_gram(joined.operands[0], joined.g, metric[0])
    return gram if bias is None else gram.add_(linear_inputs(bias))


def joined_uses(layer: Layer, metric: Inverses, *, uses: tuple[tuple[bool, bool], ...]) -> tuple[Layer, Tensor | None]:
    """One weight used several times as one layer of it, whose positions are those of all uses.

    The layer's operands are ``x`` of every use, then ``g`` of every use but the first. ``uses``: for each, whether it
    is ``x W``, and whether it adds the bias. Where ``M`` is spherical the bias is a column of ``X``, in units of the
    weight's ``M``; otherwise its gradients come apart, ``(B, m)``, times ``M^{-1/2}``.
    """
    operands, g, _, wants, _ = layer
    pairs = zip(operands[: len(uses)], (g, *operands[len(uses) :]), uses, strict=True)
    inputs, outputs, gradients = [], [], []
    spherical = all(map(is_spherical, metric)) and bool(metric[0])  # at a rate of 0 it is no unit
    for x, gradient, (swapped, biased) in pairs:
        x, gradient = (_linear_rows(v) for v in ((gradient, x) if swapped else (x, gradient)))
        if wants[1] and spherical:
            x = F.pad(x, (0, 1), value=float((metric[1] / metric[0]) ** 0.5) if biased else 0.0)
        elif biased and wants[1]:
            gradients.append(gradient.sum(1))
        inputs.append(x)
        outputs.append(gradient)
    bias = sum(gradients[1:], gradients[0]) * metric[1] ** 0.5 if gradients else None
    return Layer((torch.cat(inputs, 1),), torch.cat(outputs, 1), (None, None), (True, False)), bias
