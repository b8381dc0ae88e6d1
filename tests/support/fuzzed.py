"""A random model, random options, a random batch: a step is right, or refused in words. Everything is drawn by a seed.

The model is a list of pieces on a value of shape ``(B, WIDTH)``; a piece may fold it, remember it for a later shortcut,
draw, normalise, mix samples, or do what is refused. ``outcome`` makes two steps and says what became of them.
"""

import copy
import random
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gtddp_compile import CompiledOptimizer, CompileError, Geometric, MonteCarlo, NonFiniteError, compile_optimizer
from support.compared import TORCH

WIDTH, CLASSES = 4, 3
ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.tanh, F.relu, F.gelu, F.silu, F.softplus, torch.sin, torch.sigmoid, F.elu, torch.neg,
)  # fmt: skip


class Piece(nn.Module):
    """One piece; ``kind`` says what it does, ``rng`` how it is made."""

    def __init__(self, kind: str, rng: random.Random) -> None:
        super().__init__()
        self.kind, self.act, self.p = kind, rng.choice(ACTIVATIONS), rng.choice((0.0, 0.3))
        self.fc = nn.Linear(WIDTH, WIDTH, bias=rng.random() < 0.7)
        self.other = nn.Linear(WIDTH, WIDTH)
        self.gain = nn.Parameter(1 + 0.1 * torch.randn(WIDTH))
        self.register_buffer("shift", torch.randn(WIDTH))
        if kind in LAYERS:
            self.layer = LAYERS[kind](rng)

    def forward(self, x: Tensor, kept: Tensor) -> Tensor:
        return RUN.get(self.kind, lambda m, x, kept: m.layer(x))(self, x, kept)  # type: ignore[no-any-return]


LAYERS: dict[str, Callable[[random.Random], nn.Module]] = {
    "conv": lambda rng: nn.Conv1d(2, 2, rng.choice((1, 3)), padding="same", groups=rng.choice((1, 2))),
    "embedding": lambda rng: nn.Embedding(5, WIDTH),
    "recurrent": lambda rng: nn.GRU(2, WIDTH, batch_first=True),
    "prelu": lambda rng: nn.PReLU(),
    "bilinear": lambda rng: nn.Bilinear(2, 2, WIDTH),
    "layer_norm": lambda rng: nn.LayerNorm(WIDTH),
    "batch_norm": lambda rng: nn.BatchNorm1d(WIDTH),
    "group_norm": lambda rng: nn.GroupNorm(2, WIDTH),
    "rms_norm": lambda rng: nn.RMSNorm(WIDTH),
}


def attends(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(x.unflatten(1, (2, 2)) for x in (q, k, v))).flatten(1)


def in_place(m: Any, x: Tensor, kept: Tensor) -> Tensor:
    y = m.fc(x)
    y[:, :2] += kept[:, :2]
    return m.act(y)  # type: ignore[no-any-return]


RUN: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "linear": lambda m, x, kept: m.act(m.fc(x)),
    "residual": lambda m, x, kept: kept + m.act(m.fc(x)),
    "gate": lambda m, x, kept: torch.sigmoid(m.fc(kept)) * m.other(x),
    "tied": lambda m, x, kept: F.linear(m.act(m.fc(x)), m.fc.weight.T),
    "twice": lambda m, x, kept: m.fc(m.act(m.fc(x))),
    "gain": lambda m, x, kept: x * m.gain + m.shift,
    "bare": lambda m, x, kept: m.act(x @ m.fc.weight) + m.gain,
    "folded": lambda m, x, kept: (
        m.act(m.fc(torch.cat([x, kept], 1).reshape(-1, WIDTH))).reshape(len(x), -1, WIDTH).sum(1)
    ),
    "stacked": lambda m, x, kept: m.act(m.fc(torch.stack([x, kept]))).mean(0),
    "concatenated": lambda m, x, kept: m.fc(torch.cat([m.act(x), kept], 1)[:, ::2]),
    "conv": lambda m, x, kept: m.layer(x.unflatten(1, (2, 2))).flatten(1),
    "attention": lambda m, x, kept: x + attends(m.fc(x), m.other(x), x),
    "dropout": lambda m, x, kept: F.dropout(m.fc(x), m.p, m.training),
    "softmax": lambda m, x, kept: m.fc(x).softmax(1) + kept,
    "chunks": lambda m, x, kept: torch.cat([part * m.act(rest) for part, rest in [m.fc(x).chunk(2, 1)]] * 2, 1),
    "top": lambda m, x, kept: m.fc(x).sort(1).values,
    "embedding": lambda m, x, kept: x + m.layer((x[:, 0].abs() * 2).long().clamp(max=4)),
    "recurrent": lambda m, x, kept: m.layer(x.unflatten(1, (2, 2)))[0][:, -1],
    "prelu": lambda m, x, kept: m.layer(m.fc(x)),
    "bilinear": lambda m, x, kept: m.layer(x[:, :2], kept[:, 2:]),
    "detached": lambda m, x, kept: m.fc(x) + m.other(x).detach(),
    "where": lambda m, x, kept: torch.where(x > 0, m.fc(x), m.other(kept)),
    "in place": in_place,
    "centred": lambda m, x, kept: m.fc(x) - m.fc(x).mean(0),
    "einsum": lambda m, x, kept: torch.einsum("bi,oi->bo", x, m.fc.weight * m.gain),
    "one by one": lambda m, x, kept: torch.stack([m.act(m.fc(row)) for row in x.unbind(1)[:1] * 0 + tuple(x)]),
    "noise": lambda m, x, kept: m.fc(x) * (1 + 0.1 * torch.randn_like(x)),
    "decides": lambda m, x, kept: m.fc(x) if x.sum() > -100 else m.other(x),
    "reads": lambda m, x, kept: m.fc(x) if x.mean().item() > 0 else m.act(m.fc(x)) + kept,
    "scaled": lambda m, x, kept: m.act(m.fc(x)) / (1 + abs(x.max().item())) if max(x.mean(0).tolist()) > 0 else m.fc(x),
    "numpy": lambda m, x, kept: m.fc(x) * float(x.detach().numpy().max()),
    "shuffles": lambda m, x, kept: m.fc(x)[torch.randperm(len(x))],
    "squeezed": lambda m, x, kept: m.fc(x.unsqueeze(1)).squeeze(1),
    "transposed": lambda m, x, kept: m.act((m.fc.weight @ x.T).T),
}
DIVERGED = 100
FAILED = ("wrong", "another error")
KINDS = tuple(dict.fromkeys((*RUN, *LAYERS)))


class Network(nn.Module):
    def __init__(self, kinds: list[str], rng: random.Random) -> None:
        super().__init__()
        self.pieces, self.keep = nn.ModuleList(Piece(kind, rng) for kind in kinds), rng.choice((1, 2, 3))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        kept = x
        for index, piece in enumerate(self.pieces):
            after = piece(x, kept)
            if index % self.keep == 0:
                kept = x
            x = after
        return self.head(x)  # type: ignore[no-any-return]


def per_sample(outputs: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(outputs, targets, reduction="none") + 0.01 * outputs.square().sum(1)


LOSSES: tuple[tuple[Any, bool], ...] = (
    (nn.CrossEntropyLoss(), True), (nn.CrossEntropyLoss(reduction="sum"), True),
    (nn.CrossEntropyLoss(label_smoothing=0.1), True), (nn.MSELoss(), False), (nn.SmoothL1Loss(), False),
    (per_sample, True),
)  # fmt: skip
CHOICES: dict[str, tuple[Any, ...]] = {
    "feedback": (True, True, True, "open", False, False, False),
    "rollout": (None, None, "linear", "nonlinear"),
    "coupling": ("full", "full", "full", 2, "block"),
    "recursion": ("levenberg", "levenberg", "levenberg", "levenberg", "substituted", "printed"),
    "terminal": (None, None, "gradient", "geometric", Geometric(aim=0.3), "ggn", MonteCarlo(2)),
    "memory": ("keep", "keep", "recompute"),
    "schedule": ("asap", "alap", "sequential"),
    "cooperative": (None, None, False, True),
    "inertia": (None, None, 0.0, 0.5),
    "max_step": (None, None, None, 0.5),
    "max_grad_norm": (None, None, None, 0.3),
    "line_search": (None, None, None, (0.5, 1.0)),
    "feedback_clip": (1.0, 0.3, None),
    "weight_decay": (0.0, 0.0, 0.1),
}
METHODS: tuple[dict[str, Any], ...] = (
    {"curvature": "sgd"}, {"curvature": "sgd", "momentum": 0.9, "nesterov": True}, {"curvature": "adam"},
    {"curvature": "adam", "amsgrad": True}, {"curvature": "adamw"}, {"curvature": "rmsprop", "momentum": 0.5},
    {"curvature": "rmsprop", "centered": True}, {"curvature": "adagrad"}, {"curvature": "kfac"},
    {"curvature": "ekfac"}, {"curvature": "foof"},
)  # fmt: skip


@dataclass
class Case:
    model: Network
    loss: Any
    options: dict[str, Any]
    sizes: tuple[int, int]
    classes: bool
    said: str
    steps: int = 2

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        source, size = torch.Generator().manual_seed(step), self.sizes[step]
        x = torch.randn(size, WIDTH, generator=source, dtype=torch.float64)
        wanted = torch.randn(size, CLASSES, generator=source, dtype=torch.float64)
        return x, torch.randint(CLASSES, (size,), generator=source) if self.classes else wanted


def drawn(seed: int) -> Case:
    """The case of a seed."""
    rng = random.Random(seed)
    kinds = [rng.choice(KINDS) for _ in range(rng.randint(1, 5))]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Network(kinds, rng).double().train(rng.random() < 0.7)
    if rng.random() < 0.2:
        rng.choice(list(model.pieces)).requires_grad_(False)
    options = {name: rng.choice(values) for name, values in CHOICES.items()}
    options |= rng.choice(METHODS) | {"lr": rng.choice((0.01, 0.1))}
    if rng.random() < 0.9:
        _reconcile(options)
    loss, classes = rng.choice(LOSSES)
    if options["inertia"] and seed % 2:
        options["lookahead"] = 0.5
    if options["inertia"] and options["rollout"] != "nonlinear" and options["line_search"] is None and seed % 4 < 2:
        options["averaging"] = 1.0
    size = rng.randint(1, 6)
    said = f"seed {seed}: {kinds}, training={model.training}, {options}, {loss}"
    return Case(model, loss, options, (size, rng.choice((size, 5))), classes, said)


def _reconcile(options: dict[str, Any]) -> None:
    """Without what excludes each other."""
    own = options["recursion"] != "levenberg"
    if own or options["coupling"] == "block":
        options.update(recursion="substituted", coupling="block", cooperative=None)
    joint = options["feedback"] is True and not own and options["coupling"] != "block"
    linear = joint and options["rollout"] != "nonlinear"
    rank_one = options["terminal"] in (None, "gradient") or isinstance(options["terminal"], Geometric)
    if not joint:
        options["rollout"] = None
    if not joint or options.get("momentum") or options["curvature"] in ("adam", "adamw"):
        options["inertia"] = None
    if not linear or not rank_one:
        options["max_step"] = None
    if not (linear or options["feedback"] is False) or options["memory"] == "recompute":
        options["max_grad_norm"] = None


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Attributes:
        kind: ``"as torch.optim"``, ``"as the dense derivation"``, ``"its loss and draws"`` (no reference takes
            these options), ``"refused"``, ``"not finite"``, ``"wrong"`` or ``"another error"``.
        said: the remedy, or what is wrong.
    """

    kind: str
    said: str = ""


def outcome(seed: int) -> Outcome:
    """What became of a case."""
    case = drawn(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _outcome(case)
        except NonFiniteError as error:
            return Outcome("not finite", str(error))
        except CompileError as error:
            return Outcome("refused", error.remedy)
        except AssertionError as error:
            return Outcome("wrong", f"{case.said}: {error}")
        except Exception as error:  # that is what is looked for
            return Outcome("another error", f"{case.said}: {type(error).__name__}: {error}")


def _outcome(case: Case) -> Outcome:
    model, plain = copy.deepcopy(case.model), copy.deepcopy(case.model)
    opt = _compiled(model, case)
    losses = _steps(opt, model, case, [_follow(plain, case)])
    if losses[-1] > DIVERGED * (1 + losses[0]):  # of large numbers rounding alone is left
        return _outcome(replace(case, steps=1))
    options = {**case.options, "memory": "keep"}
    ours = CHOICES.keys() - {"weight_decay"} | {"lookahead", "averaging"}
    own = {name: value for name, value in options.items() if name not in ours}
    method = own.pop("curvature")
    if case.options["feedback"] is False and method in TORCH and not case.options["cooperative"]:
        if case.options["line_search"] is not None:
            return Outcome("its loss and draws")
        _compare(case, model, _torchs(case, TORCH[method], own))
        return Outcome("as torch.optim")
    twin = copy.deepcopy(case.model)
    try:
        dense = _compiled(twin, case, backend="dense", memory="keep", max_grad_norm=None)
        if case.options["max_grad_norm"] is not None:
            return Outcome("its loss and draws")
        _steps(dense, twin, case, [])
    except CompileError:
        return Outcome("its loss and draws")
    _compare(case, model, twin)
    return Outcome("as the dense derivation")


def _compiled(model: nn.Module, case: Case, **other: Any) -> CompiledOptimizer:
    exact = {"gram": "exact"} if other.get("backend") != "dense" else {}
    return compile_optimizer(model, case.batch(0)[0], loss=case.loss, **{**case.options, **exact, **other})


def _total(case: Case, outputs: Tensor, targets: Tensor) -> Tensor:
    return case.loss(outputs, targets).mean()  # type: ignore[no-any-return]


def _follow(plain: nn.Module, case: Case) -> Callable[[CompiledOptimizer, nn.Module, int], tuple[Tensor, Tensor]]:
    """The model's own pass before a step: loss, random state after it; buffers are left in ``plain``. Targets of
    several numbers are looked at from where look-ahead leads.
    """

    def passed(opt: CompiledOptimizer, model: nn.Module, step: int) -> tuple[Tensor, Tensor]:
        plain.load_state_dict(model.state_dict())
        x, y = case.batch(step)
        if not case.classes:
            _lead(opt, model, plain)
        torch.manual_seed(step)
        with torch.no_grad():
            value = _total(case, plain(x), y)
        return value, torch.get_rng_state()

    return passed


def _lead(opt: CompiledOptimizer, model: nn.Module, plain: nn.Module) -> None:
    (mu,) = {group.get("lookahead", 0.0) for group in opt.param_groups}
    for known, other in zip(model.parameters(), plain.parameters(), strict=True):
        state = opt.state.get(known, {})
        if mu and "last_step" in state:
            other.data += min(mu, float(state["taken"]) / (float(state["taken"]) + 3)) * state["last_step"]


def _steps(opt: CompiledOptimizer, model: nn.Module, case: Case, watched: list[Any]) -> list[float]:
    losses = []
    for step in range(case.steps):
        found = [follow(opt, model, step) for follow in watched]
        torch.manual_seed(step)
        loss = opt.step(*case.batch(step))
        for value, state in found:
            torch.testing.assert_close(loss, value, rtol=1e-9, atol=1e-9, msg="the loss is another")
            sampled = isinstance(case.options["terminal"], MonteCarlo)  # whose columns are drawn
            assert sampled or torch.equal(torch.get_rng_state(), state), "it draws another number of random numbers"
        losses.append(float(loss))
    return losses


def _torchs(case: Case, kind: Any, own: dict[str, Any]) -> nn.Module:
    plain = copy.deepcopy(case.model)
    theirs = kind([p for p in plain.parameters() if p.requires_grad], **own)
    for step in range(case.steps):
        x, y = case.batch(step)
        torch.manual_seed(step)
        theirs.zero_grad()
        _total(case, plain(x), y).backward()
        if case.options["max_grad_norm"] is not None:
            nn.utils.clip_grad_norm_(plain.parameters(), case.options["max_grad_norm"])
        theirs.step()
    return plain


def _compare(case: Case, found: nn.Module, expected: nn.Module) -> None:
    """All values are the same, as far as they are determined: rounding errors of the parameters may grow on the way."""
    moved = copy.deepcopy(case.model)
    with torch.no_grad():
        for p in moved.parameters():
            p.mul_(1 + 1e-11 * torch.randn_like(p))
    far, nothing = False, 1e-6 if case.options["curvature"] == "ekfac" else 1e-8  # whose eigenvectors are less certain
    theirs = expected.state_dict()
    for name, value in found.state_dict().items():
        if not torch.allclose(value, theirs[name], rtol=1e-7, atol=nothing):
            if not far:
                _steps(_compiled(moved, case), moved, case, [])
                far = True
            error, rounding = ((value - other[name]).norm() for other in (theirs, moved.state_dict()))
            assert error < 10 * rounding, f"{name}: {float(error)} off, where rounding does {float(rounding)}"
