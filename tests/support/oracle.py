"""A dense, brute-force DDP for networks given by hand: nothing traced, nothing shared with the package.

The network is a list of `Stage`s over hand-written augmented states. `ddp_step` is docs/theory.md#gains with
explicit matrices: the batch-augmented state is one vector of B * n numbers, its Jacobians come from `torch.func.jacrev`
of the whole batch (samples are not assumed to be separate), `V_xx` is a dense matrix and every gain is a linear solve.
`sample_gradients` defines the reading of operations that mix samples (batch-norm; docs/theory.md#mixing).

Definitions, where the text leaves a choice. Scale: the loss is `s * sum(phi)` with `s = 1/B` ("mean") or 1
("sum"); `V_x = s grad`, `V_xx = s grad gradᵀ`, or `V_x V_xᵀ`, `s²` in place of `s`, where the paper's own recursions
take the paper's terminal Hessian (Proposition 5: the factor is the gradient of the batch's cost).

Groups of b (consecutive samples, the last one ragged, `b_j` its own size): each group stands for the batch,
so it runs the whole recursion for its own mean loss, `(B/b_j) s * sum over the group`, with the metric M of
the whole batch, and the update is the mean of the groups' updates: `δu = Σ_j (b_j/B) δu^j`. Multiplying
group j's value function by `b_j/B` gives the same gains with `V` terminal scaled as in the batch, `Q_uu =
(b_j/B) M + f_uᵀ V f_u`, `Q_u = f_uᵀ V_x + (b_j/B) ℓ_u`.

Weight decay: `ℓ_u = weight_decay * u` belongs to `Q_u` (so to k, and through `Q_xu k` to `V_x`); M is unchanged.

Block coupling keeps the per-sample diagonal blocks of V_xx after every stage; with the "levenberg" recursion
the stage Hessian is the joint one, `Q_uu = M + Σ_i f_uᵀ V_xx^(i) f_u`.

Clip: `c^(i) = <g^(i), δx̂^(i)>` with the ordinary gradient g of Σφ at the cut; a sample's δx̂ is scaled
until |c| <= clip. Base method: statistics see `Q_u` (V_x of the recursion, at t + 1); its first moment
consumes `ĝ = -M δu*`.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import jacrev, vjp

State = tuple[Tensor, ...]
Params = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Stage:
    """One stage: `names` its parameters, `outputs` the h of its players, `combine` the rest."""

    names: tuple[str, ...]
    outputs: Callable[[State, Params], State]
    combine: Callable[[State, State], State]

    def step(self, state: State, params: Params) -> State:
        return self.combine(state, self.outputs(state, params))


@dataclass(frozen=True)
class Options:
    coupling: str | int = "full"
    recursion: str = "levenberg"
    feedback: bool | str = True
    clip: float | None = 1.0
    reduction: str = "mean"
    terminal: str = "gradient"

    def aim(self, phi: Tensor) -> Tensor:
        """Where a sample's quadratic model is least: V_xx = α_T ∇φ ∇φᵀ / aim."""
        if self.terminal == "gradient":
            return torch.ones_like(phi)
        return phi.clamp_min(1e-4 * float(phi.mean()))

    def scale_xx(self, scale: float) -> float:
        """What stands before grad gradᵀ / aim in V_xx at the end."""
        return scale**2 if self.recursion != "levenberg" and self.terminal == "gradient" else scale

    def groups(self, batch: int) -> list[slice]:
        size = self.coupling if isinstance(self.coupling, int) else batch
        return [slice(i, min(i + size, batch)) for i in range(0, batch, size)]


@dataclass
class Record:
    """What the last step did, for assertions about it."""

    loss: float = 0.0
    clipped_radicands: int = 0
    clipped_samples: int = 0
    feedback_norm: float = 0.0
    largest_c: float = 0.0


def flat(state: State) -> Tensor:
    return torch.cat([value.flatten(1) for value in state], 1)


def unflat(matrix: Tensor, like: State) -> State:
    parts = matrix.split([value[0].numel() for value in like], 1)
    return tuple(part.reshape(-1, *value.shape[1:]) for part, value in zip(parts, like, strict=True))


def pack(params: Params, names: Sequence[str]) -> Tensor:
    return torch.cat([params[name].flatten() for name in names])


def unpack(vector: Tensor, params: Params, names: Sequence[str]) -> Params:
    parts = vector.split([params[name].numel() for name in names])
    return {name: part.reshape(params[name].shape) for name, part in zip(names, parts, strict=True)}


def trajectory(stages: Sequence[Stage], params: Params, inputs: State) -> list[State]:
    states = [inputs]
    for stage in stages:
        states.append(stage.step(states[-1], params))
    return states


def terminal_gradient(loss: Loss, state: State, targets: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of the samples and the gradient of their sum in the outputs, one row a sample."""
    phi, pull = vjp(lambda out: loss(out, targets), state[0])
    return phi, pull(torch.ones_like(phi))[0].flatten(1)


def clipped(c: Tensor, aim: Tensor, options: Options, record: Record) -> Tensor:
    record.largest_c = max(record.largest_c, float(c.abs().max()))
    if options.clip is None:
        return torch.ones_like(c)
    limit = options.clip * aim
    record.clipped_samples += int((c.abs() > limit).sum())
    return limit / torch.maximum(c.abs(), limit)


@dataclass
class Group:
    """Value function of one group; z: its factors a sample, used by the Table 1 recursions alone."""

    rows: slice
    V_x: Tensor
    V_xx: Tensor
    z: Tensor
    gains: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def jacobians(stage: Stage, state: State, params: Params) -> tuple[Tensor, Tensor]:
    """f_x (B n' × B n) and f_u (B n' × m) of the whole batch-augmented state."""

    def big(x: Tensor, u: Tensor) -> Tensor:
        values = unflat(x.reshape(len(state[0]), -1), state)
        return flat(stage.step(values, unpack(u, params, stage.names))).flatten()

    return jacrev(big, (0, 1))(flat(state).flatten(), pack(params, stage.names))


def diagonal_blocks(matrix: Tensor, batch: int) -> Tensor:
    n = len(matrix) // batch
    keep = torch.block_diag(*[torch.ones(n, n, dtype=torch.bool)] * batch)
    return torch.where(keep, matrix, 0.0)


def outer_blocks(z: Tensor) -> Tensor:
    return torch.block_diag(*[torch.outer(row, row) for row in z])


def stage_backward(
    t: int, group: Group, f_x: Tensor, f_u: Tensor, metric: Tensor, l_u: Tensor, options: Options, record: Record
) -> None:
    """Gains of stage t and V_x, V_xx one stage earlier, for one group (metric and l_u: its share of them)."""
    batch = group.rows.stop - group.rows.start
    Q_x, Q_u = f_x.T @ group.V_x, f_u.T @ group.V_x + l_u
    Q_ux, Q_xx = f_u.T @ group.V_xx @ f_x, f_x.T @ group.V_xx @ f_x
    Q_uu = torch.diag(metric) + (f_u.T @ group.V_xx @ f_u if options.recursion == "levenberg" else 0)
    k, K = -torch.linalg.solve(Q_uu, Q_u), -torch.linalg.solve(Q_uu, Q_ux)
    group.gains[t] = k, K
    group.V_x = Q_x + Q_ux.T @ k
    if options.recursion == "levenberg":
        group.V_xx = Q_xx + Q_ux.T @ K
        if options.coupling == "block":
            group.V_xx = diagonal_blocks(group.V_xx, batch)
        return
    sign = {"substituted": -1.0, "printed": 1.0}[options.recursion]
    rows = f_u.reshape(batch, -1, f_u.shape[1])
    columns = f_x.reshape(batch, -1, batch, f_x.shape[1] // batch)
    z = []
    for i, factor in enumerate(group.z):
        q_u, q_x = rows[i].T @ factor, columns[i, :, i].T @ factor
        radicand = 1 + sign * q_u @ torch.linalg.solve(Q_uu, q_u)
        record.clipped_radicands += int(radicand < 0)
        z.append(q_x * radicand.clamp_min(0).sqrt())
    group.z = torch.stack(z)
    group.V_xx = outer_blocks(group.z)


def ddp_step(
    stages: Sequence[Stage], params: Params, inputs: State, targets: Tensor, loss: Loss, base: Any, options: Options
) -> tuple[Params, Record]:
    """One update by docs/theory.md#gains; `loss` gives one number a sample."""
    assert options.recursion == "levenberg" or options.coupling == "block"
    record = Record()
    states = trajectory(stages, params, inputs)
    phi, g = terminal_gradient(loss, states[-1], targets)
    batch = len(phi)
    scale = 1 / batch if options.reduction == "mean" else 1.0
    record.loss = float(phi.sum() * scale)
    aim = options.aim(phi)
    z = g * (options.scale_xx(scale) / aim).sqrt()[:, None] if options.feedback is not False else torch.zeros_like(g)
    groups = [Group(rows, scale * g[rows].flatten(), outer_blocks(z[rows]), z[rows]) for rows in options.groups(batch)]
    gradients = {len(stages): g}
    metrics: dict[int, Tensor] = {}
    for t in reversed(range(len(stages))):
        stage = stages[t]
        u = pack(params, stage.names)
        parts = [jacobians(stage, tuple(v[group.rows] for v in states[t]), params) for group in groups]
        l_u = base.linear(u)
        Q_u = sum((f_u.T @ group.V_x for group, (_, f_u) in zip(groups, parts, strict=True)), l_u)
        metrics[t] = base.metric(t, Q_u)
        for group, (f_x, f_u) in zip(groups, parts, strict=True):
            share = (group.rows.stop - group.rows.start) / batch
            stage_backward(t, group, f_x, f_u, share * metrics[t], share * l_u, options, record)
        pulls = [f_x.T @ gradients[t + 1][group.rows].flatten() for group, (f_x, _) in zip(groups, parts, strict=True)]
        gradients[t] = torch.cat(pulls).reshape(batch, -1)
    new, moved = dict(params), inputs
    for t, stage in enumerate(stages):
        dx = flat(moved) - flat(states[t])
        dx = dx * clipped((gradients[t] * dx).sum(1), aim, options, record)[:, None]
        if options.feedback is not True:
            dx = torch.zeros_like(dx)
        u, du = pack(params, stage.names), torch.zeros_like(pack(params, stage.names))
        for group in groups:
            k, K = group.gains[t]
            reaction = K @ dx[group.rows].flatten()
            record.feedback_norm += float(reaction.norm())
            du = du + (group.rows.stop - group.rows.start) / batch * (k + reaction)
        u = u + base.update(t, u, -metrics[t] * du)
        new |= unpack(u, params, stage.names)
        moved = stage.step(moved, new)
    return new, record


def sample_gradients(
    stages: Sequence[Stage], params: Params, states: list[State], g: Tensor
) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """g at every cut and γ (B × m) of every stage, `γ_i = (∂h_i/∂u)ᵀ ∂Σφ/∂h_i` (docs/theory.md#mixing)."""
    gradients, gammas = {len(stages): g}, {}
    for t in reversed(range(len(stages))):
        stage, state = stages[t], states[t]
        cotangent = unflat(gradients[t + 1], states[t + 1])
        pull = vjp(
            partial(lambda stage, state, *hs: stage.combine(state, hs), stage, state), *stage.outputs(state, params)
        )[1]
        heads = partial(
            lambda stage, state, u: flat(stage.outputs(state, unpack(u, params, stage.names))), stage, state
        )
        jacobian = jacrev(heads)(pack(params, stage.names))
        gammas[t] = torch.einsum("bh,bhm->bm", flat(pull(cotangent)), jacobian)
        pull = vjp(partial(lambda stage, *values: stage.step(values, params), stage), *state)[1]
        gradients[t] = flat(pull(cotangent))
    return gradients, gammas


def run(
    stages: Sequence[Stage], params: Params, batches: Iterable[tuple[State, Tensor]], loss: Loss, base: Any,
    options: Options = Options(),
) -> tuple[Params, list[Record]]:  # fmt: skip
    """Several steps; the base method keeps its state between them."""
    records, params = [], {name: value.detach().clone() for name, value in params.items()}
    for inputs, targets in batches:
        params, record = ddp_step(stages, params, inputs, targets, loss, base, options)
        records.append(record)
    return params, records
