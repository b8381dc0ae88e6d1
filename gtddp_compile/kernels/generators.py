"""The random generators' states: a step draws as much as one forward pass, the same numbers in both sweeps."""

import torch
from torch import Tensor


def random_state() -> list[Tensor]:
    """The generators' states (CPU, then every GPU in use)."""
    states = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states += torch.cuda.get_rng_state_all()
    return states


def restore_random_state(states: list[Tensor]) -> None:
    """Undo every draw since :func:`random_state`."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state_all(states[1:])
