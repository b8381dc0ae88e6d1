"""Tied weights against explicit matrices: stages by hand, the whole batch in one state, torch.linalg for the gains.

The control of a weight that is used again waits in the state, as a vector beside the samples' values. Nothing here is
the package's own but the update that is tested.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from gtddp_compile import compile_optimizer

SAMPLES, WIDTH, CLASSES, WORDS, STEPS, LR = 3, 3, 2, 5, 2, 0.5
Stage = Callable[[Tensor, Tensor], Tensor]
"""``f_t(state, control)``, flat vectors over the whole batch."""


def solve(
    stages: Sequence[Stage], start: Tensor, controls: Sequence[Tensor], losses: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """New controls: Riccati with Proposition 5's terminal and ``Q_uu = I/lr + f_uᵀ V f_u``, then a sweep forward."""
    states = [start]
    for stage, u in zip(stages, controls, strict=True):
        states.append(stage(states[-1], u))
    per_sample = jacobian(losses, states[-1])  # rows: samples; block-diagonal
    v_x, v_xx = per_sample.sum(0) / SAMPLES, per_sample.T @ per_sample / SAMPLES
    gains: list[tuple[Tensor, Tensor]] = []
    for stage, x, u in reversed(list(zip(stages, states, controls, strict=False))):
        f_x, f_u = jacobian(stage, (x, u))
        q_uu = torch.eye(len(u), dtype=u.dtype) / LR + f_u.T @ v_xx @ f_u
        q_ux = f_u.T @ v_xx @ f_x
        k, feedback = -torch.linalg.solve(q_uu, f_u.T @ v_x), -torch.linalg.solve(q_uu, q_ux)
        v_x, v_xx = f_x.T @ v_x + q_ux.T @ k, f_x.T @ v_xx @ f_x + q_ux.T @ feedback
        gains.insert(0, (k, feedback))
    state, found = start, []
    for stage, x, u, (k, feedback) in zip(stages, states, controls, gains, strict=False):
        found.append(u + k + feedback @ (state - x))
        state = stage(state, found[-1])
    return found


class Reused(nn.Module):
    """A matrix that comes back after another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.c = nn.Linear(WIDTH, CLASSES, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.b(torch.tanh(self.a(x))))
        return self.c(torch.tanh(self.a(h)))


def reused(x: Tensor, targets: Tensor) -> tuple[list[Stage], Tensor, Callable[[Tensor], Tensor]]:
    square = WIDTH * WIDTH

    def first(state: Tensor, u: Tensor) -> Tensor:
        return torch.cat([torch.tanh(state.view(SAMPLES, -1) @ u.view(WIDTH, WIDTH).T).flatten(), u])

    def second(state: Tensor, u: Tensor) -> Tensor:
        h, waiting = state[:-square].view(SAMPLES, -1), state[-square:].view(WIDTH, WIDTH)
        return torch.tanh(torch.tanh(h @ u.view(WIDTH, WIDTH).T) @ waiting.T).flatten()

    def third(state: Tensor, u: Tensor) -> Tensor:
        return (state.view(SAMPLES, -1) @ u.view(CLASSES, WIDTH).T).flatten()

    return [first, second, third], x.flatten(), lambda y: (y.view(SAMPLES, -1) - targets).square().mean(1)


class LanguageModel(nn.Module):
    """The table of the words is the output layer too."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.b = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(self.words(ids))))


def language_model(ids: Tensor, targets: Tensor) -> tuple[list[Stage], Tensor, Callable[[Tensor], Tensor]]:
    table = WORDS * WIDTH
    chosen = F.one_hot(ids, WORDS).double()

    def first(state: Tensor, u: Tensor) -> Tensor:
        return torch.cat([(chosen @ u.view(WORDS, WIDTH)).flatten(), u])

    def second(state: Tensor, u: Tensor) -> Tensor:
        h, waiting = state[:-table].view(SAMPLES, STEPS, WIDTH), state[-table:].view(WORDS, WIDTH)
        return (torch.tanh(h @ u.view(WIDTH, WIDTH).T) @ waiting.T).flatten()

    def losses(y: Tensor) -> Tensor:
        rows = y.view(SAMPLES, STEPS, WORDS).log_softmax(-1)
        return -(rows * F.one_hot(targets, WORDS)).sum(-1).mean(1)

    return [first, second], torch.zeros(1).double(), losses


def mean_square(outputs: Tensor, targets: Tensor) -> Tensor:
    return (outputs - targets).square().mean(1)


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs.transpose(1, 2), targets, reduction="none").mean(1)


def cases() -> dict[str, Any]:
    torch.manual_seed(0)
    x, y = torch.randn(SAMPLES, WIDTH).double(), torch.randn(SAMPLES, CLASSES).double()
    ids, words = torch.randint(WORDS, (SAMPLES, STEPS)), torch.randint(WORDS, (SAMPLES, STEPS))
    return {
        "a layer used again": (Reused().double(), x, y, mean_square, reused),
        "a tied language model": (LanguageModel().double(), ids, words, cross_entropy, language_model),
    }


@pytest.mark.parametrize("backend", ["fast", "dense"])
@pytest.mark.parametrize("name", cases())
def test_tied_weights_against_explicit_matrices(name: str, backend: str) -> None:
    model, x, y, loss, by_hand = cases()[name]
    parameters = list(model.parameters())
    stages, start, losses = by_hand(x, y)
    before = [p.detach().clone() for p in parameters]
    expected = solve(stages, start, [p.flatten() for p in before], losses)
    options: dict[str, Any] = {
        "terminal": "gradient",
        "feedback_clip": None,
        "rollout": "nonlinear",
        "backend": backend,
    }
    opt = compile_optimizer(model, x, loss=loss, curvature="sgd", lr=LR, **options)
    assert len(opt.graph.players[0].uses) == 2, "one player, two uses"
    opt.step(x, y)
    for p, old, new in zip(parameters, before, expected, strict=True):
        torch.testing.assert_close(p.detach().flatten(), new, rtol=0, atol=1e-11)
        assert (new - old.flatten()).abs().max() > 1e-3
