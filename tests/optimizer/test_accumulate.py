"""``opt.accumulate``: one update from the union of micro-batches, each of them a group of samples."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, CompileError, MonteCarlo, NonFiniteError, compile_optimizer
from support.compared import TORCH
from support.faults import Fault, fault_at
from support.networks import Case, seeded
from support.noisy import LOSS, Noisy

SIZE = 4


def optimizer(model: nn.Module, x: Tensor, **options: Any) -> CompiledOptimizer:
    return compile_optimizer(model, x, **{"curvature": "sgd", "loss": LOSS, "lr": 0.1, **options})


def step_of_parts(opt: CompiledOptimizer, x: Tensor, y: Tensor, size: int = SIZE) -> Tensor:
    """One update from micro-batches; the last goes to ``step``."""
    *first, last = zip(x.split(size), y.split(size), strict=True)
    for part in first:
        opt.accumulate(*part)
    return opt.step(*last)


METHODS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, "rmsprop": {"lr": 0.01, "centered": True},
    "adamw": {"lr": 0.01},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_without_feedback_it_is_torch_after_accumulated_gradients(name: str, reduction: str) -> None:
    """Also with batch-norms, which see a micro-batch at a time on either side."""
    torch.manual_seed(0)
    # no bias before the batch-norm: its gradient is rounding alone, which Adam would scale up
    layers = nn.Linear(4, 6, bias=False), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.3), nn.Linear(6, 3)
    ours, loss = nn.Sequential(*layers).double(), nn.CrossEntropyLoss(reduction=reduction)
    theirs = copy.deepcopy(ours)
    opt = optimizer(ours, torch.randn(4, 4).double(), loss=loss, curvature=name, feedback=False, **METHODS[name])
    reference = TORCH[name](theirs.parameters(), **METHODS[name])
    for step in range(4):
        x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
        torch.manual_seed(step)
        step_of_parts(opt, x, y)
        after = torch.get_rng_state()
        torch.manual_seed(step)
        reference.zero_grad()
        for a, b in zip(x.split(SIZE), y.split(SIZE), strict=True):
            (loss(theirs(a), b) * (len(b) / 10 if reduction == "mean" else 1.0)).backward()
        reference.step()
        assert torch.equal(after, torch.get_rng_state())
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=1e-12, atol=1e-12)


def noisy(**options: Any) -> tuple[nn.Module, CompiledOptimizer, Callable[[int], tuple[Tensor, Tensor]]]:
    case = Case(seeded(Noisy), (4,))
    torch.manual_seed(0)
    return case.model, optimizer(case.model, case.batch(0, 5)[0], **options), lambda seed: case.batch(seed, 5)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("options", [{}, {"memory": "recompute"}, {"curvature": "adam", "terminal": MonteCarlo(2)}])
def test_masks_of_each_micro_batch_are_the_same_in_both_sweeps(options: dict[str, Any], parts: int) -> None:
    """With a vanishing learning rate nothing moves, so nothing may be seen to have moved."""
    _, opt, batch = noisy(**{**options, "rollout": "nonlinear", "lr": 1e-30})
    if parts == 2:
        opt.accumulate(*batch(0))
    opt.step(*batch(1))
    changes = [stage["change"] for stage in opt._diagnostics._stages.values() if "change" in stage]
    assert changes and all(float(change.abs().max()) == 0 for change in changes)


def everything(model: nn.Module, opt: CompiledOptimizer) -> list[Any]:
    return [*map(torch.clone, model.state_dict().values()), str(opt.state_dict()), torch.get_rng_state()]


def assert_equal(left: list[Any], right: list[Any]) -> None:
    for a, b in zip(left, right, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


@pytest.mark.parametrize("curvature", ["sgd", "adam"])
@pytest.mark.parametrize("feedback", [True, False])
def test_a_step_that_fails_leaves_the_accumulated(curvature: str, feedback: bool) -> None:
    """The second attempt makes the update that the first would have made."""
    results = []
    for fails in (False, True):
        model, opt, batch = noisy(curvature=curvature, feedback=feedback)
        opt.step(*batch(9))
        torch.manual_seed(1)
        opt.accumulate(*batch(0))
        before = everything(model, opt)
        if fails:
            with pytest.raises(CompileError):
                opt.step(batch(1)[0], torch.full((5,), 7))
            assert_equal(before, everything(model, opt))
            with pytest.raises(Fault), fault_at(12):
                opt.step(*batch(1))
            assert_equal(before, everything(model, opt))
        opt.step(*batch(1))
        results.append(everything(model, opt))
    assert_equal(*results)


def test_accumulate_itself_changes_nothing_and_a_micro_batch_that_fails_is_left_out() -> None:
    model, opt, batch = noisy(curvature="adam")
    twin, other, _ = noisy(curvature="adam")
    torch.manual_seed(1)
    before = everything(model, opt)[:-1]
    opt.accumulate(*batch(0))
    assert_equal(before, everything(model, opt)[:-1])
    after = torch.get_rng_state()
    with pytest.raises(CompileError):
        opt.accumulate(batch(1)[0], torch.full((5,), 7))
    bad = batch(2)[0].fill_(float("inf"))
    with pytest.raises(NonFiniteError, match=r"the loss \(nan\)"):
        opt.accumulate(bad, batch(2)[1])
    assert torch.equal(after, torch.get_rng_state())
    opt.step(*batch(1))
    torch.manual_seed(1)
    other.accumulate(*batch(0))
    other.step(*batch(1))
    assert_equal(everything(model, opt), everything(twin, other))


def test_a_step_whose_loss_is_not_finite_drops_the_accumulated() -> None:
    model, opt, batch = noisy(on_nonfinite="skip")
    opt.accumulate(*batch(0))
    before = everything(model, opt)
    with pytest.warns(UserWarning, match="not finite"):
        assert not torch.isfinite(opt.step(batch(1)[0] / 0, batch(1)[1])) and opt.diagnostics["skipped"]
    assert_equal(before, everything(model, opt))
    with pytest.raises(CompileError, match="batch itself"):
        opt.step()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_what_is_dropped_leaves_autograd_on(reduction: str) -> None:
    """Micro-batches wait for others in the middle of their programs; who lets go of them ends them there."""
    model, x, y = nn.Linear(4, 3), torch.randn(6, 4), torch.randint(0, 3, (6,))
    opt = compile_optimizer(model, x, loss=nn.CrossEntropyLoss(reduction=reduction), on_nonfinite="skip")
    opt.accumulate(x, y)
    with pytest.warns(UserWarning, match="not finite"):
        opt.step(x / 0, y)
    opt.accumulate(x, y)
    del opt
    gc.collect()
    assert torch.is_grad_enabled()


def test_options_and_state_are_those_of_the_step() -> None:
    """As a learning rate that a scheduler sets between backward passes and the step is torch's."""
    model, opt, batch = noisy(curvature="adam")
    twin, other, _ = noisy(curvature="adam")
    for both in (opt, other):
        torch.manual_seed(1)
        both.step(*batch(3))
    saved = copy.deepcopy(opt.state_dict())
    opt.step(*batch(4))
    model.load_state_dict(twin.state_dict())
    torch.manual_seed(2)
    opt.accumulate(*batch(0))
    opt.load_state_dict(saved)
    for group in (*opt.param_groups, *other.param_groups):
        group["lr"] = 0.03
    opt.step(*batch(1))
    torch.manual_seed(2)
    other.accumulate(*batch(0))
    other.step(*batch(1))
    assert_equal(everything(model, opt), everything(twin, other))


def test_pickles_and_zero_grad_drop_the_accumulated() -> None:
    model, opt, batch = noisy()
    opt.accumulate(*batch(0))
    assert "accumulated" not in str(opt.state_dict())
    copied = optimizer(nn.Linear(4, 3).double(), batch(0)[0])
    copied.accumulate(*batch(0))
    opt.zero_grad()
    for one in (pickle.loads(pickle.dumps(copied)), opt):
        with pytest.raises(CompileError, match="batch itself"):
            one.step()
    assert model.bn.num_batches_tracked == 0  # type: ignore[union-attr]


KEPT: list[dict[str, Any]] = [
    {}, {"curvature": "foof"}, {"rollout": "nonlinear"}, {"memory": "recompute"}, {"terminal": "ggn"},
    {"curvature": "kfac", "feedback": False},
]  # fmt: skip


def plain(**options: Any) -> tuple[nn.Module, CompiledOptimizer, Tensor, Tensor]:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(8, 4), torch.arange(8) % 3
    return model, optimizer(model, x[:4], **options), x, y


@pytest.mark.parametrize("options", KEPT, ids=str)
def test_inputs_that_are_overwritten_are_refused_where_they_are_still_needed(options: dict[str, Any]) -> None:
    model, opt, x, y = plain(**options)
    opt.step(x, y)
    inputs = x[:4].clone()
    opt.accumulate(inputs, y[:4])
    inputs.copy_(x[4:])
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    for call in (opt.accumulate, opt.step):
        with pytest.raises(CompileError, match="inputs of accumulated micro-batch 0 were overwritten, and they are"):
            call(inputs, y[4:])
    torch.testing.assert_close((model.state_dict(), opt.state_dict()["state"]), before, rtol=0, atol=0)


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("options", [*KEPT, {"curvature": "adam", "feedback": False}], ids=str)
def test_what_is_not_needed_any_more_may_be_overwritten(options: dict[str, Any], inference: bool) -> None:
    """Targets; inputs where gradients are all that is left, or of inference mode, which do not tell and are copied."""
    found = []
    for overwritten in (False, True):
        model, opt, x, y = plain(**options)
        with torch.inference_mode(inference):
            inputs, targets = x[:4].clone(), y[:4].clone()
        opt.accumulate(inputs, targets)
        with torch.inference_mode(inference):
            if overwritten:
                targets.copy_(y[4:])
            if overwritten and (inference or options not in KEPT):
                inputs.copy_(x[4:])
        opt.step(x[4:].clone(), y[4:].clone())
        found.append(model.state_dict())
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["inputs", "targets"])
def test_what_is_overwritten_before_a_second_run_is_refused(which: str) -> None:
    _, opt, batch = noisy()
    x, y = batch(0)
    opt.accumulate(x, y)
    {"inputs": x, "targets": y}[which].zero_()
    opt.param_groups[0]["lr"] = 0.2
    with pytest.raises(CompileError, match=f"the {which} of accumulated micro-batch 0 were overwritten"):
        opt.step(*batch(1))


@pytest.mark.parametrize(
    "options", [{"coupling": "block"}, {"coupling": "block", "recursion": "substituted"}, {"backend": "dense"}], ids=str
)
def test_what_has_no_union_of_micro_batches_is_refused_by_name(options: dict[str, Any]) -> None:
    """The refusals of a model that has changed: docs/errors.md."""
    x, y = Case(seeded(Noisy), (4,)).batch(0, 5)
    with pytest.raises(CompileError, match="accumulate"):
        optimizer(nn.Linear(4, 3).double(), x, **options).accumulate(x, y)


def test_what_there_is_to_say_of_a_loss_is_said_once() -> None:
    """Not with every micro-batch of the first update."""
    _, opt, x, y = plain(loss=lambda out, targets: ((out - out.mean(0)) ** 2).mean(1))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        step_of_parts(opt, x, y, 2)
    assert ["mixes samples" in str(one.message) for one in said] == [True]
