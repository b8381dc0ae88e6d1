"""Per-sample gradients in coordinates where a Kronecker metric is diagonal: kernels, choice, what is made of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer, kernels
from support.cases import convolutional, lines, wide
from support.compared import LOSS, assert_equal
from support.samples import draw

# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["rows", "samples"])
@pytest.mark.parametrize(("samples", "positions"), [(5, 1), (40, 1), (5, 3)])
@pytest.mark.parametrize("rescaled", [False, True])
def test_kernels_against_explicit_matrices(form: str, samples: int, positions: int, rescaled: bool) -> None:
    """``γ`` and ``M⁻¹`` written out, a group at a time, with rank-deficient maps."""
    x, g, weights = draw(samples, 2, positions, 6), draw(samples, 2, positions, 5), draw(samples)
    maps, rate = (draw(2, 6, 4), draw(2, 5, 3)), 0.3
    scale: Any = draw(2, 3, 4).abs() if rescaled else 1.0
    gamma = torch.einsum("bgtm,bgtn->bgmn", g, x)
    inverse = torch.stack([
        (k := torch.kron(maps[1][group], maps[0][group])) @ (k * (scale[group].flatten() if rescaled else 1.0)).T
        for group in range(2)
    ])  # fmt: skip
    flat = gamma.flatten(2)
    gram = rate * torch.einsum("bgi,gij,cgj->bc", flat, inverse, flat)
    step = torch.einsum("gij,bgj,b->gi", inverse, flat, weights).reshape(2, 5, 6)
    moment = torch.einsum("bgmn,gmp,gnq->bgpq", gamma, maps[1], maps[0]).square()

    found = kernels.kronecker_coordinates(x, g, maps, form)
    metric, rows = ((maps,), scale, None, (rate,)), [slice(0, 3), slice(3, samples)]
    for block, row in zip(kernels.coordinates_gram(found, metric, rows), rows, strict=True):
        torch.testing.assert_close(block, gram[row, row], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(kernels.coordinates_step(found, weights, metric), step, rtol=1e-10, atol=1e-10)
    expected = torch.einsum("b,bgpq->gpq", weights.square() / 0.2, moment)
    torch.testing.assert_close(kernels.coordinates_moment(found, weights, 0.2), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("form", ["rows", "samples"])
def test_a_separated_scale_of_rank_one_is_exact(form: str) -> None:
    found = kernels.kronecker_coordinates(draw(5, 2, 3, 4), draw(5, 2, 3, 3), (draw(2, 4, 4), draw(2, 3, 3)), form)
    metric = (((draw(2, 4, 4), draw(2, 3, 3)),), draw(2, 3, 1).abs() * draw(2, 1, 4).abs(), None, (0.1,))
    exact, separated = (kernels.coordinates_gram(found, metric, [slice(0, 5)], separable=s)[0] for s in (False, True))
    torch.testing.assert_close(separated, exact, rtol=1e-10, atol=1e-12)


MOMENTS: dict[str, tuple[tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "plane": ((3, 4, 5), (2, 3), {"stride": (1, 2), "padding": (1, 0), "dilation": (1, 1)}),
    "same": ((2, 5, 4), (4, 2), {"stride": (1, 1), "padding": "same", "dilation": (1, 1)}),
    "dilated": ((1, 5, 6), (3, 2), {"stride": (1, 1), "padding": "valid", "dilation": (1, 3)}),
    "line": ((3, 6), (3,), {"stride": (1,), "padding": (2,), "dilation": (1,)}),
    "space": ((2, 4, 3, 3), (3, 2, 1), {"stride": (1, 1, 2), "padding": (1, 1, 0), "dilation": (1, 1, 1)}),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", MOMENTS)
def test_moments_of_patches_from_lines_that_they_share(name: str, bias: bool) -> None:
    shape, kernel, options = MOMENTS[name]
    x, weight = draw(3, *shape), draw(2, shape[0], *kernel)
    convolve = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(kernel) - 1]
    basis = torch.eye(weight[0].numel(), dtype=x.dtype).reshape(-1, *weight.shape[1:])
    patches = convolve(x, basis, **options).flatten(2).transpose(0, 1).flatten(1)  # every weight's input
    patches = torch.cat([patches, torch.ones_like(patches[:1])]) if bias else patches
    operands, g = (x,), torch.zeros_like(convolve(x, weight, **options))
    params, wants = (weight, draw(2)) if bias else (weight,), (True, bias)
    rows, _ = kernels.conv_rows(operands, g, params, wants, groups=1, **options)
    found = kernels.conv_moment(operands, rows, params, wants, groups=1, **options)
    torch.testing.assert_close(found, (patches @ patches.T)[None], rtol=1e-12, atol=1e-12)


# --- in programs ------------------------------------------------------------------------------------------------------


def test_factors_are_made_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls, original = lines(), [], kernels.conv_moment

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(kernels, "conv_moment", counted)
    opt = compile_optimizer(case.model, case.batch(0, 5)[0], loss=LOSS, curvature="kfac", stat_every=2, early=0)
    for step in range(4):
        opt.step(*case.batch(step, 5))
    assert len(calls) == 2 * 2  # two layers


def test_a_bias_that_is_not_trained() -> None:
    """Rows have no ones, and coordinates no place for them."""
    for case in (wide(), lines()):
        case.model.a.bias.requires_grad_(False)
        assert_equal(case, steps=3, size=5, curvature="kfac", lr=0.2, damping=1e-2)


def test_coordinates_that_would_be_too_large_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    case = convolutional()
    monkeypatch.setattr("gtddp_compile.lowering.costs.LARGEST", 5 * 36)  # the head's rows fit, the convolutions' do not
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0, 5)[0], loss=LOSS, curvature="kfac")
    assert opt.program.code.count("dual_coordinates(") == 1 and "kronecker_coordinates" not in opt.program.code
    assert_equal(case, steps=2, size=5, curvature="kfac", lr=0.2, damping=1e-2)
