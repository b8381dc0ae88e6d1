"""The trial that finds the generic kernels' faster ways: what it takes as an answer, and what is a defect."""

from __future__ import annotations

import pytest
import torch.nn.functional as F
from torch import Tensor

from gtddp_compile import kernels
from support.samples import Params, draw


@pytest.mark.parametrize("error", [ValueError, AssertionError, TypeError, AttributeError])
def test_a_trial_takes_refusals_of_a_size_and_passes_defects_on(error: type[Exception]) -> None:
    def function(params: Params, x: Tensor) -> Tensor:
        if len(x) == 1:
            raise error
        return x * params[0]

    x, w = draw(4, 3), draw(3)
    if error in (TypeError, AttributeError):
        with pytest.raises(error):
            kernels.generic_probe((x,), draw(4, 3), (w,), (True,), function=function)
    else:
        assert kernels.generic_probe((x,), draw(4, 3), (w,), (True,), function=function)["mixes"]


@pytest.mark.filterwarnings("always")
def test_a_trial_of_what_vmap_has_no_rule_for_is_quiet(recwarn: pytest.WarningsRecorder) -> None:
    def function(params: Params, x: Tensor) -> Tensor:
        return F.bilinear(x, x, params[0])  # type: ignore[arg-type]

    found = kernels.generic_probe((draw(4, 3),), draw(4, 2), (draw(2, 3, 3),), (True,), function=function)
    assert found == {"mixes": False, "vectorised": False, "forward_mode": True} and not recwarn
