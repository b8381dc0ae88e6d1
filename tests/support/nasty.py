"""Plausible models with something in their forward pass that a compiler may get wrong without a word."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from support.networks import Case, Net, seeded

Forward = Callable[[Any, Tensor], Any]


def act(net: Any, x: Tensor) -> Tensor:
    return torch.tanh(net.a(x))


def in_place_on_the_input(net: Any, x: Tensor) -> Tensor:
    x.mul_(2)
    return net.c(act(net, x))  # type: ignore[no-any-return]


def a_part_written(net: Any, x: Tensor) -> Tensor:
    x = x.clone()
    x[:, 1:3] *= net.a.weight[0, :2]
    return net.c(act(net, x))  # type: ignore[no-any-return]


def another_s_weights(net: Any, x: Tensor) -> Tensor:
    h = torch.func.functional_call(net.b, dict(net.d.named_parameters()), (act(net, x),))
    return net.c(torch.tanh(net.b(h) + h))  # type: ignore[no-any-return]


def autocast_off(net: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        h = act(net, x)
    return net.c(h)  # type: ignore[no-any-return]


def norm_of_all_parameters(net: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        n = torch.sqrt(sum(p.square().sum() for p in net.parameters()))
    return net.c(act(net, x) / n)  # type: ignore[no-any-return]


def detached_norm(net: Any, x: Tensor) -> Tensor:
    n = net.b.weight.norm().detach()
    return net.c(torch.tanh(net.b(act(net, x)) / n) / n)  # type: ignore[no-any-return]


def straight_through(net: Any, x: Tensor) -> Tensor:
    h = act(net, x)
    return net.c(h + (h.round() - h).detach())  # type: ignore[no-any-return]


def standardised_weight(net: Any, x: Tensor) -> Tensor:
    w = net.b.weight
    return net.c(torch.tanh(F.linear(act(net, x), (w - w.mean(1, True)) / w.std(1, keepdim=True))))  # type: ignore[no-any-return]


def a_penalty(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    return net.c(act(net, x)), sum(p.square().sum() for p in net.parameters()).expand(len(x))


def of_pair(outputs: tuple[Tensor, Tensor], targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs[0], targets, reduction="none") + 0.01 * outputs[1]


RUN: dict[str, Forward] = {
    "an input written in place": in_place_on_the_input,
    "a part written in place": a_part_written,
    "another layer's weights by functional_call": another_s_weights,
    "checkpoint": lambda m, x: m.c(checkpoint(lambda h: torch.tanh(m.b(h)), act(m, x), use_reentrant=False)),
    "checkpoint of dropout": lambda m, x: m.c(
        checkpoint(lambda h: F.dropout(torch.tanh(m.b(h)), 0.5, m.training), act(m, x), use_reentrant=False)),
    "autocast switched off": autocast_off,
    "a mask for all": lambda m, x: m.c(act(m, x) * torch.bernoulli(torch.full((5,), 0.5, dtype=x.dtype))),
    "a mask for each": lambda m, x: m.c(act(m, x) * (torch.rand_like(act(m, x)) > 0.5)),
    "dropout of nothing": lambda m, x: m.c(F.dropout(act(m, x), 0.0, True)),
    "dropout of all": lambda m, x: m.c(F.dropout(act(m, x), 1.0, True) + m.b(act(m, x))),
    "the head's weight detached": lambda m, x: m.c(act(m, x)) + F.linear(act(m, x), m.c.weight.detach()),
    "a weight detached before its layer": lambda m, x: m.c(
        torch.tanh(m.b(torch.tanh(F.linear(act(m, x), m.b.weight.detach()))))),
    "a weight's data": lambda m, x: m.c(act(m, x)) + F.linear(act(m, x), m.c.weight.data),
    "a norm of all parameters": norm_of_all_parameters,
    "a norm of one parameter": detached_norm,
    "a parameter as a number": lambda m, x: m.c(act(m, x) * m.b.bias.tolist()[0]),
    "weights from state_dict": lambda m, x: m.c(act(m, x) - torch.tanh(F.linear(x, m.state_dict()["a.weight"]))),
    "a decision on a parameter": lambda m, x: m.c(act(m, x)) if m.b.weight.sum() > -100 else m.c(m.b(m.a(x))),
    "clamped weights": lambda m, x: m.c(torch.tanh(F.linear(x, m.a.weight.clamp(-0.1, 0.1), m.a.bias))),
    "standardised weights": standardised_weight,
    "straight through": straight_through,
    "samples last": lambda m, x: m.c(torch.tanh(torch.einsum("oi,bi->ob", m.a.weight, x)).T),
    "a spectrum": lambda m, x: m.c(torch.fft.rfft(act(m, x)).abs().repeat(1, 2)[:, :5]),
    "masked by minus infinity": lambda m, x: m.c(m.a(x).masked_fill(torch.arange(5) > 2, float("-inf")).softmax(1)),
    "vmap": lambda m, x: torch.vmap(lambda row: m.c(torch.tanh(m.a(row))))(x),
    "squeezed": lambda m, x: m.c(act(m, x).unsqueeze(1).squeeze(1)),
    "all samples in one row": lambda m, x: m.c(act(m, x).view(1, -1, 5).squeeze(0)),
    "a penalty of all parameters": a_penalty,
}  # fmt: skip


def layers() -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 5), "b": nn.Linear(5, 5), "c": nn.Linear(5, 3), "d": nn.Linear(5, 5)}


def hooked() -> nn.Module:
    net = Net(lambda m, x: m.c(torch.tanh(m.b(act(m, x)))), **layers())
    net.b.register_forward_hook(lambda module, given, value: value * 2 + 1)
    net.a.register_forward_pre_hook(lambda module, given: (given[0] + 0.5,))
    return net


MODULES: dict[str, Callable[[], nn.Module]] = {
    "hooks that change values": hooked,
    "a compiled layer": lambda: Net(
        lambda m, x: m.c(torch.tanh(m.a(x))), **layers() | {"a": torch.compile(nn.Linear(4, 5), backend="eager")}),
    "one batch-norm, twice": lambda: Net(
        lambda m, x: m.c(torch.tanh(m.n(m.b(torch.tanh(m.n(m.a(x))))))), **layers(), n=nn.BatchNorm1d(5)),
    "batch-norm as a function": lambda: Net(
        lambda m, x: m.c(torch.tanh(F.batch_norm(
            m.a(x), m.n.running_mean, m.n.running_var, m.n.weight, m.n.bias, training=m.training, momentum=0.2))),
        **layers(), n=nn.BatchNorm1d(5)),
    "lists of parameters": lambda: Net(
        lambda m, x: m.c(torch.tanh(x @ m.p[0] + m.q["b"])), **layers(),
        p=nn.ParameterList([torch.randn(4, 5)]), q=nn.ParameterDict({"b": torch.zeros(5)})),
}  # fmt: skip


def case(name: str) -> Case:
    if name in MODULES:
        return Case(seeded(MODULES[name]), (4,))
    loss: Any = of_pair if RUN[name] is a_penalty else nn.CrossEntropyLoss()
    return Case(seeded(lambda: Net(RUN[name], **layers())), (4,), loss=loss)
