"""Every program of the table is its derivation, its exported module, and its parts; with feedback off, its base method.

The table and what it holds: tests/support/matrix.py. What is checked of a row: tests/support/compared.py.
"""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gtddp_compile import CompileError
from support import cases, published
from support.compared import (
    SIZE,
    STEPS,
    assert_base,
    assert_equal,
    assert_exported,
    assert_union,
    batches,
    flat,
    optimizer,
    train,
)
from support.matrix import CURVATURES, FORMS, GROUP, NETWORKS, Row, compiled, meeting, table
from support.networks import Case, make

TABLE = table()


def test_every_two_entries_meet() -> None:
    met = set().union(*(row.pairs for row in TABLE))
    assert set(meeting()) <= met and len(meeting()) > 1000
    assert len({(row.metric, row.terminal, row.form) for row in TABLE}) == 7 * 4 * 7


CHECKS = [(row, check) for n, row in enumerate(TABLE) for check in ("dense", "exported")[: 2 - n % 2]]
"""Of every other row the exported module too, beside it: the program is compiled once for both."""


@pytest.mark.parametrize(("row", "check"), CHECKS, ids=str)
def test_row(row: Row, check: str, tmp_path: Path) -> None:
    if check == "dense":
        run = assert_equal(row.case, compiled(row), **row.options)
        assert (run.optimizer.program.form.name == "joint") == row.form.startswith("joint")
    else:
        assert_exported(row.case, compiled(row), tmp_path)


@pytest.mark.parametrize("network", ["tokens", "conv_mixed"])
@pytest.mark.parametrize("curvature", CURVATURES)
def test_a_rate_of_zero_moves_nothing(curvature: str, network: str) -> None:
    """Where a warm-up begins and a cosine ends. What inertia carries is not the rate's."""
    case = NETWORKS[network]()
    model, opt = optimizer(case, **{**CURVATURES[curvature], "lr": 0.0})
    opt.step(*case.batch(0))
    torch.testing.assert_close(flat(model), flat(case.model), rtol=0, atol=0)


@pytest.mark.parametrize("row", TABLE[::5], ids=str)
def test_memory(row: Row) -> None:
    """Segments that run again give what was kept; most programs have several."""
    again = train(row.case, memory="recompute", **row.options)
    segments = again.optimizer.program.lowered.plan.segments
    assert segments is not None
    assert len(segments.starts) > 1 or row.network in ("two_outputs", "summed convolutions", "conv_mixed")
    torch.testing.assert_close(again.parameters, compiled(row).parameters, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(again.model.state_dict(), compiled(row).model.state_dict(), rtol=1e-10, atol=1e-12)


# The own share of an aim is of a group's size, which a smaller last micro-batch has and a last group has not.
UNION = [row for row in TABLE if "groups" in row.form and row.terminal in ("gradient", "ggn")
         and row.network != "conv_residual"]  # fmt: skip


@pytest.mark.parametrize("row", UNION[::2], ids=str)
def test_micro_batches_are_groups(row: Row) -> None:
    """One update from parts of a batch is that of the whole in groups of the parts' size; figures and states too."""
    whole = compiled(row)
    model, opt = optimizer(row.case, GROUP, **{**row.options, "coupling": "full"})
    for (x, y), loss in zip(batches(row.case, STEPS, SIZE), whole.losses, strict=True):
        opt.accumulate(x[:GROUP], y[:GROUP])
        assert float(opt.step(x[GROUP:], y[GROUP:])) == pytest.approx(loss, rel=1e-12)
    torch.testing.assert_close(model.state_dict(), whole.model.state_dict(), rtol=1e-9, atol=1e-9)
    for key, value in whole.optimizer.diagnostics.items():
        assert opt.diagnostics[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key
    for ours, theirs in zip(opt.state.values(), whole.optimizer.state.values(), strict=True):
        for key in (key for key in ours if not key.startswith(("map_", "inverse_"))):  # a null space has any basis
            torch.testing.assert_close(torch.as_tensor(ours[key]), torch.as_tensor(theirs[key]), rtol=1e-9, atol=1e-9)


# --- Proposition 4 ----------------------------------------------------------------------------------------------------

BASES: list[dict[str, Any]] = [
    {"curvature": "sgd", "lr": 0.1},
    {"curvature": "sgd", "lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1},
    {"curvature": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"curvature": "rmsprop", "lr": 0.01},
    {"curvature": "rmsprop", "lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1},
    {"curvature": "adam", "lr": 0.01},
    {"curvature": "adam", "lr": 0.01, "amsgrad": True, "weight_decay": 0.1, "betas": (0.8, 0.95)},
    {"curvature": "adamw", "lr": 0.01, "amsgrad": True, "weight_decay": 0.2},
    {"curvature": "adagrad", "lr": 0.05},
    {"curvature": "adagrad", "lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1, "initial_accumulator_value": 0.1},
]
MATRICES: list[dict[str, Any]] = [
    {"curvature": "shampoo", "lr": 0.05, "eps": 1e-2},
    {"curvature": "shampoo", "lr": 0.05, "eps": 0.1, "momentum": 0.9, "weight_decay": 0.1, "stat_decay": 0.9,
     "refresh": 3},
    {"curvature": "shampoo", "lr": 0.05, "eps": 0.1, "one_sided": True},
    {"curvature": "muon", "lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "adamw_ratio": 0.5, "damping": 0.0},
    {"curvature": "muon", "lr": 0.02, "momentum": 0.5, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw",
     "damping": 0.0},
]  # fmt: skip
PUBLISHED: list[dict[str, Any]] = [
    {"lr": 0.3, "damping": 1e-2},
    {"lr": 0.1, "damping": 1e-2, "refresh": 3, "stat_decay": 0.5},
    {"lr": 0.1, "damping": 1e-2, "refresh": 1, "stat_every": 2, "stat_decay": 0.5},
    {"lr": 0.1, "damping": 0.1, "refresh": 1, "momentum": 0.9, "weight_decay": 0.05},
    {"lr": 0.1, "damping": 0.5, "small": 3},
]
FACTORED = ("mlp", "projection", "attention", "conv_mixed", "evaluated", "embedded", "wide", "lines", "convolutional")


PLAIN = ("projection", "conv_residual", "embedded", "tied", "two_outputs")
TURNS = [(PLAIN[(n + k) % 5], options) for n, options in enumerate(BASES) for k in (0, 2)]
"""Every network in turn, twice for all options of a method."""


@pytest.mark.parametrize(("network", "options"), TURNS, ids=str)
def test_proposition_4(network: str, options: dict[str, Any]) -> None:
    """Mixed derivatives off, layers uncorrelated: torch.optim's own update."""
    assert_base(NETWORKS[network](), steps=10, **options)


@pytest.mark.parametrize("options", MATRICES, ids=lambda options: "-".join(map(str, options.values())))
@pytest.mark.parametrize("network", ["projection", "conv_mixed", "tied", "square"])
def test_proposition_4_with_metrics_of_matrices(network: str, options: dict[str, Any]) -> None:
    """Shampoo and Muon as published, roots and polar factors by singular values: 20 steps."""
    case = square() if network == "square" else NETWORKS[network]()
    assert_base(case, steps=20, size=12, tolerance=1e-6 if options["curvature"] == "muon" else 1e-8, **options)


def square() -> Case:
    """Every factor of a gradient determines its eigenbasis: the logits' always have one null direction, and no more."""
    torch.manual_seed(3)
    layers = [nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)]
    return Case(nn.Sequential(*layers).double(), (6,))


@pytest.mark.parametrize("every", [1, 3])
def test_soap_is_its_authors(every: int) -> None:
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-4, "weight_decay": 0.1, "precondition_frequency": every}
    assert_base(square(), steps=20, size=16, tolerance=1e-8, curvature="soap", **options)


def test_muon_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.optim.Muon with exact polar factors, and how far those of its iteration are from them."""
    from torch.optim import _muon

    def polar(gradient: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        found = published.polar(gradient)
        left, values, right = torch.linalg.svd(gradient, full_matrices=False)
        reached = (left.T @ iterated(gradient, coefficients, steps, eps).double() @ right.T).diagonal()
        assert reached.max() < 1.3 and ((reached - 1).abs() < 0.45)[values > 0.05 * gradient.norm()].all()
        return found

    iterated = _muon._zeropower_via_newtonschulz
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", polar)
    case, theirs = square(), square().model
    run = train(case, 20, 16, curvature="muon", lr=0.02, damping=0.0, feedback=False)
    matrices, vectors = ([p for p in theirs.parameters() if (p.dim() > 1) == wide] for wide in (True, False))
    optimizers = torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.02, weight_decay=0.1)
    for x, y in batches(case, 20, 16):
        F.cross_entropy(theirs(x), y).backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
    torch.testing.assert_close(run.model.state_dict(), theirs.state_dict(), rtol=0, atol=1e-6)


EVERY_OTHER = list(itertools.product(FACTORED, ("kfac", "ekfac"), PUBLISHED))[1::2]


@pytest.mark.parametrize(("network", "kind", "options"), EVERY_OTHER, ids=str)
def test_proposition_4_with_kronecker_factors(network: str, kind: str, options: dict[str, Any]) -> None:
    """The published algorithms, from few rows (a batch narrower than a layer) and from many. Every two of them meet."""
    size = 3 if network in ("wide", "lines") and kind == "kfac" else 12
    assert_base(NETWORKS[network](), steps=5, size=size, tolerance=1e-8, curvature=kind, **options)


@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential"])
@pytest.mark.parametrize("players", [2, 3, 4])
def test_coalitions_by_hand(players: int, schedule: str) -> None:
    """Who decides together, under every schedule; what their cross terms are."""
    _, opt = optimizer(cases.beside(players), curvature="ekfac", schedule=schedule)
    mappings = [f"p{k}" for k in range(players - 1)]
    early, late = {"asap": (mappings, []), "alap": ([], mappings), "sequential": ([], [])}[schedule]
    expected = {frozenset(names) for names in (["a", *early], ["b", *late]) if len(names) > 1}
    assert {frozenset(stage.players) for stage in opt.graph.stages if len(stage.players) > 1} == expected
    if schedule == "asap":
        blocks = [sorted((b.kind, len(b.players)) for b in stage.blocks) for stage in opt.program.derived.stages]
        together = {2: [("kronecker", 2)], 3: [("kronecker", 1), ("shared", 2)], 4: [("kronecker", 2), ("shared", 2)]}
        assert blocks == [[("kronecker", 1)], together[players], [("kronecker", 1)]]


def test_schedules_differ_where_they_do() -> None:
    """Placement changes the update of the nonlinear rollout; the joint step is the minimiser over all stages."""
    for form in ("joint", "nonlinear"):
        found = [train(NETWORKS["projection"](), curvature="sgd", lr=0.5, schedule=schedule, **FORMS[form]).parameters
                 for schedule in ("asap", "alap", "sequential")]  # fmt: skip
        for i in range(3):
            assert ((found[i] - found[i - 1]).abs().max() > 1e-6) == (form == "nonlinear")


def two_branches() -> Case:
    """The second branch draws after the first one but depends on no player of it, as a decoder does on its encoder."""

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        encoded = F.dropout(net.second(F.dropout(torch.tanh(net.first(x)), 0.4)), 0.3)
        return net.head(F.dropout(torch.tanh(net.other(F.dropout(x, 0.5))) + encoded, 0.2))

    return Case(make(forward, first=(3, 3), second=(3, 3), other=(3, 3), head=(3, 3)), (3,))


BY_HAND = {"first": 0, "second": 1, "other": 3, "head": 5}


@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential", BY_HAND], ids=str)
def test_random_numbers_are_drawn_in_the_model_s_order(schedule: Any) -> None:
    """A dropout of the input runs beside a player: its value never moves, whichever stage computes it."""
    case = two_branches()
    opt = assert_base(case, curvature="sgd", lr=0.1, schedule=schedule).optimizer
    draws = [opt.graph.stage_of[op.name] for op in opt.graph.ops.ops if op.random]
    assert len(draws) == 4 and draws == sorted(draws)
    for rollout in ("linear", "nonlinear"):
        assert_equal(case, curvature="sgd", lr=0.5, schedule=schedule, rollout=rollout)


def test_a_schedule_against_the_model_s_draws_is_refused() -> None:
    together = {"first": 0, "second": 1, "other": 1, "head": 2}
    with pytest.raises(CompileError, match="order of random draws"):
        optimizer(two_branches(), curvature="sgd", schedule=together)


def test_exact_reading_of_batch_norm_differs_in_training_only() -> None:
    """The block reading is an approximation in training mode and none with running statistics."""
    for network, differs in (("conv_residual", True), ("evaluated", False)):
        options = {"curvature": "sgd", "lr": 0.5, "backend": "dense"}
        exact, block = (train(NETWORKS[network](), mixing=m, **options).parameters for m in ("exact", "block"))
        assert ((exact - block).abs().max() > 1e-6) == differs


@pytest.mark.parametrize("curvature", ["sgd", "adam", "kfac", "ekfac", "foof"])
def test_without_feedback_the_derivation_is_the_base_method_too(curvature: str) -> None:
    for network in ("residual", "gates"):
        assert_equal(NETWORKS[network](), feedback=False, curvature=curvature, lr=0.05)


def test_micro_batches_by_default() -> None:
    """FOOF with the inertia and the aim that it suggests."""
    assert_union(NETWORKS["projection"](), 4)
