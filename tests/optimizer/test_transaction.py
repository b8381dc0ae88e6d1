"""A step is a transaction: a fault at any line of the generated program, and numbers that are not finite, leave
everything as it was, bit for bit."""

import copy
import warnings
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, NonFiniteError, compile_optimizer
from gtddp_compile.frontends import attributes
from gtddp_compile.runtime.method import BaseMethod
from support import faults
from support.faults import Normed, everything


@pytest.mark.parametrize("network", faults.NETWORKS)
def test_faults_in_a_program_change_nothing(network: str) -> None:
    """A small draw of what benchmarks/faults.py does for every curvature and rollout."""
    index = list(faults.NETWORKS).index(network)
    curvature, rollout = list(faults.CURVATURES)[index % 4], faults.ROLLOUTS[index % 2]
    found = faults.Faults(network, curvature, rollout)
    for kind in faults.KINDS:
        assert set(found.exceptions(kind, every=17)) == {f"raised, {faults.NOTHING}", faults.WHOLE}
    assert set(found.not_a_number(every=17)) == {f"raised, {faults.NOTHING}", faults.WHOLE}


@pytest.mark.parametrize("curvature", ["foof", "sgd"])
@pytest.mark.parametrize("rollout", faults.ROLLOUTS)
def test_an_interrupt_anywhere_leaves_nothing_or_the_whole_step(curvature: str, rollout: str) -> None:
    program = faults.Faults("norm, mask, shortcut", curvature, rollout)
    found = Counter(program.exceptions("interrupt", 29, faults.PACKAGE))
    assert set(found) <= {f"raised, {faults.NOTHING}", f"raised, {faults.WHOLE}", faults.WHOLE}
    assert found[f"raised, {faults.NOTHING}"] > 30


def test_the_faults_see_what_is_half_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseMethod, "undo", lambda self: None)
    found = faults.Faults("chain", "sgd", "nonlinear")
    assert f"raised, {faults.ELSE}" in set(found.exceptions("interrupt"))


@pytest.mark.parametrize("at", [1, 40])
def test_an_interrupt_while_the_model_is_looked_at_leaves_its_modules(at: int) -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    before = copy.deepcopy(net.state_dict())
    for line in range(at, 10**6, 97):
        try:
            with faults.fault_at(line, where=attributes.__file__):
                compile_optimizer(net, torch.ones(6, 4).double(), loss=nn.CrossEntropyLoss())
        except faults.Fault:
            torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
        else:
            break
    assert line > 1000


class Rooted(Normed):
    """Finite where its derivative is not: the root of a zero."""

    def forward(self, x: Tensor) -> Tensor:
        rooted: Tensor = (self.a(x) * x[:, :1]).square().sum(1, True).sqrt()
        return super().forward(x) * (1 + rooted)


METHODS: list[dict[str, Any]] = [
    {"curvature": "sgd", "momentum": 0.9}, {"curvature": "adam", "rollout": "nonlinear"}, {},
    {"curvature": "kfac", "rollout": "nonlinear"}, {"curvature": "adam", "feedback": False}, {"line_search": (1.0,)},
    {"curvature": "ekfac", "terminal": "ggn"}, {"curvature": "sgd", "backend": "dense"}, {"memory": "recompute"},
    {"curvature": "sgd", "coupling": "block", "recursion": "substituted"},
]  # fmt: skip


@pytest.mark.parametrize("bad", [float("nan"), 0.0], ids=["loss", "derivative"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_numbers_that_are_not_finite_change_nothing(method: dict[str, Any], bad: float) -> None:
    torch.manual_seed(0)
    net = Rooted().double()
    x, y = torch.rand(6, 4).double() + 0.1, torch.arange(6) % 3
    wrong = x.index_fill(1, torch.tensor(0), bad)
    given: dict[str, Any] = {"loss": nn.CrossEntropyLoss(), "lr": 0.01, **method}
    opt, strict = (compile_optimizer(net, x, on_nonfinite=what, **given) for what in ("skip", "raise"))
    opt.step(x, y)
    before = everything(opt, net)
    with pytest.warns(UserWarning, match="is not finite, and nothing was changed"):
        assert bool(opt.step(wrong, y).isfinite()) == (bad == 0)
    with warnings.catch_warnings():  # it is said once
        warnings.simplefilter("error", UserWarning)
        opt.step(wrong, y)
    assert opt.diagnostics["skipped"] and opt.diagnostics["skipped_steps"] == 2
    with pytest.raises(NonFiniteError, match="on_nonfinite='skip'"):
        strict.step(wrong, y)
    torch.testing.assert_close(everything(opt, net), before, rtol=0, atol=0)
    assert strict.state_dict()["state"] == {} and issubclass(NonFiniteError, CompileError)
    opt.step(x, y)
    assert not opt.diagnostics["skipped"] and opt.diagnostics["skipped_steps"] == 2
