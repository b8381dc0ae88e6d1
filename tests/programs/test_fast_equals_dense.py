"""The generated program equals the derivation executed with explicit matrices, after 5 steps, to 1e-9 in float64."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from gtddp_compile import compile_optimizer
from support import networks
from support.compared import FORMS, assert_equal, trained

CASES = {
    "mlp": networks.mlp,
    "residual": networks.residual,
    "nested": networks.nested,
    "consecutive": networks.consecutive,
    "projection": networks.projection,
    "gated": networks.gated,
}
CURVATURES: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "lr": 0.5},
    "momentum": {"curvature": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
    "rmsprop": {"curvature": "rmsprop", "lr": 5e-3, "momentum": 0.5, "weight_decay": 0.05},
    "adam": {"curvature": "adam", "lr": 1e-2, "amsgrad": True},
    "adamw": {"curvature": "adamw", "lr": 1e-2},
}
COUPLED = ("full", "groups", "nonlinear")
PAPERS = ("block", "substituted", "printed")
INERTIA: dict[str, dict[str, Any]] = {  # a base method's own momentum is refused beside it
    "sgd": {"inertia": 0.9},
    "momentum": {"inertia": 0.5, "momentum": 0.0, "nesterov": False},
    "rmsprop": {"inertia": 0.9, "momentum": 0.0},
    "adam": {"inertia": 0.9, "betas": (0.0, 0.999)},
    "adamw": {"inertia": 0.5, "betas": (0.0, 0.999)},
}


@pytest.mark.parametrize("form", COUPLED)
@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", CASES)
def test_networks(network: str, curvature: str, form: str) -> None:
    assert_equal(CASES[network](), **CURVATURES[curvature], **FORMS[form])


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", CASES)
def test_one_of_the_forms_of_block_coupling(network: str, curvature: str) -> None:
    """Each of the three on every network and with every curvature."""
    form = PAPERS[(list(CASES).index(network) + list(CURVATURES).index(curvature)) % 3]
    assert_equal(CASES[network](), **CURVATURES[curvature], **FORMS[form])


@pytest.mark.parametrize("curvature", CURVATURES)
@pytest.mark.parametrize("network", CASES)
def test_inertia(network: str, curvature: str) -> None:
    """In the linear rollout, in the nonlinear one on every other network."""
    rollout = ("linear", "nonlinear")[(list(CASES).index(network) + list(CURVATURES).index(curvature)) % 2]
    coupling = 3 if curvature in ("sgd", "adam") else "full"
    options = CURVATURES[curvature] | INERTIA[curvature]
    assert_equal(CASES[network](), coupling=coupling, rollout=rollout, steps=3, **options)


@pytest.mark.parametrize("form", ["full", "groups", "nonlinear", "block", "printed"])
@pytest.mark.parametrize("curvature", ["sgd", "rmsprop", "adam"])
@pytest.mark.parametrize("schedule", ["asap", "alap", "sequential"])
def test_projection_schedules(schedule: str, curvature: str, form: str) -> None:
    assert_equal(networks.projection(), schedule=schedule, **CURVATURES[curvature], **FORMS[form])


@pytest.mark.parametrize("rollout", ["linear", "nonlinear"])
def test_schedules_differ(rollout: str) -> None:
    """Placement changes the update of the nonlinear rollout: the test above compares three different programs. The
    joint step is the minimiser over all stages, wherever each is.
    """
    options = {"curvature": "sgd", "lr": 0.5, "rollout": rollout}
    found = [trained(networks.projection(), schedule=s, **options) for s in ("asap", "alap", "sequential")]
    for i in range(3):
        assert ((found[i] - found[i - 1]).abs().max() > 1e-6) == (rollout == "nonlinear")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("curvature", ["sgd", "rmsprop", "adam"])
@pytest.mark.parametrize("training", [True, False])
def test_convolutional_block_with_batch_norm(training: bool, curvature: str, form: str) -> None:
    assert_equal(networks.conv_residual(training=training), **CURVATURES[curvature], **FORMS[form])


def test_exact_reading_of_batch_norm_differs_in_training_only() -> None:
    """The block reading is an approximation in training mode and none with running statistics."""
    for training in (True, False):
        case = networks.conv_residual(training=training)
        options = {"curvature": "sgd", "lr": 0.5, "backend": "dense"}
        difference = (trained(case, **options) - trained(case, mixing="exact", **options)).abs().max()
        assert (difference > 1e-6) == training


@pytest.mark.parametrize("feedback", ["open", False])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "nonlinear"])
def test_without_feedback(form: str, feedback: Any) -> None:
    assert_equal(networks.residual(), feedback=feedback, **CURVATURES["rmsprop"], **FORMS[form])


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("form", ["nonlinear", *PAPERS])
def test_clip(form: str, clip: float | None) -> None:
    assert_equal(networks.residual(), feedback_clip=clip, **CURVATURES["sgd"], **FORMS[form])


def test_sum_loss() -> None:
    case = networks.residual()
    found = []
    for backend in ("fast", "dense"):
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(
            model, loss=nn.CrossEntropyLoss(reduction="sum"), curvature="sgd", lr=0.1, backend=backend
        )  # type: ignore[arg-type]
        for step in range(3):
            opt.step(*case.batch(step))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)
