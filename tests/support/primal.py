"""The joint step over one flat vector (docs/theory.md#linear-rollout), by `torch.func` and one dense solve.

``δu`` minimises ``(∇J + λ u)ᵀ δu + ½ δuᵀ H δu + ½ (δu - μ v)ᵀ M (δu - μ v)`` with ``H = C P_T Cᵀ`` or the exact
``Σ_i J_iᵀ H_i J_i``: ``(M + H) δu = -(∇J + λ u - μ M v)``. No stages, no cuts, no Gram matrices, no recursion; shares
nothing with the package, base methods included.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, hessian, jacrev, vmap


def flat_outputs(outputs: Any) -> Tensor:
    """All outputs of one sample side by side."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    return torch.cat([part.flatten() for part in parts])


@dataclass
class Primal:
    """`step(inputs, targets)` is one update of `u`.

    Args:
        model: any module that treats samples apart; it is not written.
        loss: ``(outputs, targets) -> (B,)``.
        method: ``"sgd"``, ``"rmsprop"``, ``"adam"``, ``"kfac"`` or ``"foof"`` (of linear layers with biases).
        options: of the method.
        terminal: ``"gradient"``, ``(aim, own, half)`` of the geometric one, or ``"ggn"``.
        group: size of the groups; ``None``: the whole batch.
        total: the loss is summed over samples, not averaged.
        reach: a group's metric is so much less that the mean of ``γ (b/B M)⁻¹ γᵀ`` has this share of the mean
            reciprocal weight, but not less than by the numbers in ``y[0]``; without decay.
        early: of the first step's weights and reach, on top; of the k-th one 1/k of it.
        lookahead: in inertia's place where ``y[0]`` has several numbers: the network is looked at in ``u + μ v``, and
            ``δu - μ v`` is regularised to zero.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    method: str = "sgd"
    options: dict[str, Any] = field(default_factory=dict)
    terminal: str | tuple[float, float, float] = (1.0, 0.0, 0.0)
    group: int | None = None
    inertia: float = 0.0
    max_step: float | None = None
    total: bool = False
    reach: float = 0.0
    lookahead: float = 0.0
    early: float = 0.0

    def __post_init__(self) -> None:
        self.named = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.buffers = dict(self.model.named_buffers())
        self.u = torch.cat([p.flatten() for p in self.named.values()])
        self.last, self.first, self.second = (torch.zeros_like(self.u) for _ in range(3))
        self.factors: dict[str, list[Tensor]] = {}
        self.shares: list[float] = []
        self.steps = self.taken = 0
        self.counted: list[float] = []
        self.ahead = False

    @property
    def mu(self) -> float:
        return min(self.lookahead if self.ahead else self.inertia, self.taken / (self.taken + 3))

    @property
    def more(self) -> float:
        return self.early / (self.taken + 1)

    # --- the network --------------------------------------------------------------------------------------------------

    def parameters(self, u: Tensor) -> dict[str, Tensor]:
        parts = u.split([p.numel() for p in self.named.values()])
        return {name: part.reshape(p.shape) for (name, p), part in zip(self.named.items(), parts, strict=True)}

    def outputs(self, u: Tensor, *inputs: Tensor) -> Any:
        """Of one sample, with its axis."""
        return functional_call(self.model, (self.parameters(u), self.buffers), tuple(x[None] for x in inputs))

    def one(self, u: Tensor, y: Tensor, *inputs: Tensor) -> Tensor:
        return self.loss(self.outputs(u, *inputs), y[None])[0]

    def gradients(self, inputs: tuple[Tensor, ...], y: Tensor) -> tuple[Tensor, Tensor]:
        """``γ`` ``(B, n)`` and ``φ``."""
        found = vmap(grad_and_value(self.one), (None, 0, *(0 for _ in inputs)))(self.u, y, *inputs)
        return found[0], found[1].detach()

    def hessians(self, inputs: tuple[Tensor, ...], y: Tensor) -> Tensor:
        """``J_iᵀ (∂²φ_i/∂o²) J_i`` of every sample."""

        def each(y: Tensor, *inputs: Tensor) -> Tensor:
            outputs = self.outputs(self.u, *inputs)
            shapes = [part.shape for part in (outputs if isinstance(outputs, tuple) else (outputs,))]

            def again(o: Tensor) -> Tensor:
                parts = o.split([shape.numel() for shape in shapes])
                found = tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))
                return self.loss(found if isinstance(outputs, tuple) else found[0], y[None])[0]

            jacobian = jacrev(lambda u: flat_outputs(self.outputs(u, *inputs)))(self.u)
            return jacobian.T @ hessian(again)(flat_outputs(outputs)) @ jacobian

        return vmap(each)(y, *inputs)

    # --- the metric ---------------------------------------------------------------------------------------------------

    def metric(self, gamma: Tensor, gradient: Tensor, inputs: tuple[Tensor, ...]) -> Tensor:
        """``M``, from the statistics of the ordinary gradients, with the decay's where torch.optim has it."""
        o, lr = self.options, self.options["lr"]
        self.steps += 1
        if self.method in ("kfac", "foof"):
            return self.kronecker(gamma, inputs[0]) / lr
        if self.method == "sgd":
            return torch.eye(len(self.u), dtype=self.u.dtype) / lr
        decay = o.get("alpha", 0.99) if self.method == "rmsprop" else o.get("betas", (0.9, 0.999))[1]
        self.second = decay * self.second + (1 - decay) * gradient**2
        second = self.second if self.method == "rmsprop" else self.second / (1 - decay**self.steps)
        return torch.diag((second.sqrt() + 1e-8) / lr)

    def kronecker(self, gamma: Tensor, x: Tensor) -> Tensor:
        """``(A + π √λ I) ⊗ (B + √λ/π I)`` of every layer, in the order weight, bias; FOOF's ``(A + λ ā I) ⊗ I``.

        FOOF's ``A`` is drawn to ``ā I`` by what its batches, weighted as they are in it, are worth.
        """
        inputs: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda _, args, __, name=name: inputs.__setitem__(name, args[0]))
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear)
        ]
        functional_call(self.model, (self.parameters(self.u), self.buffers), (x,))
        for handle in handles:
            handle.remove()
        keep, blocks = min(1 - 1 / self.steps, 0.95), []
        self.shares = [*(keep * share for share in self.shares), 1 - keep]
        spread = sum(share**2 for share in self.shares) / len(x)
        rows = dict(zip(self.named, gamma.split([p.numel() for p in self.named.values()], 1), strict=True))
        for name, read in inputs.items():
            g, wide = rows[f"{name}.bias"], torch.cat([read, torch.ones_like(read[:, :1])], 1).detach()
            new = [wide.T @ wide / len(wide), g.T @ g / len(g)]
            old = self.factors.get(name, new)
            a, b = self.factors[name] = [keep * o + (1 - keep) * n for o, n in zip(old, new, strict=True)]
            eye_a, eye_b, damping = torch.eye(len(a)).double(), torch.eye(len(b)).double(), self.options["damping"]
            pi, mean = (a.diagonal().mean() / b.diagonal().mean()).sqrt(), a.diagonal().mean()
            if self.method == "foof":
                decay = self.options["lr"] * self.options.get("weight_decay", 0.0)  # its own curvature
                rank = a[:-1, :-1].trace() ** 2 / (a[:-1, :-1] ** 2).sum()
                doubt = self.options.get("shrinkage", 3.0) * rank * spread
                a, b = (a + doubt * mean * eye_a) / (1 + doubt) + (damping * mean + decay) * eye_a, eye_b
            else:
                a, b = a + pi * damping**0.5 * eye_a, b + damping**0.5 / pi * eye_b
            m, n = len(b), len(a)
            entries = torch.arange(m * n).reshape(m, n)
            order = torch.cat([entries[:, :-1].flatten(), entries[:, -1]])
            blocks.append(torch.kron(b, a)[order][:, order])
        return torch.block_diag(*blocks)

    # --- the step -----------------------------------------------------------------------------------------------------

    def step(self, inputs: tuple[Tensor, ...], y: Tensor) -> None:
        linear, before = self.options.get("weight_decay", 0.0) * self.u, self.u
        self.ahead = bool(self.lookahead) and y[0].numel() > 1
        if self.ahead:
            self.u = self.u + self.mu * self.last
        gamma, phi = self.gradients(inputs, y)
        batch = len(phi)
        start = 1.0 if self.total else 1.0 / batch
        metric = self.metric(gamma, start * gamma.sum(0) + linear, inputs)
        drawn = 0.0 if self.ahead else self.mu
        held = linear - drawn * metric @ self.last
        update = torch.zeros_like(self.u)
        for rows in torch.arange(batch).split(self.group or batch):
            share = len(rows) / batch
            weights, c = self.weights(phi), 1.0
            if self.reach:
                gram = gamma[rows] @ torch.linalg.solve(share * metric, gamma[rows].T)
                c = max(1.0, float((self.reach + self.more) * (1 / (start * weights[rows])).sum() / gram.trace()))
                c = min(c, y[0].numel())
                self.counted.append(c)
            system = share / c * metric + start * self.model_hessian(rows, gamma, weights, inputs, y)
            own = -torch.linalg.solve(system, start * gamma[rows].sum(0) + share / c * held)
            update += share * self.capped(own, metric, held)
        self.consume(metric, update - drawn * self.last)
        self.u = before + self.last
        self.taken += 1

    def weights(self, phi: Tensor) -> Tensor:
        if not isinstance(self.terminal, tuple):
            return torch.ones_like(phi)
        aim, own, half = self.terminal
        size = min(self.group or len(phi), len(phi))
        least = 1e-4 * phi.abs().mean()
        parts = [part if part.min() >= -least else 0.15 * (part - part.min()) for part in phi.split(size)]
        phi = torch.cat(parts).clamp_min(least)
        return 1 / (phi * (aim * size / (size + half) + own / size) * (1 + self.more))

    def model_hessian(
        self, rows: Tensor, gamma: Tensor, weights: Tensor, inputs: tuple[Tensor, ...], y: Tensor
    ) -> Tensor:
        if self.terminal == "ggn":
            return self.hessians(tuple(x[rows] for x in inputs), y[rows]).sum(0)
        return (gamma[rows].T * weights[rows]) @ gamma[rows]

    def capped(self, step: Tensor, metric: Tensor, held: Tensor) -> Tensor:
        """What the samples ask for, within the bound; what decay and inertia ask for, as it is."""
        if self.max_step is None:
            return step
        carried = -torch.linalg.solve(metric, held)
        asked = step - carried
        return carried + asked * min(1.0, self.max_step / float(asked @ metric @ asked) ** 0.5)

    def consume(self, metric: Tensor, step: Tensor) -> None:
        """The base method's first moment takes ``-M`` times the step in place of the gradient."""
        if self.method == "adam":
            beta = self.options.get("betas", (0.9, 0.999))[0]
            self.first = beta * self.first - (1 - beta) * metric @ step
            step = -torch.linalg.solve(metric, self.first) / (1 - beta**self.steps)
        self.last = step + self.mu * self.last
