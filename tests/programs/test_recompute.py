"""``memory="recompute"``: the same update, bit for bit where the kernels are the same, from less memory."""

import copy
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, UpdateProgram, compile_optimizer
from support.architectures import Example
from support.compared import LOSS
from support.exported import load_module, named, targets_for
from support.networks import Net, make


def deep(depth: int = 8) -> Example:
    """Residual layers with dropout, one batch-norm, a tied layer and a value that waits for the last layer."""

    def forward(net: Net, x: Tensor) -> Tensor:
        first = x = torch.tanh(net.stem(x))
        for index in range(depth):
            h = torch.tanh(getattr(net, f"l{index}")(x))
            x = x + net.drop(net.norm(h) if index == depth // 2 else h)
        return net.head(net.l0(x) + first)

    layers = {f"l{index}": (4, 4) for index in range(depth)}
    model = make(forward, stem=(3, 4), **layers, norm=lambda: nn.BatchNorm1d(4), drop=lambda: nn.Dropout(0.3),
                 head=(4, 3))  # fmt: skip
    return Example(model, (torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double(),))


def trained(example: Example, memory: str, steps: int = 3, **options: Any) -> tuple[list[Tensor], CompiledOptimizer]:
    model, options = copy.deepcopy(example.model), {"curvature": "sgd", "lr": 0.1, **options}
    opt = compile_optimizer(model, example.inputs, loss=LOSS, memory=memory, **options)
    torch.manual_seed(5)
    losses = [opt.step(example.inputs, targets_for(3, example.inputs[0].shape[0])) for _ in range(steps)]
    return [*losses, *model.state_dict().values(), torch.get_rng_state()], opt


def test_spherical_metric_without_norms_is_the_same_bit_for_bit() -> None:
    chain = nn.Sequential(*(layer for _ in range(9) for layer in (nn.Linear(3, 3), nn.Tanh(), nn.Dropout(0.2))))
    example = Example(chain.double(), (torch.randn(5, 3).double(),))
    kept, again = (trained(example, memory)[0] for memory in ("keep", "recompute"))
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def saved_at_once(memory: str, feedback: bool) -> int:
    """The most elements that autograd holds at any time of a step."""
    chain = nn.Sequential(*(layer for _ in range(25) for layer in (nn.Linear(4, 4), nn.GELU())))  # recorded
    x = torch.randn(8, 4)
    opt = compile_optimizer(chain, x, loss=LOSS, curvature="sgd", memory=memory, feedback=feedback)  # type: ignore[arg-type]
    held = most = 0

    class Packed:
        def __init__(self, value: Tensor) -> None:
            nonlocal held, most
            self.value = value
            held += value.numel()
            most = max(most, held)
            weakref.finalize(self, self.freed, value.numel())

        @staticmethod
        def freed(size: int) -> None:
            nonlocal held
            held -= size

    with torch.autograd.graph.saved_tensors_hooks(Packed, lambda packed: packed.value):
        opt.step(x, targets_for(4, 8))
    return most


@pytest.mark.parametrize("feedback", [True, False])
def test_autograd_holds_a_segment_at_a_time(feedback: bool) -> None:
    assert saved_at_once("recompute", feedback) < 0.4 * saved_at_once("keep", feedback)


def test_segments_of_a_chain_are_about_the_square_root_of_its_depth() -> None:
    chain = nn.Sequential(*(layer for _ in range(36) for layer in (nn.Linear(4, 4), nn.Tanh())))
    opt = compile_optimizer(chain, torch.randn(8, 4), loss=LOSS, curvature="sgd", memory="recompute")
    segments = opt.program.lowered.plan.segments
    assert segments is not None
    sizes = [after - before for before, after in pairwise((*segments.starts, 36))]
    assert len(sizes) in (8, 9) and max(sizes) <= 5
    # a stage holds h and tanh(h), a cut tanh(h); with k segments 2 * 36 / k + k - 1, least at k = 8 or 9: 16
    assert segments.peak / segments.kept == pytest.approx(16 / 72, abs=1 / 72)


def test_what_is_exported_runs_segments_again(tmp_path: Path) -> None:
    example = deep()
    _, opt = trained(example, "recompute", 0)
    opt.program.export(tmp_path / "step.py")
    opt.program.export(tmp_path / "step.json")
    loaded = UpdateProgram.load(tmp_path / "step.json")
    assert loaded.code == opt.program.code and loaded.cost() == opt.program.cost()
    module, (params, buffers) = load_module(tmp_path / "step.py"), named(example.model)
    state, y = module.init_state(params), targets_for(3, 6)
    torch.manual_seed(5)
    for _ in range(3):
        params, buffers, state, _loss = module.step(params, buffers, state, example.inputs, y)
    expected, _ = trained(example, "recompute")
    assert torch.equal(torch.get_rng_state(), expected[-1])
    for name, value in zip(example.model.state_dict(), expected[3:-1], strict=True):
        torch.testing.assert_close({**params, **buffers}[name], value, rtol=1e-12, atol=1e-12)


def test_cost_says_what_is_held() -> None:
    _, opt = trained(deep(), "keep", 0)
    assert "memory='recompute' would hold" in " ".join(opt.program.cost().split())
    tiny = compile_optimizer(nn.Linear(2, 3), torch.randn(4, 2), loss=LOSS, curvature="sgd", memory="recompute")
    assert "in one segment" in " ".join(tiny.program.cost().split())
