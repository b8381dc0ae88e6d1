"""Steps of public K-FAC and EK-FAC implementations, for comparison.

NNGeometry (package ``nngeometry``, MIT) takes linear layers and convolutions, and refuses normalisation layers,
embeddings and plain parameters (``NotImplementedError``), so that of the timed networks it runs ``digits`` and
``mlp`` alone; its curvature is a Monte-Carlo Fisher matrix, one draw a sample. A step here is what its documentation
shows: Fisher matrix of the batch, gradient, solve, update. ASDL (package ``asdfghjkl``, MIT) has K-FAC with running
averages; here with the empirical Fisher matrix, whose gradients are those of the step, as ours (its EK-FAC, which its
source calls unsupported, has no period for the eigenbases: EK-FAC is timed against ASDL's K-FAC too). Both make the
matrices' inverses (the eigenbasis) every :data:`REFRESH` steps as ours are made, and the statistics (EK-FAC: the
diagonal in the basis) every step; ASDL's own default, statistics as seldom as inverses, is a method that knows less.
BackPACK has K-FAC factors but no optimizer of its own that keeps them, curvlinops computes linear operators of fixed
parameters: neither has a step that could be timed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from networks import Network
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

REFRESH, DAMPING = 10, 1e-3
PEERS = {
    "nngeometry": ("nngeometry", ("kfac", "ekfac")),
    "asdl": ("asdl", ("kfac",)),
    "asdl's kfac": ("asdl", ("ekfac",)),
}
"""By name: the module, and what it has."""
INSTALL = "pip install --no-deps nngeometry==0.4 asdfghjkl==0.1a5"


def available(curvature: str) -> list[str]:
    """The peers that are installed (``INSTALL`` says how) and have this method."""
    return [name for name, (module, has) in PEERS.items() if curvature in has and importlib.util.find_spec(module)]


def peer_step(name: str, network: Network, curvature: str, batch: int, lr: float) -> Callable[[], torch.Tensor]:
    """A peer's step, ``"kfac"`` or ``"ekfac"``.

    Raises:
        NotImplementedError: the peer does not know a layer of the network.
    """
    torch.manual_seed(0)
    model, (x, y) = network.build(), network.data(batch)
    asdl = PEERS[name][0] == "asdl"
    step = asdl_step(model, network, lr) if asdl else nngeometry_step(model, network, lr, curvature)
    return lambda: step(x, y)


@contextmanager
def _unmarked(*_: object, **__: object) -> Iterator[None]:
    """ASDL marks ranges for a profiler of CUDA builds; elsewhere that raises."""
    yield


def asdl_step(model: nn.Module, task: Any, lr: float) -> Callable[..., torch.Tensor]:
    """ASDL's K-FAC, for ``task.loss`` a cross-entropy."""
    torch.cuda.nvtx.range = _unmarked
    from asdl.precondition import KfacGradientMaker, PreconditioningConfig

    optimizer, kept = torch.optim.SGD(model.parameters(), lr=lr), {}

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if not kept:
            config = PreconditioningConfig(
                data_size=len(y),
                damping=DAMPING,
                ema_decay=0.05,  # the weight of what is new
                preconditioner_upd_interval=REFRESH,
                curvature_upd_interval=1,
            )
            kept["maker"] = KfacGradientMaker(model, config, fisher_type="fisher_emp")
        optimizer.zero_grad()
        kept["maker"].setup_loss_call(F.cross_entropy, kept["maker"].setup_model_call(model, x), y)
        _, loss = kept["maker"].forward_and_backward()
        optimizer.step()
        return loss.detach()

    return step


def nngeometry_step(model: nn.Module, task: Any, lr: float, curvature: str = "kfac") -> Callable[..., torch.Tensor]:
    """NNGeometry's K-FAC or EK-FAC, for ``task.loss`` a cross-entropy."""
    from nngeometry.metrics import FIM_MonteCarlo
    from nngeometry.object import PMatEKFAC, PMatKFAC, PVector

    kept: dict[str, Any] = {"step": 0}

    def step(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        loader = DataLoader(TensorDataset(x, y), batch_size=len(y))
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
        loss = task.loss(model(x), y)
        loss.backward()
        with torch.no_grad():
            (-lr * kept["inverse"].mv(PVector.from_model_grad(model))).add_to_model(model)
        return loss.detach()

    return step
