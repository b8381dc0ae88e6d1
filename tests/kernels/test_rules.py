"""Layer rules: which operation goes to which rule, and that what a rule names makes its kernels exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import kernels
from gtddp_compile.errors import CompileError
from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref, map_leaves
from gtddp_compile.lowering.layers import RULES, choose

X, W, B = Ref("x"), ParamRef("w"), ParamRef("b")
MEAN, VAR, COUNT = BufferRef("mean"), BufferRef("var"), BufferRef("count")


def batch_norm(
    x: Tensor, running_mean: Any, running_var: Any, num_batches_tracked: Any, weight: Any, bias: Any, *,
    training: bool, momentum: float | None, eps: float,
) -> Tensor:  # fmt: skip
    """Stands for the batch-norm of the normal form, by its name."""
    return F.batch_norm(x, running_mean, running_var, weight, bias, training, 0.0, eps)


batch_norm.__module__ = "gtddp_compile.kernels.batch_norm"
BN: dict[str, Any] = {"training": True, "momentum": 0.1, "eps": 1e-5}


def op(kind: str, target: Any, *args: Any, shape: tuple[int, ...] = (4, 2, 3, 3), **kwargs: Any) -> Op:
    """An operation ``kind`` of a float value of ``shape``."""
    return Op("h", kind, target, args, kwargs, shape=shape, dtype=torch.float64)


CASES: list[tuple[str, Op, dict[str, tuple[int, ...]], dict[str, Any]]] = [
    ("linear", op("linear", F.linear, X, W, shape=(4, 2)), {"x": (4, 3), "w": (2, 3)}, {}),
    ("linear", op("linear", F.linear, X, weight=W, bias=B, shape=(4, 5, 2)),
     {"x": (4, 5, 3), "w": (2, 3), "b": (2,)}, {}),
    ("conv", op("conv", F.conv2d, X, W, B, 1, "same", [2]), {"x": (4, 3, 3, 3), "w": (2, 3, 2, 3), "b": (2,)},
     {"stride": (1, 1), "padding": "same", "dilation": (2, 2), "groups": 1}),
    ("conv", op("conv", F.conv1d, X, W, padding="valid", stride=(2,), groups=2, shape=(4, 2, 2)),
     {"x": (4, 4, 5), "w": (2, 2, 3)}, {"stride": (2,), "padding": (0,), "dilation": (1,), "groups": 2}),
    ("conv", op("conv", F.conv3d, X, W, None, (1, 2, 1), 1, shape=(4, 2, 3, 2, 3)),
     {"x": (4, 1, 3, 3, 3), "w": (2, 1, 3, 3, 3)},
     {"stride": (1, 2, 1), "padding": (1, 1, 1), "dilation": (1, 1, 1), "groups": 1}),
    ("norm", op("batch_norm", batch_norm, X, MEAN, VAR, COUNT, W, B, **BN),
     {"x": (4, 2, 3, 3), "w": (2,), "b": (2,), "mean": (2,), "var": (2,), "count": ()},
     {"form": "batch", "eps": 1e-5, "training": True}),
    ("norm", op("batch_norm", batch_norm, X, MEAN, VAR, COUNT, W, B, **{**BN, "training": False}),
     {"x": (4, 2, 3, 3), "w": (2,), "b": (2,), "mean": (2,), "var": (2,), "count": ()},
     {"form": "batch", "eps": 1e-5, "training": False}),
    ("norm", op("layer_norm", F.layer_norm, X, [3, 3], W, None, 1e-3),
     {"x": (4, 2, 3, 3), "w": (3, 3)}, {"form": "layer", "eps": 1e-3, "normalized_shape": (3, 3)}),
    ("norm", op("group_norm", F.group_norm, X, 1, W, B), {"x": (4, 2, 3, 3), "w": (2,), "b": (2,)},
     {"form": "group", "eps": 1e-5, "num_groups": 1}),
    ("norm", op("instance_norm", F.instance_norm, X, None, None, W, B),
     {"x": (4, 2, 3, 3), "w": (2,), "b": (2,)}, {"form": "instance", "eps": 1e-5, "training": True}),
    ("norm", op("instance_norm", F.instance_norm, X, MEAN, VAR, W, B, False),
     {"x": (4, 2, 3, 3), "w": (2,), "b": (2,), "mean": (2,), "var": (2,)},
     {"form": "instance", "eps": 1e-5, "training": False}),
    ("norm", op("rms_norm", F.rms_norm, X, (3,), weight=W, eps=0.1), {"x": (4, 2, 3, 3), "w": (3,)},
     {"form": "rms", "eps": 0.1, "normalized_shape": (3,)}),
    ("transposed", op("transposed", kernels.transposed, X, W, shape=(4, 5, 3)), {"x": (4, 5, 2), "w": (2, 3)}, {}),
    ("shift", op("add", torch.add, B, X, shape=(4, 5, 2)), {"x": (4, 5, 2), "b": (2,)}, {}),
    ("generic", op("mul", torch.mul, X, W), {"x": (4, 2, 3, 3), "w": (3, 3)},
     {"mixes": False, "batched": (True,)}),
]  # fmt: skip


@pytest.mark.parametrize("case", range(len(CASES)))
def test_rule_is_chosen_and_exact(case: int) -> None:
    name, operation, shapes, options = CASES[case]
    rule = choose(operation, frozenset({"w", "b"}))
    assert (rule.name, dict(rule.options(operation))) == (name, options)
    torch.manual_seed(case)
    values = {key: torch.rand(shape, dtype=torch.float64) + 0.5 for key, shape in shapes.items()}
    params = tuple(None if role is None else values[role.name] for role in rule.roles(operation))
    operands = tuple(values[leaf.name] for leaf in rule.operands(operation))

    def function(members: tuple[Tensor | None, ...], *_: Tensor) -> Tensor:
        roles = rule.roles(operation)
        given: dict[str, Any] = dict(values)
        given |= {role.name: member for role, member in zip(roles, members, strict=True) if role is not None}
        args, kwargs = map_leaves((operation.args, dict(operation.kwargs)), lambda leaf: given[leaf.name])
        assert operation.target is not None
        result: Tensor = operation.target(*args, **kwargs)
        return result

    assert function(params, *operands).shape == operation.shape
    g = torch.randn(operation.shape or (), dtype=torch.float64)
    wants = tuple(param is not None for param in params)
    expected = kernels.generic_weighted(operands, g, params, wants, function=function)
    if rule.prepare:
        operands = getattr(kernels, f"{rule.prefix}_prepare")(operands, **options)
    extra = {"function": function} if name == "generic" else {}
    found = getattr(kernels, f"{rule.prefix}_weighted")(operands, g, params, wants, **options, **extra)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "operation",
    [
        op("linear", F.linear, X, Ref("normalised weight"), B),
        op("linear", F.linear, W, X, B),
        op("linear", F.linear, BufferRef("x"), W, B),
        op("linear", F.linear, X, W, W),
        op("linear", F.linear, X, W, shape=(4,)),
        op("linear", torch.mul, X, W),
        op("transposed", kernels.transposed, W, X, shape=(4, 2)),
        op("add", torch.add, X, W, alpha=2),
        op("conv", F.conv_transpose2d, X, W, B),
        op("conv", F.conv2d, X, W, B, Ref("stride")),
        op("conv", F.conv2d, X, W, B, shape=(2, 3, 3)),
        op("layer_norm", F.layer_norm, X, (4, 2, 3, 3), W, B),
        op("batch_norm", batch_norm, X, W, VAR, None, None, B, **{**BN, "training": False}),
    ],
)
def test_anything_unusual_is_generic(operation: Op) -> None:
    rule = choose(operation, frozenset({"w", "b"}))
    assert rule.name == "generic"
    assert all(isinstance(role, ParamRef) for role in rule.roles(operation))
    assert set(rule.roles(operation)) | set(rule.operands(operation)) == set(operation.leaves)


def test_no_rule_is_an_error_that_says_where() -> None:
    drawing = Op("h", "noise", torch.mul, (X, W), shape=(4, 2), dtype=torch.float32, random=True, module="a.b")
    with pytest.raises(CompileError, match=r"a\.b.*random"):
        choose(drawing, frozenset({"w"}))


def test_every_rule_has_its_kernels() -> None:
    for rule in RULES:
        names = ["weighted", "gram", "gram_diagonal", "directional", "per_sample"]
        assert all(callable(getattr(kernels, f"{rule.prefix}_{name}")) for name in names)
        assert hasattr(kernels, f"{rule.prefix}_prepare") == rule.prepare
