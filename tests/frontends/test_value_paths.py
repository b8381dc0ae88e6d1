"""Models that decide on values: the path of the example inputs is recorded, checked, and others compiled when met."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, CompileError, compile_optimizer
from gtddp_compile.runtime import compiler as compiling
from support.compared import assert_equal, torch_step
from support.exported import load_module, named
from support.networks import Case
from support.recorded import batch, net

LR, FULL = 0.1, torch.ones(4).double()


def masked(m: Any, x: Tensor, mask: Tensor) -> Tensor:
    """transformers: where nothing is masked, no mask is made."""
    h = torch.tanh(m.a(x))
    if bool((mask == 1).all()):
        return m.b(h)
    return m.b(h * mask[:, None])


def clamps_what_is_not_finite(m: Any, x: Tensor) -> Tensor:
    """DETR: hidden values are clamped only if one of them overflowed."""
    h = m.a(x)
    if not torch.isfinite(h).all():
        h = h.nan_to_num().clamp(-1e3, 1e3)
    return m.b(torch.tanh(h))


def halves_until_small(m: Any, x: Tensor) -> Tensor:
    h = m.a(x)
    while h.detach().abs().max() > 1:
        h = h / 2
    return m.b(torch.tanh(h))


def compiled(model: nn.Module, inputs: Any, **options: Any) -> CompiledOptimizer:
    with pytest.warns(UserWarning, match="depends on values"):
        return compile_optimizer(model, inputs, loss=nn.MSELoss(), curvature="sgd", lr=LR, **options)


def sgd(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """torch's own step."""
    model = copy.deepcopy(model)
    torch_step(torch.optim.SGD(model.parameters(), lr=LR), model(*inputs).square().mean())
    return dict(model.state_dict())


def stepped(opt: CompiledOptimizer, model: nn.Module, inputs: Any) -> dict[str, Tensor]:
    opt.step(inputs, torch.zeros(len(inputs[0]) if isinstance(inputs, tuple) else len(inputs), 3).double())
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_each_path_is_the_models_own() -> None:
    model, x, half = net(masked), batch(4), torch.tensor([1, 0.5, 1, 0]).double()
    opt = compiled(model, (x, FULL), feedback=False)
    (guard,) = opt.graph.guards
    assert guard.source == f"test_value_paths.py:{masked.__code__.co_firstlineno + 3}"
    for mask in (FULL, half, FULL, half):
        expected = sgd(model, x, mask)
        torch.testing.assert_close(stepped(opt, model, (x, mask)), expected, rtol=0, atol=1e-12)
    assert len(opt._specialisations._programs) == 2, "each path is compiled once"


@pytest.mark.filterwarnings("ignore:.*depends on values")
@pytest.mark.parametrize("forward", [masked, clamps_what_is_not_finite, halves_until_small])
def test_fast_equals_dense(forward: Any) -> None:
    batch_of: Any = ((batch(4), FULL) if forward is masked else batch(4)), torch.zeros(4, 3).double()
    case = Case(net(forward), loss=nn.MSELoss(), draw=lambda seed, size: batch_of)
    assert_equal(case, curvature="sgd", lr=LR)


def test_a_decision_is_pointed_out_once() -> None:
    """Not again for batches of other sizes, which are compiled again."""
    model = net(halves_until_small)
    opt = compiled(model, batch(4), feedback=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in (3, 5):
            stepped(opt, model, batch(size))
    assert len(opt._specialisations._programs) > 1


def test_too_many_paths_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "PATHS", 2)
    model = net(halves_until_small)
    opt = compiled(model, batch(4))
    stepped(opt, model, 8 * batch(4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(CompileError, match=r"2 batches took another one each.*torch\.where"):
        stepped(opt, model, 1000 * batch(4))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_an_exported_program_checks_its_path(tmp_path: Path) -> None:
    model, x = net(masked), batch(4)
    opt = compiled(model, (x, FULL))
    opt.program.export(tmp_path / "step.py")
    written, (params, _) = load_module(tmp_path / "step.py"), named(model)
    state, targets = written.init_state(params), torch.zeros(4, 3).double()
    found = written.step(params, {}, state, (x, FULL), targets)[0]
    torch.testing.assert_close(stepped(opt, model, (x, FULL)), found, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="another path"):
        written.step(params, {}, state, (x, 0.5 * FULL), targets)
