"""A step of a random model with random options is right, or refused in words (``benchmarks/fuzz.py`` makes 2,000)."""

import pytest

from gtddp_compile.runtime.method import BaseMethod
from support.fuzzed import FAILED, outcome

FOUND = (61, 126, 299, 835)
"""Seeds that have been wrong."""


@pytest.mark.parametrize("seed", [*range(20), *FOUND])
def test_a_step_is_right_or_refused(seed: int) -> None:
    found = outcome(seed)
    assert found.kind not in FAILED, found.said


def test_the_fuzzer_sees_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update that is off, and an error that is no CompileError."""
    seed = next(seed for seed in range(32) if outcome(seed).kind == "as torch.optim")

    def off(self: BaseMethod) -> None:
        for _, value in self._updates():
            value.add_(1e-6)

    monkeypatch.setattr(BaseMethod, "check_finite", off)
    assert outcome(seed).kind == "wrong"
    monkeypatch.setattr(BaseMethod, "check_finite", lambda self: {}["no"])
    assert outcome(seed).kind == "another error"
