"""Layer kernels against per-sample gradients by plain autograd, one sample at a time, in double precision."""

import inspect
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.kernels import conv_pairs, patches
from support.recorded import Params, draw, layer

Function = Callable[..., Tensor]

PREFIXES = ("linear", "conv", "norm", "generic", "embedding", "shift")
MODULES = {prefix: inspect.getmodule(getattr(kernels, f"{prefix}_gram")) for prefix in PREFIXES}


METRICS: dict[str, tuple[Any, Any]] = {
    "spherical": (0.3, 0.5), "scalar": (torch.tensor(0.4, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)),
    "diagonal": ("full", "full"), "mixed": ("full", 0.7), "mixed2": (0.7, "full"),
}  # fmt: skip
"""Inverse metrics of weight and bias; "full" is one of the parameter's shape."""


def oracle(function: Function, operands: tuple[Tensor, ...], g: Tensor, params: Params, wants: tuple[bool, ...]) -> Any:
    """``γ`` of each wanted parameter: gradients of ``⟨g_i, h_i⟩``, sample after sample."""
    leaves = tuple(None if p is None else p.clone().requires_grad_() for p in params)
    h = function(leaves, *operands)
    assert h.shape == g.shape
    wanted = [leaf for leaf, want in zip(leaves, wants, strict=True) if want and leaf is not None]
    rows = [
        torch.autograd.grad((g[i] * h[i]).sum(), wanted, retain_graph=True, materialize_grads=True)
        for i in range(len(g))
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def check(
    prefix: str,
    function: Function,
    operands: tuple[Tensor, ...],
    params: Params,
    wants: tuple[bool, ...] | None = None,
    /,
    *,
    metric: str = "mixed",
    slices: bool = True,
    **options: Any,
) -> None:
    """Every kernel of ``prefix`` against the oracle, on the whole batch and on a slice of it."""
    wants = wants or tuple(p is not None for p in params)
    h = function(params, *operands)
    g = draw(*h.shape, seed=5)
    gamma = oracle(function, operands, g, params, wants)
    shapes = [p.shape for p, want in zip(params, wants, strict=True) if want and p is not None]
    pairs = zip(shapes, METRICS[metric], strict=False)
    inverse = tuple(draw(*shape).abs() + 0.1 if kind == "full" else kind for shape, kind in pairs)
    direction = tuple(draw(*shape, seed=9) for shape in shapes)
    if hasattr(kernels, f"{prefix}_prepare"):
        for size in (2**18, 1):
            with patch.object(MODULES[prefix], "CHUNK", size):
                close(getattr(kernels, f"{prefix}_gamma")(layer(prefix, operands, g, params, wants, **options)), gamma)
        operands = kernels.norm_prepare(operands, kernels.Norm(**options))

    def compare(own: kernels.Layer, gamma: list[Tensor], weighted: bool) -> None:
        def call(name: str, *extra: Any) -> Any:
            return getattr(kernels, f"{prefix}_{name}")(own, *extra)

        def flat(rows: Tensor) -> Tensor:
            return rows.reshape(len(rows), -1)

        pairs = list(zip(gamma, inverse, strict=True))
        scaled = torch.cat([flat(rows * entry) for rows, entry in pairs], 1)
        gram = scaled @ torch.cat([flat(rows) for rows in gamma], 1).T
        close(call("per_sample"), gamma)
        if weighted:
            close(call("weighted"), [rows.sum(0) for rows in gamma])
        close([call("gram", inverse)], [gram])
        close([call("gram_diagonal", inverse)], [gram.diagonal()])
        change = sum(flat(rows * v).sum(1) for rows, v in zip(gamma, direction, strict=True))
        close([call("directional", direction)], [change])

    whole = layer(prefix, operands, g, params, wants, **options)
    compare(whole, gamma, True)
    if slices and len(g) > 2:
        part = slice(1, len(g) - 1)
        compare(kernels.part_of(whole, part), [rows[part] for rows in gamma], not options.get("mixes"))


def close(found: Any, expected: Any) -> None:
    """Equal shapes, and values to 1e-10."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.fixture(params=[2**24, 1, 50])
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """The bound on intermediate tensors, forced small too."""
    for module in (*MODULES.values(), patches, conv_pairs):
        if hasattr(module, "CHUNK"):
            monkeypatch.setattr(module, "CHUNK", request.param)
    return int(request.param)


def linear(params: Params, x: Tensor) -> Tensor:
    return F.linear(x, *params)  # type: ignore[arg-type]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", [(5, 4), (1, 4), (4, 3, 4), (1, 2, 3, 4), (3, 1, 4), (3, 20, 4), (3, 12)])
def test_linear(shape: tuple[int, ...], metric: str, chunk: int) -> None:
    check_members("linear", linear, (draw(*shape),), draw(3, shape[-1]), draw(3), metric=metric)


def check_members(prefix: str, function: Function, operands: Any, weight: Tensor, bias: Tensor, **options: Any) -> None:
    """With and without a bias, and with either of them frozen."""
    check(prefix, function, operands, (weight, None), **options)
    for wants in ((True, True), (True, False), (False, True)):
        check(prefix, function, operands, (weight, bias), wants, **options)


@settings(deadline=None, max_examples=60)
@given(
    samples=st.integers(1, 5), positions=st.lists(st.integers(1, 4), max_size=2), n=st.integers(1, 9),
    m=st.integers(1, 9), bias=st.booleans(), metric=st.sampled_from(sorted(METRICS)),
)  # fmt: skip
def test_linear_any_shape(samples: int, positions: list[int], n: int, m: int, bias: bool, metric: str) -> None:
    params = (draw(m, n), draw(m) if bias else None)
    check("linear", linear, (draw(samples, *positions, n),), params, metric=metric)


def convolution(stride: Any, padding: Any, dilation: Any, groups: int) -> Function:
    def function(params: Params, x: Tensor) -> Tensor:
        operation: Any = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
        return operation(x, *params, stride, padding, dilation, groups)

    return function


CONVOLUTIONS = {
    "1d": ((4, 2, 7), (3, 2, 3), (1,), (1,), (1,), 1),
    "1d same, even kernel": ((4, 2, 7), (3, 2, 4), (1,), "same", (1,), 1),
    "1d valid, dilated": ((4, 2, 9), (3, 2, 3), (2,), "valid", (2,), 1),
    "2d": ((4, 3, 5, 6), (4, 3, 3, 2), (1, 1), (1, 0), (1, 1), 1),
    "2d pointwise": ((4, 3, 2, 2), (4, 3, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "2d few positions": ((4, 6, 3, 3), (8, 6, 3, 3), (1, 1), (0, 0), (1, 1), 1),
    "2d strided past the edge": ((4, 3, 6, 7), (4, 3, 3, 3), (2, 3), (1, 2), (1, 1), 1),
    "2d same, dilated, grouped": ((4, 4, 6, 5), (6, 2, 2, 3), (1, 1), "same", (3, 2), 2),
    "2d depthwise": ((3, 4, 5, 5), (8, 1, 3, 3), (1, 1), (1, 1), (1, 1), 4),
    "2d one sample": ((1, 2, 5, 5), (3, 2, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "3d": ((3, 2, 4, 3, 4), (4, 1, 2, 3, 2), (1, 1, 2), (1, 1, 0), (2, 1, 1), 2),
}


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_conv(case: str, metric: str, chunk: int) -> None:
    shape, weight, stride, padding, dilation, groups = CONVOLUTIONS[case]
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    function, params = convolution(**options), (draw(*weight), draw(weight[0]))
    check_members("conv", function, (draw(*shape),), *params, metric=metric, **options)


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(), metric=st.sampled_from(sorted(METRICS)),
    form=st.sampled_from(["patches", "pixels", "materialised"]), grouped=st.booleans(), few=st.booleans(),
)  # fmt: skip
def test_conv_any_geometry(data: st.DataObject, metric: str, form: str, grouped: bool, few: bool) -> None:
    """Every geometry in every form of the Gram matrix, and both ways to per-sample and to weighted gradients."""
    axes = data.draw(st.integers(1, 3))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(data.draw(st.integers(low, high)) for _ in range(axes))

    kernel, stride, dilation, padding = each(1, 3), each(1, 3), each(1, 2), each(0, 2)
    groups = data.draw(st.integers(1, 2))
    triples = zip(kernel, dilation, each(0, 3), strict=True)
    size = tuple(gap * (width - 1) + 1 + extra for width, gap, extra in triples)
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    inputs, outputs = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)) * groups
    params = (draw(outputs, inputs, *kernel), draw(outputs))
    x = draw(data.draw(st.integers(1, 3)), inputs * groups, *size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULES["conv"], "conv_gram_form", lambda *shape: form)
        patch.setattr(patches, "_conv_grouped", lambda positions, channels, kernel: grouped and kernel > 1)
        patch.setattr(MODULES["conv"], "_conv_few_rows", lambda g, weight: few)
        check("conv", convolution(**options), (x,), params, metric=metric, **options)


NORMS: dict[str, tuple[dict[str, Any], tuple[int, ...], tuple[int, ...], Function]] = {
    "batch 1d": ({"form": "batch", "training": True}, (5, 3), (3,),
                 lambda p, x: F.batch_norm(x, None, None, p[0], p[1], training=True)),
    "batch 2d": ({"form": "batch", "training": True, "eps": 1e-3}, (4, 3, 2, 3), (3,),
                 lambda p, x: F.batch_norm(x, None, None, p[0], p[1], training=True, eps=1e-3)),
    "batch eval": ({"form": "batch", "training": False}, (4, 3, 2, 3), (3,),
                   lambda p, x, mean, var: F.batch_norm(x, mean, var, p[0], p[1])),
    "layer": ({"form": "layer", "normalized_shape": (4,)}, (3, 2, 4), (4,),
              lambda p, x: F.layer_norm(x, (4,), p[0], p[1])),
    "layer, no positions": ({"form": "layer", "normalized_shape": (2, 4)}, (3, 2, 4), (2, 4),
                            lambda p, x: F.layer_norm(x, (2, 4), p[0], p[1])),
    "layer, many": ({"form": "layer", "normalized_shape": (2, 4), "eps": 0.1}, (3, 2, 3, 2, 4), (2, 4),
                    lambda p, x: F.layer_norm(x, (2, 4), p[0], p[1], eps=0.1)),
    "group": ({"form": "group", "num_groups": 2}, (3, 4, 5), (4,),
              lambda p, x: F.group_norm(x, 2, p[0], p[1])),
    "instance": ({"form": "instance", "training": True}, (3, 4, 5), (4,),
                 lambda p, x: F.instance_norm(x, None, None, p[0], p[1])),
    "instance eval": ({"form": "instance", "training": False}, (3, 4, 5), (4,),
                      lambda p, x, mean, var: F.instance_norm(x, mean, var, p[0], p[1], False)),
}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("case", NORMS)
def test_norm(case: str, metric: str) -> None:
    options, shape, size, function = NORMS[case]
    operands: tuple[Tensor, ...] = (draw(*shape) * 2 + 1,)
    if options.get("training") is False:
        operands = (*operands, draw(*size), draw(*size).abs() + 0.5)
    check_members("norm", function, operands, draw(*size), draw(*size), metric=metric, **options)


@pytest.mark.parametrize("eps", [None, 0.1])
def test_rms_norm(eps: float | None) -> None:
    def function(params: Params, x: Tensor) -> Tensor:
        return F.rms_norm(x, (4,), params[0], eps)

    check("norm", function, (draw(3, 2, 4),), (draw(4),), form="rms", normalized_shape=(4,), eps=eps)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("slopes", [1, 3])
@pytest.mark.parametrize("shape", [(5, 3), (1, 3), (4, 3, 2), (3, 3, 2, 4)])
def test_prelu(shape: tuple[int, ...], slopes: int, metric: str) -> None:
    """One slope a channel, or one for all of them; where the input is zero too."""
    x = draw(*shape)
    x[0] *= x[0] > 0
    check("norm", lambda p, x: F.prelu(x, p[0]), (x,), (draw(slopes),), metric=metric, form="prelu")  # type: ignore[arg-type]


class NoForward(torch.autograd.Function):
    """An operation without forward mode and without a vmap rule."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return torch.from_numpy(x.detach().numpy() * w.detach().numpy())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return g * w, (g * x).sum(0)


def mixing(params: Params, x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, params[0], params[1], training=True)


GENERIC: dict[str, tuple[Function, tuple[Tensor, ...], tuple[bool, ...], Params]] = {
    "scale": (lambda p, x: torch.tanh(x * p[0]), (draw(4, 3, 2),), (True,), (draw(3, 2),)),
    "scalar parameter": (lambda p, x: x * p[0], (draw(4, 3),), (True,), (draw(),)),
    "two operands": (lambda p, x, y: torch.einsum("bi,oij,bj->bo", x, p[0], y), (draw(4, 3), draw(4, 2)),
                     (True, True), (draw(5, 3, 2),)),
    "operand without batch": (lambda p, x, m: (x @ p[0]) * m, (draw(4, 3), draw(2)), (True, False),
                              (draw(3, 2),)),
    "embedding": (lambda p, i: F.embedding(i, p[0]), (torch.tensor([[0, 2], [1, 1], [4, 0]]),), (True,),
                  (draw(5, 3),)),
    "class token": (lambda p: p[0].expand(4, -1, -1), (), (), (draw(1, 2, 3),)),
    "positions": (lambda p, x: x + p[0], (draw(4, 2, 3),), (True,), (draw(1, 2, 3),)),
    "transposed conv": (lambda p, x: F.conv_transpose2d(x, p[0], p[1], 2), (draw(3, 2, 3, 3),), (True,),
                        (draw(2, 3, 2, 2), draw(3))),
    "batch size built in": (lambda p, x: (x.reshape(4, 6) @ p[0]).reshape(4, 2), (draw(4, 2, 3),), (True,),
                            (draw(6, 2),)),
    "mixing": (mixing, (draw(5, 3),), (True,), (draw(3), draw(3))),
    "mixing deeply": (lambda p, x: torch.softmax(x @ p[0], 0) @ p[0], (draw(5, 3),), (True,), (draw(3, 3),)),
}  # fmt: skip


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("rows", [2, 5, 40])
@pytest.mark.parametrize("shape", [(4,), (4, 3), (3, 2, 2), (1, 3)])
def test_embedding(shape: tuple[int, ...], rows: int, metric: str, chunk: int) -> None:
    keys = torch.randint(0, rows, shape, generator=torch.Generator().manual_seed(rows))
    for padded in ({}, {"padding_idx": int(keys.flatten()[0])}, {"padding_idx": -1}):
        function: Function = lambda p, i, padded=padded: F.embedding(i, p[0], **padded)  # noqa: E731
        check("embedding", function, (keys,), (draw(rows, 3),), metric=metric, **padded)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("added", [(3,), (1,), (2, 3), (2, 1), (1, 2, 3), (1, 1, 3)])
def test_shift(added: tuple[int, ...], metric: str) -> None:
    check("shift", lambda p, x: x + p[0], (draw(4, 2, 3),), (draw(*added),), metric=metric)  # type: ignore[operator]


@pytest.mark.parametrize("vectorised", [True, False])
@pytest.mark.parametrize("case", GENERIC)
def test_generic(case: str, vectorised: bool, chunk: int) -> None:
    function, operands, batched, params = GENERIC[case]
    g, wants = draw(*function(params, *operands).shape), (True,) * len(params)
    found = kernels.generic_probe(layer("generic", operands, g, params, wants, function=function, batched=batched))
    assert found["mixes"] == (case in ("class token", "batch size built in", "mixing", "mixing deeply"))
    assert found["vectorised"] and found["forward_mode"]
    for metric in METRICS if chunk == 1 else ("mixed",):
        for forward_mode in (True, False):
            options: dict[str, Any] = {**found, "vectorised": vectorised, "forward_mode": forward_mode}
            options |= {"function": function, "batched": batched}
            check("generic", function, operands, params, metric=metric, **options)
            options["mixes"] = True
            check("generic", function, operands, params, metric=metric, **options)


def test_generic_frozen_member() -> None:
    function, operands, batched, params = GENERIC["transposed conv"]
    for wants in [(True, False), (False, True)]:
        check("generic", function, operands, params, wants, function=function, batched=batched)


def test_generic_without_vmap_and_forward_mode() -> None:
    def function(params: Params, x: Tensor) -> Tensor:
        return NoForward.apply(x, params[0])  # type: ignore[no-untyped-call]

    x, w = draw(4, 3), draw(3)
    found: Any = kernels.generic_probe(layer("generic", (x,), draw(4, 3), (w,), (True,), function=function))
    assert found == {"mixes": False, "vectorised": False, "forward_mode": False}
    check("generic", function, (x,), (w,), function=function, **found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", ["linear", "conv", "norm", "generic"])
def test_other_precisions_and_layouts(prefix: str, dtype: torch.dtype) -> None:
    options: dict[str, Any]
    if prefix == "conv":
        options = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
        function: Function = convolution(**options)
        x, params = draw(3, 6, 5, 4).permute(0, 3, 2, 1), (draw(4, 3, 3, 2).permute(3, 0, 1, 2), draw(6)[::3])
    elif prefix == "norm":
        options = {"form": "group", "num_groups": 2}
        function, x, params = lambda p, x: F.group_norm(x, 2, *p), draw(3, 5, 4).mT, (draw(8)[::2], draw(4))
    else:
        function, options = linear, {} if prefix == "linear" else {"function": linear}
        x, params = draw(4, 6, 3).permute(2, 1, 0), (draw(4, 5).mT, draw(5))
    exact = tuple(p.double() for p in params)
    check(prefix, function, (x,), exact, metric="mixed", **options)
    h = function(params, x)
    g = draw(*h.shape[::-1]).permute(*range(h.dim() - 1, -1, -1))
    metric: tuple[Any, ...] = (params[0].abs() + 0.1, 0.5)

    def everything(dtype: torch.dtype) -> list[Tensor]:
        operands: tuple[Tensor, ...] = (x.to(dtype),)
        if prefix == "norm":
            operands = kernels.norm_prepare(operands, kernels.Norm(**options))
        low, cast = g.to(dtype), tuple(p.to(dtype) for p in params)
        inverse = tuple(m.to(dtype) if isinstance(m, Tensor) else m for m in metric)
        own = layer(prefix, operands, low, cast, (True, True), **options)
        rows = [*getattr(kernels, f"{prefix}_per_sample")(own), *getattr(kernels, f"{prefix}_weighted")(own)]
        for name, extra in [("gram", inverse), ("gram_diagonal", inverse), ("directional", cast)]:
            rows.append(getattr(kernels, f"{prefix}_{name}")(own, extra))
        return rows

    tolerance = 1e-4 if dtype == torch.float32 else 6e-2
    for low, high in zip(everything(dtype), everything(torch.float64), strict=True):
        assert low.dtype == dtype
        assert float((low.double() - high).abs().max()) <= tolerance * float(high.abs().max())


@pytest.mark.parametrize("samples_a_piece", [1, 2, 5])
def test_weighted_gradients_add_up_piece_by_piece(samples_a_piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gtddp_compile.kernels.sweep.WEIGHED", samples_a_piece * 2 * 9)
    x, g, weights, params = draw(5, 3, 3, 3), draw(5, 2, 3, 3, seed=1), draw(5, seed=2), (draw(2, 3, 3, 3), draw(2))
    own = kernels.Layer((x,), g, params, (True, True), kernels.Geometry((1, 1), (1, 1), (1, 1)))
    found = kernels.weigh(kernels.conv_weighted, own, weights)
    gamma = kernels.conv_per_sample(own)
    close(found, [torch.tensordot(weights, rows, 1) for rows in gamma])


@pytest.mark.parametrize("error", [ValueError, AssertionError, TypeError, AttributeError])
def test_a_trial_takes_refusals_of_a_size_and_passes_defects_on(error: type[Exception]) -> None:
    def function(params: Params, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise error
        return x * params[0]

    x, w = draw(4, 3), draw(3)
    if error in (TypeError, AttributeError):
        with pytest.raises(error):
            kernels.generic_probe(layer("generic", (x,), draw(4, 3), (w,), (True,), function=function))
    else:
        assert kernels.generic_probe(layer("generic", (x,), draw(4, 3), (w,), (True,), function=function))["mixes"]


@pytest.mark.filterwarnings("always")
def test_a_trial_of_what_vmap_has_no_rule_for_is_quiet(recwarn: pytest.WarningsRecorder) -> None:
    def function(params: Params, x: Tensor) -> Tensor:
        return F.bilinear(x, x, params[0])  # type: ignore[arg-type]

    own = layer("generic", (draw(4, 3),), draw(4, 2), (draw(2, 3, 3),), (True,), function=function)
    found = kernels.generic_probe(own)
    assert found == {"mixes": False, "vectorised": False, "forward_mode": True} and not recwarn
