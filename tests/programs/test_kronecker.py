"""K-FAC and EK-FAC: Proposition 4 against the published algorithms, the generated program against the dense one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import EKFAC, KFAC, CompileError, compile_optimizer
from support import networks
from support.cases import conv_mixed
from support.compared import flat

LOSS = nn.CrossEntropyLoss()


# --- kernels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kfac", "ekfac"])
def test_in_pieces_it_is_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches whose unfolded inputs do not fit: the chunked forms of factors, moments and Gram matrices."""
    case, found = conv_mixed(), []
    for chunk in (2**24, 64):
        monkeypatch.setattr("gtddp_compile.kernels.kronecker.CHUNK", chunk)
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, loss=LOSS, curvature=name, lr=0.1, damping=1e-2, refresh=1)
        for step in range(2):
            opt.step(*case.batch(step))
        found.append(flat(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-10)


# --- as an optimizer --------------------------------------------------------------------------------------------------


def test_cholesky_failure_is_counted_and_survived() -> None:
    """Fewer samples than inputs and no damping: the factors are singular."""
    case = networks.residual()
    opt = compile_optimizer(copy.deepcopy(case.model), loss=LOSS, curvature="kfac", damping=0.0, refresh=1, lr=1e-6)
    assert torch.isfinite(opt.step(*case.batch(0, 2)))
    assert opt.diagnostics["solve_fallbacks"] > 0
    opt = compile_optimizer(copy.deepcopy(case.model), loss=LOSS, curvature="kfac")
    opt.step(*case.batch(0))
    assert opt.diagnostics["solve_fallbacks"] == 0


def turned(values: Tensor, vectors: Tensor) -> Tensor:
    """The eigenvectors with those of the null space turned by a random rotation, those beside it mirrored."""
    source, found = torch.Generator().manual_seed(0), vectors.clone()
    for basis, null in zip(found, values < 1e-12 * values[:, -1:], strict=True):
        count = int(null.sum())
        rotation = torch.linalg.qr(torch.randn(count, count, dtype=vectors.dtype, generator=source))[0]
        basis[:, null] = basis[:, null] @ rotation
        basis[:, ~null] *= -1
    return found


@pytest.mark.parametrize("feedback", [True, False])
def test_the_choice_of_a_basis_of_a_null_space_does_not_matter(feedback: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of 3, factors up to 8 wide, three steps in one eigenbasis: what another machine's eigh may return."""
    case, found, seen = networks.gated(), [], []
    true_eigh = torch.linalg.eigh

    def other_eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
        values, vectors = true_eigh(matrix)
        seen.append(turned(values, vectors))
        assert (vectors @ (values.unsqueeze(1) * vectors).mT - matrix).abs().max() < 1e-12
        return values, seen[-1]

    for eigh in (true_eigh, other_eigh):
        monkeypatch.setattr("torch.linalg.eigh", eigh)
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, loss=LOSS, curvature=EKFAC(lr=0.1, damping=1e-2, refresh=3), feedback=feedback)
        for step in range(3):
            opt.step(*case.batch(step, 3))
        found.append(flat(model))
    assert seen and (found[0] - flat(case.model)).abs().max() > 1e-2
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


def test_learning_rates_by_group() -> None:
    """A player whose learning rate is 0 stays, its companion in the coalition moves."""
    case = networks.projection()
    model = copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0)[0], loss=LOSS, curvature="kfac", lr=0.1)
    assert any(set(stage.players) == {"a", "short"} for stage in opt.graph.stages)
    next(group for group in opt.param_groups if group["name"] == "a")["lr"] = 0.0
    opt.step(*case.batch(0))
    before, after = dict(case.model.named_parameters()), dict(model.named_parameters())
    assert torch.equal(before["a.weight"], after["a.weight"])
    assert not torch.equal(before["short.weight"], after["short.weight"])


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (KFAC, {"damping": -1.0}, "KFAC: damping is -1.0"),
        (EKFAC, {"damping": 0.0}, "EKFAC: damping is 0.0.*positive"),
        (KFAC, {"stat_decay": 1.0}, "stat_decay is 1.0"),
        (EKFAC, {"stat_every": 0}, "stat_every is 0"),
        (EKFAC, {"refresh": 0}, "refresh is 0"),
        (KFAC, {"small": -1}, "small is -1"),
        (KFAC, {"maximize": True}, "maximize"),
        (KFAC, {"lr": "x"}, "lr is x"),
    ],
)
def test_options_are_checked(kind: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(CompileError, match="(?s)" + message):
        kind(**options)


def test_statistics_come_from_v_h() -> None:
    """With feedback the factors are those of ``α g_h``: they differ from the plain gradient's wherever P has shrunk;
    not in the linear rollout, whose P is not known before.
    """
    case, found = networks.mlp(), []
    for options in ({"rollout": "nonlinear"}, {"feedback": False}, {"rollout": "linear"}):
        model = copy.deepcopy(case.model)
        opt = compile_optimizer(model, loss=LOSS, curvature="kfac", lr=0.5, **options)  # type: ignore[arg-type]
        opt.step(*case.batch(0))
        found.append({name: opt.state[p]["factor_g"] for name, p in model.named_parameters() if "weight" in name})
    torch.testing.assert_close(found[0]["c.weight"], found[1]["c.weight"])  # α_T = 1/B
    assert (found[0]["a.weight"] - found[1]["a.weight"]).abs().max() > 1e-6
    torch.testing.assert_close(found[2], found[1])
