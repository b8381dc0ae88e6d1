"""Gains in collapsed form (docs/theory.md#collapse): those of the explicit recursion, which makes V_xx and Q_uu."""

import pytest
import torch
from torch import Tensor

from gtddp_compile.algebra import collapsed as a
from gtddp_compile.passes.p06_derive import DerivedStage
from gtddp_compile.runtime.dense.backend import Sweeps
from gtddp_compile.runtime.dense.jacobians import Trajectory
from gtddp_compile.runtime.dense.rollout import Gains
from support import networks
from support.compared import optimizer

NETWORKS = {"chain": networks.mlp, "residual": networks.residual, "projection": networks.projection}


def swept(case: networks.Case) -> tuple[Sweeps, dict[str, Tensor]]:
    """The dense backend after its backward sweep, and every sample's loss's gradient at the end, a column each."""
    x, y = case.batch(0)
    _, opt = optimizer(case, len(x), curvature="sgd", lr=0.3, weight_decay=0.1, backend="dense")
    params, buffers, _ = opt._working_copy(opt.program)
    m = opt._base_method(opt.program, params, dict(params))
    m.samples = len(x)
    sweeps = Sweeps(opt.program, m, Trajectory(opt.program.graph, params, buffers, (x,)), y)
    end = {name: torch.block_diag(*g.unsqueeze(2)) for name, g in sweeps.g.items()}
    sweeps.backward()
    return sweeps, end


def pulled(stage: DerivedStage, found: Gains, after: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """``C`` and ``G`` of the cut before: back-propagation by the Jacobians that the dense backend used."""
    d, values = stage.derivation, found.values
    later = {o: torch.cat([after[name] for name in outs]) for o, outs in stage.outputs.items()}
    c = torch.cat([sum(values[d.control[o, u]].T @ g for o, g in later.items()) for u in stage.controls])
    before = {i: sum(values[d.state[o, i]].T @ g for o, g in later.items()) for i in stage.inputs}
    sizes = {
        i: [gain.shape[1] for name, gain in found.feedback.items() if name in ins] for i, ins in stage.inputs.items()
    }
    split = {name: part for i, ins in stage.inputs.items()
             for name, part in zip(ins, before[i].split(sizes[i]), strict=True)}  # fmt: skip
    return c, split


@pytest.mark.parametrize("name", NETWORKS)
def test_gains_are_weights_on_the_gradients(name: str) -> None:
    """``k = -M⁻¹ (C Λ⁻¹ y + ℓ)``, ``K = -M⁻¹ C Λ⁻¹ Gᵀ``: ``G`` of the cut before the stage, ``Λ`` with its own Γ."""
    sweeps, g = swept(NETWORKS[name]())
    information, target = torch.diag(sweeps.aim / sweeps.start), sweeps.aim.unsqueeze(1)
    waiting = 0
    for stage, (found,) in zip(reversed(sweeps.stages), reversed(sweeps.gains), strict=True):
        c, g = pulled(stage, found, g)
        inverse = torch.linalg.inv(found.metric.curvature)
        linear = found.metric.linear.reshape(-1, 1)
        information = information + c.T @ inverse @ c
        target = target - c.T @ inverse @ linear
        weights = -inverse @ c @ torch.linalg.inv(information)
        torch.testing.assert_close(found.k, weights @ target - inverse @ linear, rtol=1e-9, atol=1e-14)
        for value, gain in found.feedback.items():
            torch.testing.assert_close(gain, weights @ g[value].T, rtol=1e-9, atol=1e-14)
        waiting += len(found.feedback) > 1
        assert stage.index == 0 or all(gain.norm() > 1e-4 for gain in found.feedback.values())
    assert waiting == (name != "chain")  # a state of several values


def test_the_proved_law_has_these_gains() -> None:
    """What is put into ``δu`` of the form that runs: ``w = Λ⁻¹ (y + c)``, ``c = Gᵀ δx``."""
    _, opt = optimizer(networks.mlp(), curvature="sgd", rollout="nonlinear")
    weights = opt.program.form.forward["w"].expression
    assert weights == (a.INFORMATION.inverse() * (a.CHANGE + a.TARGET))
    assert opt.program.form.forward["delta_u"].expression == -a.CURVATURE.inverse() * a.GRADIENTS * a.WEIGHTS
