"""The compiled optimizer against the oracle: five steps in float64, to 1e-9, over networks and options."""

from __future__ import annotations

import pytest

from gtddp_compile import compile_optimizer
from support.networks import CASES, Case, conv_residual
from support.oracle import Options, run
from support.oracle_bases import BASES
from support.oracle_cases import COUPLINGS, REGIMES, SETTINGS, arguments, batches, cross_entropy, distance, parameters

STEPS, TOLERANCE = 5, 1e-9


def check(
    case: Case, setting: str, options: Options, schedule: str = "asap", given: dict[str, int] | None = None
) -> None:
    """`given`: the package gets this mapping of players to stages in place of the schedule's name."""
    name, keywords = SETTINGS[setting]
    data, base = batches(case, STEPS), BASES[name](**keywords)
    expected, records = run(case.stages[schedule], parameters(case.model), data, cross_entropy, base, options)
    if options.feedback is True:
        assert max(record.feedback_norm for record in records) > 1e-6  # the test would see a missing gain
    opt = compile_optimizer(case.model, data[0][0][0], schedule=given or schedule, **arguments(setting, options))
    losses = [float(opt.step(x, y)) for (x,), y in data]
    assert losses == pytest.approx([record.loss for record in records], abs=TOLERANCE)
    assert distance(parameters(case.model), expected) < TOLERANCE


@pytest.mark.parametrize("regime", COUPLINGS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_curvature_by_coupling(setting: str, regime: str) -> None:
    """On a chain, a residual network and one with a mapping in turn."""
    name = ("mlp", "residual", "projection")[(list(SETTINGS).index(setting) + list(COUPLINGS).index(regime)) % 3]
    check(CASES[name](), setting, COUPLINGS[regime])


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("name", sorted(CASES))
def test_every_network_and_schedule(name: str, regime: str) -> None:
    """Each distinct schedule of the network: coalitions, mappings early and late, one player a stage."""
    distinct = {id(stages): schedule for schedule, stages in CASES[name]().stages.items()}
    settings = ["rmsprop", "momentum", "adam"]
    for schedule, setting in zip(distinct.values(), settings, strict=False):
        check(CASES[name](), setting, COUPLINGS[regime], schedule)


def test_a_schedule_given_by_hand() -> None:
    """The mapping placed at the last stage before the merge, by name."""
    stages = {"stem": 0, "a": 1, "b": 2, "short": 2, "head": 3}
    check(CASES["projection"](), "rmsprop", COUPLINGS["full"], "alap", given=stages)


def test_batch_norm_in_evaluation() -> None:
    """There it does not mix samples, and the block reading is exact."""
    check(conv_residual(training=False), "sgd", COUPLINGS["full"])
