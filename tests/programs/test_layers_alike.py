"""Small layers of one shape are one product in the joint step: what each alone would have been."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gtddp_compile import CompiledOptimizer, Geometric, UpdateProgram, compile_optimizer
from gtddp_compile.lowering import decide
from gtddp_compile.methods.curvature import foof, kfac
from support.compared import assert_equal, assert_exported, assert_union, flat, train
from support.networks import Case

WIDTH, BATCH = 4, 6
SQUARES = nn.MSELoss()
AIM = Geometric(0.3, reach=0.1, early=1.0)
SETUPS: dict[str, dict[str, Any]] = {
    "the default": {},
    "foof": {"curvature": "foof", "inertia": 0.9, "lookahead": 0.0, "terminal": AIM},
    "kfac": {"curvature": "kfac", "lr": 0.1, "damping": 1e-2, "cooperative": False},
    "kfac, inertia, groups": {
        "curvature": "kfac",
        "lr": 0.1,
        "damping": 1e-2,
        "cooperative": False,
        "inertia": 0.9,
        "coupling": 2,
    },
    "look-ahead": {"curvature": "foof", "inertia": 0.9, "lookahead": 0.7},
    "momentum, capped": {"curvature": "foof", "momentum": 0.5, "max_step": 0.1},
    "sum": {"curvature": "foof", "loss": nn.MSELoss(reduction="sum"), "inertia": 0.5},
}


OTHERS: tuple[dict[str, Any], ...] = (
    {"rollout": "nonlinear"}, {"feedback": False}, {"weight_decay": 0.1}, {"max_grad_norm": 1.0}, {"curvature": "sgd"},
    {"memory": "recompute"}, {"terminal": "ggn"},
)  # fmt: skip
"""Under which every layer is computed alone."""


class Deep(nn.Module):
    """Layers of two shapes in turns, with and without bias, over shortcuts; two of them decide together."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, WIDTH)
        self.square = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.bare = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        for index, layer in enumerate(self.square[:2]):
            x = x + torch.tanh(layer(x)) * torch.sigmoid(self.bare[index](x))
        return self.last(torch.tanh(self.square[2](x)) - torch.relu(self.square[3](x)))


def case(model: Callable[[], nn.Module] = Deep) -> Case:
    def batch(seed: int, size: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return tuple(torch.randn(size, n, generator=generator, dtype=torch.float64) for n in (3, 2))

    torch.manual_seed(0)
    return Case(model().double(), loss=SQUARES, draw=batch)


def groups(program: UpdateProgram) -> list[set[str]]:
    return [{player.name for player in group} for group in program.lowered.plan.alike]


def alone(monkeypatch: pytest.MonkeyPatch, *args: Any, **options: Any) -> Any:
    with monkeypatch.context() as patched:
        patched.setattr(decide, "TOGETHER", 0)
        run = train(*args, **options)
    assert not groups(run.optimizer.program)
    return run


@pytest.mark.parametrize("setup", SETUPS)
def test_each_is_what_it_is_alone(setup: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    options = {"loss": SQUARES} | SETUPS[setup]
    run = assert_equal(case(), steps=3, **options)
    apart = alone(monkeypatch, case(), 3, **options)
    assert len(groups(run.optimizer.program)) == 2
    torch.testing.assert_close(run.parameters, apart.parameters, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        dict(run.optimizer.diagnostics), dict(apart.optimizer.diagnostics), rtol=1e-8, atol=1e-12
    )
    assert run.optimizer.diagnostics["open_norm"].keys() == {player.name for player in run.optimizer.graph.players}
    for mine, other in zip(run.model.parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(run.optimizer.state[mine], apart.optimizer.state[other], rtol=0, atol=1e-12)
    assert_exported(case(), run, tmp_path)


def differ(opt: CompiledOptimizer) -> None:
    """Options of their own for some of the layers that are alike."""
    for index, group in enumerate(opt.param_groups):
        group["lr"] *= 1.0 + index / 7
        group["damping"] *= 2.0 if index % 2 else 1.0
        group["inertia"] = (0.9, 0.5, 0.0)[index % 3]


@pytest.mark.parametrize("lookahead", [0.0, 0.7])
def test_options_of_their_own(lookahead: float, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for together in (decide.TOGETHER, 0):
        for backend in ("fast", "dense") if together else ("fast",):
            monkeypatch.setattr(decide, "TOGETHER", together)
            given, options = case(), {"curvature": "foof", "inertia": 0.9, "lookahead": lookahead, "backend": backend}
            opt = compile_optimizer(given.model, given.batch(0, BATCH)[0], loss=SQUARES, **options)
            differ(opt)
            for step in range(4):
                opt.step(*given.batch(step, BATCH))
            found.append(flat(given.model))
    torch.testing.assert_close(found[0], found[2], rtol=0, atol=1e-12)
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-9)


@pytest.mark.parametrize("setup", ["foof", "kfac", "look-ahead", "sum"])
def test_micro_batches(setup: str) -> None:
    assert_union(case(), BATCH // 2, **{"loss": SQUARES} | SETUPS[setup])


def test_which_layers() -> None:
    def found(change: Any = None, **options: Any) -> list[set[str]]:
        given = case()
        if change is not None:
            change(given.model)
        options = {"curvature": "foof", "loss": SQUARES} | options
        return groups(compile_optimizer(given.model, given.batch(0, BATCH)[0], **options).program)

    square, bare = {f"square.{k}" for k in range(4)}, {"bare.0", "bare.1"}
    assert sorted(map(sorted, found())) == sorted(map(sorted, (square, bare)))
    frozen = found(lambda m: m.square[1].bias.requires_grad_(False))  # which is of the shape of those without then
    assert sorted(map(sorted, frozen)) == sorted(map(sorted, (square - {"square.1"}, bare | {"square.1"})))
    assert found(lambda m: setattr(m.bare[1], "weight", m.bare[0].weight)) == [square]  # one weight, used twice
    for options in OTHERS:
        assert not found(**options), options


def test_large_layers_are_computed_alone() -> None:
    model = nn.Sequential(*(nn.Linear(256, 256) for _ in range(3)))
    for batch, together in ((128, True), (129, False)):
        program = compile_optimizer(copy.deepcopy(model), torch.zeros(batch, 256), loss=SQUARES).program
        assert bool(groups(program)) == together
        assert ("one product with 2 alike" in program.cost()) == together


def test_the_program_does_not_grow_with_the_layers() -> None:
    """Only their own forward and backward lines do."""
    lines = []
    for depth in (4, 8):
        model = nn.Sequential(*(part for _ in range(depth) for part in (nn.Linear(WIDTH, WIDTH), nn.Tanh())))
        program = compile_optimizer(model, torch.zeros(BATCH, WIDTH), loss=SQUARES).program
        lines.append([one for one in program.lowered.instructions if one.phase in ("backward", "joint")])
    assert len(lines[1]) - len(lines[0]) == 4 * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are float32, and without the scale of the gradients."""
    found = []
    for together in (decide.TOGETHER, 0):
        monkeypatch.setattr(decide, "TOGETHER", together)
        given = case()
        x, y = (part.to(dtype) for part in given.batch(0, BATCH))
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0) if dtype == torch.float16 else None
        opt = compile_optimizer(given.model.to(dtype), x, loss=SQUARES, grad_scaler=scaler)
        losses = [float(opt.step(x, y)) for _ in range(3)]
        found.append(losses)
    torch.testing.assert_close(*found, rtol=2e-2, atol=0)
    assert found[0][-1] < found[0][0]


class Named(nn.Module):
    """A layer with any name, whose value is read by one of another group and by one that is computed alone."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.entry, self.last, self.norm = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2), nn.LayerNorm(WIDTH)
        self.add_module(name, nn.Linear(WIDTH, WIDTH))
        self.name, self.square = name, nn.Linear(WIDTH, WIDTH)
        self.bare = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        first = x = self.get_submodule(self.name)(self.entry(x))
        for layer in (*self.bare, self.square):
            x = torch.tanh(layer(x))
        return self.last(x * self.norm(first))


@pytest.mark.parametrize("name", ["alike_0", "x_alike_0", "coordinates_alike_0", "information", "y_2", "lambda"])
def test_modules_named_as_variables_of_the_program(name: str) -> None:
    given = case(lambda: Named(name))
    run = assert_equal(given, steps=2, loss=SQUARES, curvature="foof", inertia=0.5, lookahead=0.0)
    assert len(groups(run.optimizer.program)) == 2


@pytest.mark.parametrize("curvature", ["foof", "kfac"])
def test_statistics_out_of_step(curvature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers whose averages are of different ages, as loaded states may be, are observed each for itself."""
    found = []
    for together in (decide.TOGETHER, 0):
        monkeypatch.setattr(decide, "TOGETHER", together)
        given, options = case(), {"curvature": curvature, "lr": 0.1, "cooperative": False, "refresh": 3}
        opt = compile_optimizer(given.model, given.batch(0, BATCH)[0], loss=SQUARES, **options)
        for step in range(9):
            opt.step(*given.batch(step, BATCH))
            if step == 2:
                state = opt.state[given.model.square[1].weight]
                state["age"] = state["age"] + 1.0
        found.append([flat(given.model), *(opt.state[p] for p in given.model.parameters())])
    torch.testing.assert_close(*found, rtol=0, atol=1e-12)


class Halved(nn.Module):
    """Layers alike, of which one reads small numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = nn.Linear(3, WIDTH), nn.ModuleList(nn.Linear(WIDTH, WIDTH, False) for _ in range(3))
        self.last = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        one, two, three = self.layers
        return self.last(torch.tanh(three(torch.tanh(one(x)))) + two(x * 0.01))


def test_a_factor_that_has_no_inverse(monkeypatch: pytest.MonkeyPatch) -> None:
    """It alone is raised, and counted."""

    def small(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
        made, _ = kfac.inverse(factor, damping)
        failed = factor.diagonal(dim1=1, dim2=2).mean(1) < 1e-3
        return torch.where(failed.any(), made * 2.0, made), failed.any().double()

    monkeypatch.setattr(foof, "inverse", small)
    options = {"curvature": "foof", "loss": SQUARES}
    together = train(case(Halved), 3, **options)
    apart = alone(monkeypatch, case(Halved), 3, **options)
    assert groups(together.optimizer.program) == [{"layers.0", "layers.1", "layers.2"}]
    for mine, other in zip(together.model.parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(together.optimizer.state[mine], apart.optimizer.state[other], rtol=0, atol=1e-9)
    counts = [together.optimizer.state[layer.weight]["fallbacks"] for layer in together.model.layers]
    assert [float(count) for count in counts] == [0.0, 3.0, 0.0]
