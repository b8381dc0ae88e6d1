"""The compiled optimizer against the oracle: five steps in float64, to 1e-9, over networks and options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from support.networks import CASES, Case, conv_residual
from support.oracle import Options, collapsed_step, ddp_step, run
from support.oracle_bases import BASES
from support.oracle_cases import (
    COUPLINGS,
    REGIMES,
    SETTINGS,
    TORCH,
    arguments,
    batches,
    cross_entropy,
    distance,
    parameters,
)

STEPS, TOLERANCE = 5, 1e-9
GEOMETRIC = ["geometric", "geometric_groups", "geometric_block", "geometric_substituted"]
CONV = {"conv_residual": conv_residual, "conv_residual_eval": lambda: conv_residual(training=False)}


def check(
    case: Case,
    setting: str,
    options: Options,
    schedule: str = "asap",
    method: Any = ddp_step,
    backend: str = "fast",
    given: dict[str, int] | None = None,
) -> None:
    """`given`: the package gets this mapping of players to stages in place of the schedule's name."""
    name, keywords = SETTINGS[setting]
    data = batches(case, STEPS)
    expected, records = run(
        case.stages[schedule],
        parameters(case.model),
        data,
        cross_entropy,
        BASES[name](**keywords),
        options,
        method=method,
    )
    if options.feedback is True:
        assert max(record.feedback_norm for record in records) > 1e-6  # the test would see a missing gain
    optimizer = compile_optimizer(
        case.model, data[0][0][0], schedule=given or schedule, backend=backend, **arguments(setting, options)
    )
    losses = [float(optimizer.step(x, y)) for (x,), y in data]
    assert losses == pytest.approx([record.loss for record in records], abs=TOLERANCE)
    assert distance(parameters(case.model), expected) < TOLERANCE


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("setting", ["sgd", "momentum", "rmsprop", "adam"])
@pytest.mark.parametrize("name", ["mlp", "residual", "projection"])
def test_curvature_by_coupling(name: str, setting: str, regime: str) -> None:
    check(CASES[name](), setting, COUPLINGS[regime])


@pytest.mark.parametrize("regime", GEOMETRIC)
@pytest.mark.parametrize("setting", ["momentum", "adam"])
@pytest.mark.parametrize("name", ["residual", "projection"])
def test_geometric_terminal(name: str, setting: str, regime: str) -> None:
    check(CASES[name](), setting, COUPLINGS[regime])


@pytest.mark.parametrize("setting", ["nesterov", "centered", "adamw"])
@pytest.mark.parametrize("regime", ["full", "substituted"])
def test_other_curvature_options(setting: str, regime: str) -> None:
    check(CASES["residual"](), setting, COUPLINGS[regime])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_network_and_schedule(name: str, regime: str) -> None:
    """Each distinct schedule of the network: coalitions, mappings early and late, one player a stage."""
    distinct = {id(stages): schedule for schedule, stages in CASES[name]().stages.items()}
    settings = ["rmsprop", "momentum", "adam"]
    for schedule, setting in zip(distinct.values(), settings, strict=False):
        check(CASES[name](), setting, COUPLINGS[regime], schedule)


@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential"])
@pytest.mark.parametrize("name", ["projection", "gated", "branches", "attention"])
def test_schedules_with_the_default_coupling(name: str, schedule: str) -> None:
    check(CASES[name](), "sgd", COUPLINGS["full"], schedule)


def test_a_schedule_given_by_hand() -> None:
    """The mapping placed at the last stage before the merge, by name."""
    stages = {"stem": 0, "a": 1, "b": 2, "short": 2, "head": 3}
    check(CASES["projection"](), "rmsprop", COUPLINGS["full"], "alap", given=stages)


@pytest.mark.parametrize("regime", ["open", "unclipped", "sum", "samples"])
@pytest.mark.parametrize("name", ["residual_relu", "projection"])
def test_options_of_the_feedback_and_the_loss(name: str, regime: str) -> None:
    check(CASES[name](), "rmsprop", COUPLINGS[regime])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("setting", ["sgd", "momentum", "rmsprop", "adam"])
@pytest.mark.parametrize("name", sorted(CONV))
def test_convolutions_with_batch_norm(name: str, setting: str, regime: str) -> None:
    """Training mode is read as docs/theory.md#mixing says, which `collapsed_step` defines."""
    check(CONV[name](), setting, COUPLINGS[regime], method=collapsed_step)


def test_eval_batch_norm_against_brute_force() -> None:
    check(CONV["conv_residual_eval"](), "sgd", COUPLINGS["full"])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", ["residual", "projection", "conv_residual"])
def test_the_dense_backend(name: str, regime: str) -> None:
    check((CASES | CONV)[name](), "momentum", COUPLINGS[regime], method=collapsed_step, backend="dense")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", ["residual", "projection", "conv_residual"])
def test_without_feedback_it_is_the_base_method(name: str, setting: str) -> None:
    """Proposition 4, against torch.optim itself: five steps, parameters and buffers."""
    ours, theirs = (CASES | CONV)[name](), (CASES | CONV)[name]()
    torch_name, keywords = SETTINGS[setting]
    base = TORCH[torch_name](theirs.model.parameters(), **keywords)
    data = batches(ours, STEPS)
    optimizer = compile_optimizer(ours.model, data[0][0][0], **arguments(setting, Options(feedback=False)))
    for (x,), y in data:
        optimizer.step(x, y)
        base.zero_grad()
        F.cross_entropy(theirs.model(x), y).backward()
        base.step()
    assert distance(parameters(ours.model), parameters(theirs.model)) < 1e-11
    for left, right in zip(ours.model.buffers(), theirs.model.buffers(), strict=True):
        torch.testing.assert_close(left, right)


def test_buffers_advance_once_a_step() -> None:
    """With feedback the second forward sweep must not move batch-norm's statistics again."""
    case, reference = conv_residual(), conv_residual()
    (x,), y = batches(case, 1)[0]
    compile_optimizer(case.model, x, **arguments("sgd", Options())).step(x, y)
    reference.model(x)
    for left, right in zip(case.model.buffers(), reference.model.buffers(), strict=True):
        torch.testing.assert_close(left, right)
