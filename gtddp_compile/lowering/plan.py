"""What the program has to compute for a network, before it is written down as instructions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gtddp_compile.algebra.collapsed import CollapsedForm
from gtddp_compile.graph import ControlGraph, Player
from gtddp_compile.lowering.segments import Segments
from gtddp_compile.lowering.uses import Use


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


BlockKind = Literal["parameters", "diagonal", "uniform", "channels", "exact", "kronecker", "shared"]


@dataclass(frozen=True)
class MetricBlock:
    """Players of a stage whose curvature ``M`` is one matrix.

    Attributes:
        kind: ``"parameters"`` (spherical or diagonal, parameter by parameter); for Kronecker-factored curvatures
            ``"kronecker"`` (one player, or a coalition with cross terms: Theorem 3), ``"shared"`` (Corollary 7),
            ``"exact"`` (``E[γ γᵀ]``), ``"diagonal"`` (``E[γ²]``) or, where the metric is of inputs alone, ``"uniform"``
            (a multiple of the identity) and ``"channels"`` (a convolution, or a linear layer of tokens: of its
            input channels at a pixel or position).
        size: entries that a sample's output has for every use of the parameters: of ``"channels"`` its outputs at a
            position, of ``"uniform"`` as many as the largest parameter has.
        blocks: of a wide linear layer, into how many its inputs are split: factors of one block each.
        players: in order.
        why: one line for the reader, where the choice needs words.
    """

    kind: BlockKind
    players: tuple[Player, ...]
    why: str = ""
    blocks: int = 1
    size: int = 1

    @property
    def names(self) -> tuple[tuple[str, ...], ...]:
        """Every player's parameters."""
        return tuple(player.parameters for player in self.players)

    @property
    def of_players(self) -> bool:
        """Whether the metric is one matrix over weight and bias, and over the players of a coalition."""
        return self.kind in ("kronecker", "shared", "exact")


@dataclass(frozen=True)
class GramChoice:
    """Form of a Gram matrix.

    Attributes:
        form: ``"separable"`` (products of input and output Gram matrices), ``"pairs"``, ``"patches"``, ``"pixels"``
            (sums over pairs of positions), ``"per-sample"`` (``γ`` itself), ``"turned rows"`` (of a
            :class:`gtddp_compile.kernels.Turned` metric) or ``"sketch"``.
        kept: whether ``γ`` is kept for the weighted gradients.
        approximate: ``"exact"``, ``"separable"`` or ``"sketch"``: which kernels make it.
        columns: signs an input of the sketch; 0: as many as the option says.
        uses: of so many linear layers with the same weight the positions are taken together; 0: there is one.
    """

    form: str
    kept: bool = False
    approximate: str = "exact"
    columns: int = 0
    uses: int = 0

    def __str__(self) -> str:
        separated = ["metric separated"] if self.approximate == "separable" else []
        form = f"{self.form} over {self.uses} uses" if self.uses else self.form
        return ", ".join([form, *(["kept"] if self.kept else []), *separated])


@dataclass(frozen=True)
class LayerPlan:
    """How one player's layer is computed: decided once (``lowering.decide``), read by everyone after.

    Attributes:
        player: whose.
        block: the metric that it is in.
        uses: how each use of its parameters is differentiated.
        gram: how its ``Γ`` is made; ``gram.kept``: ``γ`` is built once and serves for the step too.
        coordinates: in which form the rows of a Kronecker-factored layer are kept where its metric is diagonal
            (:mod:`gtddp_compile.kernels.coordinates`); ``""``: they are not.
        lines: the sum of a convolution's ``x xᵀ`` is made of lines of pixels that its patches share.
        groups: groups of a weight whose diagonal metric is separated for ``Γ``; ``None``: its kernel takes the whole.
        in_place: the product that makes the step writes the parameter.
        mapped: the metric maps the layer's inputs, which are fewer, instead of its gradient's rows.
        watched: somebody reads ``δu`` itself (a later use of tied parameters).
        alike: players, this one among them, whose small layers have one shape: ``Γ`` and the step of all of them are
            one product each (:mod:`gtddp_compile.lowering.write.alike`). Empty: the layer is computed alone.
    """

    player: Player
    block: MetricBlock
    uses: tuple[Use, ...]
    gram: GramChoice
    coordinates: str = ""
    lines: bool = False
    groups: int | None = None
    in_place: bool = False
    mapped: bool = False
    watched: bool = False
    alike: tuple[str, ...] = ()

    @property
    def single(self) -> Use | None:
        """The use that has all parameters of the player, if there is one."""
        return self.uses[0] if len(self.uses) == 1 and self.uses[0].names == self.player.parameters else None

    @property
    def kind(self) -> str:
        """What the base method calls the block: one whose rows are mapped by inverse factors is ``"dual"``."""
        return "dual" if self.coordinates == "dual" else self.block.kind


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
        coupling: ``"full"``, ``"block"``, the group size, or ``"local"``: a group a rank.
        decay: whether any parameter has coupled weight decay.
        inertia: whether the metric regularises towards the last step.
        max_step: cap on the joint step's norm in the metric; ``None`` for none.
        reach: least ratio of ``Γ``'s diagonal to ``P_T⁻¹``'s in the joint step; 0 for none.
        early: how much greater aim and reach are in the first step (:class:`Geometric`).
        max_grad_norm: cap on the norm of the weighted gradient; ``None`` for none.
        clip: bound on ``c``, in units of the aim; ``None`` for none.
        terminal: how the loss is expanded in the outputs: kind, aim and what of it counts one over the batch.
        metric: the curvature's kind; ``"rescaled"`` is a Kronecker one whose diagonal does not separate.
        gram: ``"auto"``, ``"exact"``, ``"separable"``, ``"sketch"`` or ``"nystrom"``.
        columns: of the sketch, or samples whose columns of ``Γ`` are made.
        tolerance: of the iterative solution.
        ranks: processes with a shard of the batch each; 1: there is one.
    """

    coupling: str | int
    decay: bool
    inertia: bool
    max_step: float | None
    reach: float
    early: float
    max_grad_norm: float | None
    clip: float | None
    terminal: tuple[str, float, float, float]
    metric: str
    gram: str
    columns: int
    tolerance: float
    ranks: int = 1

    @property
    def gathers(self) -> bool:
        """Whether Γ is of the samples of several ranks."""
        return self.ranks > 1 and self.coupling == "full"

    @property
    def linear(self) -> bool:
        """Whether ``ℓ_u`` is present."""
        return self.decay or self.inertia

    @property
    def turned(self) -> bool:
        """Whether parameters' metrics are diagonal in coordinates of their own."""
        return self.metric.startswith("turned")


@dataclass(frozen=True, kw_only=True)
class Plan(Asked):
    """The simplified program: which gains live, which contractions are shared.

    Attributes:
        graph: the control graph.
        form: the collapsed equations.
        stages: in forward order.
        removed: what the pass left out and why, in words.
        segments: where the trajectory is run again from; ``None`` where it is kept.
        layers: how every player's layer is computed, by its name.
    """

    graph: ControlGraph
    form: CollapsedForm
    stages: tuple[StagePlan, ...]
    removed: tuple[str, ...]
    segments: Segments | None
    layers: Mapping[str, LayerPlan] = field(default_factory=dict)

    @property
    def alike(self) -> tuple[tuple[Player, ...], ...]:
        """Groups of players that are computed together, each from its last stage to its first."""
        groups = dict.fromkeys(layer.alike for layer in self.layers.values() if layer.alike)
        return tuple(tuple(self.layers[name].player for name in group) for group in groups)

    def alone(self, stage: StagePlan) -> tuple[MetricBlock, ...]:
        """The blocks of a stage that are computed where they are."""
        return tuple(block for block in stage.blocks if not self.layers[block.players[0].name].alike)
