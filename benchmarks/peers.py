"""Steps of public K-FAC and EK-FAC implementations, for comparison: NNGeometry (package ``nngeometry``, MIT).

It takes linear layers and convolutions, and refuses normalisation layers, embeddings and plain parameters
(``NotImplementedError``), so that of the timed networks it runs ``digits`` and ``mlp`` alone; its curvature is a
Monte-Carlo Fisher matrix, one draw a sample. A step here is what its documentation shows: Fisher matrix of the batch,
gradient, solve, update, with the matrix's inverse (the eigenbasis) made every :data:`REFRESH` steps as ours is, and the
statistics (EK-FAC: the diagonal in the basis) every step. BackPACK has K-FAC factors but no optimizer of its own that
keeps them, curvlinops computes linear operators of fixed parameters: neither has a step that could be timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from networks import Network
from torch.utils.data import DataLoader, TensorDataset

REFRESH, DAMPING = 10, 1e-3
INSTALL = "pip install --no-deps nngeometry==0.4"


def available() -> bool:
    """Whether the peer's package is installed (``INSTALL`` says how)."""
    return importlib.util.find_spec("nngeometry") is not None


def peer_step(network: Network, curvature: str, batch: int, lr: float) -> Callable[[], torch.Tensor]:
    """The peer's step, ``"kfac"`` or ``"ekfac"``.

    Raises:
        NotImplementedError: the peer does not know a layer of the network.
    """
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatEKFAC, PMatKFAC, PVector

    torch.manual_seed(0)
    model, (x, y) = network.build(), network.data(batch)
    loader = DataLoader(TensorDataset(x, y), batch_size=batch)
    kept: dict[str, Any] = {"step": 0}

    def step() -> torch.Tensor:
        model.zero_grad()
        fresh = kept["step"] % REFRESH == 0
        kept["step"] += 1
        if curvature == "kfac":
            fisher = FIM_MonteCarlo(model, loader, PMatKFAC)
            if fresh:
                kept["inverse"] = fisher.inverse(DAMPING)
        else:
            if fresh:
                kept["fisher"] = FIM_MonteCarlo(model, loader, PMatEKFAC)
            kept["fisher"].update_diag(loader)
            kept["inverse"] = kept["fisher"].inverse(DAMPING)
        loss = network.loss(model(x), y)
        loss.backward()
        with torch.no_grad():
            (-lr * kept["inverse"].mv(PVector.from_model_grad(model))).add_to_model(model)
        return loss.detach()

    return step
