"""K-FAC and EK-FAC as published, on a module: forward and backward hooks, per-sample gradients by `torch.func`, and an
explicit matrix a layer. Shares nothing with the package."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F


class Reference:
    """`step(x, y)` is one update; `options` are the curvature's, with its defaults spelt out."""

    def __init__(self, model: nn.Module, kind: str, **options: Any) -> None:
        self.model, self.kind = model, kind
        defaults = {"lr": 1e-2, "damping": 1e-3, "stat_decay": 0.95, "refresh": 10, "stat_every": 10,
                    "momentum": 0.0, "weight_decay": 0.0, "small": 256, "pi": True, "early": 10}  # fmt: skip
        self.options = defaults | options
        self.memory: dict[str, dict[str, Any]] = {}
        self.steps = 0

    def step(self, x: Tensor, y: Tensor) -> None:
        seen: dict[str, tuple[Tensor, Tensor]] = {}
        handles = []
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                handles.append(module.register_forward_hook(self._watch(name, seen)))
        self.model.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        for handle in handles:
            handle.remove()
        samples = self._sample_gradients(x, y)
        self.steps += 1
        changes = {}
        for name, module in self.model.named_modules():
            own = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            if own:
                changes.update(self._change(name, module, own, seen.get(name), samples))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter += changes[name]

    def _watch(self, name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            # the mean loss gives g / B
            output.register_hook(lambda g: seen.__setitem__(name, (inputs[0].detach(), g.detach() * len(g))))

        return hook

    def _sample_gradients(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        parameters = {name: p.detach() for name, p in self.model.named_parameters()}
        buffers = dict(self.model.named_buffers())

        def one(p: dict[str, Tensor], a: Tensor, b: Tensor) -> Tensor:
            return F.cross_entropy(functional_call(self.model, (p, buffers), (a[None],)), b[None])

        return vmap(grad(one), (None, 0, 0))(parameters, x, y)

    def _change(self, name: str, module: nn.Module, own: list[str], rows: Any, samples: dict[str, Tensor]) -> Any:
        o = self.options
        p = dict(self.model.named_parameters())
        gradients = {key: p[key].grad + o["weight_decay"] * p[key].detach() for key in own}  # type: ignore[operator]
        memory = self.memory.setdefault(name, {})
        keep = min(1 - 1 / self.steps, o["stat_decay"])

        def average(key: str, new: Tensor, every: int = 1) -> Tensor:
            if self._early() or (self.steps - 1) % every == 0:
                count = memory[f"{key} averaged"] = memory.get(f"{key} averaged", 0) + 1
                kept = min(1 - 1 / count, o["stat_decay"])
                memory[key] = new if key not in memory else kept * memory[key] + (1 - kept) * new
            return memory[key]

        flat = torch.cat([gradients[key].flatten() for key in own])
        gamma = torch.cat([samples[key].flatten(1) for key in own], 1)
        order = torch.arange(len(flat))
        if rows is not None:
            xs, gs = unfolded(module, *rows)
            order = matrix_order(module)
            a = average("A", torch.einsum("bgtn,bgtk->gnk", xs, xs) / len(xs), o["stat_every"])
            b = average("B", torch.einsum("bgtm,bgtk->gmk", gs, gs) / (len(gs) * gs.shape[2]), o["stat_every"])
        elif len(flat) > o["small"]:
            return self._momentum(own, p, flat / (average("diagonal", gamma.square().mean(0)) + o["damping"]))
        else:
            a = torch.ones(1, 1, 1, dtype=flat.dtype)
            b = average("B", (gamma.T @ gamma / len(gamma))[None], o["stat_every"])
        if self._early() or (self.steps - 1) % o["refresh"] == 0:
            memory["blocks"] = [(a[k], b[k]) for k in range(len(a))]
            memory.pop("moment", None)
        solved = self._solve(memory, keep, flat[order], gamma[:, order], exact=rows is None)
        back = torch.empty_like(flat)
        back[order] = solved
        return self._momentum(own, p, back)

    def _early(self) -> bool:
        """Steps 1, 2, 3, 5, 9, …"""
        return self.steps in (1, *(1 + 2**k for k in range(9))) and self.steps <= self.options["early"]

    def _solve(self, memory: dict[str, Any], keep: float, flat: Tensor, gamma: Tensor, *, exact: bool) -> Tensor:
        """Every group of the layer by its own dense matrix, `kron(B, A)` on rows (output, input)."""
        o, found, start = self.options, [], 0
        moments = []
        for k, (a, b) in enumerate(memory["blocks"]):
            size = len(a) * len(b)
            piece = slice(start, start + size)
            start += size
            if self.kind == "kfac":
                pi = (a.trace() / len(a) / (b.trace() / len(b))).sqrt() if o["pi"] else 1.0
                root = o["damping"] ** 0.5
                left, right = (o["damping"], 0.0) if exact else (root / pi, root * pi)
                matrix = torch.kron(b + left * torch.eye(len(b)).to(b), a + right * torch.eye(len(a)).to(a))
            else:
                (values_a, basis_a), (values_b, basis_b) = torch.linalg.eigh(a), torch.linalg.eigh(b)
                basis = torch.kron(basis_b, basis_a)
                old = memory["moment"][k] if "moment" in memory else torch.kron(values_b, values_a)
                seen = (gamma[:, piece] @ basis).square().mean(0).reshape(len(b), len(a))
                moments.append(keep * old + (1 - keep) * mean_over_null_spaces(seen, values_b, values_a).flatten())
                matrix = basis @ torch.diag(moments[-1] + o["damping"]) @ basis.T
            found.append(torch.linalg.solve(matrix, flat[piece]))
        memory["moment"] = moments
        return torch.cat(found)

    def _momentum(self, own: list[str], p: dict[str, Tensor], direction: Tensor) -> dict[str, Tensor]:
        found, pieces = {}, direction.split([p[key].numel() for key in own])
        for key, piece in zip(own, pieces, strict=True):
            slot = self.memory.setdefault("momentum", {})
            slot[key] = self.options["momentum"] * slot.get(key, 0.0) + piece.reshape(p[key].shape)
            found[key] = -self.options["lr"] * slot[key]
        return found


def mean_over_null_spaces(seen: Tensor, values_b: Tensor, values_a: Tensor) -> Tensor:
    """By projectors of averages: no published rule says which basis of a null space to take."""
    for values, axis in ((values_b, 0), (values_a, 1)):
        null = (values < len(values) * torch.finfo(values.dtype).eps * values.max()).to(seen.dtype)
        average = torch.diag(1 - null) + torch.outer(null, null) / null.sum().clamp_min(1)
        seen = average @ seen if axis == 0 else seen @ average
    return seen


def unfolded(module: nn.Module, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Homogeneous inputs (B, G, T, n) and output gradients (B, G, T, m)."""
    if isinstance(module, nn.Conv2d):
        assert isinstance(module.padding, tuple)
        patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)  # type: ignore[arg-type]
        xs = patches.unflatten(1, (module.groups, -1)).transpose(2, 3)
        gs = g.flatten(2).unflatten(1, (module.groups, -1)).transpose(2, 3)
    else:
        xs, gs = x.flatten(1, -2) if x.dim() > 2 else x[:, None], g.flatten(1, -2) if g.dim() > 2 else g[:, None]
        xs, gs = xs[:, None], gs[:, None]
    if module.bias is not None:
        xs = torch.cat([xs, torch.ones_like(xs[..., :1])], -1)
    return xs, gs


def matrix_order(module: nn.Module) -> Tensor:
    """Where the entries of `[weight, bias]` rows stand in the concatenation of weight and bias."""
    assert isinstance(module.weight, Tensor)
    rows, columns = len(module.weight), module.weight[0].numel()
    index = torch.arange(rows * columns).reshape(rows, columns)
    if module.bias is not None:
        index = torch.cat([index, rows * columns + torch.arange(rows)[:, None]], 1)
    return index.flatten()
