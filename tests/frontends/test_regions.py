"""Parts of a model under another autocast or attention than is around it: named, and what is advised works."""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from gtddp_compile import CompileError, compile_optimizer
from support.compared import LOSS
from support.exported import targets_for


class Model(nn.Module):
    """Attention, and a head; ``asks`` for its batch's size, which torch.fx does not record."""

    def __init__(self, *, float_head: bool = False, by_math: bool = False, asks: bool = False) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(4, 24), nn.Linear(8, 3)
        self.float_head, self.by_math, self.asks, self.low = float_head, by_math, asks, False

    def forward(self, x: Tensor) -> Tensor:
        if self.asks:
            x = x / len(x) * 6
        with torch.autocast("cpu", torch.bfloat16) if self.low else nullcontext():
            q, k, v = self.inner(x).unsqueeze(1).chunk(3, -1)
        h = self.attended(q, k, v).squeeze(1).mean(1)
        with torch.autocast("cpu", enabled=False) if self.float_head else nullcontext():
            return self.head(h.float())

    def attended(self, *qkv: Tensor) -> Tensor:
        around: AbstractContextManager[Any] = sdpa_kernel(SDPBackend.MATH) if self.by_math else nullcontext()
        with around:
            return F.scaled_dot_product_attention(*qkv)


def built(**how: bool) -> tuple[Model, Tensor, Tensor]:
    torch.manual_seed(0)
    return Model(**how), torch.randn(6, 5, 4), targets_for(3, 6)


def line(function: Any, text: str) -> int:
    """Where a line of a function is in this file."""
    lines, first = inspect.getsourcelines(function)
    return first + next(index for index, found in enumerate(lines) if text in found)


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("part", "where", "said"),
    [("float_head", line(Model.forward, "self.head("), "autocast is another .* Take it out"),
     ("by_math", line(Model.attended, "F.scaled"), "sdpa_kernel is around attention.* Take sdpa_kernel out")],
)  # fmt: skip
def test_a_region_that_no_recording_has_is_named(part: str, where: int, said: str, asks: bool) -> None:
    """With its own line, whatever else front ends stumble over; without it, and without autocast, the model trains."""
    for autocast in (True, False):
        for region in (True, False):
            model, x, y = built(asks=asks, **{part: region})
            opt = compile_optimizer(model, loss=LOSS)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                if autocast and region:
                    with pytest.raises(CompileError, match=rf"at test_regions\.py:{where}: {said}"):
                        opt.step(x, y)
                    continue
                first = float(opt.step(x, y).detach())
                assert min(float(opt.step(x, y)) for _ in range(5)) < first


def test_lower_precision_in_a_part_of_a_model() -> None:
    """What is advised instead of a part in float32."""
    model, x, y = built()
    model.low = True
    opt = compile_optimizer(model, loss=LOSS)
    with torch.no_grad():
        expected, (again, *_) = LOSS(model(x), y), built()
        plain = LOSS(again(x), y)
    first = opt.step(x, y)
    torch.testing.assert_close(first, expected, rtol=1e-6, atol=1e-6)
    assert abs(float(expected - plain)) > 1e-5
    assert min(float(opt.step(x, y)) for _ in range(5)) < float(first)
