"""The compiled optimizer against the oracle: five steps in float64, to 1e-9, over networks and options."""

import copy
import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gtddp_compile import compile_optimizer
from support.compared import TORCH, torch_step
from support.networks import CASES, Case, conv_residual, residual
from support.oracle import Options, Stage, ddp_step, run
from support.oracle_cases import (
    BASES,
    COUPLINGS,
    REGIMES,
    SETTINGS,
    arguments,
    batches,
    cross_entropy,
    distance,
    parameters,
)

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


@pytest.mark.parametrize(
    ("number", "setting", "regime"),
    [(n, *both) for n, both in enumerate(itertools.product(SETTINGS, COUPLINGS)) if n % 2],
)
def test_curvature_by_coupling(number: int, setting: str, regime: str) -> None:
    """Every other pair, on a chain, a residual network and one with a mapping in turn."""
    check(CASES[("mlp", "residual", "projection")[number % 3]](), setting, COUPLINGS[regime])


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


# --- the oracle on its own: base methods, a linear-quadratic problem, groups ---


def solve(case: Case, setting: str, options: Options, steps: int = 3) -> dict[str, Tensor]:
    name, keywords = SETTINGS[setting]
    data = batches(case, steps)
    return run(case.stages["asap"], parameters(case.model), data, cross_entropy, BASES[name](**keywords), options)[0]


@pytest.mark.parametrize("setting", SETTINGS)
def test_without_feedback_it_is_the_base_method(setting: str) -> None:
    case = residual()
    result, theirs = solve(case, setting, Options(feedback=False), 5), copy.deepcopy(case.model)
    name, keywords = SETTINGS[setting]
    optimizer = TORCH[name](theirs.parameters(), **keywords)
    for (x,), y in batches(case, 5):
        torch_step(optimizer, F.cross_entropy(theirs(x), y))
    assert distance(result, parameters(theirs)) < 1e-12


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_linear_dynamics_give_the_minimum_of_the_quadratic_model(weight_decay: float) -> None:
    """x' = A x + B u: the sweep minimises mean(g δx + (g δx)²/2) + ℓ_u δu + |δu|²/(2 lr) over all u."""
    torch.manual_seed(0)
    batch, lr = 3, 2.0
    maps = [(torch.randn(2, 2).double(), torch.randn(2, 2).double()) for _ in range(3)]
    stages = [
        Stage((f"u{t}",), lambda s, p, t=t, B=B: (s[0] * 0 + p[f"u{t}"] @ B,), lambda s, h, A=A: (s[0] @ A + h[0],))
        for t, (A, B) in enumerate(maps)
    ]
    params = {f"u{t}": torch.randn(2).double() for t in range(3)}
    x, goal = torch.randn(batch, 2).double(), torch.randn(batch, 2).double()

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return ((outputs - targets) ** 2).sum(1)

    base = BASES["sgd"](lr=lr, weight_decay=weight_decay)
    new, _ = ddp_step(stages, params, (x,), goal, loss, base, Options(clip=None))

    u, state, response = torch.cat(list(params.values())), x, torch.zeros(0, 2).double()
    for t, (A, B) in enumerate(maps):
        state, response = state @ A + params[f"u{t}"] @ B, torch.cat([response @ A, B])
    rows = 2 * (state - goal) @ response.T  # gradient of each sample's loss in all controls
    hessian = rows.T @ rows / batch + torch.eye(6).double() / lr
    best = u - torch.linalg.solve(hessian, rows.mean(0) + weight_decay * u)
    torch.testing.assert_close(torch.cat(list(new.values())), best, rtol=1e-12, atol=1e-12)


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
