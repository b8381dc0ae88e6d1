"""The oracle on its own: base methods, a linear-quadratic problem, brute force against closed form.

Each a test below:

* The closed form (docs/theory.md#collapse) equals the dense solver with the whole batch-augmented Hessian, and the
  block form (docs/theory.md#block) the dense block-diagonal one.
* With weight decay `α = P 1`, `w = P (1 + c)` is not the DDP update. The closed form that equals the brute force has
  `y_t = y_{t+1} - γ_t M_t⁻¹ ℓ_u`, `y_T = 1`, in every place of the vector of ones (docs/theory.md#weight-decay).
  The block form needs nothing new: its k contains ℓ_u.
* Groups: `P_t⁻¹ = P_{t+1}⁻¹ + (B/b_j) Γ_t` is the mean, weighted by b_j/B, of the updates of groups that each
  stand for the batch; a ragged last group uses its own size.
* docs/theory.md#mixing is the exact derivation where samples do not mix (batch-norm in eval mode), else it is near.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.networks import CASES, Case, conv_residual, residual
from support.oracle import Options, Stage, collapsed_step, ddp_step, run
from support.oracle_bases import BASES
from support.oracle_cases import COUPLINGS, SETTINGS, TORCH, batches, cross_entropy, distance, parameters

BUILDERS = CASES | {"conv_residual_eval": lambda: conv_residual(training=False)}


def solve(case: Case, setting: str, options: Options, steps: int = 3, schedule: str = "asap", **extra: Any) -> Any:
    name, keywords = SETTINGS[setting]
    return run(
        case.stages[schedule],
        parameters(case.model),
        batches(case, steps),
        cross_entropy,
        BASES[name](**keywords),
        options,
        **extra,
    )


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", [ddp_step, collapsed_step])
@pytest.mark.parametrize("build", [residual, conv_residual])
def test_without_feedback_it_is_the_base_method(build: Any, method: Any, setting: str) -> None:
    case = build()
    result, _ = solve(case, setting, Options(feedback=False), steps=5, method=method)
    name, keywords = SETTINGS[setting]
    optimizer = TORCH[name](case.model.parameters(), **keywords)
    for (x,), y in batches(case, 5):
        optimizer.zero_grad()
        F.cross_entropy(case.model(x), y).backward()
        optimizer.step()
    assert distance(result, parameters(case.model)) < 1e-12


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("method", [ddp_step, collapsed_step])
def test_linear_dynamics_give_the_minimum_of_the_quadratic_model(method: Any, weight_decay: float) -> None:
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
    new, _ = method(stages, params, (x,), goal, loss, base, Options(clip=None))

    u, state, response = torch.cat(list(params.values())), x, torch.zeros(0, 2).double()
    for t, (A, B) in enumerate(maps):
        state, response = state @ A + params[f"u{t}"] @ B, torch.cat([response @ A, B])
    rows = 2 * (state - goal) @ response.T  # gradient of each sample's loss in all controls
    hessian = rows.T @ rows / batch + torch.eye(6).double() / lr
    best = u - torch.linalg.solve(hessian, rows.mean(0) + weight_decay * u)
    torch.testing.assert_close(torch.cat(list(new.values())), best, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_closed_form_equals_brute_force(setting: str, coupling: str) -> None:
    case = residual()
    dense, records = solve(case, setting, COUPLINGS[coupling], steps=5)
    closed, closed_records = solve(case, setting, COUPLINGS[coupling], steps=5, method=collapsed_step)
    assert distance(closed, dense) < 1e-10
    assert [r.clipped_samples for r in records] == [r.clipped_samples for r in closed_records]
    assert [r.clipped_radicands for r in records] == [r.clipped_radicands for r in closed_records]
    silent = COUPLINGS[coupling].feedback is not True
    assert all((record.feedback_norm == 0) == silent for record in records)


@pytest.mark.parametrize("coupling", ["full", "groups", "block", "substituted"])
@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("setting", ["momentum", "adam"])
def test_closed_form_equals_brute_force_on_every_network(setting: str, name: str, coupling: str) -> None:
    case = BUILDERS[name]()
    for schedule in {id(stages): schedule for schedule, stages in case.stages.items()}.values():
        dense, _ = solve(case, setting, COUPLINGS[coupling], 2, schedule)
        closed, _ = solve(case, setting, COUPLINGS[coupling], 2, schedule, method=collapsed_step)
        assert distance(closed, dense) < 1e-10


@pytest.mark.parametrize("setting", ["momentum", "rmsprop", "adam"])
def test_weight_decay_needs_its_own_term_in_the_closed_form(setting: str) -> None:
    dense, _ = solve(residual(), setting, Options())
    whole, _ = solve(residual(), setting, Options(), method=collapsed_step)
    printed, _ = solve(residual(), setting, Options(), method=collapsed_step, decay_terms=False)
    assert distance(whole, dense) < 1e-12
    assert distance(printed, dense) > 1e-4


def test_couplings_agree_where_they_must_and_differ_elsewhere() -> None:
    case = residual()
    results = {name: solve(case, "sgd", Options(coupling=name))[0] for name in ("full", 7, 9, 3, 1, "block")}
    assert distance(results[7], results["full"]) < 1e-12
    assert distance(results[9], results["full"]) < 1e-12
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


def test_clipped_radicands_are_counted() -> None:
    case = residual()
    args = (case.stages["asap"], parameters(case.model), batches(case, 1), cross_entropy)
    for method in (ddp_step, collapsed_step):

        def count(lr: float, recursion: str, method: Any = method) -> int:
            _, records = run(*args, BASES["sgd"](lr=lr), Options("block", recursion), method=method)
            return records[0].clipped_radicands

        assert count(100.0, "substituted") > 0
        assert count(0.01, "substituted") == 0
        assert count(100.0, "printed") == 0


def test_schedules_differ_to_second_order_only() -> None:
    case = CASES["projection"]()
    before = parameters(case.model)

    def update(schedule: str, lr: float) -> dict[str, Tensor]:
        new, _ = run(case.stages[schedule], before, batches(case, 1), cross_entropy, BASES["sgd"](lr=lr))
        return {name: value - before[name] for name, value in new.items()}

    for schedule in ("alap", "sequential"):
        small, large = (distance(update(schedule, lr), update("asap", lr)) for lr in (0.001, 0.01))
        assert 0 < small < large / 50


def test_batch_norm_exact_reading_differs_from_the_block_reading() -> None:
    case = conv_residual()
    exact, _ = solve(case, "sgd", Options(), steps=1)
    block, _ = solve(case, "sgd", Options(), steps=1, method=collapsed_step)
    assert 1e-6 < distance(block, exact) < 0.1
