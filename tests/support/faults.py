"""Faults at the instructions of generated programs: an exception at any line, NaN in any value that one writes."""

import ast
import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.linalg import LinAlgError  # type: ignore[attr-defined]
from torch.utils._pytree import tree_map

import gtddp_compile
from gtddp_compile import CompiledOptimizer, NonFiniteError, compile_optimizer
from gtddp_compile.runtime.fast import FastBackend
from support import cases, networks
from support.networks import Case


class Fault(BaseException):
    """Of no kind that anybody handles, as a KeyboardInterrupt is."""


KINDS: dict[str, type[BaseException]] = {
    "interrupt": Fault, "out of memory": torch.OutOfMemoryError, "no factor": LinAlgError,
}  # fmt: skip
GENERATED, PACKAGE = "<gtddp_compile", str(Path(gtddp_compile.__file__).parent)
"""How the files of generated code, and those of the package, are called."""


@contextmanager
def fault_at(line: int, kind: type[BaseException] = Fault, where: str = GENERATED) -> Iterator[None]:
    """Raise at one line of the generated functions, counted as they run; ``where``: how files' names begin."""
    lines = iter(range(1, line))

    def follow(frame: Any, event: str, _: Any) -> Any:
        if event == "line" and next(lines, None) is None:
            sys.settrace(None)
            raise kind("made by a test")
        return follow

    def enter(frame: Any, event: str, _: Any) -> Any:
        return follow if frame.f_code.co_filename.startswith(where) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(before)


class Poison:
    """Makes NaN of one number of the ``at``-th value that the program writes, counted as it runs; 0: of none."""

    def __init__(self) -> None:
        self.at = self.seen = 0

    def __call__(self, *values: Any) -> Any:
        self.seen += 1
        found = tree_map(_spoilt, values) if self.seen == self.at else values
        return found if len(values) != 1 else found[0]


def _spoilt(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.numel():
        return value
    bad = torch.zeros_like(value, memory_format=torch.contiguous_format).detach()
    bad.view(-1)[0] = float("nan")
    return value + bad


def poisoned(opt: CompiledOptimizer, inputs: Tensor) -> Poison:
    """A poison for what every instruction of the optimizer's program writes."""
    _, backend = opt._specialise((inputs,))
    assert isinstance(backend, FastBackend)
    poison, tree = Poison(), ast.parse(backend.program.code)
    for node in ast.walk(tree):
        for block in (getattr(node, "body", None),):
            if isinstance(block, list) and not isinstance(node, ast.Module):
                node.body = [new for statement in block for new in (statement, *_poisoning(statement))]  # type: ignore[attr-defined]
    backend._step = backend._load(ast.unparse(ast.fix_missing_locations(tree)), "step")
    backend._step.__globals__["poison"] = poison
    return poison


def _poisoning(statement: ast.stmt) -> list[ast.stmt]:
    """``a, b = poison(a, b)`` after a statement that writes them."""
    if not isinstance(statement, ast.Assign):
        return []
    target = ast.unparse(statement.targets[0])
    return [] if "[" in target else ast.parse(f"{target} = poison({target})").body


class Normed(nn.Module):
    """Statistics that advance, masks that are drawn, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.dropout(torch.relu(self.norm(self.a(x))), 0.4, self.training)
        return self.c(h + torch.tanh(self.b(h)))


NETWORKS: dict[str, Callable[[], Case]] = {
    "chain": networks.mlp, "norm, mask, shortcut": lambda: Case(networks.seeded(Normed), (4,)),
    "convolutions": networks.conv_residual, "attention": networks.attention, "gates": cases.gates, "tied": cases.tied,
}  # fmt: skip
CURVATURES: dict[str, dict[str, Any]] = {
    "sgd": {"curvature": "sgd", "momentum": 0.9}, "adam": {"curvature": "adam"}, "kfac": {"curvature": "kfac"},
    "foof": {"curvature": "foof"},
}  # fmt: skip
ROLLOUTS = ("linear", "nonlinear")
NOTHING, WHOLE, ELSE = "nothing changed", "the whole step", "something else"


def everything(opt: CompiledOptimizer, net: nn.Module) -> Any:
    """Parameters, buffers, state, random state, grad mode."""
    own = opt.state_dict()["state"]
    return copy.deepcopy((net.state_dict(), own, torch.get_rng_state(), torch.is_grad_enabled()))


def is_equal(left: Any, right: Any) -> bool:
    """Whether two are the same, bit for bit."""
    try:
        torch.testing.assert_close(left, right, rtol=0, atol=0)
    except AssertionError:
        return False
    return True


class Faults:
    """One program, after a step (there are states, and memory of a step), and the faults that it may meet."""

    def __init__(self, network: str, curvature: str, rollout: str) -> None:
        torch.manual_seed(0)
        case, size = NETWORKS[network](), 6
        self.net = copy.deepcopy(case.model)
        self.batch = case.batch(0, size)
        given: Any = {**CURVATURES[curvature], "rollout": rollout, "loss": case.loss, "lr": 0.1}
        self.opt = compile_optimizer(self.net, self.batch[0], **given)
        self.opt.step(*self.batch)
        self.before = everything(self.opt, self.net)
        twin, own = copy.deepcopy((self.net, self.opt))
        own.step(*self.batch)
        self.expected = everything(own, twin)
        torch.set_rng_state(self.before[2])

    def exceptions(self, kind: str, every: int = 1, where: str = GENERATED) -> Iterator[str]:
        """What became of a fault at one line after the other, until a step comes to its end."""
        for line in range(every, 10**6, every):
            try:
                with fault_at(line, KINDS[kind], where):
                    self.opt.step(*self.batch)
            except (*KINDS.values(), NonFiniteError):
                yield f"raised, {self._now()}"
            else:
                break
        yield self._now()

    def not_a_number(self, every: int = 1) -> Iterator[str]:
        """What became of NaN in one value after the other; at last of none."""
        poison = poisoned(self.opt, self.batch[0])
        for at in range(every, 10**6, every):
            poison.at, poison.seen = at, 0
            try:
                self.opt.step(*self.batch)
            except NonFiniteError:
                yield f"raised, {self._now()}"
            else:
                yield self._now()
            if poison.seen < at:
                break

    def _now(self) -> str:
        """What is found, and everything back to where it was."""
        found = everything(self.opt, self.net)
        if is_equal(found, self.before):
            return NOTHING
        values, state, random, _ = copy.deepcopy(self.before)
        self.net.load_state_dict(values)
        self.opt.load_state_dict({**self.opt.state_dict(), "state": state})
        torch.set_rng_state(random)
        return WHOLE if is_equal(found, self.expected) else ELSE
