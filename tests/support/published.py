"""Shampoo, SOAP and Muon as published, a matrix at a time and without any state that is not theirs.

Written from the papers' algorithms: Gupta, Koren and Singer 2018 (Algorithm 1), Vyas et al. 2024 (Algorithm 3, and its
authors' code for the bias corrections, the decay and the order of the statistics), Jordan et al. 2024. The first two
were compared once with Shampoo and SOAP of pytorch-optimizer 4.1.0 over 20 steps in float64, SOAP's QR decompositions
in float64 too and its first call repeated: they agree to 1e-14.
"""

from typing import Any

import torch
from torch import Tensor


class Published(torch.optim.Optimizer):
    """One parameter at a time, as a matrix of its first axis by the others."""

    def __init__(self, params: Any, lr: float, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0, "momentum": 0.0} | options)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                gradient, state = p.grad.reshape(len(p), -1), self.state[p]
                state["t"] = state.get("t", 0) + 1
                p += self.change(p.reshape(len(p), -1), gradient, state, group, vector=p.dim() == 1).reshape(p.shape)

    def change(self, u: Tensor, g: Tensor, state: Any, o: Any, *, vector: bool) -> Tensor:
        raise NotImplementedError


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Of a symmetric positive definite matrix."""
    left, values, _ = torch.linalg.svd(matrix)
    return left @ torch.diag(values**exponent) @ left.T


def polar(matrix: Tensor) -> Tensor:
    """The orthogonal factor; zero where the matrix is, the logits' gradient in the direction of all logits say."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left @ torch.diag((values > 1e-12 * values.max()).to(values)) @ right


class Shampoo(Published):
    def change(self, u: Tensor, g: Tensor, state: Any, o: Any, *, vector: bool) -> Tensor:
        g = g + o["weight_decay"] * u
        decay, direction, single = o.get("stat_decay", 1.0), g, vector or o.get("one_sided", False)
        for side, own in {"L": g, "R": g.T}.items():
            longer = len(own) > own.shape[1] or (side == "R" and len(own) == own.shape[1])
            if (vector and side == "R") or (single and not vector and longer):
                continue
            share = 1.0 if decay == 1.0 else 1.0 - decay
            state[side] = decay * state.get(side, 0 * own @ own.T) + share * own @ own.T
            total = state[side] / (1.0 if decay == 1.0 else 1.0 - decay ** state["t"])
            if (state["t"] - 1) % o.get("refresh", 1) == 0:
                state["root" + side] = power(total + o["eps"] * torch.eye(len(own)).to(own), -0.5 if single else -0.25)
            direction = state["rootL"] @ direction if side == "L" else direction @ state["rootR"]
        state["b"] = o["momentum"] * state.get("b", 0 * g) + direction
        return -o["lr"] * state["b"]


class SOAP(Published):
    def change(self, u: Tensor, g: Tensor, state: Any, o: Any, *, vector: bool) -> Tensor:
        beta1, beta2 = o["betas"]
        squares = [] if vector else [g @ g.T, g.T @ g]
        if state["t"] == 1:  # the call that their first step is
            state.update(m=0 * g, v=0 * g, GG=[(1 - beta2) * own for own in squares])
            state["Q"] = [torch.linalg.eigh(own).eigenvectors.flip(1) for own in state["GG"]]
        left, right = state["Q"] or tuple(torch.eye(size).to(g) for size in g.shape)
        state["m"] = beta1 * state["m"] + (1 - beta1) * g
        state["v"] = beta2 * state["v"] + (1 - beta2) * (left.T @ g @ right) ** 2
        rate = o["lr"] * (1 - beta2 ** state["t"]) ** 0.5 / (1 - beta1 ** state["t"])
        step = -rate * left @ (left.T @ state["m"] @ right / (state["v"].sqrt() + o["eps"])) @ right.T
        state["GG"] = [beta2 * old + (1 - beta2) * own for old, own in zip(state["GG"], squares, strict=True)]
        if state["t"] % o["precondition_frequency"] == 0:
            state["Q"] = [self.followed(state, axis) for axis in range(len(squares))]
        return step - o["lr"] * o["weight_decay"] * (u + step)

    def followed(self, state: Any, axis: int) -> Tensor:
        """One power iteration; ``v`` goes with its direction."""
        basis, whole = state["Q"][axis], state["GG"][axis]
        order = torch.argsort(torch.diag(basis.T @ whole @ basis), descending=True)
        state["v"] = state["v"].index_select(axis, order)
        return torch.linalg.qr(whole @ basis[:, order]).Q


class Muon(Published):
    def change(self, u: Tensor, g: Tensor, state: Any, o: Any, *, vector: bool) -> Tensor:
        if vector:
            state["m"] = 0.9 * state.get("m", 0 * g) + 0.1 * g
            state["v"] = 0.999 * state.get("v", 0 * g) + 0.001 * g**2
            above, second = state["m"] / (1 - 0.9 ** state["t"]), state["v"] / (1 - 0.999 ** state["t"])
            rate = o["lr"] * o.get("adamw_ratio", 1.0)
            return -rate * (above / (second.sqrt() + 1e-8) + o["weight_decay"] * u)
        mu = o["momentum"]
        state["b"] = mu * state.get("b", 0 * g) + (1 - mu) * g
        scale = max(1.0, len(g) / g.shape[1]) ** 0.5
        if o.get("adjust_lr_fn") == "match_rms_adamw":
            scale = 0.2 * max(g.shape) ** 0.5
        return -o["lr"] * (scale * polar(mu * state["b"] + (1 - mu) * g) + o["weight_decay"] * u)
