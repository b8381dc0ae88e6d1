"""What the studies compare: training methods of torch.optim, of other packages, and compiled ones.

The packages come with ``pip install -e ".[rivals]"``, but for NNGeometry and ASDL, which would install another torch:
``pip install --no-deps`` (``peers.INSTALL``).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peers import asdl_step, nngeometry_step
from study_tasks import Task
from torch import Tensor, nn

from gtddp_compile import FOOF, CompiledOptimizer, Geometric, Sketch, Terms, compile_optimizer
from gtddp_compile.methods.curvature import updates
from gtddp_compile.options import SUGGESTED

RATES = tuple(float(f"{digit}e{power}") for power in range(-5, 4) for digit in (1, 3))
"""What a sweep may come to: every rate is about three times the one before."""
Step = Callable[..., Tensor]
Optimizers = Callable[[nn.Module, float], list[torch.optim.Optimizer]]


# --- methods ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Method:
    """A training method.

    Attributes:
        name: key, as tables show it.
        optimizers: of a model and a learning rate; ``None``: ``compile_optimizer``, or ``peer``.
        peer: a step of a K-FAC that has no torch.optim class, of a model, loss and learning rate.
        options: of ``compile_optimizer``.
        rates: learning rates to begin a sweep with; none: nothing is tuned.
        cosine: whether it is meant to have a schedule; it is then swept with and without.
        whole: whether it takes all training data at every step.
        only: tasks it is for, by name; all where none is named.
        ramp: steps after which inertia is half of what it tends to; ``None``: the package's.
    """

    name: str
    optimizers: Optimizers | None = None
    peer: Callable[..., Step] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    cosine: bool = False
    whole: bool = False
    only: tuple[str, ...] = ()
    ramp: float | None = None

    @property
    def ours(self) -> bool:
        """Whether it is compiled."""
        return self.optimizers is None and self.peer is None

    def make(self, model: nn.Module, task: Task, example: Any, run: Any) -> tuple[Step, Callable[[bool], None]]:
        """One training step on this model; and what it has to be told before (False) and after it is evaluated."""
        if self.ours:
            options = self.options if not run.rate else {**self.options, "lr": run.rate}
            losses = {} if isinstance(model, Terms) else {"loss": task.loss}
            optimizer = compile_optimizer(model, example, on_nonfinite="skip", **losses, **options)
            step = optimizer.step if self.ramp is None else ramped(optimizer, self.ramp)
            return step, lambda training: None
        if self.peer is not None:
            return self.peer(model, task, run.rate), lambda training: None
        return descent(model, task, self.optimizers(model, run.rate), run.schedule == "cosine")  # type: ignore[misc]


def descent(
    model: nn.Module, task: Task, optimizers: list[torch.optim.Optimizer], cosine: bool
) -> tuple[Step, Callable[[bool], None]]:
    """Steps of optimizers that share a model, each with parameters of its own."""
    ends = [torch.optim.lr_scheduler.CosineAnnealingLR(opt, task.steps) for opt in optimizers if cosine]

    def closure(*batch: Any) -> Tensor:
        for optimizer in optimizers:
            optimizer.zero_grad()
        value = task.objective(model, *batch)
        value.backward()
        return value.detach()

    def step(*batch: Any) -> Tensor:
        if isinstance(optimizers[0], torch.optim.LBFGS):
            value = optimizers[0].step(lambda: closure(*batch))
        else:
            value = closure(*batch)
            for optimizer in optimizers:
                optimizer.step()
        for end in ends:
            end.step()
        return value

    def tell(training: bool) -> None:
        for optimizer in optimizers:  # schedule-free methods keep two sets of weights
            change = getattr(optimizer, "train" if training else "eval", None)
            if change is not None:
                change()

    tell(True)
    return step, tell


def ramped(optimizer: CompiledOptimizer, ramp: float) -> Step:
    """Steps of an inertia that grows otherwise than the package's, which has no option for it."""

    def step(*batch: Any) -> Tensor:
        own, updates.RAMP = updates.RAMP, ramp
        try:
            return optimizer.step(*batch)
        finally:
            updates.RAMP = own

    return step


# --- rivals -----------------------------------------------------------------------------------------------------------


def optim(kind: str, module: str = "torch.optim", **options: Any) -> Optimizers:
    """A class of torch.optim or another module, for all parameters."""

    def make(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
        found = getattr(importlib.import_module(module), kind)
        return [found(model.parameters(), lr=rate, **options)]

    return make


class FlatMuon(torch.optim.Muon):
    """torch.optim.Muon, which takes matrices alone, of kernels too: a row an output channel, as its authors do."""

    def __init__(self, weights: list[nn.Parameter], rate: float) -> None:
        self.pairs = [(weight, nn.Parameter(weight.detach().flatten(1))) for weight in weights]
        super().__init__([flat for _, flat in self.pairs], lr=rate, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: Any = None) -> Any:
        """Shares the weights' memory."""
        for weight, flat in self.pairs:
            flat.grad = None if weight.grad is None else weight.grad.flatten(1)
        return super().step(closure)


def muon(model: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for weights of layers, scaled to take AdamW's rates; AdamW for embeddings, the last layer and the rest."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.RNN)]
    hidden = [p for layer in layers[:-1] for p in layer.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if all(p is not q for q in hidden)]
    return [FlatMuon(hidden, rate), torch.optim.AdamW(rest, lr=rate)]


ADAM, STEPS, SGD = (3e-4, 1e-3, 3e-3, 0.01, 0.03), (1e-3, 3e-3, 0.01, 0.03, 0.1), (3e-3, 0.01, 0.03, 0.1, 0.3)
"""Learning rates to begin with."""
NAMED_CLASSES = ("digits-128", "digits-8", "mnist-bn-64", "mnist-plain-64", "tanh-40-64")
OTHERS = "pytorch_optimizer"
NESTEROV = {"momentum": 0.9, "nesterov": True}
SHAMPOO = {"start_preconditioning_step": 10, "preconditioning_compute_steps": 10, "moving_average_for_momentum": True}
RIVALS = (
    Method("torch SGD Nesterov", optim("SGD", **NESTEROV), rates=SGD, cosine=True),
    Method("torch Adam", optim("Adam"), rates=ADAM, cosine=True),
    Method("torch Muon", muon, rates=ADAM, cosine=True),
    Method("SOAP", optim("SOAP", OTHERS), rates=ADAM, cosine=True),
    Method("torch AdamW", optim("AdamW"), rates=ADAM, cosine=True),
    Method("torch NAdam", optim("NAdam"), rates=ADAM, cosine=True),
    Method("torch RMSprop", optim("RMSprop"), rates=ADAM, cosine=True),
    Method("schedule-free AdamW", optim("AdamWScheduleFree", "schedulefree"), rates=STEPS),
    Method("PSGD Kron", optim("Kron", OTHERS), rates=ADAM, cosine=True),
    Method("Shampoo", optim("ScalableShampoo", OTHERS, **SHAMPOO), rates=SGD, cosine=True),
    Method("ASDL K-FAC", peer=asdl_step, rates=STEPS, only=NAMED_CLASSES),
    Method("NNGeometry K-FAC", peer=nngeometry_step, rates=STEPS, only=("digits-128", "digits-8", "tanh-40-64")),
    Method("torch L-BFGS", optim("LBFGS", max_iter=1, max_eval=25, history_size=50, line_search_fn="strong_wolfe"),
           rates=(1.0,), whole=True, only=("poisson-300", "diabetes-32")),
)  # fmt: skip
"""The four that are run first, then the others."""


# --- ours -------------------------------------------------------------------------------------------------------------

SUGGESTION: Geometric = SUGGESTED["foof"]["terminal"]
LIKE_DEFAULT = {**SUGGESTED["foof"], "lr": FOOF().lr, "damping": FOOF().damping}
"""FOOF's settings, for K-FAC; refresh periods are the same anyway."""


def ours(name: str, *rates: float, **options: Any) -> Method:
    """A compiled optimizer."""
    return Method(name, options=options, rates=rates)


DEFAULT = ours("default")
METHODS = {
    method.name: method
    for method in (
        DEFAULT,
        *RIVALS,
        ours("lr / 3", lr=1.0),
        ours("lr × 3", lr=9.0),
        ours("damping 0.01", damping=0.01),
        ours("damping 0.03", damping=0.03),
        ours("damping 1", damping=1.0),
        *(ours(f"shrinkage {much:g}", shrinkage=much) for much in (0.0, 10.0)),
        *(ours(f"average {newest:g}", averaging=newest) for newest in (0.0, 10.0)),
        ours("inertia 0", inertia=0.0),
        ours("inertia 0.7", inertia=0.7),
        Method("inertia at once", ramp=1e-9),
        Method("inertia, ramp 1", ramp=1.0),
        Method("inertia, ramp 10", ramp=10.0),
        *(ours(f"aim {aim} flat", terminal=Geometric(aim)) for aim in (0.1, 0.3, 1.0, 2.0)),
        ours("aim 0.6 B/(B + 16)", terminal=Geometric(0.6, half=16.0)),
        ours("look-ahead 0", inertia=0.9, lookahead=0.0),
        *(ours(f"reach {reach:g}", terminal=replace(SUGGESTION, reach=reach)) for reach in (0.0, 0.3)),
        ours("early 0", terminal=replace(SUGGESTION, early=0.0)),
        ours("deep 0", terminal=replace(SUGGESTION, deep=0.0)),
        ours("refresh 1", refresh=1, stat_every=1),
        ours("ekfac", curvature="ekfac", **LIKE_DEFAULT),
        ours("kfac damping 0.1", curvature="kfac", **LIKE_DEFAULT),
        ours("kfac damping 0.01", curvature="kfac", **{**LIKE_DEFAULT, "damping": 0.01}),
        ours("kfac, aim 0.1", curvature="kfac", **{**LIKE_DEFAULT, "terminal": Geometric(0.1)}),
        ours("line search", line_search=(0.1, 0.3, 1.0)),
        ours("sgd linear", 0.1, 0.3, 1.0, 3.0, curvature="sgd"),
        ours("adam linear", 1e-3, 3e-3, 0.01, 0.03, curvature="adam"),
        ours("nonlinear", rollout="nonlinear"),
        ours("open", feedback="open"),
        ours("exact Γ", gram="exact"),
        ours("Γ of 64 columns", gram=Sketch(64)),
    )
}
"""By name."""
