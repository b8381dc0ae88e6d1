"""Layer rules: which operation goes to which rule, and that what a rule names makes its kernels exact."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import compile_optimizer, kernels
from gtddp_compile.errors import CompileError, NonFiniteError
from gtddp_compile.graph import Layout
from gtddp_compile.graph.ops import BufferRef, Op, ParamRef, Ref, map_leaves
from gtddp_compile.lowering.layers import choose
from support.recorded import layer

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
    ("norm", op("prelu", F.prelu, X, W), {"x": (4, 2, 3, 3), "w": (2,)}, {"form": "prelu"}),
    ("norm", op("prelu", torch.ops.aten.prelu.default, X, W, shape=(4, 2)), {"x": (4, 2), "w": (1,)},
     {"form": "prelu"}),
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
        return operation.target(*args, **kwargs)

    assert function(params, *operands).shape == operation.shape
    g = torch.randn(operation.shape or (), dtype=torch.float64)
    wants = tuple(param is not None for param in params)
    expected = kernels.generic_weighted(layer("generic", operands, g, params, wants, function=function))
    if rule.prepare:
        operands = kernels.norm_prepare(operands, kernels.Norm(**options))
    extra = {"function": function} if name == "generic" else {}
    own = layer(rule.prefix, operands, g, params, wants, **options, **extra)
    found = getattr(kernels, f"{rule.prefix}_weighted")(own)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("operation", [
    op("linear", F.linear, X, Ref("normalised weight"), B), op("linear", F.linear, W, X, B),
    op("linear", F.linear, BufferRef("x"), W, B), op("linear", F.linear, X, W, W),
    op("linear", F.linear, X, W, shape=(4,)), op("linear", torch.mul, X, W),
    op("transposed", kernels.transposed, W, X, shape=(4, 2)), op("add", torch.add, X, W, alpha=2),
    op("conv", F.conv_transpose2d, X, W, B),
    op("prelu", F.prelu, X, W, shape=(4,)), op("prelu", F.prelu, W, X),
    Op("h", "prelu", F.prelu, (X, W), {}, shape=(3, 4), dtype=torch.float64, layout=Layout(1)),
    op("conv", F.conv2d, X, W, B, Ref("stride")), op("conv", F.conv2d, X, W, B, shape=(2, 3, 3)),
    op("layer_norm", F.layer_norm, X, (4, 2, 3, 3), W, B),
    op("batch_norm", batch_norm, X, W, VAR, None, None, B, **{**BN, "training": False}),
    op("embedding", F.embedding, X, W, 0, 1.0), op("embedding", F.embedding, X, W, None, 1.0),
    op("embedding", F.embedding, X, W, scale_grad_by_freq=True), op("embedding", F.embedding, BufferRef("x"), W),
])  # fmt: skip
def test_anything_unusual_is_generic(operation: Op) -> None:
    rule = choose(operation, frozenset({"w", "b"}))
    assert rule.name == "generic"
    assert all(isinstance(role, ParamRef) for role in rule.roles(operation))
    assert set(rule.roles(operation)) | set(rule.operands(operation)) == set(operation.leaves)


def test_a_plain_table_has_a_rule() -> None:
    table = op("embedding", F.embedding, X, W, None, sparse=False)
    rule = choose(table, frozenset({"w"}))
    assert (rule.name, rule.operands(table), rule.roles(table)) == ("embedding", (X,), (W,))


@pytest.mark.parametrize("row", [0, -1])
def test_a_padded_table_has_the_same_kernels(row: int) -> None:
    table = op("embedding", F.embedding, X, W, padding_idx=row)
    rule = choose(table, frozenset({"w"}))
    assert (rule.name, rule.prefix, rule.options(table)) == ("padded", "embedding", {"padding_idx": row})
    assert (rule.operands(table), rule.roles(table)) == ((X,), (W,))


def test_no_rule_is_an_error_that_says_where() -> None:
    drawing = Op("h", "noise", torch.mul, (X, W), shape=(4, 2), dtype=torch.float32, random=True, module="a.b")
    with pytest.raises(CompileError, match=r"a\.b.*random"):
        choose(drawing, frozenset({"w"}))


@pytest.mark.parametrize("noise", [1e-7, 3e-5])
def test_rounding_does_not_make_it_indefinite(noise: float) -> None:
    """A rank-one Gram matrix in float32, and one with more noise than rounding of one sum explains."""
    torch.manual_seed(0)
    gamma = torch.randn(64, 1)
    error = torch.randn(64, 64) * noise
    block = 1e6 * (gamma @ gamma.T + error + error.T)
    with pytest.raises(RuntimeError):
        torch.linalg.cholesky(block)
    (found,), _ = kernels.factor((block,))
    torch.testing.assert_close(found.T @ found, block, rtol=1e-2, atol=1e-2 * float(block.abs().max()))


def test_a_step_whose_gram_matrices_overflow_is_skipped() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    x, y = torch.randn(6, 4) * 1e15, torch.randint(3, (6,))
    with torch.no_grad():
        model[1].weight.mul_(1e8)
    before = copy.deepcopy(model.state_dict())
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), curvature="sgd", lr=0.1)
    with pytest.raises(NonFiniteError, match=r"a matrix of gradients .* is not finite"):
        opt.step(x, y)
    assert math.isfinite(opt.diagnostics["loss"]) and opt.diagnostics["skipped"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("rollout", "factored"), [("linear", 1), ("nonlinear", 2)])
@pytest.mark.parametrize(("coupling", "blocks"), [("full", 1), (3, 2)])
def test_larger_lifts_are_counted(
    coupling: int | str, blocks: int, rollout: Any, factored: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first Gram matrices, one a group of samples, are said to be indefinite beyond rounding: those of the last
    stage of two, or the only ones.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x, y = torch.randn(6, 4, dtype=torch.float64), torch.randint(3, (6,))
    options = {"curvature": "sgd", "coupling": coupling, "lr": 0.1, "rollout": rollout}
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(), **options)
    opt.step(x, y)
    assert opt.diagnostics["lifted_grams"] == 0
    true_cholesky, calls = torch.linalg.cholesky_ex, []

    def fails_first(block: torch.Tensor, **options: bool) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(block)
        found, failed = true_cholesky(block, **options)
        return found, failed + (len(calls) <= blocks)

    monkeypatch.setattr("torch.linalg.cholesky_ex", fails_first)
    with pytest.warns(RuntimeWarning, match="not definite to rounding"):
        opt.step(x, y)
    assert len(calls) == factored * blocks
    assert opt.diagnostics["lifted_grams"] == blocks
