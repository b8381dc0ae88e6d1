"""The compiled optimizer against the oracle: three steps in float64, to 1e-9, over networks and options."""

import itertools

import pytest
import torch
from torch import Tensor

from gtddp_compile import compile_optimizer
from support.networks import CASES, Case, conv_residual, residual
from support.oracle import Options, run
from support.oracle_cases import BASES, COUPLINGS, SETTINGS, arguments, batches, cross_entropy, distance, parameters

STEPS, TOLERANCE = 3, 1e-9


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


@pytest.mark.parametrize(
    ("number", "setting", "regime"),
    [(n, *both) for n, both in enumerate(itertools.product(SETTINGS, COUPLINGS)) if n % 2],
)
def test_curvature_by_coupling(number: int, setting: str, regime: str) -> None:
    """Every other pair, on a chain, a residual network and one with a mapping in turn."""
    check(CASES[("mlp", "residual", "projection")[number % 3]](), setting, COUPLINGS[regime])


@pytest.mark.parametrize("regime", ["full", "groups", "block", "substituted", "printed"])
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


# --- the oracle on its own: base methods, a linear-quadratic problem, groups ---


def solve(case: Case, setting: str, options: Options, steps: int = 3) -> dict[str, Tensor]:
    name, keywords = SETTINGS[setting]
    data = batches(case, steps)
    return run(case.stages["asap"], parameters(case.model), data, cross_entropy, BASES[name](**keywords), options)[0]


def test_couplings_agree_where_they_must_and_differ_elsewhere() -> None:
    case = residual()
    results = {name: solve(case, "sgd", Options(coupling=name)) for name in ("full", 7, 9, 3, 1, "block")}
    assert max(distance(results[size], results["full"]) for size in (7, 9)) < 1e-12
    for left, right in (("full", 3), ("full", 1), ("full", "block"), (3, 1), (1, "block")):
        assert distance(results[left], results[right]) > 1e-3


def test_groups_are_the_mean_of_groups_that_stand_for_the_batch() -> None:
    """With sgd, whose metric is no statistic, the update is the weighted mean of each group's own update."""
    case = residual()
    x, y = case.batch(0)
    before = parameters(case.model)

    def first_stage(rows: slice, options: Options) -> Tensor:
        data = [((x[rows],), y[rows])]
        new, _ = run(case.stages["asap"], before, data, cross_entropy, BASES["sgd"](lr=0.7), options)
        return new["stem.weight"] - before["stem.weight"]

    parts = [slice(0, 3), slice(3, 6), slice(6, 7)]
    mean = sum((r.stop - r.start) / 7 * first_stage(r, Options()) for r in parts)
    torch.testing.assert_close(first_stage(slice(0, 7), Options(coupling=3)), mean, rtol=1e-12, atol=1e-14)
