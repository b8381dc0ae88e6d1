"""The aims of the geometric terminal."""

import pytest
import torch

from gtddp_compile import kernels


@pytest.mark.parametrize("least", [0.0, -1e-9])
def test_fitted_samples_are_no_sign_that_losses_may_be_negative(least: float) -> None:
    """A loss that is zero in its precision, or below it by rounding, leaves the others' aims as they are."""
    phi = torch.tensor([0.5, 2.0, least, 1e-3])
    _, aims, _ = kernels.terminal(phi, "mean", "geometric", 0.5)
    torch.testing.assert_close(aims[[0, 1, 3]], 0.5 * phi[[0, 1, 3]])


def test_a_negative_loss_is_one() -> None:
    phi = torch.tensor([0.5, 2.0, -0.1, 1e-3])
    _, aims, _ = kernels.terminal(phi, "mean", "geometric", 0.5)
    torch.testing.assert_close(aims[[0, 1, 3]], 0.5 * 0.15 * (phi + 0.1)[[0, 1, 3]])
    _, apart, _ = kernels.terminal(phi, "mean", "geometric", 0.5, group=2)
    torch.testing.assert_close(apart[:2], 0.5 * phi[:2])
