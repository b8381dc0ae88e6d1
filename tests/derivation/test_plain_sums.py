"""Sums are what they are, whatever they are written as: Corollary 7's players are found by their derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import compile_optimizer
from gtddp_compile.passes.p01_normalise import FRONT_ENDS, normalise
from support.compared import KRONECKER, LOSS, trained
from support.networks import Case, make

SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "nested": lambda a, b, c: a + (b + c),
    "torch.add": lambda a, b, c: torch.add(torch.add(input=a, other=b, alpha=1), c),
    "method": lambda a, b, c: c.add(b).add(other=a),
    "in place": lambda a, b, c: a.add_(b).add_(c),
    "of a list": lambda a, b, c: sum([a, b, c]),
    "beside a constant": lambda a, b, c: 1.0 + a + torch.zeros_like(b) + (b + c) - 1,
    "differences": lambda a, b, c: -(0 - a - torch.add(b, c)),
    "reshaped": lambda a, b, c: a.view(a.size(0), -1) + b.flatten(1) + c,
}


@pytest.mark.parametrize("spelling", SUMS)
def test_corollary_7_whatever_the_sum_is_written_as(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def case(add: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Case:
        def forward(net: nn.Module, x: Tensor) -> Tensor:
            x = torch.tanh(net.stem(x))
            return net.head(torch.tanh(add(net.p0(x), net.p1(x), net.p2(x))))

        return Case(make(forward, stem=(4, 3), head=(4, 3), **{f"p{k}": (3, 4) for k in range(3)}), (4,), {})

    expected = trained(case(lambda a, b, c: a + b + c), steps=2, **KRONECKER["ekfac"])
    for front_end in FRONT_ENDS[:2]:
        monkeypatch.setattr(normalise, "__defaults__", ((front_end,),))
        found = trained(case(SUMS[spelling]), steps=2, **KRONECKER["ekfac"])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_no_corollary_7_for_other_derivatives_or_readers() -> None:
    """A difference, a player counted twice, and one whose output is read elsewhere too."""
    others: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
        lambda a, b, c: a + b - c, lambda a, b, c: a + b + c + c, lambda a, b, c: (a + b + c) * c,
    ]  # fmt: skip
    for add in others:

        def forward(net: nn.Module, x: Tensor, add: Any = add) -> Tensor:
            return net.head(torch.tanh(add(net.p0(x), net.p1(x), net.p2(x))))

        case = Case(make(forward, head=(4, 3), **{f"p{k}": (4, 4) for k in range(3)}), (4,), {})
        opt = compile_optimizer(case.model, case.batch(0)[0], loss=LOSS, curvature="ekfac")
        kinds = [(block.kind, len(block.players)) for block in opt.program.derived.stages[0].blocks]
        assert kinds == [("shared", 2), ("kronecker", 1)]
