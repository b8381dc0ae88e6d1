"""What a user may do wrong, a row each: what is done, and what the error has to say.

``docs/errors.md`` is written from these tables.
"""

import math
import random
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributions import Categorical
from torch.nn import functional as F

from gtddp_compile import KFAC, SGD, CompiledOptimizer, Geometric, MonteCarlo, Sketch
from support.recorded import batch
from support.refused import TARGETS, compiled, model

CALLS = count()
GRAPH = torch.arange(6) // 2


# --- models -----------------------------------------------------------------------------------------------------------


class Output(dict[str, Tensor]):
    """A dict of a class that torch does not know."""


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sin()


class Clipped(NoBackward):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp(-0.01, 0.01)


def hidden(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x) if layer.last is None else layer.fc(x) + layer.last
    layer.last = y.detach()
    return y


def counted(layer: Any, x: Tensor) -> Tensor:
    layer.calls += 1
    return layer.fc(x) / layer.calls  # type: ignore[no-any-return]


def writes_a_buffer(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.mean.mul_(0.9).add_(y.detach().mean(0))
    return y - layer.mean


def writes_a_parameter(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        layer.fc.weight.mul_(0.9)
    return layer.fc(x)  # type: ignore[no-any-return]


def replaces_a_parameter(layer: Any, x: Tensor) -> Tensor:
    layer.fc.weight = nn.Parameter(layer.fc.weight * 0.9)
    return layer.fc(x)  # type: ignore[no-any-return]


def grows_a_list(layer: Any, x: Tensor) -> Tensor:
    y: Tensor = layer.fc(x)
    layer.options.masks.append(y.detach().mean(0))
    return y - torch.stack(layer.options.masks).mean(0)


def overwrites(layer: Any, x: Tensor) -> Tensor:
    y = torch.tanh(layer.fc(x))
    y.mul_(2)
    return y


def fails(layer: Any, x: Tensor) -> Tensor:
    raise ValueError("no batch today")


def seeds(layer: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    return F.dropout(layer.fc(x), 0.5)


FORWARDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "a value goes into a Python number": lambda layer, x: layer.fc(x) * float(layer.fc(x).detach().max()),
    "math asks a number that was read": lambda layer, x: x if math.isnan(x.mean().item()) else layer.fc(x),
    "a number that was read, as a text": lambda layer, x: layer.fc(x) * float(f"{x.mean().item():.1f}"),
    "numpy in forward": lambda layer, x: layer.fc(x) * torch.from_numpy(np.tanh(x.numpy())),
    "a buffer is written": writes_a_buffer,
    "a parameter is written": writes_a_parameter,
    "a parameter is replaced in forward": replaces_a_parameter,
    "a hidden state in an attribute": hidden,
    "a counter in an attribute": counted,
    "a list that grows": grows_a_list,
    "a global counter": lambda layer, x: layer.fc(x) / (1 + next(CALLS)),
    "the clock": lambda layer, x: layer.fc(x) * (time.perf_counter() % 1),
    "Python's random numbers": lambda layer, x: x if random.random() < 0.01 else layer.fc(x),
    "numpy's random numbers": lambda layer, x: x if np.random.rand() < 0.01 else layer.fc(x),
    "torch is seeded in forward": seeds,
    "values overwritten that backward needs": overwrites,
    "a Function without backward": lambda layer, x: NoBackward.apply(layer.fc(x)),
    "use_reentrant=True": lambda layer, x: torch.utils.checkpoint.checkpoint(layer.fc, layer.fc(x), use_reentrant=True),
    "a Function that clips its gradient": lambda layer, x: Clipped.apply(layer.fc(x)),
    "forward raises": fails,
    "rows chosen by value": lambda layer, x: layer.fc(x)[layer.fc(x)[:, 0] > 0],
    "unique values": lambda layer, x: layer.fc(x).unique(),
    "mean over the batch": lambda layer, x: layer.fc(x).mean(0, keepdim=True),
    "the transpose": lambda layer, x: layer.fc(x).T @ layer.fc(x),
    "a parameter's data is clipped": lambda layer, x: (layer.fc.weight.data.clamp_(-9, 9), layer.fc(x))[1],
    "a parameter drawn at random": lambda layer, x: F.linear(x, torch.normal(layer.fc.weight)),
    "a complex value": lambda layer, x: torch.fft.fft(layer.fc(x)),
    "bernoulli of a parameter": lambda layer, x: x * torch.bernoulli(layer.fc.weight[0].sigmoid()),
}

ENDS: dict[str, Callable[[Any, Tensor], Any]] = {
    "whole numbers are returned": lambda net, x: net.a(x).argmax(1),
    "nothing is returned": lambda net, x: print(end=""),
    "a word is returned": lambda net, x: "cat",
    "the loss is computed in forward": lambda net, x: F.cross_entropy(net.a(x), TARGETS),
    "a distribution is returned": lambda net, x: Categorical(logits=net.a(x)),
    "an object is returned": lambda net, x: slice(net.a(x)),
    "a dict subclass is returned": lambda net, x: Output(logits=net.a(x)),
    "a parameter is returned": lambda net, x: (net.a(x), net.a.bias),
    "outputs are detached": lambda net, x: net.a(x).detach(),
    "a sparse tensor is returned": lambda net, x: net.a(x).to_sparse(),
    "a number is returned": lambda net, x: net.a(x).sum().item(),
    "numpy is returned": lambda net, x: net.a(x).detach().numpy(),
    "an empty tuple is returned": lambda net, x: (),
    "rows are shuffled": lambda net, x: net.a(x)[torch.randperm(6)],
    "nodes are pooled to graphs": lambda net, x: torch.zeros(3, 3).double().index_add(0, GRAPH, net.a(x)),
}


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.gain).real


class Expanded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1).double().expand(4))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(4).double().to_sparse())

    def forward(self, x: Tensor) -> Tensor:
        return torch.sparse.mm(self.weight, x.T).T


def overlapping() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 4)).double()
    net[1].weight.data = net[0].weight.data.t()
    return net


class Stochastic(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 3), kind
        self.generator, self.python = torch.Generator(), random.Random(0)

    def forward(self, x: Tensor) -> Tensor:
        drawn = float(torch.rand((), generator=self.generator)) if self.kind == "torch" else self.python.random()
        return self.fc(x) * 0 if drawn < 0.01 else self.fc(x)  # type: ignore[no-any-return]


def hooked() -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    net[1].register_full_backward_hook(lambda module, given, taken: (2 * given[0],))
    return net


MODELS: dict[str, Callable[[], Any]] = {
    "a word": lambda: "model",
    "a function": lambda: F.relu,
    "the class": lambda: nn.Linear,
    "an optimizer": lambda: torch.optim.SGD([torch.zeros(1)]),
    "a list of layers": lambda: [nn.Linear(4, 3)],
    "a ModuleList": lambda: nn.ModuleList([nn.Linear(4, 3)]),
    "nothing to train": nn.ReLU,
    "everything frozen": lambda: nn.Linear(4, 3).requires_grad_(False),
    "a lazy module": lambda: nn.Sequential(nn.LazyLinear(3)),
    "the meta device": lambda: nn.Linear(4, 3, device="meta"),
    "a jit trace": lambda: torch.jit.trace(model(), batch(6)),
    "DataParallel": lambda: nn.DataParallel(model()),
    "torch.compile around the model": lambda: torch.compile(model(), backend="eager"),
    "complex parameters": Complex,
    "sparse parameters": Sparse,
    "an expanded parameter": Expanded,
    "two parameters in one memory": overlapping,
    "a generator of its own": lambda: Stochastic("torch").double(),
    "a random.Random of its own": lambda: Stochastic("python").double(),
    "spectral_norm in training": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)).double(),
    "a backward hook that changes gradients": hooked,
    "another dtype than the inputs": lambda: nn.Linear(4, 3).float(),
    "another width than the inputs": lambda: nn.Linear(5, 3).double(),
    "batch-norm on a batch of one": lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double(),
}


# --- inputs, targets, losses ------------------------------------------------------------------------------------------

X = batch(6)

INPUTS: dict[str, Callable[[], Any]] = {
    "text": lambda: "text",
    "an array": lambda: np.zeros((6, 4)),
    "numbers": lambda: [1.0, 2.0],
    "a set": lambda: {1.0},
    "a packed sequence": lambda: nn.utils.rnn.pack_sequence([torch.zeros(2, 4)]),
    "a nested tuple": lambda: ((X, X), X),
    "a dict with another name": lambda: {"x": X, "y": X},
    "a dict without the name": lambda: {"y": X},
    "an empty tuple": lambda: (),
    "an empty dict": lambda: {},
    "a number as tensor": lambda: torch.tensor(1.0),
    "an empty batch": lambda: X[:0],
    "too wide": lambda: torch.zeros(6, 5).double(),
    "another dtype": lambda: X.float(),
    "whole numbers": lambda: torch.zeros(6, 4, dtype=torch.long),
    "complex": lambda: X.to(torch.complex128),
    "too many": lambda: (X, X),
    "None too many": lambda: (X, None),
    "on another device": lambda: X.to("meta"),
    "sparse": lambda: X.to_sparse(),
    "a nested tensor": lambda: torch.nested.nested_tensor([X[0], X[1]]),
    "the result of a graph": lambda: X.clone().requires_grad_() * 2,
    "NaN": lambda: X * float("nan"),
    "a target too": lambda: (X, TARGETS),
    "a loader": lambda: torch.utils.data.DataLoader([X]),
}

TARGET: dict[str, Callable[[], Any]] = {
    "a class too large": lambda: torch.tensor([0, 1, 2, 3, 0, 1]),
    "a negative class": lambda: torch.tensor([0, -1, 2, 0, 0, 1]),
    "too few": lambda: TARGETS[:4],
    "none": lambda: TARGETS[:0],
    "left out": lambda: None,
    "floats": lambda: torch.zeros(6).double(),
    "text": lambda: "cat",
    "a list": lambda: TARGETS.tolist(),
    "an array": lambda: TARGETS.numpy(),
    "all ignored": lambda: torch.full((6,), -100),
    "probabilities of other width": lambda: torch.ones(6, 4).double() / 4,
    "a column": lambda: TARGETS[:, None],
    "int32": lambda: TARGETS.int(),
    "booleans": lambda: TARGETS > 0,
    "on another device": lambda: TARGETS.to("meta"),
    "one for all": lambda: torch.tensor(1),
    "a tuple": lambda: (TARGETS, TARGETS),
}

LOSSES: dict[str, Any] = {
    "the class": nn.CrossEntropyLoss,
    "a word": "mse",
    "none": None,
    "without reduction": nn.CrossEntropyLoss(reduction="none"),
    "of three inputs": nn.TripletMarginLoss(),
    "of lengths": nn.CTCLoss(),
    "with parameters": nn.Bilinear(3, 3, 1),
    "mean squares of another shape": nn.MSELoss(),
    "binary, not in [0, 1]": nn.BCELoss(),
    "batchmean of another shape": nn.KLDivLoss(reduction="batchmean"),
    "a number": lambda y, t: F.cross_entropy(y, t),
    "a Python number": lambda y, t: 1.0,
    "nothing": lambda y, t: None,
    "an array": lambda y, t: y.detach().numpy()[:, 0],
    "a column": lambda y, t: F.cross_entropy(y, t, reduction="none")[:, None],
    "one an element": lambda y, t: y.square(),
    "detached": lambda y, t: F.cross_entropy(y.detach(), t, reduction="none"),
    "whole numbers": lambda y, t: y.argmax(1),
    "constant": lambda y, t: torch.ones(6).double(),
    "NaN": lambda y, t: F.cross_entropy(y, t, reduction="none") * float("nan"),
    "infinite": lambda y, t: F.cross_entropy(y, t, reduction="none") / 0.0,
    "half of the samples": lambda y, t: F.cross_entropy(y, t, reduction="none")[:3],
    "one argument": lambda y: y.sum(1),
    "raises": lambda y, t: t.no_such_method(),
    "complex": lambda y, t: torch.complex(y, y).sum(1),
    "writes outputs": lambda y, t: F.cross_entropy(y.mul_(2), t, reduction="none"),
}

OPTIONS: list[dict[str, Any]] = [
    {"curvature": "lbfgs"}, {"curvature": SGD}, {"curvature": None}, {"curvature": SGD(lr=1.0), "lr": 1.0},
    {"learning_rate": 1.0}, {"lr": -1.0}, {"lr": float("nan")}, {"lr": float("inf")}, {"lr": "0.1"}, {"lr": None},
    {"lr": torch.tensor([0.1, 0.2])}, {"momentum": -0.1}, {"nesterov": True}, {"weight_decay": -1.0},
    {"curvature": "adam", "betas": (0.9, 1.0)}, {"curvature": "adam", "betas": 0.9}, {"curvature": "adam", "eps": -1.0},
    {"curvature": "rmsprop", "alpha": -1.0}, {"curvature": "kfac", "damping": -1.0},
    {"curvature": "kfac", "refresh": 0}, {"curvature": "kfac", "stat_every": 1.5}, {"maximize": True},
    {"foreach": True}, {"differentiable": True}, {"curvature": "adam", "fused": True},
    {"curvature": "adam", "capturable": True}, {"feedback": "closed"}, {"feedback": 1}, {"feedback_clip": -1.0},
    {"rollout": "cubic"}, {"rollout": "linear", "feedback": "open"}, {"rollout": "linear", "coupling": "block"},
    {"inertia": True}, {"inertia": 0.5, "coupling": "block"}, {"inertia": 0.5, "curvature": "adam"},
    {"max_step": 1.0, "feedback": False}, {"max_step": 1.0, "terminal": "ggn"},
    {"max_grad_norm": 1.0, "feedback": "open"}, {"max_grad_norm": 1.0, "backend": "dense"},
    {"max_grad_norm": 1.0, "memory": "recompute"}, {"inertia": 1.0}, {"lookahead": 1.0}, {"averaging": 0.5},
    {"curvature": "sgd", "lookahead": 0.5}, {"curvature": "sgd", "averaging": 20}, {"averaging": 20, "inertia": 0.0},
    {"averaging": 20, "line_search": (1.0,)}, {"inertia": 0.5, "momentum": 0.9}, {"inertia": 0.5, "feedback": False},
    {"max_step": float("nan")}, {"max_step": 1.0, "rollout": "nonlinear"}, {"max_grad_norm": 0},
    {"max_grad_norm": 1.0, "rollout": "nonlinear"}, {"line_search": ()}, {"line_search": 0.5}, {"schedule": "late"},
    {"schedule": {"nowhere": 0}}, {"schedule": {"block.0.fc": 1, "out": 0}},
    {"schedule": {"block.0.fc": "a", "out": "b"}}, {"coupling": "diagonal"}, {"coupling": 0}, {"coupling": 2.5},
    {"recursion": "magic"}, {"recursion": "substituted"}, {"terminal": "hessian"}, {"terminal": Geometric},
    {"terminal": Geometric(early=1.0), "inertia": 0.0}, {"backend": "gpu"}, {"mixing": "exact"}, {"cooperative": 0},
    {"gram": "fine"}, {"compile": 0}, {"memory": "disk"}, {"memory": "recompute", "backend": "dense"},
    {"compile": {"no_such": 1}}, {"compile": {"backend": "no_such"}}, {"compile": True, "curvature": "kfac"},
    {"on_nonfinite": "stop"}, {"grad_scaler": 2.0}, {"program": "step.json"},
]  # fmt: skip

OBJECTS: dict[str, Callable[[], Any]] = {
    "Geometric(aim=-1.0)": lambda: Geometric(aim=-1.0),
    "Geometric(aim=nan)": lambda: Geometric(aim=float("nan")),
    "MonteCarlo(0)": lambda: MonteCarlo(0),
    "Sketch(0)": lambda: Sketch(0),
    "KFAC(damping='much')": lambda: KFAC(damping="much"),  # type: ignore[arg-type]
}


# --- after a step of adam ---------------------------------------------------------------------------------------------

Act = Callable[[CompiledOptimizer, Any], Any]


def one(opt: CompiledOptimizer, net: Any) -> Any:
    return opt.step(X, TARGETS)


def group(name: str, value: Any) -> tuple[Act, Act]:
    return lambda opt, net: opt.param_groups[0].update({name: value}), one


def load(change: Callable[[dict[str, Any]], Any]) -> tuple[None, Act]:
    return None, lambda opt, net: opt.load_state_dict(change(opt.state_dict()))


def accumulated(change: Act) -> tuple[Act, Act]:
    return lambda opt, net: (opt.accumulate(X, TARGETS), change(opt, net)), one


LATER: dict[str, tuple[Act | None, Act]] = {
    "step()": (None, lambda opt, net: opt.step()),
    "a closure alone": (None, lambda opt, net: opt.step(lambda: 0.0)),
    "a parameter group is added": (None, lambda opt, net: opt.add_param_group({"params": [torch.zeros(1)]})),
    "a parameter is replaced": (
        lambda opt, net: setattr(net.out, "weight", nn.Parameter(torch.zeros(3, 4).double())), one),
    "a layer is replaced": (lambda opt, net: setattr(net, "out", nn.Linear(4, 3).double()), one),
    "a layer is added": (lambda opt, net: setattr(net, "more", nn.Linear(4, 3).double()), one),
    "a layer is removed": (lambda opt, net: delattr(net, "out"), one),
    "all is frozen": (lambda opt, net: net.requires_grad_(False), one),
    "the model is converted, not its inputs": (lambda opt, net: net.float(), one),
    "the model is converted, not its state": (
        lambda opt, net: net.float(), lambda opt, net: opt.step(X.float(), TARGETS)),
    "forward is replaced by one that sums": (lambda opt, net: setattr(net, "forward", lambda x: x.sum()), one),
    "a hook detaches the output": (
        lambda opt, net: net.out.register_forward_hook(lambda m, x, y: y.detach()), one),
    "inference mode": (None, lambda opt, net: torch.inference_mode()(opt.step)(X, TARGETS)),
    "group['lr'] = 'fast'": group("lr", "fast"),
    "group['lr'] = None": group("lr", None),
    "group['lr'] = nan": group("lr", float("nan")),
    "group['lr'] = 1e308": group("lr", 1e308),
    "group['betas'] = (2, 2)": group("betas", (2.0, 2.0)),
    "group['eps'] = 'small'": group("eps", "small"),
    "group['inertia'] = 1.5": group("inertia", 1.5),
    "group['inertia'] = 0.5": group("inertia", 0.5),
    "group['lookahead'] = 'far'": group("lookahead", "far"),
    "group['averaging'] = 20": group("averaging", 20),
    "group['peak_lr'] = -1.0": group("peak_lr", -1.0),
    "group['maximize'] = True": group("maximize", True),
    "a group is taken away": (lambda opt, net: opt.param_groups.pop(), one),
    "an option is deleted": (lambda opt, net: opt.param_groups[0].pop("lr"), one),
    "a state loses a tensor": (lambda opt, net: opt.state[net.out.weight].pop("exp_avg"), one),
    "a state of another dtype": (
        lambda opt, net: opt.state[net.out.weight].update(exp_avg=torch.zeros(3, 4)), one),
    "load_state_dict({})": load(lambda s: {}),
    "load_state_dict(path)": load(lambda s: "adam.pt"),
    "load_state_dict(None)": load(lambda s: None),
    "the model's state_dict": (None, lambda opt, net: opt.load_state_dict(net.state_dict())),
    "SGD's state_dict": (
        None, lambda opt, net: opt.load_state_dict(torch.optim.SGD(net.parameters(), lr=1.0).state_dict())),
    "Adam's state_dict, of another model": (
        None, lambda opt, net: opt.load_state_dict(torch.optim.Adam(net.out.parameters()).state_dict())),
    "groups of renamed modules": load(
        lambda s: {**s, "param_groups": [{**g, "name": "net." + g["name"]} for g in s["param_groups"]]}),
    "groups without names": load(
        lambda s: {**s, "param_groups": [{**g, "name": "all"} for g in s["param_groups"]][:1]}),
    "states of another shape": load(lambda s: {**s, "state": {0: {**s["state"][0], "exp_avg": torch.zeros(2)}}}),
    "states of parameters that are not there": load(lambda s: {**s, "state": {**s["state"], 99: s["state"][0]}}),
    "states with other keys": load(lambda s: {**s, "state": {0: {"momentum_buffer": torch.zeros(4, 4)}}}),
    "states with words": load(lambda s: {**s, "state": {0: {**s["state"][0], "step": "one"}}}),
    "accumulate with too few targets": (None, lambda opt, net: opt.accumulate(X, TARGETS[:3])),
    "accumulate without a batch": (None, lambda opt, net: opt.accumulate(None, None)),
    "accumulate with max_grad_norm": (None, lambda opt, net: compiled(net, max_grad_norm=1.0).accumulate(X, TARGETS)),
    "accumulate, then eval()": accumulated(lambda opt, net: net.eval()),
    "accumulate, then write a parameter": accumulated(lambda opt, net: nn.init.zeros_(net.out.bias)),
    "export('step.onnx')": (None, lambda opt, net: opt.program.export("step.onnx")),
    "derivation(99)": (None, lambda opt, net: opt.program.derivation(99)),
    "derivation(0, 'html')": (None, lambda opt, net: opt.program.derivation(0, "html")),
    "graph.save('net.doc')": (None, lambda opt, net: opt.graph.save("net.doc")),
}  # fmt: skip
