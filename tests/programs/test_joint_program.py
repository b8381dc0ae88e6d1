"""The program of the linear rollout: the theorem it rests on, its files, micro-batches, figures and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import CompileError, compile_optimizer
from gtddp_compile.methods.terminal import Terminal
from gtddp_compile.options import Options
from support import networks
from support.compared import LOSS, assert_exported, flat, optimizer, train
from support.networks import Net

CLIPPED: dict[str, dict[str, Any]] = {
    "clipped": {"curvature": "kfac", "lr": 0.2, "refresh": 1, "inertia": 0.5, "max_grad_norm": 0.2},
    "clipped alone": {"curvature": "adam", "lr": 0.02, "feedback": False, "max_grad_norm": 0.2},
}


@pytest.mark.parametrize("feedback", [True, False])
def test_micro_batches_cannot_clip_the_gradient_of_their_union(feedback: bool) -> None:
    case = networks.mlp()
    model, opt = optimizer(case, curvature="sgd", lr=0.1, max_grad_norm=0.1, feedback=feedback)
    before = flat(model)
    with pytest.raises(CompileError, match=r"accumulate\(\) with max_grad_norm=0.1.*the union's gradients"):
        opt.accumulate(*case.batch(0, 6))
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("name", CLIPPED)
def test_a_clipped_gradient_is_exported(name: str, tmp_path: Path) -> None:
    case = networks.residual()
    assert_exported(case, train(case, **CLIPPED[name]), tmp_path)


@pytest.mark.parametrize(
    "options", [{}, {"coupling": 3}, {"terminal": "ggn"}, {"terminal": "ggn", "coupling": 3}], ids=str
)
def test_diagnostics_mean_what_they_mean_in_the_nonlinear_rollout(options: dict[str, Any]) -> None:
    """Open gains and the predicted decrease do not depend on the rollout; the first stage has no feedback in either."""
    case, found = networks.projection(), []
    for rollout in ("linear", "nonlinear"):
        _, opt = optimizer(case, curvature="sgd", lr=0.5, weight_decay=0.05, rollout=rollout, **options)
        opt.step(*case.batch(0, 6))
        found.append(opt.diagnostics)
    linear, nonlinear = found
    assert linear["open_norm"] == pytest.approx(nonlinear["open_norm"], rel=1e-9)
    assert (
        linear["predicted_decrease"] == pytest.approx(nonlinear["predicted_decrease"], rel=1e-9)
        and linear["predicted_decrease"] > 0
    )
    assert linear["feedback_norm"].keys() == nonlinear["feedback_norm"].keys()
    assert linear["feedback_norm"]["stem"] < 1e-12 < 1e-4 < linear["feedback_norm"]["head"]
    assert linear["lifted_grams"] == 0 and linear["clipped_changes"] == 0


# --- the theorem and the program --------------------------------------------------------------------------------------


@pytest.mark.parametrize("coupling", ["full", 3])
@pytest.mark.parametrize("terminal", ["geometric", "ggn"])
def test_the_weights_are_the_same_at_every_stage(terminal: Terminal, coupling: Any) -> None:
    """One factor, no stage run twice, and the claim it rests on."""
    case = networks.projection()
    _, opt = optimizer(case, curvature="rmsprop", terminal=terminal, coupling=coupling, inertia=0.9)
    program = opt.program
    claims = [claim for claim in program.form.claims if "the weights are the same at every stage" in claim.statement]
    assert len(claims) == 1 and program.form.name == "joint"
    called = [one.function for one in program.lowered.instructions]
    assert called.count("factor") == 1
    functions = [function.name for function in program.lowered.functions]
    assert len(functions) >= len(opt.graph.stages)
    assert all(called.count(name) == 1 for name in functions)
    assert not any(one.phase == "forward" for one in program.lowered.instructions)


# --- options ----------------------------------------------------------------------------------------------------------


def test_where_it_is_the_default() -> None:
    assert Options().rollout_kind == Options(coupling=4).rollout_kind == "linear"
    for other in ({"feedback": "open"}, {"feedback": False}, {"coupling": "block"}, {"rollout": "nonlinear"},
                  {"coupling": "block", "recursion": "printed"}):  # fmt: skip
        assert Options(**other).rollout_kind == "nonlinear"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollout": "curved"}, "option rollout='curved' is not known.*'linear', 'nonlinear'"),
        ({"rollout": "linear", "feedback": "open"}, "rollout='linear' is the joint step.*feedback='open'"),
        ({"rollout": "linear", "coupling": "block"}, "rollout='linear' is the joint step.*coupling='block'"),
        ({"rollout": "linear", "coupling": "block", "recursion": "printed"}, "rollout='linear'.*recursion='printed'"),
        ({"inertia": 1.0}, "option inertia=1.0 is not known.*at least 0 and less than 1"),
        ({"inertia": -0.1}, "option inertia=-0.1 is not known"),
        ({"inertia": True}, "option inertia=True is not known"),
        ({"inertia": 0.5, "feedback": False}, "inertia=0.5 is momentum inside the model.*own option momentum"),
        ({"inertia": 0.5, "coupling": "block"}, "inertia=0.5 is momentum inside the model"),
        ({"inertia": 0.5, "coupling": "block", "recursion": "substituted"}, "inertia=0.5 is momentum inside the model"),
        ({"inertia": 0.5, "momentum": 0.9}, "inertia=0.5 beside sgd's own momentum 0.9.*momentum=0"),
        ({"inertia": 0.5, "curvature": "adam"}, "inertia=0.5 beside adam's own momentum 0.9.*betas"),
        ({"max_step": 0.0}, "option max_step=0.0 is not known.*positive number"),
        ({"max_step": True}, "option max_step=True is not known"),
        ({"max_grad_norm": -1.0}, "option max_grad_norm=-1.0 is not known.*positive number"),
        ({"max_step": 1.0, "rollout": "nonlinear"}, "max_step=1.0 caps the joint step.*rollout='linear'"),
        ({"max_step": 1.0, "feedback": False}, "max_step=1.0 caps the joint step"),
        ({"max_step": 1.0, "terminal": "ggn"}, "max_step=1.0 shortens the weights.*terminal='ggn'"),
        ({"max_grad_norm": 1.0, "rollout": "nonlinear"}, "max_grad_norm=1.0.*the stages before have moved"),
        ({"max_grad_norm": 1.0, "feedback": "open"}, "max_grad_norm=1.0.*rollout='linear'"),
        ({"max_grad_norm": 1.0, "backend": "dense"}, "max_grad_norm=1.0.*backend='dense'"),
        ({"max_grad_norm": 1.0, "memory": "recompute"}, "max_grad_norm=1.0.*memory='recompute'"),
        ({"line_search": ()}, r"option line_search=\(\) is not known"),
        ({"line_search": (1.0, -0.5)}, "option line_search=.*positive step lengths"),
    ],
    ids=str,
)  # fmt: skip
def test_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CompileError, match=said):
        compile_optimizer(Net(lambda net, x: net.a(x), a=nn.Linear(2, 2)), loss=LOSS, **{"curvature": "sgd", **options})
