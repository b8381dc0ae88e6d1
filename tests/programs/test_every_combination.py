"""curvature × terminal × coupling × schedule on coalitions of 2, 3 and 4 players: equal, or refused.

Of the linear rollout the whole product is enumerated, with inertia on one number of players for every curvature and
terminal; of the nonlinear one (recursions and couplings) every form on every number of players, with three of the four
schedules. A combination has one of two outcomes: the generated program equals the derivation executed with explicit
matrices to 1e-9, or both backends refuse it with a CompileError that names the options.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompileError, MonteCarlo, compile_optimizer
from support.networks import Case, make

CURVATURES: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.5, "momentum": 0.5, "weight_decay": 0.05},
    "rmsprop": {"lr": 2e-2},
    "adam": {"lr": 2e-2},
    "adamw": {"lr": 2e-2, "weight_decay": 0.1},
    "kfac": {"lr": 0.1, "damping": 1e-2},
    "ekfac": {"lr": 0.1, "damping": 5e-2},
    "foof": {"lr": 0.1, "damping": 0.1},
}
FORGETFUL: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.0}, "adam": {"betas": (0.0, 0.999)}, "adamw": {"betas": (0.0, 0.999)},
}  # fmt: skip
"""Without a momentum of the base method's own, which is refused beside inertia."""
TERMINALS: dict[str, Any] = {"geometric": "geometric", "gradient": "gradient", "ggn": "ggn", "mc": MonteCarlo(1)}
COUPLINGS: tuple[Any, ...] = ("full", 3, "block")
RECURSIONS = ("levenberg", "substituted", "printed")
PLAYERS = (2, 3, 4)


def beside(players: int) -> Case:
    """``b(tanh(a(x)))`` beside ``players - 1`` mappings of x, which decide with a ("asap"), with b ("alap") or alone.

    x comes from a layer too: the value Hessian that the last stage leaves is read by one whose state has changed.
    One mapping is a gate (Theorem 3); three mappings are a gate and two that are added (Corollary 7), two are added.
    """

    def forward(net: nn.Module, x: Tensor) -> Tensor:
        x = torch.tanh(net.stem(x))
        parts = [getattr(net, f"p{k}")(x) for k in range(players - 1)]
        y: Tensor = net.b(torch.tanh(net.a(x)))
        if players != 2:
            y = y + parts[-1] + parts[-2]
        return y if players == 3 else y * torch.sigmoid(parts[0])

    mappings: dict[str, Any] = {f"p{k}": (2, 3) for k in range(players - 1)}
    return Case(make(forward, stem=(2, 2), a=(2, 2, players != 2), b=(2, 3), **mappings), (2,), {})


def schedules(players: int) -> list[Any]:
    """Every schedule, with coalitions of 2, 3 and 4 early or late, split in two, or one player a stage."""
    split = {"stem": 0, "a": 1, "p0": 1, "b": 2, **{f"p{k}": 2 for k in range(1, players - 1)}}
    return ["asap", "alap", "sequential", split]


def refusal(coupling: Any, recursion: str) -> str | None:
    """What the refusal of a combination has to say; ``None``: it is allowed."""
    if recursion != "levenberg" and coupling != "block":
        return rf"recursion '{recursion}'.*coupling '(full|groups)'"
    return None


def coalitions(players: int, schedule: Any) -> list[frozenset[str]]:
    """Who decides with a and who with b, by hand."""
    mappings = [f"p{k}" for k in range(players - 1)]
    early = {"asap": mappings, "alap": [], "sequential": []}.get(str(schedule), mappings[:1])
    late = [] if schedule == "sequential" else [name for name in mappings if name not in early]
    return [frozenset(["a", *early]), frozenset(["b", *late])]


def trained(case: Case, backend: Any, options: dict[str, Any]) -> tuple[Tensor, Any]:
    """All parameters after a step with a batch of 4, with inertia after two."""
    model = copy.deepcopy(case.model)
    opt = compile_optimizer(model, case.batch(0, 4)[0], loss=nn.CrossEntropyLoss(), backend=backend, **options)
    torch.manual_seed(3)
    for step in range(2 if options.get("inertia") else 1):
        opt.step(*case.batch(step, 4))
    return torch.cat([p.detach().flatten() for p in model.parameters()]), opt


def chosen(curvature: str, terminal: str, players: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The combinations that are allowed, and those that are refused."""
    found: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([], [])
    turn = list(CURVATURES).index(curvature) + list(TERMINALS).index(terminal)
    plain = {"curvature": curvature, "terminal": TERMINALS[terminal], **CURVATURES[curvature]}
    for coupling, schedule in itertools.product(("full", 3), schedules(players)):
        own = {"coupling": coupling, "schedule": schedule, "rollout": "linear"}
        found[0].append({**plain, **own, "inertia": 0.0})
        if turn % 3 == players - 2:
            found[0].append({**plain, **own, **FORGETFUL.get(curvature, {}), "inertia": 0.9})
    for form, (coupling, recursion) in enumerate(itertools.product(COUPLINGS, RECURSIONS)):
        own = {"coupling": coupling, "recursion": recursion, "rollout": "nonlinear", "inertia": 0.0}
        some = schedules(players)
        some = some if refusal(coupling, recursion) else [some[(form + turn + players) % 4]]
        found[refusal(coupling, recursion) is not None].extend({**plain, **own, "schedule": one} for one in some)
    return found


@pytest.mark.parametrize("players", PLAYERS)
@pytest.mark.parametrize("terminal", TERMINALS)
@pytest.mark.parametrize("curvature", CURVATURES)
def test_every_combination(curvature: str, terminal: str, players: int) -> None:
    case = beside(players)
    start = torch.cat([p.detach().flatten() for p in case.model.parameters()])
    allowed, refused = chosen(curvature, terminal, players)
    for options in refused:
        for backend in ("fast", "dense"):
            with pytest.raises(CompileError, match=refusal(options["coupling"], options["recursion"])):
                trained(case, backend, options)
    for options in allowed:
        fast, opt = trained(case, "fast", options)
        dense, _ = trained(case, "dense", options)
        found = {frozenset(stage.players) for stage in opt.graph.stages if len(stage.players) > 1}
        assert found == {names for names in coalitions(players, options["schedule"]) if len(names) > 1}
        assert (fast - start).abs().max() > 1e-4, options
        assert (fast - dense).abs().max() < 1e-9, options
        assert opt.program.form.name == "joint" or options["rollout"] == "nonlinear"
    assert len(allowed) in (8 + 5, 2 * 8 + 5) and len(refused) == 4 * len(schedules(players))


def test_what_is_chosen() -> None:
    """Inertia once for every curvature, terminal, coupling and schedule; every other form under every schedule."""
    found = [
        (curvature, terminal, str(options["coupling"]), options.get("recursion"), index, options["inertia"])
        for curvature, terminal, players in itertools.product(CURVATURES, TERMINALS, PLAYERS)
        for options in chosen(curvature, terminal, players)[0]
        for index, schedule in enumerate(schedules(players))
        if schedule == options["schedule"]
    ]
    product = len(CURVATURES) * len(TERMINALS)
    assert len(found) == len([one for one in found if not one[-1]]) + product * 8
    assert len({one for one in found if one[3] is None}) == product * 8 * 2
    assert len({(one[0], *one[2:]) for one in found if one[3] is not None}) == len(CURVATURES) * 5 * 4


def test_the_product_has_coalitions_of_every_size_and_both_kinds_of_cross_terms() -> None:
    """What the enumeration covers: one shared block, one joint block, and both in the same stage."""
    found = {}
    for players in PLAYERS:
        case = beside(players)
        opt = compile_optimizer(case.model, case.batch(0, 4)[0], loss=nn.CrossEntropyLoss(), curvature="ekfac")
        found[players] = [
            sorted((b.kind, len(b.players)) for b in stage.blocks) for stage in opt.program.derived.stages
        ]
    assert found == {
        2: [[("kronecker", 1)], [("kronecker", 2)], [("kronecker", 1)]],
        3: [[("kronecker", 1)], [("kronecker", 1), ("shared", 2)], [("kronecker", 1)]],
        4: [[("kronecker", 1)], [("kronecker", 2), ("shared", 2)], [("kronecker", 1)]],
    }
