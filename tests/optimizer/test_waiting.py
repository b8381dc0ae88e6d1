"""A step waits for the device once, at its end.

Tensors on torch's device ``meta`` have no values: whatever asks for one raises. A program that runs on them waits for
no accelerator either.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from gtddp_compile import compile_optimizer
from gtddp_compile.runtime import fast
from gtddp_compile.runtime.method import BaseMethod
from support import networks
from support.compared import LOSS, flat

OPTIONS: list[dict[str, Any]] = [
    {"curvature": "sgd"}, {"curvature": "sgd", "momentum": 0.9, "weight_decay": 0.1},
    {"curvature": "rmsprop", "gram": "separable"}, {"curvature": "adam", "coupling": 3},
    {"curvature": "adamw", "coupling": "block"}, {"curvature": "sgd", "feedback": False},
]  # fmt: skip


def on_meta(values: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("meta") for name, value in values.items()}


@pytest.mark.parametrize("network", ["residual", "conv_residual"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nothing_is_read_before_the_step_is_done(
    network: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    case = getattr(networks, network)()
    x, y = case.batch(0, 5)
    opt = compile_optimizer(case.model, x, loss=LOSS, **{"curvature": "sgd", **options})
    params = on_meta(dict(case.model.named_parameters()))
    groups = {name: opt.param_groups[0] for name in params}
    states = {name: opt._curvature.init_state(value, groups[name]) for name, value in params.items()}
    m = BaseMethod(opt._curvature, dict(params), dict(params), states, groups, opt._loss, opt._options.terminal_kind)
    m.first = False
    monkeypatch.setattr(fast.Precision, "around", lambda *given: fast.Precision())  # meta has no autocast
    looked: list[BaseMethod] = []
    monkeypatch.setattr(fast, "check_done", looked.append)
    buffers = on_meta(dict(case.model.named_buffers()))
    backend = fast.FastBackend(opt.program)
    arguments = dict(params), buffers, dict(params), (x.to("meta"),), y.to("meta")
    phi = backend.run(m, *arguments)
    assert phi.shape == (5,) and phi.device.type == "meta" and looked == [m]
    with pytest.raises(RuntimeError, match="meta"):
        backend.run(m, *arguments, plainly=True)


def test_a_factor_that_fails_is_taken_back_and_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """The step that does not wait finds it out at its end; the one made in its place gives what it always did."""
    found = []
    for broken in (False, True):
        case = networks.residual()
        opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature="sgd", lr=0.3)
        opt.step(*case.batch(0))
        if broken:
            once = iter([True])
            original = fast.FastBackend.run

            def run(self: Any, m: Any, *arguments: Any, original: Any = original, once: Any = once, **how: Any) -> Any:
                phi = original(self, m, *arguments, **how)
                if next(once, False):
                    m.figures[0]["weights"] = m.figures[0]["weights"] * float("nan")
                    fast.check_done(m)
                return phi

            monkeypatch.setattr(fast.FastBackend, "run", run)
        opt.step(*case.batch(1))
        found.append(flat(case.model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
