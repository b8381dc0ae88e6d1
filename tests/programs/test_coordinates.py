"""Per-sample gradients in coordinates where a Kronecker metric is diagonal: kernels, choice, what is made of them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer, kernels
from support.compared import LOSS, assert_equal, parameters
from support.kronecker_reference import Reference
from support.networks import Case, make


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def wide(seed: int = 0) -> Case:
    """Layers wider than the batches of this file are large, one without bias; an update goes through rows."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.c(torch.tanh(net.b(torch.tanh(net.a(x)))))

    return Case(make(forward, seed, a=(9, 8), b=lambda: nn.Linear(8, 9, bias=False), c=(9, 3)), (9,), {})


def convolutional(seed: int = 0) -> Case:
    """More positions than outputs and kernel elements: per-sample gradients are kept themselves."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(torch.tanh(net.b(torch.tanh(net.a(x)))).flatten(1))

    layers = {"a": lambda: nn.Conv2d(1, 2, 2), "b": lambda: nn.Conv2d(2, 2, 1, groups=2, bias=False), "head": (32, 3)}
    return Case(make(forward, seed, **layers), (1, 5, 5), {})


def lines(seed: int = 0) -> Case:
    """A convolution whose patches share lines of pixels, with a bias, and one without, strided along the other axis."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        return net.head(torch.tanh(net.b(torch.tanh(net.a(x)))).flatten(1))

    layers = {
        "a": lambda: nn.Conv2d(4, 2, 3, padding=1),
        "b": lambda: nn.Conv2d(2, 2, (4, 4), padding=(2, 1), stride=(1, 3), bias=False),
        "head": (24, 3),
    }
    return Case(make(forward, seed, **layers), (4, 5, 5), {})


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
    operands = (x,)
    params, wants = (weight, draw(2)) if bias else (weight,), (True, bias)
    found = kernels.conv_moment(operands, params, wants, groups=1, **options)
    torch.testing.assert_close(found, (patches @ patches.T)[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("bias", [True, False])
def test_the_last_step_is_added_by_the_product_that_makes_the_step(blocks: int, bias: bool) -> None:
    x, g, weights, last = draw(5, 7), draw(5, 4), draw(5), (draw(4, 7), draw(4))[: 1 + bias]
    rows = kernels.linear_rows((x,), g, (), (True, bias), blocks=blocks)
    width = rows[0].shape[3]
    inverses = draw(blocks, width, width), draw(1, 4, 4)
    found = kernels.dual_carried(kernels.dual_coordinates(*rows, inverses), weights, last, 0.9, 0.3)
    whole = torch.block_diag(*inverses[0])[: 7 + bias, : 7 + bias]
    ones = torch.cat([x, torch.ones(5, 1, dtype=x.dtype)], 1) if bias else x
    step = 0.3 * (weights[:, None] * g @ inverses[1][0]).T @ ones @ whole
    expected = [0.9 * last[0] - step[:, :7], *(0.9 * own - step[:, 7] for own in last[1:])]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_kept_gradients_in_whitened_channels() -> None:
    """``Γ`` of them is that of a convolution of whitened inputs."""
    x, g, params, maps = draw(3, 4, 5, 5), draw(3, 6, 5, 5), (draw(6, 2, 3, 3), draw(6)), draw(2, 2, 2)
    options: Any = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 2}
    gamma = kernels.conv_per_sample((x,), g, params, (True, True), **options)
    white = kernels.conv_whitened((x,), g, params, maps)
    gram = kernels.conv_gram(white, g, params, (True, True), (0.3, 0.2), **options)
    (found,) = kernels.joint_gram(kernels.channel_rows(gamma, maps), (0.3, 0.2), [slice(0, 3)])
    torch.testing.assert_close(found, gram, rtol=1e-12, atol=1e-12)


# --- in programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("coupling", ["full", 2, "block"])
@pytest.mark.parametrize(("network", "form"), [(wide, "rows"), (convolutional, "samples")])
def test_fast_equals_dense(network: Any, form: str, coupling: Any, kind: str) -> None:
    case = network()
    options: dict[str, Any] = {"curvature": kind, "lr": 0.2, "damping": 1e-2, "refresh": 2, "momentum": 0.5}
    if kind == "ekfac":  # batches of five leave null spaces: directions in them are any basis's
        options["refresh"] = 1
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0, 5)[0], loss=LOSS, coupling=coupling, **options)
    dual = kind == "kfac" and form == "rows"
    made = "kronecker_coordinates(" if form == "rows" else "sample_coordinates("
    kept, step = ("dual_coordinates(", "descend_dual") if dual else (made, "coordinates_step")
    assert kept in opt.program.code and step in opt.program.code
    assert_equal(case, coupling=coupling, steps=3, size=5, **options)


@pytest.mark.parametrize("network", [wide, convolutional])
def test_with_decay_the_gradient_is_mapped(network: Any) -> None:
    case, options = network(), {"curvature": "kfac", "lr": 0.2, "damping": 1e-2, "weight_decay": 0.05}
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0, 5)[0], loss=LOSS, **options)
    gram = "dual_gram" if network is wide else "coordinates_gram"
    assert gram in opt.program.code and "coordinates_step" not in opt.program.code and "dual(" not in opt.program.code
    assert_equal(case, steps=3, size=5, **options)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_proposition_4_from_few_rows_and_from_many(kind: str) -> None:
    """With feedback off the published method, where rows are mapped, and where a batch is too large for it to pay."""
    case, options = wide(), {"lr": 0.3, "damping": 1e-2, "momentum": 0.9}
    ours, theirs = copy.deepcopy(case.model), copy.deepcopy(case.model)
    opt = compile_optimizer(ours, case.batch(0, 3)[0], loss=LOSS, curvature=kind, feedback=False, **options)
    assert opt.program.code.count("m.descend_rows") == 3
    reference = Reference(theirs, kind, **options)
    for step, size in enumerate((20, 4, 30, 3, 5)):
        reference.step(*case.batch(step, size))
        opt.step(*case.batch(step, size))
    assert (parameters(theirs) - parameters(case.model)).abs().max() > 1e-3
    torch.testing.assert_close(parameters(ours), parameters(theirs), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("network", [wide, lines])
def test_micro_batches_make_the_update_of_their_groups(network: Any, feedback: bool, kind: str) -> None:
    """Steps in coordinates and moments add up over micro-batches."""
    case, found = network(), []
    for coupling, parts in ((4, 1), ("full", 2)):
        model = copy.deepcopy(case.model)
        options: dict[str, Any] = {"coupling": coupling} if feedback else {}
        opt = compile_optimizer(
            model,
            case.batch(0, 8 // parts)[0],
            loss=LOSS,
            curvature=kind,
            lr=0.3,
            refresh=1,
            feedback=feedback,
            **options,
        )
        for step in range(2):
            x, y = case.batch(step, 8)
            *first, last = zip(x.chunk(parts), y.chunk(parts), strict=True)
            for part in first:
                opt.accumulate(*part)
            opt.step(*last)
        found.append(parameters(model))
    assert (found[0] - parameters(case.model)).abs().max() > 1e-3
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("options", [
    {}, {"coupling": 2}, {"curvature": "ekfac", "refresh": 1}, {"stat_every": 2}, {"feedback": False},
    {"curvature": "ekfac", "refresh": 1, "feedback": False},
])  # fmt: skip
def test_factors_from_lines_that_patches_share(options: dict[str, Any]) -> None:
    case, options = lines(), {"curvature": "kfac", "lr": 0.2, "damping": 1e-2, "refresh": 2} | options
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0, 5)[0], loss=LOSS, **options)
    assert opt.program.code.count("moment=conv_moment") == 2
    assert_equal(case, steps=3, size=5, **options)


def test_factors_are_made_when_they_are_due(monkeypatch: pytest.MonkeyPatch) -> None:
    case, calls, original = lines(), [], kernels.conv_moment

    def counted(*args: Any, **options: Any) -> Tensor:
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setitem(kernels.KERNELS, "conv_moment", counted)
    opt = compile_optimizer(case.model, case.batch(0, 5)[0], loss=LOSS, curvature="kfac", stat_every=2, early=0)
    for step in range(4):
        opt.step(*case.batch(step, 5))
    assert len(calls) == 2 * 2  # two layers


@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
@pytest.mark.parametrize("feedback", [True, False])
@pytest.mark.parametrize("network", [wide, lines])
def test_the_exported_module_makes_the_same_step(network: Any, feedback: bool, kind: str, tmp_path: Path) -> None:
    case = network()
    opt = compile_optimizer(
        case.model, case.batch(0, 5)[0], loss=LOSS, curvature=kind, lr=0.2, refresh=1, feedback=feedback
    )
    opt.program.export(tmp_path / "step.py")
    namespace: dict[str, Any] = {"__name__": "exported"}
    exec(compile((tmp_path / "step.py").read_text(), "step.py", "exec"), namespace)
    params = {name: p.detach().clone() for name, p in case.model.named_parameters()}
    state, buffers = namespace["init_state"](params), dict(case.model.named_buffers())
    for step in range(2):
        x, y = case.batch(step, 5)
        params, buffers, state, _ = namespace["step"](params, buffers, state, x, y)
        opt.step(x, y)
    torch.testing.assert_close(
        torch.cat([p.flatten() for p in params.values()]), parameters(case.model), rtol=0, atol=1e-10
    )


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
