"""A compiled optimizer behaves as a torch.optim.Optimizer, and a step is a transaction."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, RMSprop, compile_optimizer
from gtddp_compile.runtime.method import BaseMethod
from support import networks
from support.noisy import LOSS, Noisy, batch


def snapshot(model: nn.Module, opt: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, Any], Tensor]:
    return copy.deepcopy(model.state_dict()), copy.deepcopy(opt.state_dict()), torch.get_rng_state()


def assert_unchanged(before: tuple[Any, ...], model: nn.Module, opt: torch.optim.Optimizer) -> None:
    state, options, random = before
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name]), name
    assert str(opt.state_dict()) == str(options)
    assert torch.equal(torch.get_rng_state(), random)


def test_buffers_advance_once_and_random_numbers_are_drawn_once() -> None:
    model = Noisy()
    plain = copy.deepcopy(model)
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd", lr=0.1)
    torch.manual_seed(3)
    opt.step(*batch())
    after = torch.get_rng_state()
    torch.manual_seed(3)
    plain(batch()[0])
    assert torch.equal(after, torch.get_rng_state())
    for ours, theirs in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_dropout_masks_are_shared_by_both_sweeps() -> None:
    """With gains of zero (lr = 0) nothing moves, so no predicted change can be seen anywhere."""
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd", lr=1e-30, rollout="nonlinear")
    opt.step(*batch())
    stages = opt._diagnostics._stages
    changes = [stage["change"] for stage in stages.values() if "change" in stage]
    assert changes
    assert all(float(change.abs().max()) == 0 for change in changes)


def test_non_finite_loss_changes_nothing() -> None:
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="adam")
    opt.step(*batch())
    before = snapshot(model, opt)
    x, y = batch(1)
    x[0, 0] = float("inf")
    loss = opt.step(x, y)
    assert not torch.isfinite(loss)
    assert opt.diagnostics["skipped"]
    assert_unchanged(before, model, opt)


@pytest.mark.parametrize("targets", [torch.tensor([0, 1, 2, 3, 0, 1, 7]), torch.zeros(5, dtype=torch.long)])
def test_bad_targets_are_named_and_change_nothing(targets: Tensor) -> None:
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="rmsprop")
    opt.step(*batch())
    before = snapshot(model, opt)
    with pytest.raises(CompileError):
        opt.step(batch()[0], targets)
    assert_unchanged(before, model, opt)


@pytest.mark.parametrize(("curvature", "verb"), [("sgd", "descend_by"), ("adam", "descend"), ("kfac", "descend_block")])
def test_exception_in_the_second_sweep_changes_nothing(
    curvature: str, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parameters are written in place while the second sweep runs: one has been when it stops."""
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature=curvature)
    opt.step(*batch())
    before = snapshot(model, opt)
    original = getattr(BaseMethod, verb)
    written: list[bool] = []

    def broken(self: BaseMethod, *args: Any) -> None:
        if self._written:
            written.append(any(not torch.equal(self._aside[name], now) for name, now in self._written.items()))
            raise KeyboardInterrupt
        original(self, *args)

    monkeypatch.setattr(BaseMethod, verb, broken)
    with pytest.raises(KeyboardInterrupt):
        opt.step(*batch(1))
    assert written == [True]
    assert_unchanged(before, model, opt)


def test_state_dict_resumes_bit_for_bit() -> None:
    case = networks.residual()
    model = copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="adam", lr=0.01)
    for step in range(3):
        opt.step(*case.batch(step))
    stream = io.BytesIO()
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, stream)
    stream.seek(0)
    saved = torch.load(stream)
    other = copy.deepcopy(case.model)
    resumed = compile_optimizer(other, loss=LOSS, curvature="adam")
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    for step in range(3, 6):
        assert torch.equal(opt.step(*case.batch(step)), resumed.step(*case.batch(step)))
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pickle_carries_model_and_state() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    opt = compile_optimizer(model, batch(0)[0], loss=LOSS, curvature="adam", lr=0.01)
    opt.step(*batch(0))
    twin = pickle.loads(pickle.dumps(opt))
    assert torch.equal(opt.step(*batch(1)), twin.step(*batch(1)))
    assert torch.equal(opt.step(*batch(2)), twin.step(*batch(2)))


def test_scheduler_and_groups() -> None:
    case = networks.residual()
    model = copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="sgd", lr=0.4)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)
    names = [group["name"] for group in opt.param_groups]
    assert names == [player.name for player in opt.graph.players]
    opt.step(*case.batch(0))
    scheduler.step()
    assert all(group["lr"] == 0.2 for group in opt.param_groups)
    opt.param_groups[0]["lr"] = 0.0
    before = [p.clone() for p in opt.param_groups[0]["params"]]
    other = [p.clone() for p in opt.param_groups[1]["params"]]
    opt.step(*case.batch(1))
    assert all(torch.equal(a, b) for a, b in zip(before, opt.param_groups[0]["params"], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(other, opt.param_groups[1]["params"], strict=True))


def test_hooks_and_zero_grad() -> None:
    case = networks.mlp()
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0)[0], loss=LOSS, curvature="sgd", lr=0.1)
    seen: list[str] = []
    opt.register_step_pre_hook(lambda *a: seen.append("before"))
    opt.register_step_post_hook(lambda *a: seen.append("after"))
    opt.zero_grad()
    opt.step(*case.batch(0))
    assert seen == ["before", "after"]
    assert all(p.grad is None for group in opt.param_groups for p in group["params"])


def test_groups_cannot_be_added() -> None:
    case = networks.mlp()
    opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature="sgd")
    with pytest.raises(CompileError, match="compile_optimizer again"):
        opt.add_param_group({"params": [nn.Parameter(torch.zeros(1))]})


def test_specialised_at_the_first_step() -> None:
    case = networks.mlp()
    opt = compile_optimizer(copy.deepcopy(case.model), loss=LOSS, curvature=RMSprop(lr=1e-3))
    with pytest.raises(CompileError, match="not specialised"):
        _ = opt.graph
    opt.step(*case.batch(0))
    assert len(opt.graph.players) == len(list(case.model.parameters())) // 2


def test_mode_and_frozen_parameters_are_respected_after_a_change() -> None:
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd", lr=0.1)
    opt.step(*batch())
    model.eval()
    model.fc.weight.requires_grad_(False)
    frozen, buffers = model.fc.weight.clone(), [b.clone() for b in model.buffers()]
    bias = model.fc.bias.clone()
    opt.step(*batch(1))
    assert torch.equal(frozen, model.fc.weight)
    assert not torch.equal(bias, model.fc.bias)
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers(), strict=True))


class Striding(nn.Module):
    """Attributes of several kinds that its forward pass reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 2, 3, padding=1), nn.Linear(2, 3)
        self.options = {"gain": 2.0}

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(self.conv(x).relu().mean((2, 3))) * self.options["gain"]
        return out


def test_changed_attributes_and_hooks_are_followed() -> None:
    torch.manual_seed(0)
    model, x, y = Striding(), torch.randn(4, 1, 6, 6), torch.randint(3, (4,))
    opt = compile_optimizer(model, x, loss=LOSS, curvature="sgd", lr=0.1)
    losses = []

    def step() -> None:
        expected = LOSS(model(x), y).item()
        losses.append(float(opt.step(x, y)))
        assert losses[-1] == pytest.approx(expected, rel=1e-5)

    step()
    model.conv.stride = (2, 2)
    step()
    model.options["gain"] = -1.0
    step()
    handle = model.fc.register_forward_hook(lambda module, inputs, output: 3 * output)
    step()
    handle.remove()
    step()
    assert len(set(losses)) == len(losses)


def test_a_function_as_loss_may_do_without_targets() -> None:
    case = networks.mlp()
    x = case.batch(0)[0]
    opt = compile_optimizer(copy.deepcopy(case.model), x, loss=lambda y, _: y.square().mean(1), curvature="sgd", lr=0.1)
    assert opt.accumulate(x, None) == opt.step(x)


def test_replaced_parameter_is_refused() -> None:
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd")
    model.fc.weight = nn.Parameter(torch.zeros(6, 4))
    with pytest.raises(CompileError, match=r"fc\.weight.*replaced"):
        opt.step(*batch())


@pytest.mark.parametrize("inputs", [None, "text", torch.zeros(0, 4), torch.zeros(3, 5), [], torch.tensor(1.0)])
def test_malformed_inputs(inputs: Any) -> None:
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature="sgd")
    before = snapshot(model, opt)
    with pytest.raises((CompileError, RuntimeError)):
        opt.step(inputs, torch.zeros(3, dtype=torch.long))
    assert_unchanged(before, model, opt)


def test_unknown_options_are_refused_by_name() -> None:
    model, x = Noisy(), batch()[0]
    for options in (
        {"coupling": "diagonal"}, {"coupling": 0}, {"recursion": "magic"}, {"schedule": "late"}, {"backend": "gpu"},
        {"feedback": "closed"}, {"feedback_clip": -1.0}, {"curvature": "lbfgs"}, {"learning_rate": 1.0},
        {"recursion": "substituted"}, {"maximize": True}, {"feedback": 1}, {"cooperative": 0}, {"compile": 0},
        {"feedback_clip": "a"}, {"feedback_clip": True},
    ):  # fmt: skip
        with pytest.raises(CompileError) as error:
            compile_optimizer(model, x, loss=LOSS, **{"curvature": "sgd", **options})  # type: ignore[arg-type]
        assert next(iter(options)).split("_")[0] in str(error.value), options


def test_batch_of_one_and_other_sizes() -> None:
    case = networks.residual()
    opt = compile_optimizer(copy.deepcopy(case.model), case.batch(0)[0], loss=LOSS, curvature="sgd", lr=0.1)
    for size in (1, 2, 9):
        assert torch.isfinite(opt.step(*case.batch(0, size)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_lower_precision(dtype: torch.dtype) -> None:
    case = networks.residual()
    model = copy.deepcopy(case.model).to(dtype)
    opt = compile_optimizer(model, case.batch(0)[0].to(dtype), loss=LOSS, curvature="sgd", lr=0.5)
    x, y = case.batch(0)
    first = float(opt.step(x.to(dtype), y))
    for _ in range(20):
        last = float(opt.step(x.to(dtype), y))
    assert last < first


def test_non_contiguous_inputs() -> None:
    case = networks.residual()
    x, y = case.batch(0)
    found = []
    for value in (x, x.T.contiguous().T):
        model = copy.deepcopy(case.model)
        compile_optimizer(model, x, loss=LOSS, curvature="sgd", lr=0.1).step(value, y)
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [{"curvature": "adam", "amsgrad": True}, {"curvature": "rmsprop", "centered": True, "momentum": 0.5},
     {"curvature": "sgd", "momentum": 0.9}],
    ids=lambda options: options["curvature"],
)  # fmt: skip
def test_states_stay_the_tensors_they_are(options: dict[str, Any]) -> None:
    """As in torch.optim, who holds a state's tensor sees what it is after every step; a copy stays what it was."""
    model = Noisy()
    opt = compile_optimizer(model, batch()[0], loss=LOSS, **{"curvature": "sgd", **options})
    opt.step(*batch())
    opt.step(*batch(1))
    held = [(state, key, value) for state in opt.state.values() for key, value in state.items() if value.dim()]
    copies = [value.clone() for *_, value in held]
    opt.step(*batch(2))
    assert held and all(state[key] is value for state, key, value in held)
    assert all(not torch.equal(value, copy) for (*_, value), copy in zip(held, copies, strict=True))


@pytest.mark.parametrize("curvature", ["adam", "rmsprop"])
def test_memory_of_new_states_is_no_state(curvature: str) -> None:
    """A step that fails after the statistics leaves the states alone, and the next is what it would have been."""
    found = []
    for interrupted in (False, True):
        torch.manual_seed(0)
        model = Noisy()
        opt = compile_optimizer(model, batch()[0], loss=LOSS, curvature=curvature)
        for index in range(4):
            if interrupted:
                before, x = snapshot(model, opt), batch(index)[0].clone()
                x[0, 0] = float("inf")
                opt.step(x, batch(index)[1])
                with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
                    patch.setattr(BaseMethod, "descend", _interrupted)
                    opt.step(*batch(index + 7))
                assert_unchanged(before, model, opt)
            opt.step(*batch(index))
        found.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def _interrupted(*arguments: Any) -> None:
    raise KeyboardInterrupt
