"""The program of the linear rollout: the theorem it rests on, its files, micro-batches, figures and options."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import CompileError, UpdateProgram, compile_optimizer
from gtddp_compile.algebra import forms
from gtddp_compile.methods.terminal import Terminal
from gtddp_compile.options import Options
from gtddp_compile.passes.p07_collapse import prove_law
from support import networks
from support.compared import LOSS, SUM, flat, optimizer
from support.exported import largest, load_module, named
from support.networks import Case, Net, make

OPTIONS: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.5, "inertia": 0.9, "weight_decay": 0.05, "max_step": 0.3},
    "adam": {"curvature": "adam", "lr": 0.02},
    "kfac": {"curvature": "kfac", "lr": 0.2, "damping": 1e-2, "refresh": 2, "inertia": 0.5},
    "ggn": {"curvature": "sgd", "lr": 0.5, "terminal": "ggn", "inertia": 0.5},
}
CLIPPED: dict[str, dict[str, Any]] = {
    "clipped": {"curvature": "kfac", "lr": 0.2, "refresh": 1, "inertia": 0.5, "max_grad_norm": 0.2},
    "clipped alone": {"curvature": "adam", "lr": 0.02, "feedback": False, "max_grad_norm": 0.2},
}


@pytest.mark.parametrize("loss", [LOSS, SUM], ids=["mean", "sum"])
@pytest.mark.parametrize("name", OPTIONS)
def test_micro_batches_are_groups(name: str, loss: nn.Module) -> None:
    case = networks.projection()
    options = {**OPTIONS[name], "loss": loss}
    parts, ours = optimizer(case, **options)
    whole, theirs = optimizer(case, coupling=4, **options)
    for step in range(2):
        x, y = case.batch(step, 10)
        ours.accumulate(x[:4], y[:4])
        ours.accumulate(x[4:8], y[4:8])
        ours.step(x[8:], y[8:]), theirs.step(x, y)
        torch.testing.assert_close(flat(parts), flat(whole), rtol=0, atol=1e-9)
    for key, value in theirs.diagnostics.items():
        assert ours.diagnostics[key] == pytest.approx(value, rel=1e-6, abs=1e-12), key


@pytest.mark.parametrize("feedback", [True, False])
def test_micro_batches_cannot_clip_the_gradient_of_their_union(feedback: bool) -> None:
    case = networks.mlp()
    model, opt = optimizer(case, curvature="sgd", lr=0.1, max_grad_norm=0.1, feedback=feedback)
    before = flat(model)
    with pytest.raises(CompileError, match=r"accumulate\(\) with max_grad_norm=0.1.*the union's gradients"):
        opt.accumulate(*case.batch(0, 6))
    assert torch.equal(before, flat(model))


@pytest.mark.parametrize("name", OPTIONS)
def test_memory(name: str) -> None:
    case = networks.nested()
    kept, ours = optimizer(case, **OPTIONS[name])
    again, theirs = optimizer(case, memory="recompute", **OPTIONS[name])
    for step in range(2):
        x, y = case.batch(step, 6)
        ours.step(x, y), theirs.step(x, y)
    torch.testing.assert_close(flat(again), flat(kept), rtol=0, atol=1e-12)
    assert "checkpoint" in {one.phase for one in theirs.program.lowered.instructions}


def test_torch_compile() -> None:
    torch._dynamo.reset()
    case = Case(make(lambda net, x: net.b(torch.tanh(net.a(x))), a=(3, 2), b=(2, 3)), (3,), {})
    options = {**OPTIONS["sgd"], "coupling": 3}
    plain, ours = optimizer(case, **options)
    graph, theirs = optimizer(case, compile={"backend": "eager"}, **options)
    for step in range(3):
        x, y = case.batch(step, 6)
        torch.testing.assert_close(theirs.step(x, y), ours.step(x, y), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(flat(graph), flat(plain), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [*OPTIONS, *CLIPPED])
def test_files(name: str, tmp_path: Path) -> None:
    """``.json`` is the program, ``.py`` and (where there is one) ``.pt2`` the step."""
    case = networks.residual()
    model, opt = optimizer(case, **(OPTIONS | CLIPPED)[name])
    opt.program.export(tmp_path / "step.json")
    program = UpdateProgram.load(tmp_path / "step.json")
    assert program.code == opt.program.code and program.options == opt.program.options
    program.export(tmp_path / "step.py")
    module = load_module(tmp_path / "step.py")
    params, buffers = named(model)
    state = module.init_state(params)
    graph = None
    if name in ("sgd", "adam"):
        program.export(tmp_path / "step.pt2")
        loaded = torch.export.load(tmp_path / "step.pt2")
        graph = (*named(model), loaded.example_inputs[0][2])
    for step in range(2):
        x, y = case.batch(step, 6)
        opt.step(x, y)
        params, buffers, state, _ = module.step(params, buffers, state, (x,), y)
        assert largest(params, named(model)[0]) < 1e-12
        if graph is not None:
            graph = loaded.module()(*graph, (x,), y)[:3]
            assert largest(graph[0], named(model)[0]) < 1e-12


# --- diagnostics ------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("factored", [False, True])
def test_another_law_has_other_weights(factored: bool) -> None:
    law, _ = prove_law("levenberg", factored)
    assert "same at every stage" in forms._same_weights(law, law.update).statement
    grouped, _ = forms._in_a_group(law)
    assert "same at every stage" in forms._same_weights(grouped, forms._share(law.update)).statement
    altered = (
        (replace(law, drift=-law.drift), law.update),
        (replace(law, drift=2 * law.drift), law.update),
        (law, -law.update),
        (replace(law, weights=-law.weights), law.update),
        (replace(law, weights=2 * law.weights), law.update),
        (grouped, law.update),
    )
    for other, update in altered:
        with pytest.raises(CompileError, match=r"the weights are the same at every stage.*does not follow"):
            forms._same_weights(other, update)


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


def test_feedback_off_has_either_rollout() -> None:
    case, found = networks.mlp(), []
    for rollout in ("linear", "nonlinear"):
        model, opt = optimizer(case, curvature="sgd", lr=0.1, feedback=False, rollout=rollout)
        opt.step(*case.batch(0, 6))
        found.append(flat(model))
    assert torch.equal(*found)
