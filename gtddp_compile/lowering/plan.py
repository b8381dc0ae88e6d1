"""What the program has to compute for a network, before it is written down as instructions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.graph import ControlGraph, Player
from gtddp_compile.lowering.segments import Segments


@dataclass(frozen=True, slots=True)
class Contraction:
    """``⟨g_v, δv⟩`` a sample: computed once when ``v`` has moved, reused at every stage until ``reader`` consumes
    ``v``.

    Attributes:
        value: name of the value, or ``"params:NAME"`` for a tied player's control.
        reader: stage up to which this gradient of the value is the one at the cut (the number of stages: the loss).
        since: the contraction counts at stages ``since + 1 … reader``: the reader before this one, if there is one.
        born: stage that changes the value.
    """

    value: str
    reader: int
    since: int
    born: int


BlockKind = Literal["parameters", "diagonal", "uniform", "channels", "exact", "kronecker", "printed", "shared"]


@dataclass(frozen=True)
class MetricBlock:
    """Players of a stage whose curvature ``M`` is one matrix.

    Attributes:
        kind: ``"parameters"`` (spherical or diagonal, parameter by parameter); for Kronecker-factored curvatures
            ``"kronecker"`` (one player, or a coalition with cross terms: Theorem 3), ``"printed"``
            (such a coalition, each player's own curvature kept beside: Eq. 23), ``"shared"`` (Corollary 7),
            ``"exact"`` (``E[γ γᵀ]``), ``"diagonal"`` (``E[γ²]``) or, where the metric is of inputs alone, ``"uniform"``
            (a multiple of the identity) and ``"channels"`` (a convolution: of its input channels at a pixel).
        positions: of a ``"uniform"`` block, how often a sample uses each parameter; of ``"channels"``, the bias.
        blocks: of a wide linear layer, into how many its inputs are split: factors of one block each.
        players: in order.
        why: one line for the reader, where the choice needs words.
    """

    kind: BlockKind
    players: tuple[Player, ...]
    why: str = ""
    positions: float = 1.0
    blocks: int = 1


@dataclass(frozen=True)
class StagePlan:
    """One stage of the plan.

    Attributes:
        index: t.
        players: deciding here, in order.
        pulled: consumed values whose gradient is needed (not those no player has moved).
        opened: values in the cut after the stage that this stage computes and gradients enter through.
        feeds: contractions that add up to ``c`` here; none means the feedback gain is dead.
        contracts: contractions to compute once this stage has been run again.
        rerun: whether the forward sweep has to run this stage again.
        statistics: whether ``α`` at t+1 is needed (statistics of the base method, or the form itself).
        blocks: the players by what metric they are in.
    """

    index: int
    players: tuple[Player, ...]
    pulled: tuple[str, ...]
    opened: tuple[str, ...]
    feeds: tuple[Contraction, ...]
    contracts: tuple[Contraction, ...]
    rerun: bool
    statistics: bool
    blocks: tuple[MetricBlock, ...]


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What was asked of a program beside the equations, by the options and the curvature.

    Attributes:
        coupling: ``"full"``, ``"block"`` or the group size.
        decay: whether any parameter has coupled weight decay.
        inertia: whether the metric regularises towards the last step.
        max_step: cap on the joint step's norm in the metric; ``None`` for none.
        max_grad_norm: cap on the norm of the weighted gradient; ``None`` for none.
        clip: bound on ``c``, in units of the aim; ``None`` for none.
        terminal: how the loss is expanded in the outputs: kind, aim and what of it counts one over the batch.
        metric: the curvature's kind; ``"rescaled"`` is a Kronecker one whose diagonal does not separate.
        gram: ``"auto"``, ``"exact"``, ``"separable"``, ``"sketch"`` or ``"coarse"``.
        columns: of the sketch.
    """

    coupling: str | int
    decay: bool
    inertia: bool
    max_step: float | None
    max_grad_norm: float | None
    clip: float | None
    terminal: tuple[str, float, float, float]
    metric: str
    gram: str
    columns: int

    @property
    def linear(self) -> bool:
        """Whether ``ℓ_u`` is present."""
        return self.decay or self.inertia


@dataclass(frozen=True, kw_only=True)
class Plan(Asked):
    """The simplified program: which gains live, which contractions are shared.

    Attributes:
        graph: the control graph.
        form: the collapsed equations.
        stages: in forward order.
        removed: what the pass left out and why, in words.
        segments: where the trajectory is run again from; ``None`` where it is kept.
    """

    graph: ControlGraph
    form: CollapsedForm
    stages: tuple[StagePlan, ...]
    removed: tuple[str, ...]
    segments: Segments | None
